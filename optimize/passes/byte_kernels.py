"""Operators on bytes and integers that have no kernel on a GPU, by others that have one. Values are the same.

Rows of packed caches are int8. ONNX Runtime's CUDA provider gathers rows of bytes with Gather and not with GatherND; it chooses between
int32 and not between int8, and pads float64 and not int64 (optimize/cuda_kernels.py has its table).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

_INT8, _INT32, _INT64, _DOUBLE = ir.DataType.INT8, ir.DataType.INT32, ir.DataType.INT64, ir.DataType.DOUBLE


def use_byte_kernels(model: ir.Model) -> int:
    """Replace the nodes, in place, also in loops; returns how many."""
    nodes = [(node, _replacement(node)) for node in model.graph.all_nodes()]
    for node, make in nodes:
        if make is None:
            continue
        build = _Build(node)
        make(build, node)
        build.finish(node)
    return sum(make is not None for _, make in nodes)


def _replacement(node: ir.Node) -> Callable[[_Build, ir.Node], None] | None:
    types = {value.dtype for value in (*node.inputs, *node.outputs) if value is not None}
    if node.domain or not types & {_INT8, _INT64}:
        return None
    if node.op_type == "GatherND" and _INT8 in types:
        return _rows
    if node.op_type == "Where" and _INT8 in types:
        return _choice
    data = node.inputs[0] if node.op_type == "Pad" else None
    return _pad if data is not None and data.dtype == _INT64 else None


class _Build:
    """Nodes before an old one; the last one gives what the old one gave."""

    def __init__(self, old: ir.Node) -> None:
        graph = old.graph
        assert isinstance(graph, ir.Graph)
        self._graph, self._old, self._count = graph, old, 0
        self.last: ir.Value | None = None

    def __call__(self, op_type: str, *inputs: ir.Value | None, **attributes: int | ir.DataType) -> ir.Value:
        """The value of a new node."""
        self._count += 1
        name = f"{self._old.name}_bytes_{self._count}"
        node = ir.node(op_type, inputs, attributes=attributes, name=name)
        self._graph.insert_before(self._old, node)
        self.last = node.outputs[0]
        self.last.name = name
        return self.last

    def constant(self, values: list[int]) -> ir.Value:
        """A list of int64."""
        self._count += 1
        array = np.array(values, np.int64)
        node = ir.node(
            "Constant", [], attributes={"value": ir.tensor(array)}, name=f"{self._old.name}_bytes_{self._count}"
        )
        self._graph.insert_before(self._old, node)
        value = node.outputs[0]
        value.name, value.dtype, value.shape = node.name, _INT64, ir.Shape(array.shape)
        return value

    def finish(self, old: ir.Node) -> None:
        """Let the last value take the place of the old one."""
        out, value = old.outputs[0], self.last
        assert value is not None
        self._graph.remove(old)  # before its value loses its name
        value.dtype, value.shape, value.name = out.dtype, out.shape, out.name
        ir.convenience.replace_all_uses_with(out, value, replace_graph_outputs=True)


def _rows(build: _Build, node: ir.Node) -> None:
    """GatherND of rows: data [B, N, D], indices [B, ..., 1] and one batch dimension -> [B, ..., D].

    The sequences' rows lie one after the other, so row n of sequence b is row b N + n of all.
    """
    data, indices = node.inputs
    assert data is not None and indices is not None and indices.shape is not None
    assert node.attributes["batch_dims"].value == 1 and indices.shape[-1] == 1
    between = len(indices.shape) - 2
    zero, one = build.constant([0]), build.constant([1])
    flat = build("Reshape", data, build("Concat", build.constant([-1]), build("Shape", data, start=2, end=3), axis=0))
    batch, count = build("Shape", data, start=0, end=1), build("Shape", data, start=1, end=2)
    sequences = build("Range", *(build("Squeeze", value) for value in (zero, batch, one)))
    begins = build("Mul", sequences, count)
    if between:
        begins = build("Unsqueeze", begins, build.constant(list(range(1, between + 1))))
    rows = build("Squeeze", indices, build.constant([-1]))
    build("Gather", flat, build("Add", rows, begins), axis=0)


def _choice(build: _Build, node: ir.Node) -> None:
    """Where of int8, in int32."""
    condition, *values = node.inputs
    wide = [build("Cast", value, to=_INT32) for value in values]
    build("Cast", build("Where", condition, *wide), to=_INT8)


def _pad(build: _Build, node: ir.Node) -> None:
    """Pad of int64 in float64, which holds integers of up to 53 bits; those here are codes of a byte."""
    data, pads, fill, *axes = node.inputs
    wide = [build("Cast", value, to=_DOUBLE) for value in (data, fill)]
    build("Cast", build("Pad", wide[0], pads, wide[1], *axes), to=_INT64)
