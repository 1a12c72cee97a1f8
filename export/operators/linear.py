"""FoldkvBlockLinear: y = x W^T with a weight as stored. Nodes of it are made for engines, after tracing (optimize/passes/linears.py).

x [M, G K] float32, weight [G N, K] (e4m3 as int8, or bfloat16), scale [ceil(G N / block_rows), ceil(K / block_columns)]
(e8m0 exponents as int8, or float32) -> y [M, G N] float32. An element of the weight is its code times the scale of its
block, as in export/checkpoint/formats.py; a bfloat16 weight has one block. With G ``groups``, group g of x meets rows g N
to (g + 1) N. Of x, the sum of ``terms`` bfloat16 is used: 1 rounds it to bfloat16, 3 has float32's 24 bits. Sums are float32.
"""

from __future__ import annotations

import torch
from onnx import numpy_helper
from onnxscript import FLOAT, INT8, script
from onnxscript import opset20 as op
from torch import Tensor

from ..checkpoint.values import byte_values, scale_values
from ..contract.products import ROUNDED
from ..contract.weights import E4M3, EXPONENT
from .registry import OPSET, operator

_ELEMENTS = numpy_helper.from_array(byte_values(torch.float8_e4m3fn).numpy(), "elements")
_POWERS = numpy_helper.from_array(scale_values(torch.arange(256, dtype=torch.uint8)).numpy(), "powers")


def block_linear(
    x: Tensor, weight: Tensor, scale: Tensor, groups: int, block_rows: int, block_columns: int, terms: int,
    weight_format: str, scale_format: str,
) -> Tensor:  # fmt: skip
    """The definition in torch."""
    elements = (weight.view(torch.float8_e4m3fn) if weight_format == E4M3 else weight).to(x.dtype)
    factors = (scale_values(scale.view(torch.uint8)) if scale_format == EXPONENT else scale).to(x.dtype)
    rows, columns = weight.shape
    spread = factors.repeat_interleave(block_rows, 0)[:rows].repeat_interleave(block_columns, 1)[:, :columns]
    values = (elements * spread).unflatten(0, (groups, -1))
    taken = x.to(torch.bfloat16).to(x.dtype) if terms == ROUNDED else x
    return torch.einsum("mgk,gnk->mgn", taken.unflatten(1, (groups, -1)), values).flatten(1)


@script(OPSET, default_opset=op)
def FoldkvBlockLinear(x: FLOAT, weight: INT8, scale: INT8, groups: int, block_rows: int, block_columns: int, terms: int, weight_format: str, scale_format: str):  # type: ignore[no-untyped-def]  # fmt: skip
    # A negative byte finds its row from the end of the table (packed.py).
    if op.Equal(op.Constant(value_string=weight_format), op.Constant(value_string="e4m3")):
        elements = op.Gather(op.Constant(value=_ELEMENTS), op.Cast(weight, to=7))
    else:
        elements = op.Cast(weight, to=1)
    if op.Equal(op.Constant(value_string=scale_format), op.Constant(value_string="exponent")):
        factors = op.Gather(op.Constant(value=_POWERS), op.Cast(scale, to=7))
    else:
        factors = op.Cast(scale, to=1)
    taken = op.Where(op.Equal(op.Constant(value_int=terms), 1), op.Cast(op.Cast(x, to=16), to=1), x)
    one = op.Constant(value_ints=[1])
    count = one * groups
    columns = op.Shape(weight, start=1, end=2)
    block = op.Concat(one, one * block_rows, one, one * block_columns, axis=0)
    blocks = op.Expand(op.Unsqueeze(factors, [1, 3]), block)
    grid = op.Reshape(blocks, op.Concat(op.Shape(scale, start=0, end=1) * block_rows, [-1], axis=0))
    spread = op.Slice(grid, [0, 0], op.Shape(weight))
    values = op.Reshape(elements * spread, op.Concat(count, [-1], columns, axis=0))
    parts = op.Transpose(op.Reshape(taken, op.Concat([-1], count, columns, axis=0)), perm=[1, 0, 2])
    products = op.Transpose(op.MatMul(parts, op.Transpose(values, perm=[0, 2, 1])), perm=[1, 0, 2])
    return op.Reshape(products, op.Concat([-1], op.Shape(weight, start=0, end=1), axis=0))


linear = operator("FoldkvBlockLinear", eager=block_linear, function=FoldkvBlockLinear)
