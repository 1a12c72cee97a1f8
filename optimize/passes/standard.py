"""A segment that was optimised for the cpu, in the operators of the ONNX standard, in a form that TensorRT takes, too.

What :func:`~foldkv.optimize.passes.cpu.optimize_for_cpu` and :func:`~foldkv.optimize.passes.transposes.fuse_transposes` put in the place of
standard operators is written out again, and so are the routed experts: grouped, they take NonZero and a ScatterND that adds, which TensorRT
refuses. Values differ in the order of sums alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from ...errors import BuildError
from ...export.operators.grouped import ONE_EXPERT

#: Domains of the ONNX standard, as models write them.
_STANDARD = ("", "ai.onnx")
_FUSED, _NORM, _HALF_STEP = "FusedMatMul", "SimplifiedLayerNormalization", "LpNormalization"


@dataclass(frozen=True)
class Routed:
    """The routed experts of a layer: the node that computes them, and what it takes.

    Attributes:
        node: in the main graph; its output is y [T, C].
        x: float32 [T, C].
        chosen: int64 [T, K].
        weights: float32 [T, K].
        limit: of the clamped SwiGLU.
    """

    node: ir.Node
    x: ir.Value
    chosen: ir.Value
    weights: ir.Value
    limit: float


def routed_of(model: ir.Model) -> Routed:
    """Find the grouped experts (export/operators/grouped.py) of an inlined segment.

    Raises:
        BuildError: there are none, or several.
    """
    found = [(node, body) for node in model.graph for body in _bodies(node) if body.name == ONE_EXPERT]
    if len(found) != 1:
        raise BuildError(
            f"a segment has {len(found)} loops over experts; expected one. Report this as a fault of foldkv."
        )
    [(node, body)] = found
    mine = _one(body, "NonZero")
    tokens = {value for one in mine.outputs[0].uses() if one.node.op_type == "Gather" for value in one.node.outputs}
    [x] = {one.inputs[0] for one in body if one.op_type == "Gather" and one.inputs[1] in tokens}
    chosen, weights = _one(body, "Equal").inputs[0], _one(body, "GatherND").inputs[0]
    clamps = {_scalar(value) for one in body if one.op_type == "Min" for value in one.inputs} - {None}
    if x is None or chosen is None or weights is None or len(clamps) != 1:
        raise BuildError("a loop over experts is not the one that foldkv writes. Report this as a fault of foldkv.")
    return Routed(node, x, chosen, weights, float(clamps.pop() or 0))


def write_experts_out(model: ir.Model, routed: Routed, experts: int, inner: int) -> dict[str, ir.Value]:
    """Replace the loop by products of every token with some experts, in place; an expert that did not get a token weighs it by 0.

    Args:
        model: the segment.
        routed: what :func:`routed_of` found.
        experts: how many are kept.
        inner: their width, I.

    Returns:
        New inputs of the graph: "numbers" int64 [E, 1, 1], "w1" and "w3" float32 [E, C, I], and "w2" float32 [E, I, C].
    """
    graph = model.graph
    assert routed.x.shape is not None
    width = int(routed.x.shape[-1])
    shapes = {"w1": [experts, width, inner], "w3": [experts, width, inner], "w2": [experts, inner, width]}
    taken = {"numbers": _input("experts.numbers", ir.DataType.INT64, [experts, 1, 1])}
    taken |= {part: _input(f"experts.{part}", ir.DataType.FLOAT, shape) for part, shape in shapes.items()}
    graph.inputs.extend(taken.values())
    write = _Writer(graph, routed.node, "experts.")
    first, last = write.constant("first", np.array([0])), write.constant("last", np.array([2]))
    limit = write.constant("limit", np.array(routed.limit, np.float32))
    low = write.constant("low", np.array(-routed.limit, np.float32))
    column = write("Unsqueeze", routed.x, first)
    clamped = write("Min", write("MatMul", column, taken["w1"]), limit)
    bounded = write("Max", write("Min", write("MatMul", column, taken["w3"]), limit), low)
    hidden = write("Mul", write("Mul", clamped, write("Sigmoid", clamped)), bounded)
    down = write("MatMul", hidden, taken["w2"])
    mine = write("Equal", write("Unsqueeze", routed.chosen, first), taken["numbers"])
    shares = write(
        "Where", mine, write("Unsqueeze", routed.weights, first), write.constant("none", np.array(0, np.float32))
    )
    share = write("ReduceSum", shares, last, keepdims=1)
    y = write("ReduceSum", write("Mul", down, share), first, keepdims=0)
    _replace(routed.node, y)
    return taken


def use_standard_operators(model: ir.Model) -> None:
    """Replace every operator that is none of the ONNX standard, in place, also in loops.

    Sums of the half steps of Sinkhorn are products with ones: TensorRT takes minutes to build a graph with a few of them as sums.

    Raises:
        BuildError: an operator is neither of the standard nor one of those that are known here.
    """
    for node in list(ir.traversal.RecursiveGraphIterator(model.graph)):
        graph = node.graph
        assert isinstance(graph, ir.Graph)
        for value in node.outputs:
            if value.name == "_":  # what nobody reads; TensorRT has such a name itself
                value.name = f"{node.name}.unread"
        write = _Writer(graph, node, f"{node.outputs[0].name}.")
        if node.op_type == _FUSED:
            _replace(node, _product(write, node))
        elif node.op_type == _NORM:
            _replace(node, _norm(write, node))
        elif node.op_type == _HALF_STEP:
            _replace(node, _half_step(write, node))
        elif (
            node.op_type == "Loop" and node.inputs[1] is None
        ):  # TensorRT's parser then misses the body's own condition
            node.replace_input_with(1, write.constant("always", np.array(True)))
        elif node.domain not in _STANDARD:
            raise BuildError(
                f"a segment has the operator {node.domain}.{node.op_type}, which standard ONNX has not. Report this as a fault of foldkv."
            )
    for domain in [name for name in model.graph.opset_imports if name not in _STANDARD]:
        del model.graph.opset_imports[domain]


def _product(write: _Writer, node: ir.Node) -> ir.Value:
    left, right = node.inputs
    assert left is not None and right is not None
    given = {name: node.attributes[name].value for name in node.attributes}
    if given != {"transA": 0, "transB": 1, "alpha": 1.0} or right.shape is None:
        raise BuildError(
            f"the product {node.name} has {given} and a shape {right.shape}. Report this as a fault of foldkv."
        )
    rank = len(right.shape)
    turned = write("Transpose", right, perm=[*range(rank - 2), rank - 1, rank - 2])
    return write("MatMul", left, turned)


def _norm(write: _Writer, node: ir.Node) -> ir.Value:
    x, scale = node.inputs
    assert x is not None and scale is not None
    axis = write.constant("axis", np.array([node.attributes["axis"].as_int()]))
    eps = write.constant("eps", np.array(node.attributes["epsilon"].as_float(), np.float32))
    mean = write("ReduceMean", write("Mul", x, x), axis, keepdims=1)
    return write("Mul", write("Div", x, write("Sqrt", write("Add", mean, eps))), scale)


def _half_step(write: _Writer, node: ir.Node) -> ir.Value:
    """The values are above 0, so their sum is the sum of their magnitudes."""
    [x] = node.inputs
    assert x is not None
    axis, p = (node.attributes[name].as_int() for name in ("axis", "p"))
    if p != 1 or axis not in (-1, -2) or x.shape is None or not isinstance(x.shape[axis], int):
        raise BuildError(
            f"the norm {node.name} has p = {p}, axis {axis} and the shape {x.shape}. Report this as a fault of foldkv."
        )
    ones = write.constant("ones", np.ones((int(x.shape[axis]),) * 2, np.float32))
    return write("Div", x, write("MatMul", x, ones) if axis == -1 else write("MatMul", ones, x))


class _Writer:
    """Writes nodes before another one."""

    def __init__(self, graph: ir.Graph, before: ir.Node, prefix: str) -> None:
        self._graph, self._before, self._prefix, self._count = graph, before, prefix, 0

    def __call__(self, op_type: str, *inputs: ir.Value, **attributes: Any) -> ir.Value:
        self._count += 1
        node = ir.node(op_type, inputs, attributes=attributes, name=f"{self._prefix}{op_type}_{self._count}")
        value = node.outputs[0]
        value.name = f"{self._prefix}{self._count}"
        self._graph.insert_before(self._before, node)
        return value

    def constant(self, name: str, array: np.ndarray) -> ir.Value:
        """A Constant node, which a loop's body can have, too."""
        node = ir.node("Constant", [], attributes={"value": ir.tensor(array)}, name=f"{self._prefix}{name}")
        value = node.outputs[0]
        value.name, value.shape, value.dtype = (
            f"{self._prefix}{name}",
            ir.Shape(array.shape),
            ir.DataType.from_numpy(array.dtype),
        )
        self._graph.insert_before(self._before, node)
        return value


def _replace(node: ir.Node, made: ir.Value) -> None:
    """Give the uses of a node's output the value that was made instead, under the old name."""
    old = node.outputs[0]
    name, made.type, made.shape = old.name, old.type, old.shape
    old.name = f"{name}.before"
    ir.convenience.replace_all_uses_with(old, made, replace_graph_outputs=True)
    made.name = name
    assert node.graph is not None
    node.graph.remove(node, safe=True)


def _bodies(node: ir.Node) -> list[ir.Graph]:
    """The subgraphs of a node, however deep."""
    own = [
        graph
        for value in node.attributes.values()
        if value.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
        for graph in (value.as_graphs() if value.type == ir.AttributeType.GRAPHS else [value.as_graph()])
    ]
    return [*own, *(inner for graph in own for one in graph for inner in _bodies(one))]


def _one(body: ir.Graph, op_type: str) -> ir.Node:
    found = [node for node in body if node.op_type == op_type]
    if len(found) != 1:
        raise BuildError(
            f"a loop over experts has {len(found)} {op_type}; expected one. Report this as a fault of foldkv."
        )
    return found[0]


def _scalar(value: ir.Value | None) -> float | None:
    tensor = None if value is None else ir.convenience.get_const_tensor(value)
    return None if tensor is None or tensor.size != 1 else float(tensor.numpy().reshape(()))


def _input(name: str, dtype: ir.DataType, shape: list[int]) -> ir.Value:
    return ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))
