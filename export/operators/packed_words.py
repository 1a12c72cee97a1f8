"""The chosen experts of a packed stack for TensorRT: bytes in int32 words.

TensorRT cannot gather from FP8 or FP4. It treats an int8 constant as quantised, and only a DequantizeLinear can read that: it
would decode all experts before any is chosen. It can gather from an int32 constant. Four bytes of codes are one word, so the
engine keeps as many bytes as the checkpoint has. The parser has no shifts, so division splits the words. The sign is removed
first, because backends divide negative numbers differently. The result is that of operators/packed.py in another precision;
tokens are processed one at a time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import ml_dtypes
import numpy as np
import onnx
import torch

from ..checkpoint.formats import FP4
from ..checkpoint.values import byte_pairs, byte_values, scale_values
from .grouped import clamped_swiglu
from .packed import EXPERTS, PARTS, SCALED_EXPERTS, Matrix, _function

#: Bytes in a word.
WORD = 4
_FORMATS = {name: format_ for table in (EXPERTS, SCALED_EXPERTS) for format_, name in table.items()}
_DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


def geometry(matrices: Mapping[str, Matrix]) -> dict[str, list[int]]:
    """Where w1, w2 and w3 are in a row, as attributes of a node; :func:`matrices_of` reads them."""
    parts = [matrices[part] for part in PARTS]
    return {
        "codes_at": [part.codes for part in parts], "scales_at": [part.scales for part in parts],
        "shapes": [size for part in parts for size in part.shape], "grids": [size for part in parts for size in part.grid],
    }  # fmt: skip


def matrices_of(attributes: Mapping[str, Sequence[int]]) -> dict[str, Matrix]:
    """The values that :func:`geometry` wrote.

    Raises:
        KeyError: an attribute is missing.
    """
    codes, scales, shapes, grids = (attributes[key] for key in ("codes_at", "scales_at", "shapes", "grids"))
    return {
        part: Matrix(
            codes[i], scales[i], (shapes[2 * i], shapes[2 * i + 1]), (grids[2 * i], grids[2 * i + 1])
        )
        for i, part in enumerate(PARTS)
    }  # fmt: skip


def format_of_node(op_type: str) -> str | None:
    """The format of the experts that an operator takes, or None for another operator."""
    return _FORMATS.get(op_type)


def code_bytes(matrix: Matrix, format_: str) -> int:
    """Bytes of the codes of one matrix."""
    rows, columns = matrix.shape
    return rows * columns // (2 if format_ == FP4 else 1)


def scale_bytes(matrix: Matrix) -> int:
    """Bytes of the scales of one matrix."""
    return matrix.grid[0] * matrix.grid[1]


def routed_experts_words(format_: str, matrices: Mapping[str, Matrix], dtype: str) -> onnx.FunctionProto:
    """FoldkvRoutedExpertsFp4 or FoldkvRoutedExpertsFp8 with words instead of bytes; products run in ``dtype``.

    x [T, C] float32, chosen [T, K] int64, weights [T, K] float32, codes [E, words] int32, scales [E, words] int32,
    slots [E] int64 -> y [T, C] float32; attribute ``limit``. Between the products everything is float32. Element times scale is
    exact in bfloat16 unless it overflows or underflows, because a scale is a power of two.

    Args:
        format_: "fp4" or "fp8".
        matrices: where w1, w2 and w3 are in a row, in bytes; offsets are multiples of four.
        dtype: "bfloat16" or "float32".
    """
    kind = _DTYPES[dtype]
    elements = byte_pairs() if format_ == FP4 else byte_values(torch.float8_e4m3fn)
    exponents = scale_values(torch.arange(256, dtype=torch.uint8)).numpy()
    with np.errstate(invalid="ignore"):  # NaN stays NaN
        tables = {"table": exponents.astype(kind), "elements": elements.numpy().astype(kind)}
    constants: dict[str, np.ndarray] = {
        **tables, "axis": np.array([1]),
        "zero": np.array(0, np.int32), "one": np.array(1, np.int32), "greatest": np.array(2**31 - 1, np.int32),
        "half": np.array(128, np.int32), "base": np.array(256, np.int32),
    }  # fmt: skip
    decode = "".join(_decoding(part, matrices[part], format_, constants) for part in PARTS)
    to = int(onnx.helper.np_dtype_to_tensor_dtype(kind))
    body = f"""
        limit = Constant <value_float: float = @limit> ()
        low = Neg (limit)
        first = Constant <value_ints = [0]> ()
        second = Constant <value_ints = [1]> ()
        last = Constant <value_ints = [2]> ()
        sizes = Shape <start = 0, end = 1> (x)
        count = Squeeze (sizes, first)
        always = Constant <value = bool {{1}}> ()
        narrow = Cast <to = {to}> (x)
        y = Loop (count, always) <body = one_token (int64 token, bool go) => (bool more, float[C] row) {{
            more = Identity (go)
            input = Gather <axis = 0> (narrow, token)
            experts = Gather <axis = 0> (chosen, token)
            shares = Gather <axis = 0> (weights, token)
            places = Gather <axis = 0> (slots, experts)
            code = Gather <axis = 0> (codes, places)
            scale = Gather <axis = 0> (scales, places)
            {decode}
            column = Unsqueeze (input, second)
            gate_product = MatMul (w1, column)
            up_product = MatMul (w3, column)
            gate = Cast <to = 1> (gate_product)
            up = Cast <to = 1> (up_product)
            {clamped_swiglu()}
            hidden_narrow = Cast <to = {to}> (hidden)
            down_product = MatMul (w2, hidden_narrow)
            down = Cast <to = 1> (down_product)
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
    constants |= {
        f"{part}_tiles": np.array([-1, r, rows // r, c, columns // c]), f"{part}_grid": np.array([-1, r, 1, c, 1]),
        f"{part}_shape": np.array([-1, rows, columns]),
    }  # fmt: skip
    codes = _bytes(f"{part}_code", "code", matrix.codes, code_bytes(matrix, format_), constants)
    scales = _bytes(f"{part}_scale", "scale", matrix.scales, scale_bytes(matrix), constants)
    return f"""
            {codes}
            {part}_looked = Gather <axis = 0> (elements, {part}_code)
            {part}_tiled = Reshape ({part}_looked, {part}_tiles)
            {scales}
            {part}_factors = Gather <axis = 0> (table, {part}_scale)
            {part}_factor = Reshape ({part}_factors, {part}_grid)
            {part}_scaled = Mul ({part}_tiled, {part}_factor)
            {part} = Reshape ({part}_scaled, {part}_shape)
    """


def _bytes(name: str, rows: str, at: int, length: int, constants: dict[str, np.ndarray]) -> str:
    """Statements for ``length`` bytes, from byte ``at`` of rows of words: ``name`` [K, length] int32, 0 to 255."""
    assert at % WORD == 0, "a matrix begins within a word"
    words = -(-length // WORD)
    constants |= {
        f"{name}_from": np.array([at // WORD]), f"{name}_to": np.array([at // WORD + words]),
        f"{name}_row": np.array([-1, WORD * words]), f"{name}_none": np.array([0]), f"{name}_all": np.array([length]),
    }  # fmt: skip
    statements = f"""
            {name}_words = Slice ({rows}, {name}_from, {name}_to, axis)
            {name}_negative = Less ({name}_words, zero)
            {name}_near = Add ({name}_words, greatest)
            {name}_lifted = Add ({name}_near, one)
            {name}_sign = Where ({name}_negative, half, zero)
            {name}_0 = Where ({name}_negative, {name}_lifted, {name}_words)
            {name}_1 = Div ({name}_0, base)
            {name}_2 = Div ({name}_1, base)
            {name}_3 = Div ({name}_2, base)
    """
    for i in range(WORD - 1):
        statements += f"""
            {name}_above_{i} = Mul ({name}_{i + 1}, base)
            {name}_byte_{i} = Sub ({name}_{i}, {name}_above_{i})
            {name}_part_{i} = Unsqueeze ({name}_byte_{i}, last)
        """
    parts = ", ".join(f"{name}_part_{i}" for i in range(WORD))
    whole = f"{name}_padded" if length % WORD else name
    statements += f"""
            {name}_byte_{WORD - 1} = Add ({name}_{WORD - 1}, {name}_sign)
            {name}_part_{WORD - 1} = Unsqueeze ({name}_byte_{WORD - 1}, last)
            {name}_quads = Concat <axis = 2> ({parts})
            {whole} = Reshape ({name}_quads, {name}_row)
    """
    if length % WORD:
        statements += f"{name} = Slice ({whole}, {name}_none, {name}_all, axis)"
    return statements
