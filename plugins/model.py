"""Every kernel that a model's engines can launch, from its configuration alone: no graph, no GPU, no Triton."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from ..export.checkpoint.formats import FP4_GROUP, FP8_BLOCK
from ..export.contract.geometry import CSA, HCA, SLIDING, ModelSpec
from ..export.contract.layouts import LAYOUTS
from ..export.contract.operators import BLOCK_LINEAR, PACKED_EXPERTS, ROUTED_EXPERTS
from ..export.contract.products import Product, all_products
from ..export.contract.profiles import HF, SERVED
from ..export.contract.rows import DENSE
from ..export.contract.weights import (
    BFLOAT16,
    E2M1,
    EXPONENT,
    FLOAT32,
    PLAIN_FORMATS,
    SCALE_FORMAT,
    VALUES_PER_ELEMENT,
    WEIGHT_FORMAT,
)
from .launch import kernels
from .plans import Kernel

#: The form of the routed experts in released checkpoints.
RELEASED_EXPERTS = PACKED_EXPERTS[E2M1, EXPONENT]
#: Every form of them.
EXPERT_FORMS = (ROUTED_EXPERTS, *PACKED_EXPERTS.values())


class OperatorCall(NamedTuple):
    """A model's call of an operator: its static sizes, its attributes and the state group whose rows it touches, or "".

    The group of a product is the role of its weight within a layer; that of the routed experts is "experts".
    """

    operator: str
    group: str
    sizes: dict[str, int]
    attributes: dict[str, Any]


def operator_calls(
    spec: ModelSpec, profile: str = HF, experts: Sequence[str] = (RELEASED_EXPERTS,)
) -> list[OperatorCall]:
    """The different calls of operators in the model's layers, for a profile; weights are in the released formats.

    ``experts`` are the forms of the routed experts.
    """
    width, half = spec.head_dim, spec.rope_dim // 2
    attended = {"W": spec.sliding_window, "H": spec.num_heads, "D": width, "P": half}
    calls = [*_mixing(spec), *_routing(spec)]
    calls.append(OperatorCall("FoldkvWindowUpdate", "window", {"W": spec.sliding_window, "D": width}, {}))
    for kind, ratio in dict.fromkeys(zip(spec.layer_types, spec.ratios, strict=True)):
        attributes = {"ratio": ratio}
        if kind == SLIDING:
            calls.append(OperatorCall("FoldkvWindowAttention", "window", attended, {}))
        elif kind == HCA:
            calls += [
                _compress(spec, profile, "entries", ratio, online=True),
                OperatorCall("FoldkvDenseAttention", "entries", attended, attributes),
            ]
        elif kind == CSA:
            scored = {"H": spec.index_heads, "D": spec.index_head_dim}
            selected = {"ratio": ratio, "topk": spec.index_topk}
            calls += [
                _compress(spec, profile, "entries", ratio),
                _compress(spec, profile, "index_entries", ratio),
                OperatorCall("FoldkvIndexScores", "index_entries", scored, attributes),
                OperatorCall("FoldkvIndexSelect", "index_entries", {}, selected),
                OperatorCall("FoldkvSparseAttention", "entries", attended | {"K": spec.index_topk}, {}),
            ]
    calls += [product_call(product) for product in all_products(spec)]
    return [*calls, *(_experts(spec, form) for form in experts)]


def product_call(product: Product, block: tuple[int, int] = FP8_BLOCK) -> OperatorCall:
    """The call of a product with its weight in the released format; ``block`` is that of e4m3 weights."""
    plain = product.released == BFLOAT16
    height, width = (product.rows, product.columns) if plain else block
    sizes = {
        "GN": product.rows,
        "K": product.columns,
        "SN": -(-product.rows // height),
        "SK": -(-product.columns // width),
    }
    attributes = {
        "groups": product.groups, "block_rows": height, "block_columns": width, "terms": product.terms,
        WEIGHT_FORMAT: product.released, SCALE_FORMAT: FLOAT32 if plain else EXPONENT,
    }  # fmt: skip
    return OperatorCall(BLOCK_LINEAR, product.role, sizes, attributes)


def _experts(spec: ModelSpec, form: str) -> OperatorCall:
    """The routed experts; packed ones lie in a row as an export puts them, w1, w2 and w3 one after the other."""
    inner, hidden = spec.moe_intermediate_size, spec.hidden_size
    sizes = {"X": spec.num_experts, "K": spec.experts_per_token, "C": hidden, "I": inner}
    attributes: dict[str, Any] = {"limit": spec.swiglu_limit}
    if form == ROUTED_EXPERTS:
        return OperatorCall(form, "experts", sizes, attributes)
    [weight] = [weight for (weight, _), name in PACKED_EXPERTS.items() if name == form]
    block = (1, FP4_GROUP) if weight == E2M1 else FP8_BLOCK
    codes, scales, shapes, grids = [0], [0], list[int](), list[int]()
    for rows, columns in ((inner, hidden), (hidden, inner), (inner, hidden)):
        grid = (-(-rows // block[0]), -(-columns // block[1]))
        shapes += [rows, columns]
        grids += grid
        codes.append(codes[-1] + rows * columns // VALUES_PER_ELEMENT[weight])
        scales.append(scales[-1] + grid[0] * grid[1])
    del sizes["I"]
    sizes |= {"CODES": codes.pop(), "SCALES": scales.pop()}
    places = {"codes_at": codes, "scales_at": scales, "shapes": shapes, "grids": grids}
    return OperatorCall(form, "experts", sizes, attributes | {name: tuple(values) for name, values in places.items()})


def _mixing(spec: ModelSpec) -> list[OperatorCall]:
    count, width = spec.hc_mult, spec.hidden_size
    sizes = {"N": count, "C": width, "J": (2 + count) * count, "NC": count * width}
    attributes = {"norm_eps": spec.rms_norm_eps, "iterations": spec.hc_sinkhorn_iters, "eps": spec.hc_eps}
    return [
        OperatorCall("FoldkvHcPre", "", sizes, attributes),
        OperatorCall("FoldkvHcPost", "", {"N": count, "C": width}, {}),
    ]


def _routing(spec: ModelSpec) -> list[OperatorCall]:
    """With the gate in either format: a checkpoint decides, a configuration does not."""
    sizes, places = {"X": spec.num_experts, "C": spec.hidden_size}, spec.experts_per_token
    calls = []
    for weight_format in PLAIN_FORMATS:
        attributes = {"scaling": spec.routed_scaling_factor, WEIGHT_FORMAT: weight_format}
        if not all(spec.hash_layers):
            calls.append(OperatorCall("FoldkvRoute", "", sizes, {"topk": places, **attributes}))
        if any(spec.hash_layers):
            table = {"V": spec.vocab_size, "K": places}
            calls.append(OperatorCall("FoldkvRouteHashed", "", sizes | table, attributes))
    return calls


def _compress(spec: ModelSpec, profile: str, group: str, ratio: int, *, online: bool = False) -> OperatorCall:
    width = spec.head_dim if group == "entries" else spec.index_head_dim
    sizes = {"T": ratio, "D": width, "P": spec.rope_dim // 2}
    attributes: dict[str, Any] = {"ratio": ratio, "eps": spec.rms_norm_eps}
    operator = "FoldkvCompressOnline" if online else "FoldkvCompress"
    if not online:  # the rings of two series
        sizes |= {"R": 2 * ratio, "C": 2 * width}
    if profile != SERVED:
        return OperatorCall(operator, group, sizes, attributes)
    if group == "entries":
        return OperatorCall(f"{operator}Fp8", group, sizes, {"rope_dim": spec.rope_dim, **attributes})
    return OperatorCall(f"{operator}Fp4", group, sizes, attributes)


def model_kernels(
    spec: ModelSpec, *, sm: int, dtype: str = "bfloat16", layout: str = "dense", profile: str = HF
) -> list[Kernel]:
    """The different kernels of a model, in the order of its layers; of the routed experts those in the released form.

    Args:
        spec: of the model.
        sm: compute capability.
        dtype: type of dense rows of the state.
        layout: name of the cache layout, see export/contract/layouts.py.
        profile: of the graph, see export/contract/profiles.py.

    Raises:
        ValueError: sizes or row formats that the kernels cannot take.
    """
    found: dict[Kernel, None] = {}
    for operator, group, sizes, attributes in operator_calls(spec, profile):
        row_format = LAYOUTS[layout].format_of(group) or DENSE
        found |= dict.fromkeys(
            kernels(operator, sizes, attributes, sm=sm, dtype=dtype, row_format=row_format, rope_dim=spec.rope_dim)
        )
    return list(found)
