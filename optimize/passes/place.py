"""Weights of a segment in float32, which is what ONNX Runtime computes in on the CPU; the graph follows.

A weight that a checkpoint stores in another type is either converted in every step, or *placed*: converted once, into a
file of the bundle (optimize/chain.py). Here the graph of a segment is changed to take it in that form.
"""

from __future__ import annotations

import onnx_ir as ir

from ...export.checkpoint.names import scale_name
from .products import remove_unused


def take_float32(model: ir.Model, role: str) -> None:
    """Let a segment take a weight in float32, and not convert it itself; in place."""
    graph = model.graph
    stored = next(value for value in graph.inputs if value.name == role)
    at = list(graph.inputs).index(stored)
    value = next((v for node in graph for v in node.outputs if v.name == f"{role}.value"), None)
    shape = stored.shape if value is None else value.shape
    wide = ir.Value(name=role, type=ir.TensorType(ir.DataType.FLOAT), shape=shape)
    graph.inputs[at] = wide
    stored.name = f"{role}.stored"
    if value is None:  # the experts' operator reads any type, and an embedding is converted after its look-up
        ir.convenience.replace_all_uses_with(stored, wide)
        return
    ir.convenience.replace_all_uses_with(value, wide)
    remove_unused(value.producer())
    for given in [value for value in graph.inputs if value.name == scale_name(role) and not value.uses()]:
        graph.inputs.remove(given)  # the values have their scale in them
