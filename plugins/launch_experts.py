"""What the routed experts launch (kernels/experts.py): from how their weights are stored to kernels, grids and arguments.

Programs are as many as pairs of a token and an expert can need, whatever is chosen: grids depend on sizes only, so a CUDA graph
can capture a call. A program without a tile ends at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..export.contract.operators import PACKED_EXPERTS, ROUTED_EXPERTS
from ..export.contract.weights import BFLOAT16, E2M1, E4M3, EXPONENT, FLOAT32, VALUES_PER_ELEMENT
from .plans import Argument, Kernel, Launch, Plan

#: Up to this many pairs of a token and an expert find their tiles themselves; more are sorted by expert first.
FEW_PAIRS = 64
#: The format of scales that there are not.
UNSCALED = "none"
_ALIGNMENT = 256  # bytes, of each part of the workspace
_GROUP_BLOCK, _SUM_BLOCK = 256, 512
_WEIGHT_POINTERS = {E2M1: "*i8", E4M3: "*i8", BFLOAT16: "*bf16"}
_SCALE_POINTERS = {EXPONENT: "*i8", FLOAT32: "*fp32", UNSCALED: None}


@dataclass(frozen=True)
class _Matrix:
    """One matrix of an expert: the operator's input that has it, and where it is in an expert's row of that input.

    Attributes:
        input: index of the input.
        row: elements of a row, one per expert.
        start: element of a row with which the matrix begins.
        shape: rows and columns.
        scale_row: elements of a row of scales; 0 without scales.
        scale_start: element of that row with which the matrix's scales begin.
        grid: rows and columns of its scales, which divide it into equal blocks.
    """

    input: int
    row: int
    start: int
    shape: tuple[int, int]
    scale_row: int = 0
    scale_start: int = 0
    grid: tuple[int, int] = (1, 1)

    def wrong(self, name: str, weight: str) -> list[str]:
        """Why kernels cannot read it."""
        (rows, columns), (r, c) = self.shape, self.grid
        found = []
        if rows % r or columns % c:
            found.append(f"{r} x {c} scales do not divide {name} of {rows} x {columns} into equal blocks")
        elif columns // c % VALUES_PER_ELEMENT[weight]:
            found.append(f"{name} has blocks of {columns // c} columns; expected whole elements of {weight}")
        size = rows * columns // VALUES_PER_ELEMENT[weight]
        if size >= 1 << 31:
            found.append(f"{name} has {size} elements; kernels count those of one matrix in 32 bits")
        for what, start, length, row in (
            ("codes", self.start, size, self.row), ("scales", self.scale_start, r * c, self.scale_row or r * c),
        ):  # fmt: skip
            if start + length > row:
                found.append(f"the {what} of {name} end at element {start + length} of a row of {row}")
        return found


@dataclass(frozen=True)
class _Experts:
    """The experts of a layer as an operator has them.

    Attributes:
        count: experts.
        chosen: experts of each token.
        weight: format of the weights (export/contract/weights.py).
        scale: format of the scales.
        gate: w1 [I, C].
        up: w3, stored as w1 is.
        down: w2 [C, I].
        limit: of the clamped SwiGLU.
        scales: index of the input with the scales; None without.
        slots: index of the input with the row of each expert; None if rows are in the order of the experts.
    """

    count: int
    chosen: int
    weight: str
    scale: str
    gate: _Matrix
    up: _Matrix
    down: _Matrix
    limit: float
    scales: int | None = None
    slots: int | None = None

    def wrong(self, hidden: int) -> list[str]:
        """Why kernels cannot compute them for tokens of ``hidden`` channels."""
        found = [
            reason
            for name, matrix in (("w1", self.gate), ("w2", self.down), ("w3", self.up))
            for reason in matrix.wrong(name, self.weight)
        ]
        inner = self.gate.shape[0]
        if (self.gate.shape, self.up.shape, self.down.shape) != ((inner, hidden), (inner, hidden), (hidden, inner)):
            found.append(
                f"w1, w2 and w3 are {self.gate.shape}, {self.down.shape} and {self.up.shape} for tokens of {hidden} channels"
            )
        if self.gate.grid != self.up.grid:
            found.append(f"w1 has {self.gate.grid} scales, w3 {self.up.grid}")
        return found


def plan_experts(operator: str, sizes: Mapping[str, int], attributes: Mapping[str, Any], *, sm: int) -> Plan:
    """The launches of a call of the routed experts, in any form.

    Args:
        operator: ONNX name.
        sizes: of every symbol of the operator's declaration.
        attributes: values of the operator's attributes.
        sm: compute capability, which determines the tiles.

    Raises:
        ValueError: sizes, or places of the matrices in a row, that the kernels cannot take.
    """
    experts = _plain(sizes, attributes) if operator == ROUTED_EXPERTS else _packed(operator, sizes, attributes)
    wrong = experts.wrong(sizes["C"])
    if wrong:
        raise ValueError(f"{operator}: {'; '.join(wrong)}. Build with --plugins off.")
    return _launches(experts, sizes["M"], sm)


def _plain(sizes: Mapping[str, int], attributes: Mapping[str, Any]) -> _Experts:
    """w13 is input 3, gate over up; w2 is input 4."""
    inner, hidden = sizes["I"], sizes["C"]
    size = inner * hidden
    return _Experts(
        sizes["X"], sizes["K"], BFLOAT16, UNSCALED, limit=attributes["limit"],
        gate=_Matrix(3, 2 * size, 0, (inner, hidden)), up=_Matrix(3, 2 * size, size, (inner, hidden)),
        down=_Matrix(4, size, 0, (hidden, inner)),
    )  # fmt: skip


def _packed(operator: str, sizes: Mapping[str, int], attributes: Mapping[str, Any]) -> _Experts:
    """codes are input 3, scales 4, slots 5; attributes have w1, w2 and w3 in this order."""
    [(weight, scale)] = [formats for formats, name in PACKED_EXPERTS.items() if name == operator]
    codes, scales, shapes, grids = (attributes[name] for name in ("codes_at", "scales_at", "shapes", "grids"))
    gate, down, up = (
        _Matrix(
            3, sizes["CODES"], codes[i], (shapes[2 * i], shapes[2 * i + 1]), sizes["SCALES"], scales[i],
            (grids[2 * i], grids[2 * i + 1]),
        )
        for i in range(3)
    )  # fmt: skip
    return _Experts(sizes["X"], sizes["K"], weight, scale, gate, up, down, attributes["limit"], scales=4, slots=5)


@dataclass(frozen=True)
class _Tile:
    """Pairs, rows and columns of weights in a step of a product, warps, stages."""

    pairs: int
    rows: int
    columns: int
    warps: int = 4
    stages: int = 3


def _tile(experts: _Experts, few: bool, sm: int) -> _Tile:
    """On paper, alike on every SM: bytes on their way hide the latency, shared memory suffices, and no kernel spills."""
    columns = 64 if experts.weight == BFLOAT16 else 128
    if few:
        return _Tile(16, 32, columns, stages=4)
    return _Tile(32, 64, columns, warps=8)


def _launches(experts: _Experts, tokens: int, sm: int) -> Plan:
    """The launches for that many tokens: sorting of pairs, if they are many; gate and up; down; the weighted sum."""
    pairs = tokens * experts.chosen
    few = pairs <= FEW_PAIRS
    of = _tile(experts, few, sm)
    (inner, hidden), room = experts.gate.shape, _Room()
    rows, values = room.take(pairs * hidden * 4), room.take(pairs * inner * 2)
    order, counts = (None, None) if few else (room.take(pairs * 4), room.take(experts.count * 4))
    grouped: tuple[Launch, ...] = ()
    tiles = pairs
    if order is not None and counts is not None:
        # An expert that was chosen has one tile that may not be full, and the others are.
        busy = min(experts.count, pairs)
        tiles = busy + (pairs - busy) // of.pairs
        kernel = Kernel(
            "experts.group",
            (("chosen", "*i64"), ("pairs", "i32"), ("order", "*i32"), ("counts", "*i32")),
            (("BP", _GROUP_BLOCK),),
        )
        arguments = (Argument("input", 1), Argument("int32", pairs), order, counts)
        grouped = (Launch(kernel, (experts.count, 1, 1), arguments),)
    shared = {
        "E": experts.count, "BE": _power(experts.count), "BP": FEW_PAIRS, "BM": of.pairs, "WEIGHT": experts.weight,
        "SCALE": experts.scale,
    }  # fmt: skip
    search = (("order", order), ("counts", counts))
    gate, up, down = experts.gate, experts.up, experts.down
    first = _product(
        "gate_up", ("x", "*fp32", Argument("input", 0)), ("hidden", "*bf16", values), experts, gate, search, pairs, tiles,
        shared | {"K": experts.chosen, "GATE": gate.start, "UP": up.start, "GATE_SCALE": gate.scale_start,
                  "UP_SCALE": up.scale_start, "LIMIT": experts.limit},
        of,
    )  # fmt: skip
    second = _product(
        "down", ("hidden", "*bf16", values), ("rows", "*fp32", rows), experts, down, search, pairs, tiles,
        shared | {"DOWN": down.start, "DOWN_SCALE": down.scale_start},
        of,
    )  # fmt: skip
    block = min(_SUM_BLOCK, _power(hidden))
    kernel = Kernel(
        "experts.weigh",
        (("rows", "*fp32"), ("weights", "*fp32"), ("y", "*fp32")),
        (("K", experts.chosen), ("COLUMNS", hidden), ("BC", block)),
    )
    third = Launch(kernel, (tokens, _cdiv(hidden, block), 1), (rows, Argument("input", 2), Argument("output", 0)))
    return Plan((*grouped, first, second, third), room.bytes)


def _product(
    function: str, given: tuple[str, str, Argument], made: tuple[str, str, Argument], experts: _Experts, matrix: _Matrix,
    search: tuple[tuple[str, Argument | None], ...], pairs: int, tiles: int, constants: Mapping[str, Any], of: _Tile,
) -> Launch:  # fmt: skip
    """The launch of ``gate_up`` or ``down``, whose arguments differ only in the first and the last."""
    rows, columns = matrix.shape
    blocks = _columns(experts, matrix, of)
    inputs = (("scales", _SCALE_POINTERS[experts.scale], experts.scales), ("slots", "*i64", experts.slots))
    types: list[tuple[str, str | None]] = [given[:2], ("chosen", "*i64"), ("codes", _WEIGHT_POINTERS[experts.weight])]
    types += [(name, None if index is None else pointer) for name, pointer, index in inputs]
    types += [(name, None if place is None else "*i32") for name, place in search]
    types += [("pairs", "i32"), made[:2]]
    arguments = [given[2], Argument("input", 1), Argument("input", matrix.input)]
    arguments += [Argument("input", index) for *_, index in inputs if index is not None]
    arguments += [place for _, place in search if place is not None]
    arguments += [Argument("int32", pairs), made[2]]
    block = min(of.rows, _power(rows, 16))
    sizes = {
        "ROWS": rows, "COLUMNS": columns, "GRID_ROWS": matrix.grid[0], "GRID_COLUMNS": matrix.grid[1],
        "CODES": matrix.row, "SCALES": matrix.scale_row, "BN": block, "BK": blocks,
    }  # fmt: skip
    kernel = Kernel(
        f"experts.{function}", tuple(types), tuple(_ordered(function, {**sizes, **constants})), of.warps, of.stages
    )
    return Launch(kernel, (tiles, _cdiv(rows, block), 1), tuple(arguments))


#: Constants in the order of the kernels' parameters.
_SIZES = ("E", "ROWS", "COLUMNS", "GRID_ROWS", "GRID_COLUMNS", "CODES", "SCALES")
_BLOCKS = ("WEIGHT", "SCALE", "BE", "BP", "BM", "BN", "BK")
_CONSTANTS = {
    "gate_up": ("K", *_SIZES, "GATE", "UP", "GATE_SCALE", "UP_SCALE", "LIMIT", *_BLOCKS),
    "down": (*_SIZES, "DOWN", "DOWN_SCALE", *_BLOCKS),
}


def _ordered(function: str, constants: Mapping[str, Any]) -> list[tuple[str, Any]]:
    return [(name, constants[name]) for name in _CONSTANTS[function]]


def _columns(experts: _Experts, matrix: _Matrix, of: _Tile) -> int:
    """Columns of a step: within a block that shares a scale, unless the blocks are narrow and scales are exponents."""
    width = matrix.shape[1] // matrix.grid[1]
    several = matrix.grid[1] > 1 and experts.scale == EXPONENT and width & (width - 1) == 0
    return min(of.columns, _power(matrix.shape[1] if several else width, 16))


class _Room:
    """Parts of the workspace, one after the other."""

    def __init__(self) -> None:
        self.bytes = 0

    def take(self, size: int) -> Argument:
        start = self.bytes
        self.bytes += _cdiv(size, _ALIGNMENT) * _ALIGNMENT
        return Argument("workspace", start)


def _cdiv(size: int, of: int) -> int:
    return -(-size // of)


def _power(size: int, least: int = 1) -> int:
    return max(least, 1 << (size - 1).bit_length())
