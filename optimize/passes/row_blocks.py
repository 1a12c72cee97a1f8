"""Matrices in bfloat16, in blocks of rows: each is widened to float32 just before its product, while it is in the processor's cache.

ONNX Runtime multiplies in float32 on the CPU. A matrix that is widened as a whole goes to memory and comes back, which takes
longer than the product. A block of rows stays in the cache, and a step reads half of the bytes of a float32 matrix.
Blocks are inputs of their own, bound to ranges of the mapped file, so nothing is cut or copied in a step. Values are exact.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from ...export.checkpoint.names import scale_name
from ...export.contract.stacks import BLOCK_BYTES, RowBlocks, block_name
from .products import product_of, remove_unused


def row_blocks(rows: int, columns: int, groups: int) -> RowBlocks:
    """The blocks of a matrix [rows, columns], of at most ``BLOCK_BYTES`` in float32."""
    group = rows // groups
    return RowBlocks(group, max(1, min(group, BLOCK_BYTES // (4 * columns))))


def take_row_blocks(model: ir.Model, role: str, blocks: RowBlocks, dtype: ir.DataType) -> None:
    """Let a segment take a matrix in blocks of rows, in place.

    Args:
        model: of a segment whose weights are inputs.
        role: of the matrix, as the segment has it: in bfloat16 or float16, or in e4m3 with scales, which it takes no longer.
        blocks: the blocks.
        dtype: of the blocks: bfloat16 or float16.

    Raises:
        BuildError: the matrix is not used as in a product.
    """
    graph = model.graph
    stored = next(value for value in graph.inputs if value.name == role)
    value = next(v for node in graph for v in node.outputs if v.name == f"{role}.value")
    assert value.shape is not None
    rows, columns = (int(size) for size in value.shape)
    groups = rows // blocks.group
    product = product_of(value, groups, role)
    taken, at = [], list(graph.inputs).index(stored)
    for number, (start, end) in enumerate(blocks.spans(rows)):
        one = ir.Value(name=block_name(role, number), type=ir.TensorType(dtype), shape=ir.Shape([end - start, columns]))
        taken.append(one)
    _Blocks(graph, product, role).replace(taken, groups, rows, columns)
    graph.inputs[at : at + 1] = taken
    for given in [one for one in graph.inputs if one.name == scale_name(role) and not one.uses()]:
        graph.inputs.remove(given)


class _Blocks:
    """Nodes before a product, which compute what it gave."""

    def __init__(self, graph: ir.Graph, product: ir.Node, role: str) -> None:
        self._graph, self._product, self._role = graph, product, role

    def replace(self, taken: list[ir.Value], groups: int, rows: int, columns: int) -> None:
        product, out = self._product, self._product.outputs[0]
        x = product.inputs[0]
        assert x is not None
        if groups > 1:
            result = self._by_group(x, taken, groups, columns)
        else:
            flat = self._add("Reshape", x, self._constant([-1, columns], "flat_shape"), name="flat")
            result = self._rows(flat, taken, "all")
            if product.op_type != "Gemm":
                leading = self._add("Shape", x, name="leading", start=0, end=-1)
                shape = self._add("Concat", leading, self._constant([rows], "count"), name="out_shape", axis=0)
                result = self._add("Reshape", result, shape, name="out")
        result.dtype, result.shape = ir.DataType.FLOAT, out.shape
        if out.is_graph_output():
            result.name, out.name = out.name, None
        ir.convenience.replace_all_uses_with(out, result, replace_graph_outputs=True)
        remove_unused(product)

    def _by_group(self, x: ir.Value, taken: list[ir.Value], groups: int, columns: int) -> ir.Value:
        """x [groups, tokens, columns] -> [groups, tokens, rows of a group]."""
        count, parts = len(taken) // groups, []
        for group in range(groups):
            part = self._add("Gather", x, self._constant([group], f"group_{group}_at"), name=f"group_{group}", axis=0)
            flat = self._add("Reshape", part, self._constant([-1, columns], "flat_shape"), name=f"group_{group}_flat")
            made = self._rows(flat, taken[group * count : (group + 1) * count], f"group_{group}")
            parts.append(self._add("Unsqueeze", made, self._constant([0], "first"), name=f"group_{group}_out"))
        return self._add("Concat", *parts, name="groups", axis=0)

    def _rows(self, flat: ir.Value, taken: list[ir.Value], name: str) -> ir.Value:
        """flat [tokens, columns] -> [tokens, rows of all blocks]."""
        parts = []
        for block in taken:
            wide = self._add("Cast", block, name=f"{block.name}.wide", to=ir.DataType.FLOAT)
            parts.append(self._add("Gemm", flat, wide, name=f"{block.name}.product", transB=1))
        return parts[0] if len(parts) == 1 else self._add("Concat", *parts, name=f"{name}_rows", axis=1)

    def _add(self, op_type: str, *inputs: ir.Value, name: str, **attributes: Any) -> ir.Value:
        full = name if name.startswith(self._role) else f"{self._role}.{name}"
        node = ir.node(op_type, inputs, attributes, name=full)
        self._graph.insert_before(self._product, node)
        node.outputs[0].name = full
        return node.outputs[0]

    def _constant(self, values: list[int], name: str) -> ir.Value:
        full = f"{self._role}.{name}"
        if full not in self._graph.initializers:
            array = np.array(values, np.int64)
            value = ir.Value(name=full, const_value=ir.tensor(array, name=full))
            value.dtype, value.shape = ir.DataType.INT64, ir.Shape(array.shape)
            self._graph.register_initializer(value)
        return self._graph.initializers[full]
