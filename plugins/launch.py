"""What an operator launches: kernels with their constants, grids and arguments. No Triton, no TensorRT.

Only this module and what it asks (launch_experts.py) know it. TensorRT's plugins, the compiler, the interpreter's tests and the benchmarks
all ask here, so the tests run what is launched.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from ..errors import InputError
from ..export.contract.operators import BLOCK_LINEAR, PACKED_EXPERTS, ROUTED_EXPERTS, TensorSpec, operator_spec
from ..export.contract.products import EXACT, ROUNDED
from ..export.contract.rows import DENSE, RowFormat, row_format_named
from ..export.contract.weights import BFLOAT16, E4M3, SCALE_FORMAT, WEIGHT_FORMAT
from .declarations import LAYOUT_VERSION, PLUGINS, PluginSpec
from .launch_experts import FEW_PAIRS, plan_experts
from .launch_sublayers import SUBLAYER_PLANS, around_sublayer, sublayer_faults
from .plans import Argument, Kernel, Launch, Plan

#: Sizes that change from call to call: batch, chunk, capacity in entries, and tokens of a product (batch times chunk).
#: Kernels are compiled for any of them.
DYNAMIC = ("B", "S", "E", "M")
#: Keys per split. Fixed, so a result depends neither on the batch nor on the capacity.
SPARSE_SPAN, DENSE_SPAN = 128, 256
#: Entries that one program scores: many, if enough programs remain to fill a GPU, because each program loads its query.
SCORE_SPANS, SCORE_PROGRAMS = (1024, 256), 192
#: For a selection: the fewest entries in a part, the most parts of a row, and the number of programs that fill a GPU.
SELECT_SPAN, SELECT_PARTS, SELECT_PROGRAMS = 2048, 64, 256
#: Chunks up to this length split their keys; longer ones have enough programs.
SPLIT_CHUNK = 8
#: Products with up to this many tokens only wait for their weights, so they read them with as many programs as a GPU runs.
FEW_TOKENS = 64
#: For a product with few tokens: rows and tokens of a tile, channels of a tile at most, the fewest channels of a program,
#: and the number of programs that fill a GPU.
LINEAR_ROWS, LINEAR_TOKENS, LINEAR_CHANNELS, LINEAR_SPAN, LINEAR_PROGRAMS = 64, 16, 64, 256, 512

_POINTER = {"float32": "*fp32", "int32": "*i32", "int64": "*i64", "bfloat16": "*bf16", "int8": "*i8"}
_ITEM = 4  # bytes of a float32 in the workspace
_INT32 = 2**31 - 1


def plan(
    operator: str,
    sizes: Mapping[str, int],
    attributes: Mapping[str, Any],
    *,
    sm: int,
    dtype: str,
    row_format: str = DENSE,
    rope_dim: int = 0,
    layout_version: int = LAYOUT_VERSION,
) -> Plan:
    """The launches for a call of ``operator``.

    Args:
        operator: ONNX name.
        sizes: of every symbol of the spec, see :meth:`PluginSpec.dimensions`.
        attributes: values of the operator's attributes.
        sm: compute capability, which determines the tiles.
        dtype: type of dense rows of the state.
        row_format: of the state that the operator touches.
        rope_dim: rotated channels of a row, which packed formats keep apart.
        layout_version: version of that format.

    Raises:
        ValueError: sizes, a row format or a layout version that the kernels cannot take.
    """
    spec = PLUGINS[operator]
    values = {name: _float32(value) if isinstance(value, float) else value for name, value in attributes.items()}
    call = _Call(spec, dict(sizes), values, sm, dtype, row_format, rope_dim)
    _check(call, layout_version)
    return _PLANS[operator](call)


def kernels(
    operator: str,
    sizes: Mapping[str, int],
    attributes: Mapping[str, Any],
    *,
    sm: int,
    dtype: str,
    row_format: str = DENSE,
    rope_dim: int = 0,
) -> list[Kernel]:
    """Every kernel that calls with these static sizes can launch, for any dynamic sizes; see :func:`plan`."""
    found: dict[Kernel, None] = {}
    for chunk, tokens in ((1, 1), (SPLIT_CHUNK + 1, max(FEW_TOKENS, FEW_PAIRS) + 1)):
        dynamic = {"B": 1, "S": chunk, "E": 1 << 20, "M": tokens}
        steps = plan(
            operator, {**sizes, **dynamic}, attributes, sm=sm, dtype=dtype, row_format=row_format, rope_dim=rope_dim
        )
        for launch in steps.launches:
            found[launch.kernel] = None
    return list(found)


def largest_workspace(
    operator: str,
    sizes: Mapping[str, int],
    attributes: Mapping[str, Any],
    *,
    sm: int,
    dtype: str,
    row_format: str = DENSE,
    rope_dim: int = 0,
    layout_version: int = LAYOUT_VERSION,
) -> int:
    """Bytes of scratch memory that are enough for all calls up to these sizes; see :func:`plan`.

    Short chunks split their work and need scratch memory; long chunks do not. So the largest chunk may not need the most.
    """
    limits = {symbol: limit for symbol, limit in (("S", SPLIT_CHUNK), ("M", FEW_TOKENS)) if symbol in sizes}
    short = {symbol: min(sizes[symbol], limit) for symbol, limit in limits.items()}
    options: dict[str, Any] = {
        "sm": sm,
        "dtype": dtype,
        "row_format": row_format,
        "rope_dim": rope_dim,
        "layout_version": layout_version,
    }
    return max(plan(operator, {**sizes, **chunk}, attributes, **options).workspace for chunk in ({}, short))


@dataclass(frozen=True)
class _Call:
    spec: PluginSpec
    sizes: dict[str, int]
    attributes: dict[str, Any]
    sm: int
    dtype: str
    row_format: str
    rope_dim: int

    def __getitem__(self, symbol: str) -> int:
        return self.sizes[symbol]

    def pointer(self, tensor: TensorSpec) -> str:
        return _POINTER[tensor.stored_type(self.attributes, rows="int8" if self.format.packed else self.dtype)]

    @property
    def format(self) -> RowFormat:
        """Of the rows."""
        return row_format_named(self.row_format)

    @property
    def values(self) -> RowFormat:
        """The format to whose values the operator rounds what it writes; dense if it does not round."""
        return row_format_named(operator_spec(self.spec.operator).rounds or DENSE)

    @property
    def mixes(self) -> bool:
        """Whether a Hadamard matrix mixes the channels before they are rounded."""
        return any(tensor.name == "hadamard" for tensor in self.spec.inputs)

    @property
    def turned(self) -> int:
        """Channels that a packed row keeps apart because RoPE turned them."""
        return self.format.kept(self.rope_dim)

    @property
    def row_size(self) -> int:
        """Elements of the state's pointer in a row: channels, or bytes."""
        width, format_ = self["D"], self.format
        return format_.row_bytes(width, self.turned) if format_.packed else width

    @property
    def row(self) -> dict[str, int | str]:
        """How a row of the state is stored, as constants."""
        return {"ROW": self.row_size, "ROTARY": self.turned, "FORMAT": self.row_format}

    def launch(
        self, function: str, grid: tuple[int, int, int], constants: Mapping[str, int | float | str], *,
        extras: tuple[str, ...] = ("S",), warps: int = 4, stages: int = 2,
    ) -> Launch:  # fmt: skip
        """The ordinary launch: every input, then sizes as int32, then every output."""
        names = {"S": "chunk", "E": "capacity", "SPAN": "span"}
        spec = self.spec
        aliased = {spec.outputs[out].name for out in spec.aliases}
        types: list[tuple[str, str | None]] = [(t.name, self.pointer(t)) for t in spec.inputs]
        types += [(names[symbol], "i32") for symbol in extras]
        types += [(f"{t.name}_out" if t.name in aliased else t.name, self.pointer(t)) for t in spec.outputs]
        arguments = [Argument("input", i) for i in range(len(spec.inputs))]
        arguments += [Argument("int32", self[symbol]) for symbol in extras]
        arguments += [Argument("output", i) for i in range(len(spec.outputs))]
        return Launch(Kernel(function, tuple(types), tuple(constants.items()), warps, stages), grid, tuple(arguments))


def _float32(value: float) -> float:
    """An attribute as ONNX and TensorRT store it, so a kernel gets the same constants from everywhere."""
    rounded: float = struct.unpack("f", struct.pack("f", value))[0]
    return rounded


def _cdiv(size: int, of: int) -> int:
    return -(-size // of)


def _power(size: int, least: int = 1) -> int:
    return max(least, 1 << (size - 1).bit_length())


def _check(call: _Call, layout_version: int) -> None:
    spec, sizes, attributes = call.spec, call.sizes, call.attributes
    wrong = []
    if layout_version != spec.layout_version:
        wrong.append(f"rows have layout version {layout_version}; its kernels read {spec.layout_version}")
    if spec.row_formats and call.row_format not in spec.row_formats:
        wrong.append(f"rows in {call.row_format}; its kernels read {', '.join(sorted(spec.row_formats))}")
    elif call.format.packed and spec.row_formats:
        wrong += _packed(call)
    if "D" in sizes and sizes["D"] % 16:
        wrong.append(f"rows are {sizes['D']} wide; expected a multiple of 16")
    if "P" in sizes and (sizes["P"] & (sizes["P"] - 1) or 2 * sizes["P"] > sizes["D"]):
        wrong.append(
            f"{2 * sizes['P']} rotated channels of {sizes.get('D')}; expected a power of two, at most {sizes.get('D')}"
        )
    if "rope_dim" in attributes and attributes["rope_dim"] != call.rope_dim:
        wrong.append(
            f"it keeps {attributes['rope_dim']} channels in bfloat16, but rows have {call.rope_dim} rotated channels"
        )
    wrong += _rounds(call)
    if "T" in sizes and "ratio" in attributes and sizes["T"] != attributes["ratio"]:
        wrong.append(f"a bias of {sizes['T']} rows does not fit ratio {attributes['ratio']}")
    if "R" in sizes and (sizes["R"], sizes["C"]) != (2 * attributes["ratio"], 2 * sizes["D"]):
        wrong.append(
            f"carries of {sizes['R']} rows by {sizes['C']} do not fit entries of {sizes['D']} channels and ratio "
            f"{attributes['ratio']}"
        )
    if spec.operator in SUBLAYER_PLANS:
        wrong += sublayer_faults(sizes, attributes)
    if wrong:
        raise ValueError(f"{spec.operator}: {'; '.join(wrong)}. Build with --plugins off.")


def _packed(call: _Call) -> list[str]:
    """What is wrong with the sizes of packed rows."""
    turned = 2 * call.sizes.get("P", call.rope_dim // 2)
    if call.format.keeps_rope and call.rope_dim != turned:
        return [f"rows have {call.rope_dim} rotated channels but frequencies for {turned}"]
    try:
        size = call.row_size
    except InputError as error:
        return [str(error)]
    if call.sizes.get("ROW", size) != size:
        return [f"rows of {call['ROW']} bytes; {call['D']} channels in {call.row_format} take {size}"]
    return []


def _rounds(call: _Call) -> list[str]:
    """What is wrong with the sizes of rows that are rounded to the values of a packed format."""
    if call.mixes and call["D"] & (call["D"] - 1):
        return [f"rows are {call['D']} wide; a Hadamard matrix needs a power of two"]
    if not call.values.packed or call.format.packed:  # nothing to round, or the stored rows were already checked
        return []
    try:
        call.values.row_bytes(call["D"], call.rope_dim)
    except InputError as error:
        return [str(error)]
    return []


def _window_update(call: _Call) -> Plan:
    size = call.row_size
    constants = {"W": call["W"], "D": call["D"], "BD": _power(call["D"]), "ROW": size, "BR": _power(size)}
    grid = (call["W"] + call["S"], call["B"], 1)
    return Plan(
        (call.launch("window.window_update", grid, constants | {"ROTARY": call.turned, "FORMAT": call.row_format}),)
    )


def _compress(call: _Call) -> Plan:
    windows = _cdiv(call["S"], call.attributes["ratio"])
    tiles = {"BM": min(8, _power(call["R"])), "BC": _power(call["C"]), "BR": 4}
    function = "compress.compress_mixed" if call.mixes else "compress.compress"
    return _entries(call, function, max(windows - 1, 1), tiles)


def _compress_online(call: _Call) -> Plan:
    ratio = call.attributes["ratio"]
    tiles = {"BM": min(8, _power(ratio))}
    return _entries(call, "compress_online.compress_online", _cdiv(call["S"], ratio), tiles)


def _entries(call: _Call, function: str, programs: int, tiles: dict[str, int]) -> Plan:
    """A compressing kernel with that many programs per sequence; plugins/kernels/entry.py turns a window into a row."""
    values, width = call.values, call["D"]
    constants: dict[str, int | float | str] = {
        "RATIO": call.attributes["ratio"], "D": width, "BD": _power(width), "HALF": call["P"],
        "EPS": call.attributes["eps"],
    } | call.row  # fmt: skip
    if call.format.packed:  # packing rounds, so the operators of both profiles have the same kernel
        constants |= {"VALUES": DENSE}
    else:
        constants |= {"ROTARY": values.kept(call.rope_dim), "VALUES": values.name}
    grid, warps = (programs, call["B"], 1), 4 if width <= 256 else 8
    return Plan((call.launch(function, grid, constants | tiles, extras=("S", "E"), warps=warps),))


@dataclass(frozen=True)
class _ScoreTile:
    """Entries of a block, warps, stages."""

    block: int
    warps: int
    stages: int


def _score_tile(call: _Call) -> _ScoreTile:
    if call.sm == 90:  # measured on an H200; a decoded block cannot be loaded in advance
        return _ScoreTile(64, 4, 2 if call.format.packed else 3)
    return _ScoreTile(128, 8, 2)


def _index_scores(call: _Call) -> Plan:
    tile, span = _score_tile(call), SCORE_SPANS[-1]
    if call["B"] * call["S"] * (call["E"] // SCORE_SPANS[0]) >= SCORE_PROGRAMS:
        span = SCORE_SPANS[0]
    constants = {
        "H": call["H"], "BH": _power(call["H"], 16), "D": call["D"], "BD": _power(call["D"], 16),
        "RATIO": call.attributes["ratio"], "BN": tile.block, "ROW": call.row_size, "FORMAT": call.row_format,
    }  # fmt: skip
    grid = (_cdiv(call["E"], span), call["S"], call["B"])
    parted = replace(call, sizes=call.sizes | {"SPAN": span})
    launch = parted.launch(
        "index_scores.index_scores", grid, constants, extras=("S", "E", "SPAN"), warps=tile.warps, stages=tile.stages
    )
    return Plan((launch,))


def _index_select(call: _Call) -> Plan:
    constants: dict[str, int | float | str] = {"K": call.attributes["topk"], "RATIO": call.attributes["ratio"]}
    if call["S"] <= SPLIT_CHUNK and call["E"] > SELECT_SPAN:
        return _parted_select(call, constants)
    grid = (call["S"], call["B"], 1)
    whole = constants | {"BN": 4096}
    return Plan((call.launch("index_select.index_select", grid, whole, extras=("S", "E"), warps=16),))


@dataclass(frozen=True)
class _SelectTile:
    """Entries of a block, number of parts whose counts are read at once, warps."""

    block: int
    parts: int
    warps: int


def _select_tile(call: _Call) -> _SelectTile:
    return _SelectTile(2048, 64, 8)


def _parted_select(call: _Call, constants: Mapping[str, int | float | str]) -> Plan:
    """Four passes that count and one that emits, with enough programs for a GPU. The split into parts changes no result."""
    rows, of = call["B"] * call["S"], _select_tile(call)
    block = of.block
    parts = min(_cdiv(call["E"], SELECT_SPAN), max(1, min(SELECT_PARTS, _cdiv(SELECT_PROGRAMS, rows))))
    span = _cdiv(call["E"], parts * block) * block
    # Room for the most parts that this many rows or fewer can have, so a call with a larger batch never takes less.
    counted = rows + SELECT_PROGRAMS
    offsets = [0, 4 * counted * 256 * _ITEM]
    offsets += [offsets[1] + rows * 4 * 2 * _ITEM]
    work = tuple(Argument("workspace", offset) for offset in offsets)
    sizes = (Argument("int32", call["S"]), Argument("int32", call["E"]), Argument("int32", span))
    given = (Argument("input", 0), Argument("input", 1), *sizes, *work)
    types: tuple[tuple[str, str | None], ...] = (
        ("scores", "*fp32"), ("positions", "*i32"), ("chunk", "i32"), ("capacity", "i32"), ("span", "i32"),
        ("counts", "*i32"), ("known", "*i32"), ("larger", "*i32"),
    )  # fmt: skip
    tile = {**constants, "BN": block, "BP": of.parts}
    passes = [
        Kernel("index_select.select_count", types, (*tile.items(), ("STEP", step)), num_warps=of.warps)
        for step in range(4)
    ]
    emit = Kernel("index_select.select_emit", (*types, ("chosen", "*i32")), tuple(tile.items()), num_warps=of.warps)
    grid = (parts, call["S"], call["B"])
    launches = [Launch(kernel, grid, given) for kernel in passes]
    launches.append(Launch(emit, grid, (*given, Argument("output", 0))))
    return Plan(tuple(launches), offsets[2] + counted * _ITEM)


@dataclass(frozen=True)
class _Tile:
    """Heads and keys of an attention's tile, warps, stages, and whether the query is parked (see the kernel)."""

    heads: int
    keys: int
    warps: int = 8
    stages: int = 2
    parked: bool = False


def _attention_tile(call: _Call) -> _Tile:
    """Tiles that fit each SM's shared memory and do not spill; see docs/kernels.md."""
    width, packed = _power(call["D"]), call.format.packed
    stages = 1 if packed else 2  # a decoded tile cannot be loaded in advance, and its bytes would take shared memory
    if width < 256:
        return _Tile(16, 32 if call.dtype == "float32" and not packed else 64, 4, stages)
    if call.sm == 90 and call["H"] >= 64 and width <= 512:  # measured on an H200
        narrow = packed or call.dtype == "float32"
        return _Tile(64, 32 if narrow else 64, stages=stages, parked=packed or call.dtype != "float32")
    if call.sm in (100, 103) and call["H"] >= 64 and width <= 512:
        return _Tile(64, 32, stages=stages)
    if call["H"] <= 16:
        large = width > 512 or packed or call.dtype == "float32"
        return _Tile(16, 32 if large else 64, stages=stages)
    if (
        packed
    ):  # every program decodes the keys that it reads: 32 heads share this work, and 16 warps have enough registers
        return _Tile(32 if width <= 512 else 16, 32, 16, stages)
    return _Tile(32, 32, stages=stages)


def _attention(
    call: _Call, function: str, far: int, extras: tuple[str, ...], constants: dict[str, int], span: int
) -> Plan:
    of = _attention_tile(call)
    places = _cdiv(call["W"], of.keys) * of.keys + far  # the window takes whole blocks
    split = call["S"] <= SPLIT_CHUNK and places > span
    splits = _cdiv(places, span) if split else 1
    shape = {"W": call["W"], "H": call["H"], "D": call["D"], "BD": _power(call["D"], 16), "HALF": call["P"]}
    tile = {"SPAN": span if split else 0, "BH": of.heads, "BN": of.keys, "PARKED": int(of.parked)}
    grid = (call["S"] * _cdiv(call["H"], of.heads), splits, call["B"])
    main = call.launch(
        f"attention.{function}",
        grid,
        {**constants, **shape, **call.row, **tile},
        extras=extras,
        warps=of.warps,
        stages=of.stages,
    )
    types, arguments = list(main.kernel.arguments), list(main.arguments)
    if not split:
        return Plan((_with_kernel(main, [*types, ("lse", None)], arguments),))
    rows = call["B"] * call["S"] * call["H"] * splits
    partial, lse = Argument("workspace", 0), Argument("workspace", rows * call["D"] * _ITEM)
    main = _with_kernel(main, [*types, ("lse", "*fp32")], [*arguments[:-1], partial, lse])
    names = [tensor.name for tensor in call.spec.inputs]
    read = ("sinks", "inv_freq", "positions")
    merge = Kernel(
        "attention.combine",
        (("partial", "*fp32"), ("lse", "*fp32"), ("sinks", "*fp32"), ("inv_freq", "*fp32"), ("positions", "*i32"),
         ("chunk", "i32"), ("splits", "i32"), ("out", "*fp32")),
        tuple((name, shape[name]) for name in ("H", "D", "BD", "HALF")),
    )  # fmt: skip
    merged = Launch(
        merge,
        (call["S"] * call["H"], call["B"], 1),
        (
            partial, lse, *(Argument("input", names.index(name)) for name in read),
            Argument("int32", call["S"]), Argument("int32", splits), Argument("output", 0),
        ),
    )  # fmt: skip
    return Plan((main, merged), rows * (call["D"] + 1) * _ITEM)


def _with_kernel(launch: Launch, types: list[tuple[str, str | None]], arguments: list[Argument]) -> Launch:
    kernel = launch.kernel
    changed = Kernel(kernel.function, tuple(types), kernel.constants, kernel.num_warps, kernel.num_stages)
    return Launch(changed, launch.grid, tuple(arguments))


def _window_attention(call: _Call) -> Plan:
    return _attention(call, "window_attention", 0, ("S",), {}, SPARSE_SPAN)


def _sparse_attention(call: _Call) -> Plan:
    return _attention(call, "sparse_attention", call["K"], ("S", "E"), {"K": call["K"]}, SPARSE_SPAN)


def _dense_attention(call: _Call) -> Plan:
    constants = {"RATIO": call.attributes["ratio"]}
    return _attention(call, "dense_attention", call["E"], ("S", "E"), constants, DENSE_SPAN)


def _routed_experts(call: _Call) -> Plan:
    return plan_experts(call.spec.operator, call.sizes, call.attributes, sm=call.sm)


@dataclass(frozen=True)
class _LinearTile:
    """Rows of the weight, tokens and channels of a product's tile, warps, stages."""

    rows: int
    tokens: int
    channels: int
    warps: int
    stages: int


def _linear_tile(call: _Call, *, few: bool) -> _LinearTile:
    """Tiles of products with few tokens, and with many; see docs/kernels.md.

    Both have as many channels, within one block of the weight: sums are then rounded alike for any number of tokens.
    """
    block, channels = call.attributes["block_columns"], LINEAR_CHANNELS
    while block < call["K"] and block % channels:
        channels //= 2
    if few:
        return _LinearTile(LINEAR_ROWS, LINEAR_TOKENS, channels, 4, 4)
    # Before Hopper, and on consumer GPUs, operands are in registers: those of more tokens would spill.
    narrow = call.sm not in (90, 100, 103) and call.attributes["terms"] == EXACT
    return _LinearTile(128, 32 if narrow else 64, channels, 8, 3)


def _block_linear(call: _Call) -> Plan:
    """One launch for many tokens. For few, several programs can share a row, and a second launch adds what they computed."""
    wrong = _linear_gaps(call)
    if wrong:
        raise ValueError(f"{call.spec.operator}: {'; '.join(wrong)}. Build with --plugins off.")
    attributes, (tokens, columns) = call.attributes, (call["M"], call["K"])
    groups = attributes["groups"]
    rows = call["GN"] // groups
    few = tokens <= FEW_TOKENS
    of = _linear_tile(call, few=few)
    steps = _cdiv(columns, of.channels)
    # The spans depend on the weight alone, so that a sum does not depend on the other tokens.
    programs = groups * _cdiv(rows, LINEAR_ROWS)
    wanted = max(1, min(LINEAR_PROGRAMS // programs, steps * of.channels // LINEAR_SPAN))
    span = _cdiv(steps, wanted)
    spans = _cdiv(steps, span)
    split = few and spans > 1
    align = next(size for size in (16, 8, 4, 2, 1) if columns % size == 0)
    sizes = {
        "tokens": tokens, "rows": rows, "units": columns // align, "steps": span, "block_rows": attributes["block_rows"],
        "block_columns": attributes["block_columns"], "scale_columns": call["SK"], "groups": groups,
    }  # fmt: skip
    types: list[tuple[str, str | None]] = [(tensor.name, call.pointer(tensor)) for tensor in call.spec.inputs]
    types += [*((name, "i32") for name in sizes), ("out", "*fp32")]
    constants = {
        "BM": of.tokens, "BN": of.rows, "BK": of.channels, "ALIGN": align, "TERMS": attributes["terms"],
        "FORMAT": attributes[WEIGHT_FORMAT], "SCALES": attributes[SCALE_FORMAT], "SPLIT": int(split),
    }  # fmt: skip
    kernel = Kernel("block_linear.block_linear", tuple(types), tuple(constants.items()), of.warps, of.stages)
    grid = (_cdiv(tokens, of.tokens), _cdiv(rows, of.rows), groups * (spans if split else 1))
    partial, out = Argument("workspace", 0), Argument("output", 0)
    given = (*(Argument("input", i) for i in range(3)), *(Argument("int32", size) for size in sizes.values()))
    first = Launch(kernel, grid, (*given, partial if split else out))
    if not split:
        return Plan((first,))
    size, block = tokens * call["GN"], 256
    second = Launch(
        Kernel(
            "block_linear.add_spans",
            (("partial", "*fp32"), ("size", "i32"), ("spans", "i32"), ("out", "*fp32")),
            (("BLOCK", block),),
        ),
        (_cdiv(size, block), 1, 1),
        (partial, Argument("int32", size), Argument("int32", spans), out),
    )
    return Plan((first, second), spans * size * _ITEM)


def _linear_gaps(call: _Call) -> list[str]:
    """What is wrong with a product's weight."""
    attributes, rows, columns = call.attributes, call["GN"], call["K"]
    block = attributes["block_rows"], attributes["block_columns"]
    grid = call["SN"], call["SK"]
    wrong = []
    if attributes[WEIGHT_FORMAT] not in (E4M3, BFLOAT16):
        wrong.append(f"weights are in {attributes[WEIGHT_FORMAT]}; its kernels read {E4M3} and {BFLOAT16}")
    if attributes["terms"] not in (ROUNDED, EXACT):
        wrong.append(f"activations have {attributes['terms']} terms; expected {ROUNDED} or {EXACT}")
    if (
        rows % attributes["groups"]
        or call.sizes.get("GK", columns * attributes["groups"]) != columns * attributes["groups"]
    ):
        wrong.append(f"{call.sizes.get('GK')} channels and {rows} rows are not those of {attributes['groups']} groups")
    if grid != (_cdiv(rows, block[0]), _cdiv(columns, block[1])):
        wrong.append(f"{grid[0]} x {grid[1]} scales do not fit blocks of {block[0]} x {block[1]}")
    if block[1] < columns and block[1] % 16:
        wrong.append(f"blocks have {block[1]} channels; expected a multiple of 16, or one block")
    if max(rows * columns, call["M"] * max(rows, columns * attributes["groups"])) > _INT32:
        wrong.append("a tensor has more elements than an int32 counts")
    return wrong


def _around_sublayer(call: _Call) -> Plan:
    return around_sublayer(call.spec.operator, call.sizes, call.attributes)


_PLANS: dict[str, Callable[[_Call], Plan]] = {
    **dict.fromkeys((ROUTED_EXPERTS, *PACKED_EXPERTS.values()), _routed_experts),
    BLOCK_LINEAR: _block_linear,
    "FoldkvWindowUpdate": _window_update,
    **dict.fromkeys(("FoldkvCompress", "FoldkvCompressFp8", "FoldkvCompressFp4"), _compress),
    **dict.fromkeys(("FoldkvCompressOnline", "FoldkvCompressOnlineFp8"), _compress_online),
    "FoldkvIndexScores": _index_scores,
    "FoldkvIndexSelect": _index_select,
    "FoldkvWindowAttention": _window_attention,
    "FoldkvSparseAttention": _sparse_attention,
    "FoldkvDenseAttention": _dense_attention,
    **dict.fromkeys(SUBLAYER_PLANS, _around_sublayer),
}
