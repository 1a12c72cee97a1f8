"""What hyper-connections and routing launch: what a layer does before and after its sub-layers (kernels/products.py,
kernels/hyper_connections.py, kernels/route.py).

Both begin with a product of a token with a matrix of few rows. Many programs compute it in parts, which a second launch adds: in
one launch, one multiprocessor would read the whole matrix for each token, and the others would wait. Tiles and parts do not depend
on the number of tokens. The figures are reckoned, not measured.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ..export.contract.weights import PLAIN_FORMATS, WEIGHT_FORMAT, WEIGHT_TYPES
from .plans import Argument, Kernel, Launch, Plan

#: Channels that one program multiplies. V4-Flash's hyper-connections have 64 parts, its routing 16 in each of 8 blocks of experts.
PRODUCT_SPAN = 256
#: Channels of the streams that one program mixes; a token of V4-Flash has 16 programs.
MIX_CHANNELS = 256
#: Tokens and rows of the matrix in a product's tile, and channels of one step.
_TOKENS, _ROWS, _STEP = 16, 32, 64
#: Channels of the chosen experts' rows that a program of FoldkvRouteHashed reads at once.
_ROW_CHANNELS = 512
_POINTERS = {"float32": "*fp32", "bfloat16": "*bf16"}
_ITEM = 4  # bytes of a float32 in the workspace
_Constants = dict[str, int | float | str]


def around_sublayer(operator: str, sizes: Mapping[str, int], attributes: Mapping[str, Any]) -> Plan:
    """The launches of a call; see ``launch.plan``."""
    return SUBLAYER_PLANS[operator](sizes, attributes)


def sublayer_faults(sizes: Mapping[str, int], attributes: Mapping[str, Any]) -> list[str]:
    """Why no kernel takes a call: every broken rule, or nothing."""
    wrong = []
    if (count := sizes.get("N", 1)) & (count - 1):
        wrong.append(f"{count} streams; expected a power of two")
    if "J" in sizes:
        given, expected = (sizes["J"], sizes["NC"]), ((2 + count) * count, count * sizes["C"])
        if given != expected:
            wrong.append(f"weights {given} for {count} streams of {sizes['C']} channels; expected {expected}")
    if WEIGHT_FORMAT in attributes:
        if (stored := attributes[WEIGHT_FORMAT]) not in PLAIN_FORMATS:
            wrong.append(f"a gate in {stored}; its kernels read {', '.join(PLAIN_FORMATS)}")
        if (places := attributes["topk"] if "topk" in attributes else sizes["K"]) > sizes["X"]:
            wrong.append(f"{places} chosen of {sizes['X']} experts")
    return wrong


def _pre(sizes: Mapping[str, int], attributes: Mapping[str, Any]) -> Plan:
    tokens, channels, width = sizes["B"] * sizes["S"], sizes["C"], sizes["NC"]
    first, workspace = _product(tokens, sizes["J"], width, "*fp32", squares=True)
    parts = _cdiv(width, PRODUCT_SPAN)
    constants: _Constants = {
        "N": sizes["N"], "D": channels, "PARTS": parts, "BP": _power(parts), "BC": MIX_CHANNELS,
        "NORM_EPS": attributes["norm_eps"], "EPS": attributes["eps"], "ITERATIONS": attributes["iterations"],
    }  # fmt: skip
    given = {
        "streams": Argument("input", 0), "partial": Argument("workspace", 0), "base": Argument("input", 2),
        "scale": Argument("input", 3), "tokens": Argument("int32", tokens), "x": Argument("output", 0),
        "post": Argument("output", 1), "comb": Argument("output", 2),
    }  # fmt: skip
    grid = (tokens, _cdiv(channels, MIX_CHANNELS), 1)
    return Plan((first, _launch("hyper_connections.hc_pre", grid, given, constants)), workspace)


def _post(sizes: Mapping[str, int], attributes: Mapping[str, Any]) -> Plan:
    given = {name: Argument("input", i) for i, name in enumerate(("streams", "out", "post", "comb"))}
    given["mixed"] = Argument("output", 0)
    constants: _Constants = {"N": sizes["N"], "D": sizes["C"], "BC": MIX_CHANNELS}
    grid = (sizes["B"] * sizes["S"], _cdiv(sizes["C"], MIX_CHANNELS), 1)
    return Plan((_launch("hyper_connections.hc_post", grid, given, constants),))


def _route(sizes: Mapping[str, int], attributes: Mapping[str, Any]) -> Plan:
    tokens, experts, places = sizes["M"], sizes["X"], attributes["topk"]
    first, workspace = _product(tokens, experts, sizes["C"], _gate_pointer(attributes), squares=False)
    constants: _Constants = {
        "X": experts, "K": places, "PARTS": _cdiv(sizes["C"], PRODUCT_SPAN), "BX": _power(experts), "BK": _power(places),
        "SCALING": attributes["scaling"],
    }  # fmt: skip
    given = {
        "partial": Argument("workspace", 0), "bias": Argument("input", 2), "tokens": Argument("int32", tokens),
        "chosen": Argument("output", 0), "weights": Argument("output", 1),
    }  # fmt: skip
    return Plan((first, _launch("route.route", (tokens, 1, 1), given, constants, chosen="*i64")), workspace)


def _route_hashed(sizes: Mapping[str, int], attributes: Mapping[str, Any]) -> Plan:
    """One launch: the experts are known, and their rows are few."""
    places, channels = sizes["K"], sizes["C"]
    constants: _Constants = {
        "K": places, "D": channels, "BK": _power(places), "BC": min(_ROW_CHANNELS, _power(channels)),
        "SCALING": attributes["scaling"],
    }  # fmt: skip
    given = {name: Argument("input", i) for i, name in enumerate(("x", "weight", "tid2eid", "input_ids"))}
    given |= {"chosen": Argument("output", 0), "weights": Argument("output", 1)}
    types = {"weight": _gate_pointer(attributes)} | dict.fromkeys(("tid2eid", "input_ids", "chosen"), "*i64")
    return Plan((_launch("route.route_hashed", (sizes["M"], 1, 1), given, constants, warps=8, **types),))


def _product(tokens: int, rows: int, width: int, weight: str, *, squares: bool) -> tuple[Launch, int]:
    """The product of the first two inputs in parts, at the start of the workspace, and the bytes that the parts take."""
    parts = _cdiv(width, PRODUCT_SPAN)
    constants: _Constants = {
        "M": rows, "K": width, "SQUARES": int(squares), "SPAN": PRODUCT_SPAN, "BT": _TOKENS, "BM": _ROWS, "BK": _STEP
    }  # fmt: skip
    given = {
        "x": Argument("input", 0), "weight": Argument("input", 1), "tokens": Argument("int32", tokens),
        "partial": Argument("workspace", 0),
    }  # fmt: skip
    grid = (parts, _cdiv(rows, _ROWS), _cdiv(tokens, _TOKENS))
    launch = _launch("products.partial_products", grid, given, constants, weight=weight)
    return launch, parts * tokens * (rows + squares) * _ITEM


def _launch(
    function: str, grid: tuple[int, int, int], given: Mapping[str, Argument], constants: _Constants, *, warps: int = 4,
    **types: str,
) -> Launch:  # fmt: skip
    """A launch with these arguments by name; pointers without a type are of float32."""
    declared = tuple((name, "i32" if one.kind == "int32" else types.get(name, "*fp32")) for name, one in given.items())
    return Launch(Kernel(function, declared, tuple(constants.items()), warps), grid, tuple(given.values()))


def _gate_pointer(attributes: Mapping[str, Any]) -> str:
    return _POINTERS[WEIGHT_TYPES[attributes[WEIGHT_FORMAT]]]


def _cdiv(size: int, of: int) -> int:
    return -(-size // of)


def _power(size: int) -> int:
    return 1 << (size - 1).bit_length()


SUBLAYER_PLANS: dict[str, Callable[[Mapping[str, int], Mapping[str, Any]], Plan]] = {
    "FoldkvHcPre": _pre, "FoldkvHcPost": _post, "FoldkvRoute": _route, "FoldkvRouteHashed": _route_hashed
}  # fmt: skip
