"""Weights as released, decoded where they are used: e4m3 blocks, and the chosen experts of a packed stack.

These are functions of the graph only: they take the place of float32 weights after tracing. Their values equal
export/formats.py bit for bit. Bytes that are looked up (exponents, pairs of e2m1, e4m3 of experts) are int8: ONNX counts
a negative index from the end of the table, so that byte 255, which int8 reads as -1, finds row 255. Gather takes FP8 and
FP4 types neither in TensorRT nor, FP4, in ONNX Runtime; it takes int8 in both.

The routed experts of a layer are the rows of one tensor ``codes [E, bytes]``, each holding w1, w2 and w3, with their
exponents as the rows of ``scales [E, bytes]``; ``slots [E]`` says in which row an expert lies. Tokens are taken one at a
time: no more than the chosen experts of one token are read and decoded at once, whatever E is.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx
from onnx import helper, numpy_helper

from foldkv.export.formats import FP4, byte_pairs, byte_values, scale_values
from foldkv.export.operators.registry import DOMAIN, ONNX_OPSET

EXPONENTS, BLOCK, PARTIAL = "FoldkvExponents", "FoldkvBlockScale", "FoldkvPartialBlockScale"
EXPERTS = {"fp4": "FoldkvRoutedExpertsFp4", "fp8": "FoldkvRoutedExpertsFp8"}
PARTS = ("w1", "w2", "w3")


@dataclass(frozen=True)
class Matrix:
    """One weight of an expert within its row: byte offsets of codes and scales, shape [R, C], grid of scales [r, c]."""

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
    """FoldkvPartialBlockScale: as FoldkvBlockScale, where the last block of rows or columns is cut off.

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


def routed_experts(format_: str, matrices: dict[str, Matrix]) -> onnx.FunctionProto:
    """The chosen experts' clamped SwiGLU, as operators/experts.py defines it, from packed weights.

    x [T, C], chosen [T, K] int64, weights [T, K], codes [E, bytes] int8, scales [E, bytes] int8, slots [E] int64
    -> y [T, C]; attribute ``limit``. The sizes of a model's experts are part of the body.

    Args:
        format_: "fp4" or "fp8".
        matrices: where w1, w2 and w3 lie in a row.
    """
    constants = {"table": _exponent_table(), "elements": _elements(format_), "axis": np.array([1])}
    decode = "".join(_decoding(part, matrices[part], format_, constants) for part in PARTS)
    body = f"""
        limit = Constant <value_float: float = @limit> ()
        low = Neg (limit)
        first = Constant <value_ints = [0]> ()
        second = Constant <value_ints = [1]> ()
        last = Constant <value_ints = [2]> ()
        sizes = Shape <start = 0, end = 1> (x)
        count = Squeeze (sizes, first)
        always = Constant <value = bool {{1}}> ()
        y = Loop (count, always) <body = one_token (int64 token, bool go) => (bool more, float[C] row) {{
            more = Identity (go)
            input = Gather <axis = 0> (x, token)
            experts = Gather <axis = 0> (chosen, token)
            shares = Gather <axis = 0> (weights, token)
            places = Gather <axis = 0> (slots, experts)
            code = Gather <axis = 0> (codes, places)
            scale = Gather <axis = 0> (scales, places)
            {decode}
            column = Unsqueeze (input, second)
            gate = MatMul (w1, column)
            up = MatMul (w3, column)
            clamped = Min (gate, limit)
            sigmoid = Sigmoid (clamped)
            silu = Mul (clamped, sigmoid)
            top = Min (up, limit)
            bounded = Max (top, low)
            hidden = Mul (silu, bounded)
            down = MatMul (w2, hidden)
            flat = Squeeze (down, last)
            share = Unsqueeze (shares, second)
            weighted = Mul (flat, share)
            row = ReduceSum <keepdims = 0> (weighted, first)
        }}>
    """
    inputs = ["x", "chosen", "weights", "codes", "scales", "slots"]
    return _function(EXPERTS[format_], inputs, ["y"], ["limit"], body, constants)


def _decoding(part: str, matrix: Matrix, format_: str, constants: dict[str, np.ndarray]) -> str:
    """Statements that decode one weight of the chosen experts to ``part`` [K, R, C]."""
    (rows, columns), (r, c) = matrix.shape, matrix.grid
    length = rows * columns // (2 if format_ == FP4 else 1)
    constants |= {
        f"{part}_from": np.array([matrix.codes]), f"{part}_to": np.array([matrix.codes + length]),
        f"{part}_scale_from": np.array([matrix.scales]), f"{part}_scale_to": np.array([matrix.scales + r * c]),
        f"{part}_tiles": np.array([-1, r, rows // r, c, columns // c]), f"{part}_grid": np.array([-1, r, 1, c, 1]),
        f"{part}_shape": np.array([-1, rows, columns]),
    }  # fmt: skip
    return f"""
            {part}_bytes = Slice (code, {part}_from, {part}_to, axis)
            {part}_index = Cast <to = 6> ({part}_bytes)
            {part}_looked = Gather <axis = 0> (elements, {part}_index)
            {part}_tiled = Reshape ({part}_looked, {part}_tiles)
            {part}_powers = Slice (scale, {part}_scale_from, {part}_scale_to, axis)
            {part}_power = Cast <to = 6> ({part}_powers)
            {part}_factors = Gather <axis = 0> (table, {part}_power)
            {part}_factor = Reshape ({part}_factors, {part}_grid)
            {part}_scaled = Mul ({part}_tiled, {part}_factor)
            {part} = Reshape ({part}_scaled, {part}_shape)
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
    """A function of the domain foldkv from the text of its body; ``constants`` are values that it names."""
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
