"""Weights of a segment in float32, which is what ONNX Runtime computes in on the CPU; the graph follows.

A weight that a checkpoint stores in another type is either converted in every step, or *placed*: converted once, into a
file of the bundle (optimize/chain.py). Here the graph of a segment is changed to take it in that form.
"""

from __future__ import annotations

import onnx_ir as ir

from ...export.checkpoint.names import scale_name


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
    node = value.producer()
    assert node is not None
    ir.convenience.replace_all_uses_with(value, wide)
    pending: list[ir.Node | None] = [node]
    while pending:
        dead = pending.pop()
        if dead is None or dead.graph is None or any(out.uses() for out in dead.outputs):
            continue
        before = [value.producer() for value in dead.inputs if value is not None]
        graph.remove(dead, safe=True)
        pending += before
    for given in [value for value in graph.inputs if value.name == scale_name(role) and not value.uses()]:
        graph.inputs.remove(given)  # the values have their scale in them
