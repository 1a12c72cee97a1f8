"""Sinkhorn-Knopp iterations that make a positive matrix nearly doubly stochastic.

Columns first, then ``iterations - 1`` times rows and columns; ``eps`` is added to every sum
(V4 report 2.2; transformers `DeepseekV4HyperConnection`). The ONNX function is a Loop: unrolled, twenty
steps make TensorRT's compiler take minutes instead of a fraction of a second.
"""

from __future__ import annotations

from onnxscript import FLOAT, script
from onnxscript import opset20 as op
from torch import Tensor

from .registry import OPSET


def sinkhorn(matrix: Tensor, iterations: int, eps: float) -> Tensor:
    """matrix [..., n, n], positive -> the same shape."""
    matrix = matrix / (matrix.sum(dim=-2, keepdim=True) + eps)
    for _ in range(iterations - 1):
        matrix = matrix / (matrix.sum(dim=-1, keepdim=True) + eps)
        matrix = matrix / (matrix.sum(dim=-2, keepdim=True) + eps)
    return matrix


@script(OPSET, default_opset=op)
def FoldkvSinkhorn(matrix: FLOAT, iterations: int, eps: float):  # type: ignore[no-untyped-def]
    balanced = matrix / (op.ReduceSum(matrix, [-2], keepdims=1) + eps)
    for _ in range(iterations - 1):
        rows = balanced / (op.ReduceSum(balanced, [-1], keepdims=1) + eps)
        balanced = rows / (op.ReduceSum(rows, [-2], keepdims=1) + eps)
    return balanced
