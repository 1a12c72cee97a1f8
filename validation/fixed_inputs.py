"""A graph for one set of inputs: all that follows from them, and from sizes, becomes constants, and only what follows from the others
is computed.

So a segment is left with what a layer computes with its streams. Weights are decoded, masks and places in caches are tables, all
sizes are numbers, and nothing is left of types that a library may not take.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
from onnx import helper, numpy_helper

from ..errors import FoldkvError
from ..runtime.chain import first_line, session_options

#: A turned matrix stays under its name, and whoever runs the graph turns it once.
_LEFT = {"Transpose"}
_SIZES = {"Shape", "Size"}
_BIAS = np.uint32(1 << 16)


@dataclass(frozen=True)
class Typed:
    """An array and ONNX's number of its type, which numpy may lack; then integers hold the bits."""

    array: npt.NDArray[Any]
    kind: int

    @classmethod
    def of(cls, array: npt.NDArray[Any], kind: int | None = None) -> Typed:
        """An array [...] of a type that numpy has, or of the given one; contiguous."""
        found = helper.np_dtype_to_tensor_dtype(array.dtype) if kind is None else kind
        return cls(np.ascontiguousarray(array), found)


def run_graph(
    model: onnx.ModelProto, values: Mapping[str, Typed], outputs: Sequence[str], *, threads: int = 1
) -> dict[str, npt.NDArray[Any]]:
    """Values inside a graph whose inputs are given. Only what they need is computed.

    Raises:
        FoldkvError: ONNX Runtime cannot run it.
    """
    asked = onnx.ModelProto()
    asked.CopyFrom(model)
    del asked.graph.output[:]
    asked.graph.output.extend(onnx.ValueInfoProto(name=name) for name in outputs)
    _drop_unused(asked.graph)
    used = {name for node in asked.graph.node for name in _reads(node)} | set(outputs)
    kept = [value for value in asked.graph.input if value.name in used]
    del asked.graph.input[:]
    asked.graph.input.extend(kept)
    options = session_options(onnxruntime, threads, decode=False)
    try:
        session = onnxruntime.InferenceSession(asked.SerializeToString(), options, providers=["CPUExecutionProvider"])
        given = {value.name: values[value.name] for value in kept}
        # These lie over the arrays, which must stay as long.
        feeds = {
            name: onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(one.array, one.kind)
            for name, one in given.items()
        }
        found = session.run_with_ort_values(list(outputs), feeds)
    except Exception as error:  # ONNX Runtime's own classes derive from nothing else
        raise FoldkvError(f"ONNX Runtime cannot run the layer: {first_line(error)}") from error
    return {name: value.numpy() for name, value in zip(outputs, found, strict=True)}


def with_fixed_inputs(
    model: onnx.ModelProto, values: Mapping[str, Typed], free: Mapping[str, npt.NDArray[Any]], *, threads: int = 1
) -> tuple[onnx.ModelProto, dict[str, Typed]]:
    """A graph that takes ``free`` only, in these shapes, and the constants that it takes as inputs, too.

    Args:
        model: a graph without functions; types are numpy's wherever values are left over.
        values: all of its inputs.
        free: the inputs that it keeps, with values, whose shapes become its own.
        threads: of the run that finds the constants.

    Returns:
        The graph, whose inputs are ``free`` and then the constants, and the constants by name.
    """
    model = _unrolled(model, values, threads)
    graph = model.graph
    _drop_unused(graph)
    constant = {one.name for one in graph.initializer} | {one.name for one in graph.input if one.name not in free}
    nodes, kept = [], []
    for node in graph.node:
        follows = all(name in constant for name in _reads(node)) and node.op_type not in _LEFT
        if follows or node.op_type in _SIZES:
            constant.update(node.output)
            nodes.append(node)
        else:
            kept.append(node)
    wanted = {name for node in kept for name in _reads(node)} | {value.name for value in graph.output}
    inside = {one.name for one in graph.initializer}
    edge = sorted((wanted & constant) - inside)
    given = {name: values[name] for name in edge if name in values}
    made_of = run_graph(model, values, [name for name in edge if name not in given], threads=threads)
    found = given | {name: Typed.of(array) for name, array in made_of.items()}
    made = onnx.ModelProto()
    made.CopyFrom(model)
    del made.graph.node[:], made.graph.input[:], made.graph.value_info[:], made.graph.initializer[:]
    made.graph.node.extend(kept)
    made.graph.initializer.extend(one for one in graph.initializer if one.name in wanted)
    taken = {name: Typed.of(array) for name, array in free.items()} | found
    made.graph.input.extend(
        helper.make_tensor_value_info(name, one.kind, one.array.shape) for name, one in taken.items()
    )
    return made, found


def widen_bytes(model: onnx.ModelProto, constants: dict[str, Typed]) -> None:
    """Let packed rows be int32 in place of int8, in place; values stay. TensorRT takes an int8 constant for a quantised one, which only a
    DequantizeLinear may read."""
    graph = model.graph
    for name, one in constants.items():
        if one.kind == onnx.TensorProto.INT8:
            constants[name] = Typed.of(one.array.astype(np.int32))
    for tensor in graph.initializer:
        if tensor.data_type == onnx.TensorProto.INT8:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.int32), tensor.name))
    nodes: list[onnx.NodeProto] = []
    wrapped = False
    for node in graph.node:
        to = next((one.i for one in node.attribute if one.name == "to"), None) if node.op_type == "Cast" else None
        if to != onnx.TensorProto.INT8:
            nodes.append(node)
            continue
        wrapped = True  # a cast keeps the last eight bits
        own = f"{node.output[0]}.byte"
        nodes += [
            helper.make_node("Cast", list(node.input), [f"{own}.0"], name=f"{own}.0", to=onnx.TensorProto.INT64),
            helper.make_node("Add", [f"{own}.0", "byte.half"], [f"{own}.1"], name=f"{own}.1"),
            helper.make_node("Mod", [f"{own}.1", "byte.all"], [f"{own}.2"], name=f"{own}.2"),
            helper.make_node("Sub", [f"{own}.2", "byte.half"], [f"{own}.3"], name=f"{own}.3"),
            helper.make_node("Cast", [f"{own}.3"], list(node.output), name=node.name, to=onnx.TensorProto.INT32),
        ]
    if wrapped:
        graph.initializer.extend(
            numpy_helper.from_array(np.array(value, np.int64), name)
            for name, value in (("byte.half", 128), ("byte.all", 256))
        )
    del graph.node[:]
    graph.node.extend(nodes)


def as_constants(
    model: onnx.ModelProto,
    constants: Mapping[str, Typed],
    data: Any,
    file: str,
    *,
    always: Sequence[str],
    small: int = 1024,
) -> None:
    """Turn inputs into initializers, in place. Float32 matrices whose values are those of bfloat16 are stored in it, in half of the bytes.

    Args:
        model: the graph.
        constants: values by name of input.
        data: a binary file for external ones.
        file: its name.
        always: names that are external, whatever their size.
        small: bytes up to which others lie in the graph.
    """
    graph = model.graph
    rest = [value for value in graph.input if value.name not in constants]
    del graph.input[:]
    graph.input.extend(rest)
    casts = []
    for name, one in constants.items():
        array = one.array
        if array.nbytes <= small and name not in always:
            graph.initializer.append(helper.make_tensor(name, one.kind, array.shape, array.tobytes(), raw=True))
            continue
        bits = _narrow(array) if one.kind == onnx.TensorProto.FLOAT and array.ndim > 1 else None
        kind = one.kind if bits is None else onnx.TensorProto.BFLOAT16
        stored = name if bits is None else f"{name}.stored"
        data.write(b"\0" * (-data.tell() % 64))
        tensor = onnx.TensorProto(
            name=stored, data_type=kind, dims=array.shape, data_location=onnx.TensorProto.EXTERNAL
        )
        content = np.ascontiguousarray(array if bits is None else bits)
        facts = {"location": file, "offset": str(data.tell()), "length": str(content.nbytes)}
        tensor.external_data.extend(onnx.StringStringEntryProto(key=key, value=value) for key, value in facts.items())
        data.write(content.data)
        graph.initializer.append(tensor)
        if bits is not None:
            casts.append(helper.make_node("Cast", [stored], [name], name=f"{name}.cast", to=onnx.TensorProto.FLOAT))
    for number, node in enumerate(casts):
        graph.node.insert(number, node)


def _unrolled(model: onnx.ModelProto, values: Mapping[str, Typed], threads: int) -> onnx.ModelProto:
    """A graph without loops: rounds follow from the sizes. TensorRT parses loops in a graph of fixed sizes, and cannot build it."""
    made = onnx.ModelProto()
    made.CopyFrom(model)
    loops = [node for node in model.graph.node if node.op_type == "Loop"]
    if not loops:
        return made
    counts = run_graph(model, values, sorted({node.input[0] for node in loops}), threads=threads)
    del made.graph.node[:]
    for node in model.graph.node:
        made.graph.node.extend(_rounds(node, int(counts[node.input[0]].item())) if node.op_type == "Loop" else [node])
    return made


def _rounds(loop: onnx.NodeProto, count: int) -> Iterator[onnx.NodeProto]:
    """The rounds of a loop that carries values, goes on until its last round and collects nothing."""
    [body] = [attribute.g for attribute in loop.attribute if attribute.name == "body"]
    carried = list(loop.input[2:])
    number, going, *taken = [value.name for value in body.input]
    if len(loop.output) != len(carried):
        raise FoldkvError(f"the loop {loop.name} collects values. Report this as a fault of foldkv.")
    for at in range(count):
        own = f"{loop.name}.{at}."
        yield helper.make_node("Constant", [], [f"{own}number"], value=numpy_helper.from_array(np.array(at)))
        yield helper.make_node("Constant", [], [f"{own}going"], value=numpy_helper.from_array(np.array(True)))
        names = {number: f"{own}number", going: f"{own}going"} | dict(zip(taken, carried, strict=True))
        for tensor in body.initializer:
            names[tensor.name] = f"{own}{tensor.name}"
            yield helper.make_node("Constant", [], [names[tensor.name]], value=tensor)
        names |= {name: f"{own}{name}" for node in body.node for name in node.output if name}
        for node in body.node:
            yield _renamed(node, names, own)
        carried = [names.get(value.name, value.name) for value in body.output[1:]]
    for name, value in zip(loop.output, carried, strict=True):
        yield helper.make_node("Identity", [value], [name], name=f"{loop.name}.{name}")


def _renamed(node: onnx.NodeProto, names: Mapping[str, str], prefix: str) -> onnx.NodeProto:
    made = onnx.NodeProto()
    made.CopyFrom(node)
    made.name = f"{prefix}{node.name}"
    for side in (made.input, made.output):
        renamed = [names.get(name, name) for name in side]
        del side[:]
        side.extend(renamed)
    for attribute in made.attribute:
        for body in _bodies(attribute):
            inner = [_renamed(one, names, prefix) for one in body.node]
            del body.node[:]
            body.node.extend(inner)
            for value in body.output:
                value.name = names.get(value.name, value.name)
    return made


def _narrow(array: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16] | None:
    """The bits of the same values in bfloat16; None if it does not have them."""
    bits = np.ascontiguousarray(array).view(np.uint32)
    return None if (bits % _BIAS).any() else (bits // _BIAS).astype(np.uint16)


def _reads(node: onnx.NodeProto) -> Iterator[str]:
    """The values that a node takes, also those that its subgraphs take from outside."""
    yield from filter(None, node.input)
    for attribute in node.attribute:
        for body in _bodies(attribute):
            own = {value.name for value in body.input} | {one.name for one in body.initializer}
            own |= {name for inner in body.node for name in inner.output}
            reads = {name for inner in body.node for name in _reads(inner)} | {value.name for value in body.output}
            yield from reads - own


def _bodies(attribute: onnx.AttributeProto) -> list[onnx.GraphProto]:
    return [attribute.g] if attribute.type == onnx.AttributeProto.GRAPH else list(attribute.graphs)


def _drop_unused(graph: onnx.GraphProto) -> None:
    """Drop the nodes whose outputs nobody reads, and initializers likewise."""
    wanted, kept = {value.name for value in graph.output}, []
    for node in reversed(graph.node):
        if wanted & set(node.output):
            wanted |= set(_reads(node))
            kept.append(node)
    initializers = [one for one in graph.initializer if one.name in wanted]
    nodes = list(reversed(kept))
    del graph.node[:], graph.initializer[:]
    graph.node.extend(nodes)
    graph.initializer.extend(initializers)
