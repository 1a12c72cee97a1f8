"""Move what follows from a step's inputs alone out of the layers: it is computed once per step, not once per layer.

The angles of the rotation, the masks of the window, which token lies in which row: all layers of a kind, and often several
kinds, compute the same. In a chain every layer is a graph of its own, so these values become inputs of the layers, and the
graph of the step makes them. Only values whose shape follows from batch and chunk move: their buffers are bound once per
shape of a chunk.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

# Sizes of the step, and such a size plus a number: how torch.export names the rows of window and chunk.
_STEP_SIZE = re.compile(r"(batch|chunk)( [+*] \d+)?")


def hoist(step: ir.Model, segments: dict[str, ir.Model], shared: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    """Move values of the segments into ``step``, in place.

    Args:
        step: takes the step's inputs, and makes values from them.
        segments: optimized graphs by name.
        shared: names of the inputs that are the same for all segments: the step's inputs, and what it makes already.

    Returns:
        For each segment the names of the step's outputs that it takes, in the order of its inputs.
    """
    values = {value.name: value for value in (*step.graph.inputs, *step.graph.outputs)}
    known = _Known({name: values[name] for name in shared})
    taken = {name: _move(step, model, name, known) for name, model in segments.items()}
    for value in {id(value): value for pairs in taken.values() for value in pairs}.values():
        if not value.is_graph_output():
            step.graph.outputs.append(value)
    for model in (step, *segments.values()):
        RemoveUnusedNodesPass()(model)
    return {name: tuple(value.name or "" for value in pairs) for name, pairs in taken.items()}


@dataclass
class _Known:
    """What the step has: its values by name, and the nodes and constants in it by what they compute."""

    shared: dict[str, ir.Value]
    nodes: dict[object, ir.Node] = field(default_factory=dict)
    constants: dict[object, ir.Value] = field(default_factory=dict)


def _move(step: ir.Model, model: ir.Model, name: str, known: _Known) -> list[ir.Value]:
    """Copy every node that depends on the step alone; returns the step's values that the segment then takes."""
    graph = model.graph
    twin = {value: known.shared[value.name] for value in graph.inputs if value.name in known.shared}
    copied: set[ir.Node] = set()
    for node in graph:
        if not _movable(node, twin):
            continue
        inputs = [None if value is None else _twin(step, value, twin, name, known) for value in node.inputs]
        key = (
            node.op_identifier(), tuple(map(id, inputs)), len(node.outputs),
            tuple(sorted((key, repr(attribute.value)) for key, attribute in node.attributes.items())),
        )  # fmt: skip
        if key not in known.nodes:
            new = ir.Node(
                node.domain, node.op_type, inputs, list(node.attributes.values()), num_outputs=len(node.outputs),
                name=f"{name}.{node.name}",
            )  # fmt: skip
            for old, out in zip(node.outputs, new.outputs, strict=True):
                out.name, out.dtype, out.shape = f"{name}.{old.name}", old.dtype, old.shape
            step.graph.append(new)
            known.nodes[key] = new
        twin |= dict(zip(node.outputs, known.nodes[key].outputs, strict=True))
        copied.add(node)
    taken: dict[ir.Value, ir.Value] = {}
    for node in copied:
        for value in node.outputs:
            outside = [(user, at) for user, at in value.uses() if user not in copied]
            if not outside or not _fixed(value):
                continue
            source = twin[value]
            if source not in taken:
                new_input = ir.Value(name=source.name, type=ir.TensorType(value.dtype), shape=value.shape)
                graph.inputs.append(new_input)
                taken[source] = new_input
            for user, at in outside:
                user.replace_input_with(at, taken[source])
    return list(taken)


def _movable(node: ir.Node, twin: dict[ir.Value, ir.Value]) -> bool:
    """Whether a node reads only constants and what the step has, and at least one of the latter."""
    if any(
        attribute.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for attribute in node.attributes.values()
    ):
        return False
    given = [value for value in node.inputs if value is not None]
    return any(value in twin for value in given) and all(value in twin or _constant(value) for value in given)


def _constant(value: ir.Value) -> bool:
    node = value.producer()
    return value.is_initializer() or (node is not None and node.op_type == "Constant")


def _twin(step: ir.Model, value: ir.Value, twin: dict[ir.Value, ir.Value], name: str, known: _Known) -> ir.Value:
    if value not in twin:
        tensor, node = value.const_value, value.producer()
        if tensor is None and node is not None:
            tensor = node.attributes["value"].as_tensor()
        assert tensor is not None
        array = tensor.numpy()
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in known.constants:
            copy = ir.Value(name=f"{name}.{value.name}", const_value=ir.tensor(array, name=f"{name}.{value.name}"))
            copy.dtype, copy.shape = tensor.dtype, ir.Shape(array.shape)
            step.graph.register_initializer(copy)
            known.constants[key] = copy
        twin[value] = known.constants[key]
    return twin[value]


def _fixed(value: ir.Value) -> bool:
    """Whether the shape of a value follows from batch and chunk alone."""
    if value.shape is None or value.dtype is None:
        return False
    return all(
        isinstance(size, int) or (size.value is not None and _STEP_SIZE.fullmatch(size.value)) for size in value.shape
    )
