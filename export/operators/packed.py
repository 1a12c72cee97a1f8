"""Weights as released, decoded where they are used: e4m3 blocks, and the chosen experts of a packed stack.

These functions exist only in the graph: they replace float32 weights after tracing. Their values equal
export/checkpoint/formats.py bit for bit. Bytes that are looked up (exponents, pairs of e2m1, e4m3 of experts) are int8. ONNX counts
a negative index from the end of the table, so byte 255, which is -1 in int8, finds row 255. The reason for int8 is Gather:
it takes no FP8 in TensorRT and no FP4 in either backend, but int8 in both.

The routed experts of a layer are the rows of one tensor ``codes [E, bytes]``; each row has w1, w2 and w3. Their
exponents are the rows of ``scales [E, bytes]``; ``slots [E]`` has the row of each expert. The bytes of experts that no
token of a chunk chose are not read. Only a band of one matrix is decoded at a time, for any E.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import helper, numpy_helper

from ..checkpoint.formats import FP4, FP8
from ..checkpoint.values import byte_pairs, byte_values, scale_values
from ..contract.operators import PACKED_EXPERTS
from ..contract.weights import E2M1, E4M3, EXPONENT, FLOAT32
from .grouped import CONSTANTS, grouped_experts
from .registry import DOMAIN, ONNX_OPSET

EXPONENTS, BLOCK, PARTIAL = "FoldkvExponents", "FoldkvBlockScale", "FoldkvPartialBlockScale"
_CODES = {FP4: E2M1, FP8: E4M3}
EXPERTS = {format_: PACKED_EXPERTS[codes, EXPONENT] for format_, codes in _CODES.items()}
#: The same with float32 scales instead of exponents.
SCALED_EXPERTS = {format_: PACKED_EXPERTS[codes, FLOAT32] for format_, codes in _CODES.items()}
PARTS = ("w1", "w2", "w3")
#: Bytes of codes that are decoded at once on a processor. Their indices and values take 12 and 17 times as much; all stay in the cache.
BAND = 1 << 18
# Rows of the look-up tables: GatherElements gives each to a processor.
_LANES = 16


@dataclass(frozen=True)
class Matrix:
    """One weight of an expert within its row: where its codes (bytes) and scales (elements) begin, shape [R, C], grid of
    scales [r, c]."""

    codes: int
    scales: int
    shape: tuple[int, int]
    grid: tuple[int, int]


def exponents() -> onnx.FunctionProto:
    """FoldkvExponents: e8m0 bytes, int8 of any shape -> float32."""
    return _function(
        EXPONENTS, ["bytes"], ["values"], [], "index = Cast <to = 6> (bytes) values = Gather <axis = 0> (table, index)",
        {"table": _exponent_table()},
    )  # fmt: skip


def block_scale() -> onnx.FunctionProto:
    """FoldkvBlockScale: elements [R, C] times scales [r, c] of their blocks, float32 -> [R, C]; blocks are whole.

    ``blocks`` is [r, R / r, c, C / c], ``grid`` [r, 1, c, 1] and ``shape`` [R, C].
    """
    return _function(
        BLOCK, ["elements", "scale"], ["values"], ["blocks", "grid", "shape"],
        """
        blocks = Constant <value_ints: ints = @blocks> ()
        grid = Constant <value_ints: ints = @grid> ()
        shape = Constant <value_ints: ints = @shape> ()
        tiles = Reshape (elements, blocks)
        factors = Reshape (scale, grid)
        scaled = Mul (tiles, factors)
        values = Reshape (scaled, shape)
        """,
    )  # fmt: skip


def partial_block_scale() -> onnx.FunctionProto:
    """FoldkvPartialBlockScale: like FoldkvBlockScale, but the last block of rows or columns is cut off.

    ``blocks`` is [r, block rows, c, block columns], ``whole`` [r * block rows, c * block columns].
    """
    return _function(
        PARTIAL, ["elements", "scale"], ["values"], ["blocks", "grid", "whole", "shape"],
        """
        blocks = Constant <value_ints: ints = @blocks> ()
        grid = Constant <value_ints: ints = @grid> ()
        whole = Constant <value_ints: ints = @whole> ()
        shape = Constant <value_ints: ints = @shape> ()
        zero = Constant <value_ints = [0, 0]> ()
        tiles = Reshape (scale, grid)
        repeated = Expand (tiles, blocks)
        flat = Reshape (repeated, whole)
        factors = Slice (flat, zero, shape)
        values = Mul (elements, factors)
        """,
    )  # fmt: skip


def routed_experts(
    format_: str, matrices: dict[str, Matrix], *, scaled: bool = False, band: int | None = None
) -> onnx.FunctionProto:
    """The chosen experts' clamped SwiGLU from packed weights, as defined in operators/experts.py.

    x [T, C], chosen [T, K] int64, weights [T, K], codes [E, bytes] int8, scales [E, bytes] int8, slots [E] int64
    -> y [T, C]; attribute ``limit``. The sizes of a model's experts are part of the body.

    Experts are processed as described in operators/grouped.py, and their matrices in bands of rows that fit in a processor's
    cache. The two e2m1 of a byte are decoded separately, into a matrix of the even columns and one of the odd columns. So an
    element is one look-up; instead of interleaving the weights, the input's channels are split once.

    Args:
        format_: "fp4" or "fp8".
        matrices: where w1, w2 and w3 are in a row.
        scaled: scales are float32, and not exponents.
        band: the most bytes of codes that are decoded at once; None is what suits a processor.
    """
    halves = 2 if format_ == FP4 else 1
    elements = _elements(format_).reshape(256, halves)
    constants = {f"elements_{half}": np.tile(elements[:, half], (_LANES, 1)) for half in range(halves)}
    constants |= CONSTANTS | {
        "powers": np.tile(_exponent_table(), (_LANES, 1)), "axes": np.array([0, 1]),
    } | {f"half_{half}": np.array(half) for half in range(halves)}  # fmt: skip
    bands = {part: _Bands(part, matrices[part], halves, constants, scaled, band or BAND) for part in PARTS}
    head = "limit = Constant <value_float: float = @limit> () low = Neg (limit)"
    body = head + grouped_experts(
        f"""
            slot = Gather <axis = 0> (slots, expert)
            place = Unsqueeze (slot, first)
            {bands["w1"].parted("columns", "x")}
            {bands["w1"].loop("gate", "x")}
            {bands["w3"].loop("up", "x")}
        """,
        bands["w2"].parted("hidden", "h") + bands["w2"].loop("down", "h"),
        table="slots",
    )
    inputs = ["x", "chosen", "weights", "codes", "scales", "slots"]
    name = (SCALED_EXPERTS if scaled else EXPERTS)[format_]
    return _function(name, inputs, ["y"], ["limit"], body, constants)


class _Bands:
    """Statements that multiply one weight with columns, a band of rows at a time; their constants are added to a table."""

    def __init__(
        self, part: str, matrix: Matrix, halves: int, constants: dict[str, np.ndarray], scaled: bool, band: int
    ) -> None:
        (rows, columns), (r, c) = matrix.shape, matrix.grid
        self.part, self.halves, self.scaled = part, halves, scaled
        width = columns // halves  # bytes of a row
        blocks = max(n for n in range(1, r + 1) if r % n == 0 and (n == 1 or n * (rows // r) * width <= band))
        code, scale = blocks * (rows // r) * width, blocks * c
        constants |= {
            f"{part}_count": np.array(r // blocks), f"{part}_pairs": np.array([width, halves, -1]),
            f"{part}_code": np.array([matrix.codes]), f"{part}_code_step": np.array([code]),
            f"{part}_code_size": np.array([1, code]), f"{part}_code_lanes": np.array([math.gcd(code, _LANES), -1]),
            f"{part}_scale": np.array([matrix.scales]), f"{part}_scale_step": np.array([scale]),
            f"{part}_scale_size": np.array([1, scale]), f"{part}_scale_lanes": np.array([math.gcd(scale, _LANES), -1]),
            f"{part}_tiles": np.array([blocks, rows // r, c, width // c]), f"{part}_grid": np.array([blocks, 1, c, 1]),
            f"{part}_band": np.array([-1, width]), f"{part}_rows": np.array([rows, -1]),
        }  # fmt: skip

    def parted(self, source: str, name: str) -> str:
        """``source`` [columns, n] as one value for each element of a byte: ``name_0``, ``name_1`` [columns / 2, n]."""
        return f"{name}_pairs = Reshape ({source}, {self.part}_pairs)\n" + "\n".join(
            f"{name}_{half} = Gather <axis = 1> ({name}_pairs, half_{half})" for half in range(self.halves)
        )

    def loop(self, out: str, given: str) -> str:
        """The product with the columns ``given_0``, ``given_1``: ``out`` [rows, n]."""
        p = self.part
        products = "".join(
            f"""
                {p}_looked_{half} = GatherElements <axis = 1> (elements_{half}, {p}_code_index)
                {p}_tiled_{half} = Reshape ({p}_looked_{half}, {p}_tiles)
                {p}_scaled_{half} = Mul ({p}_tiled_{half}, {p}_factors)
                {p}_values_{half} = Reshape ({p}_scaled_{half}, {p}_band)
                {p}_product_{half} = MatMul ({p}_values_{half}, {given}_{half})
            """
            for half in range(self.halves)
        )
        total = "Add" if self.halves == 2 else "Identity"
        terms = ", ".join(f"{p}_product_{half}" for half in range(self.halves))
        return f"""
            {p}_bands = Loop ({p}_count, always) <body = {p}_one_band (int64 {p}_at, bool {p}_go)
                => (bool {p}_more, float[R, N] {p}_sum) {{
                {p}_more = Identity ({p}_go)
                {self._index("code")}
                {self._slice("scale", f"{p}_power") if self.scaled else self._index("scale")}
                {"" if self.scaled else f"{p}_power = GatherElements <axis = 1> (powers, {p}_scale_index)"}
                {p}_factors = Reshape ({p}_power, {p}_grid)
                {products}
                {p}_sum = {total} ({terms})
            }}>
            {out} = Reshape ({p}_bands, {p}_rows)
        """

    def _index(self, kind: str) -> str:
        # Through uint8: without negative indices the look-up has no branch to predict.
        name = f"{self.part}_{kind}"
        return f"""
                {self._slice(kind, f"{name}_signed")}
                {name}_bytes = Cast <to = 2> ({name}_signed)
                {name}_number = Cast <to = 6> ({name}_bytes)
                {name}_index = Reshape ({name}_number, {name}_lanes)
        """

    def _slice(self, kind: str, out: str) -> str:
        """A band's part of the expert's row of ``codes`` or ``scales``."""
        name = f"{self.part}_{kind}"
        return f"""
                {name}_far = Mul ({self.part}_at, {name}_step)
                {name}_from = Add ({name}_far, {name})
                {name}_start = Concat <axis = 0> (place, {name}_from)
                {name}_end = Add ({name}_start, {name}_size)
                {out} = Slice ({kind}s, {name}_start, {name}_end, axes)
        """


def _exponent_table() -> np.ndarray:
    import torch

    return scale_values(torch.arange(256, dtype=torch.uint8)).numpy()


def _elements(format_: str) -> np.ndarray:
    import torch

    return (byte_pairs() if format_ == FP4 else byte_values(torch.float8_e4m3fn)).numpy()


def _function(
    name: str, inputs: list[str], outputs: list[str], attributes: list[str], body: str,
    constants: dict[str, np.ndarray] | None = None,
) -> onnx.FunctionProto:  # fmt: skip
    """A function of the domain foldkv from the text of its body; attributes are floats, ``constants`` are values it uses."""
    given = f" <{', '.join(attributes)}>" if attributes else ""
    head = f'<domain: "{DOMAIN}", opset_import: ["" : {ONNX_OPSET}]>'
    function = onnx.parser.parse_function(
        f"{head} {name}{given} ({', '.join(inputs)}) => ({', '.join(outputs)}) {{ {body} }}"
    )
    nodes = [
        helper.make_node("Constant", [], [key], name=key, value=numpy_helper.from_array(value))
        for key, value in (constants or {}).items()
    ]
    nodes += list(function.node)
    del function.node[:]
    function.node.extend(nodes)
    return function
