"""The graph in the form that ONNX Runtime runs fastest: the number of nodes bounds the speed of a decode step.

Operators are inlined, so anything that layers share (which row holds which token, the angles) is
computed once. Sizes are read off the inputs, norms become one node, Sinkhorn's loop is unrolled into
one node per half step, RoPE swaps the channels of a pair in a product, and caches are read in blocks (blocks.py). Results differ from the function bodies only by float32 rounding.
"""

from __future__ import annotations

import re
import threading
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import (
    CommonSubexpressionEliminationPass,
    DeduplicateInitializersPass,
    InlinePass,
    LiftConstantsToInitializersPass,
    LiftSubgraphInitializersToMainGraphPass,
    RemoveUnusedNodesPass,
)
from onnxscript.optimizer import fold_constants
from onnxscript.rewriter import pattern, rewrite
from onnxscript.rewriter.ort_fusions.rms_normalization import fuse_rms_normalization

from ...export.operators.experts import grouped_body
from ...export.operators.registry import DOMAIN
from .blocks import read_in_blocks

# Functions that are called in other forms here than their own.
_ROPE, _SINKHORN = "FoldkvRope", "FoldkvSinkhorn"
_END = np.iinfo(np.int64).max
_TABLE = 1 << 16  # elements of the largest table that an operator's body holds
# A sum of a named dimension and a number: torch.export writes the rows of window and chunk in this way.
_SUM = re.compile(r"(\w+) \+ (\d+)")


# onnxscript's rules for norms are objects of its module that keep the match they are at: two threads would mix theirs.
_REWRITING = threading.Lock()


def optimize_for_cpu(model: ir.Model) -> int:
    """Bring a graph into the form that ONNX Runtime runs fastest, in place; returns its nodes after inlining."""
    with _REWRITING:
        return _optimize(model)


def _optimize(model: ir.Model) -> int:
    read_in_blocks(model)
    _group_experts(model)
    InlinePass(criteria=lambda function: function.name not in (_ROPE, _SINKHORN))(model)
    rewrite(model, pattern_rewrite_rules=[_RopeAsProducts.rule(), _UnrolledSinkhorn.rule()])
    InlinePass()(model)
    inlined = len(model.graph)
    _simplify(model)
    _read_sizes_off_inputs(model)
    fuse_rms_normalization(model)
    rewrite(model, pattern_rewrite_rules=[_PlainRmsNorm.rule(), _EntryRmsNorm.rule()])
    _simplify(model)
    _name_casts(model)
    _share_constants(model)
    return inlined


def _name_casts(model: ir.Model) -> None:
    """Casts to the type of another value, which no library has a kernel for, as casts to that type."""
    for node in model.graph.all_nodes():
        dtype = _type_of(node.inputs[1]) if node.op_type == "CastLike" else None
        if dtype is not None:
            cast = ir.node("Cast", node.inputs[:1], attributes={"to": dtype}, name=node.name)
            value = cast.outputs[0]
            value.name, value.dtype, value.shape = node.outputs[0].name, dtype, node.outputs[0].shape
            graph = node.graph
            assert graph is not None
            graph.insert_before(node, cast)
            ir.convenience.replace_all_uses_with(node.outputs[0], value, replace_graph_outputs=True)
            graph.remove(node, safe=True)


def _type_of(value: ir.Value | None) -> ir.DataType | None:
    """The type of a value, also of a part of a shape inside a loop, where inference leaves it out; None if unknown."""
    node = value.producer() if value is not None else None
    if value is None or value.dtype is not None or node is None:
        return value.dtype if value is not None else None
    if node.op_type == "Shape":
        return ir.DataType.INT64
    return _type_of(node.inputs[0]) if node.op_type in ("Identity", "Slice", "Squeeze", "Unsqueeze") else None


def _group_experts(model: ir.Model) -> None:
    """Let the tokens of a chunk share the dense weights of their experts; the body for packed weights shares them already."""
    body = ir.serde.deserialize_function(grouped_body())
    if body.identifier() in model.functions:
        model.functions[body.identifier()] = body


def _share_constants(model: ir.Model) -> None:
    # The bodies' own tables are the same in every layer. Weights are larger and are not compared.
    LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    LiftSubgraphInitializersToMainGraphPass()(model)
    DeduplicateInitializersPass(size_limit=_TABLE)(model)


def _simplify(model: ir.Model) -> None:
    # Not onnxscript's whole `optimize`: its rewrite rules find nothing here and take most of a minute.
    fold_constants(model, onnx_shape_inference=True)
    CommonSubexpressionEliminationPass()(model)
    RemoveUnusedNodesPass()(model)


class _UnrolledSinkhorn(pattern.RewriteRuleClassBase):  # type: ignore[misc]
    """Half steps as LpNormalization, which omits ``eps``; the first and the last half step keep it.

    The input is a softmax plus ``eps``, so every sum after the first half step is 1/16 or more. Where a
    middle step omits the ``eps`` of 1e-6, the next one makes up for it.
    """

    def pattern(self, op: Any, matrix: Any) -> Any:
        return op.FoldkvSinkhorn(matrix, _domain=DOMAIN, _outputs=["balanced"])

    def check(self, context: Any, matrix: Any, balanced: ir.Value) -> bool:
        return bool(_attribute(balanced, "iterations") > 1)

    def rewrite(self, op: Any, matrix: Any, balanced: ir.Value) -> Any:
        def exact(value: Any) -> Any:
            sums = op.ReduceSum(value, op.Constant(value_ints=[-2]), keepdims=1)
            return op.Div(value, op.Add(sums, op.Constant(value_float=_attribute(balanced, "eps"))))

        value = exact(matrix)
        for _ in range(_attribute(balanced, "iterations") - 2):
            value = op.LpNormalization(op.LpNormalization(value, axis=-1, p=1), axis=-2, p=1)
        return exact(op.LpNormalization(value, axis=-1, p=1))


class _RopeAsProducts(pattern.RewriteRuleClassBase):  # type: ignore[misc]
    """Six nodes for each call after the first: with x' = x P, which holds (-odd, even) for every pair (even, odd),
    the turned channels are x cos + x' sin. Zeros and ones of P leave the values as they are."""

    def pattern(self, op: Any, x: Any, positions: Any, inv_freq: Any) -> Any:
        return op.FoldkvRope(x, positions, inv_freq, _domain=DOMAIN, _outputs=["turned"])

    def check(self, context: Any, x: ir.Value, positions: ir.Value, inv_freq: ir.Value, turned: ir.Value) -> bool:
        return ir.convenience.get_const_tensor(inv_freq) is not None

    def rewrite(self, op: Any, x: ir.Value, positions: ir.Value, inv_freq: ir.Value, turned: ir.Value) -> Any:
        table = ir.convenience.get_const_tensor(inv_freq)
        assert table is not None
        frequencies = table.numpy().repeat(2)  # of every channel
        size = len(frequencies)
        swap = np.zeros((size, size), np.float32)
        sign = -1 if _attribute(turned, "inverse") else 1
        for even in range(0, size, 2):
            swap[even + 1, even], swap[even, even + 1] = -sign, sign

        def constant(values: np.ndarray) -> Any:
            return op.Constant(value=ir.tensor(values))

        angle = op.Mul(op.Unsqueeze(op.Cast(positions, to=1), constant(np.array([2, 3]))), constant(frequencies))
        start, axis = constant(np.array([-size])), constant(np.array([3]))
        keep = op.Slice(x, constant(np.array([0])), start, axis)
        turn = op.Slice(x, start, constant(np.array([_END])), axis)
        swapped = op.Mul(op.MatMul(turn, constant(swap)), op.Sin(angle))
        return op.Concat(keep, op.Add(op.Mul(turn, op.Cos(angle)), swapped), axis=-1)


class _EntryRmsNorm(pattern.RewriteRuleClassBase):  # type: ignore[misc]
    """The RMSNorm of entries, which their operators compute with a division."""

    def pattern(self, op: Any, x: Any, eps: Any, norm: Any) -> Any:
        scale = op.Sqrt(op.Add(op.ReduceMean(op.Mul(x, x), [-1], keepdims=1), eps))
        return op.Mul(op.Div(x, scale), norm)

    def check(self, context: Any, x: ir.Value, eps: ir.Value, norm: ir.Value) -> bool:
        return eps.const_value is not None and eps.const_value.size == 1

    def rewrite(self, op: Any, x: ir.Value, eps: ir.Value, norm: ir.Value) -> Any:
        assert eps.const_value is not None
        return op.SimplifiedLayerNormalization(x, norm, axis=-1, epsilon=eps.const_value.numpy().item(), stash_type=1)


class _PlainRmsNorm(pattern.RewriteRuleClassBase):  # type: ignore[misc]
    """An RMSNorm without a weight, as in hyper-connections and query heads."""

    def pattern(self, op: Any, x: Any, eps: Any) -> Any:
        mean = op.ReduceMean(op.Pow(x, 2.0), [-1], keepdims=1, noop_with_empty_axes=0)
        return op.Mul(x, op.Reciprocal(op.Sqrt(op.Add(mean, eps))))

    def check(self, context: Any, x: ir.Value, eps: ir.Value) -> bool:
        known = eps.const_value is not None and eps.const_value.size == 1
        return known and x.shape is not None and isinstance(x.shape[-1], int)

    def rewrite(self, op: Any, x: ir.Value, eps: ir.Value) -> Any:
        assert x.shape is not None and eps.const_value is not None
        ones = op.Constant(value=ir.tensor(np.ones(int(x.shape[-1]), np.float32)))
        return op.SimplifiedLayerNormalization(x, ones, axis=-1, epsilon=eps.const_value.numpy().item(), stash_type=1)


def _attribute(value: ir.Value, name: str) -> Any:
    node = value.producer()
    assert node is not None
    return node.attributes[name].value


def _read_sizes_off_inputs(model: ir.Model) -> None:
    """Let every ``Shape`` read the inputs instead if their dimensions (plus a number) are the same.

    Layers ask for the sizes of their own tensors, which differ only in name. Once all layers ask the
    same input, everything computed from the sizes is the same in all layers too.
    """
    sizes = _Sizes(model.graph)
    for node in list(model.graph):
        if node.op_type != "Shape" or node in sizes.own:
            continue
        shape = node.inputs[0].shape if node.inputs[0] is not None else None
        if shape is None:
            continue
        start = node.attributes["start"].value if "start" in node.attributes else 0
        end = node.attributes["end"].value if "end" in node.attributes else len(shape)
        wanted = [sizes.of(dimension) for dimension in shape[start:end]]
        if not wanted or any(value is None for value in wanted):
            continue
        value = wanted[0]
        if len(wanted) > 1:
            joined = ir.node("Concat", wanted, attributes={"axis": 0}, name=f"{node.name}_sizes")
            value = _named(joined, f"{node.name}_sizes", len(wanted))
            model.graph.insert_before(node, joined)
        ir.convenience.replace_all_uses_with(node.outputs[0], value)
        model.graph.remove(node, safe=True)


class _Sizes:
    """One value [1] int64 for each dimension, made on first use, at the graph's start."""

    def __init__(self, graph: ir.Graph) -> None:
        self._graph, self._values, self.own = graph, {}, set[ir.Node]()
        self._inputs: dict[str, tuple[ir.Value, int]] = {}
        # Of integers first: in a chain these belong to the step, and what follows from them is shared (hoist.py).
        for value in sorted(graph.inputs, key=lambda value: value.dtype == ir.DataType.FLOAT):
            for axis, dimension in enumerate(value.shape or ()):
                if not isinstance(dimension, int) and dimension.value is not None:
                    self._inputs.setdefault(dimension.value, (value, axis))

    _values: dict[int | str, ir.Value]

    def of(self, dimension: int | ir.SymbolicDim) -> ir.Value | None:
        """The size, or None if the inputs do not have it."""
        key = dimension if isinstance(dimension, int) else dimension.value
        if key is None or key in self._values:
            return self._values.get(key) if key is not None else None
        value: ir.Value | None = None
        if isinstance(key, int):
            value = ir.Value(name=f"size_of_{key}", const_value=ir.tensor(np.array([key]), name=f"size_of_{key}"))
            value.shape, value.dtype = ir.Shape([1]), ir.DataType.INT64
            self._graph.register_initializer(value)
        elif key in self._inputs:
            source, axis = self._inputs[key]
            value = self._first(
                ir.node("Shape", [source], attributes={"start": axis, "end": axis + 1}), f"size_of_{key}"
            )
        elif match := _SUM.fullmatch(key):
            terms = [self.of(ir.SymbolicDim(match[1])), self.of(int(match[2]))]
            if None not in terms:
                value = _named(added := ir.node("Add", terms), f"size_of_{match[1]}_{match[2]}", 1)
                producer = terms[0].producer() if terms[0] is not None else None
                assert producer is not None
                self._graph.insert_after(producer, added)
        if value is not None:
            self._values[key] = value
        return value

    def _first(self, node: ir.Node, name: str) -> ir.Value:
        value = _named(node, name, 1)
        self._graph.insert_before(self._graph[0], node)
        self.own.add(node)
        return value


def _named(node: ir.Node, name: str, size: int) -> ir.Value:
    node.name, value = name, node.outputs[0]
    value.name, value.shape, value.dtype = name, ir.Shape([size]), ir.DataType.INT64
    return value
