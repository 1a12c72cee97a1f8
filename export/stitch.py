"""One whole graph from a package's segments: a view for tools, for engines and for plain ONNX Runtime.

Every kind of layer becomes a function ``FoldkvLayer…`` of the domain foldkv, and every layer a node that calls it.
:func:`flat` gives the graph in which every operator is a node. Weights are inputs of the whole graph, named as a released
checkpoint names them, until :func:`bind_weights` turns them into initializers, which are read on demand.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
from onnx_ir.passes.common import InlinePass

from ..errors import ArtifactError
from .contract.lock import Weight, WeightsLock
from .model.decoder import CHOSEN, TAP
from .operators.registry import DOMAIN
from .package import INJECTED, Package
from .roles import EMBED, HEAD, onnx_dtype
from .segments import STEP, STREAMS, TOKENS, Segment
from .trace import INPUTS, LOGITS

PREFIX = "FoldkvLayer"


def flat_model(package: Package) -> onnx.ModelProto:
    """The whole graph with every operator as a node, and weights as inputs; what injection made of it, for an injected package."""
    if INJECTED in package.manifest.files:
        injected: onnx.ModelProto = onnx.load(package.folder / INJECTED, load_external_data=False)
        return injected
    whole: onnx.ModelProto = ir.to_proto(flat(stitched(package)))
    return whole


def stitched(
    package: Package, segments: Mapping[str, Segment] | None = None, lock: WeightsLock | None = None
) -> ir.Model:
    """The whole model with a function per kind of layer; its weights are inputs, after the state.

    Args:
        package: the graph package.
        segments: instead of the package's; they are taken apart.
        lock: instead of the package's, for segments that take their weights in another form.
    """
    lock = lock or package.lock
    segments = dict(segments or {name: package.segment(name) for name in package.manifest.segments})
    step, embed, head = (segments.pop(name) for name in (STEP, EMBED, HEAD))
    given: dict[str, ir.Value] = {}
    types = {"positions": ir.DataType.INT32, "num_tokens": ir.DataType.INT32}
    shapes: dict[str, list[str | int]] = {
        "input_ids": ["batch", "chunk"], "positions": ["batch"], "num_tokens": ["batch"], "active_context": [1],
        "logit_indices": ["batch", "kept"],
    }  # fmt: skip
    for name in INPUTS:
        given[name] = _value(name, types.get(name, ir.DataType.INT64), shapes[name])
    state = {tensor.input: _value(tensor.input, ir.DataType.FLOAT, _rows(tensor)) for tensor in package.state}
    graph = ir.Graph(
        [*given.values(), *state.values()], [], nodes=[], opset_imports=step.model.graph.opset_imports, name="decoder"
    )
    model = ir.Model(graph, ir_version=step.model.ir_version, producer_name="foldkv")
    for segment in (embed, head, *segments.values(), step):
        for identifier, function in segment.model.functions.items():
            model.functions.setdefault(identifier, function)
    calls = {name: _function(model, segment) for name, segment in segments.items()}
    given[TOKENS] = _splice(model, step, given, {})[TOKENS]
    streams = _splice(model, embed, given, _weights(model, EMBED, lock, embed))[STREAMS]
    outputs = []
    for layer, name in enumerate(package.layers):
        segment, rows = segments[name], package.state_of(layer)
        weights = _weights(model, f"layers.{layer}", lock, segment)
        arguments = [{STREAMS: streams, **given}[argument] for argument in segment.arguments]
        arguments += [state[row.input] for row in rows] + [weights[role] for role in segment.weights]
        node = ir.Node(DOMAIN, calls[name], arguments, num_outputs=1 + len(rows), name=f"layers.{layer}")
        for value, out in zip(node.outputs, [TAP.format(layer=layer), *(row.output for row in rows)], strict=True):
            value.name, value.dtype = out, ir.DataType.FLOAT
        for value, row in zip(node.outputs[1:], rows, strict=True):
            value.shape = ir.Shape(_rows(row))
        node.outputs[0].shape = streams.shape
        graph.append(node)
        outputs += node.outputs[1:]
        streams = node.outputs[0]
    ends = _splice(model, head, {STREAMS: streams, **given}, _weights(model, HEAD, lock, head))
    graph.outputs[:] = [ends[LOGITS], *outputs]
    ends[LOGITS].shape = ir.Shape(["batch", "kept", package.manifest.model.vocab_size])
    model.opset_imports[DOMAIN] = 1
    return model


def flat(model: ir.Model) -> ir.Model:
    """The graph in which every operator is a node, made in place: the layers' functions are inlined, once per layer."""
    sparse = []
    for node in model.graph:
        function = model.functions.get(node.op_identifier())
        if node.op_type.startswith(PREFIX) and function is not None:
            sparse += [node.name] * sum(inner.op_type == "FoldkvIndexSelect" for inner in function)
    InlinePass(criteria=lambda function: function.name.startswith(PREFIX))(model)
    selects = [node for node in model.graph if node.op_type == "FoldkvIndexSelect"]
    if sparse:
        for node, name in zip(selects, sparse, strict=True):
            node.outputs[0].name = CHOSEN.format(layer=(name or "").removeprefix("layers."))
    return model


def flat_name(owner: str, role: str) -> str:
    """The name of a weight in a whole graph."""
    return role if owner in (EMBED, HEAD) else f"{owner}.{role}"


def bind_weights(model: ir.Model, lock: WeightsLock, files: Mapping[str, Path]) -> ir.Model:
    """Turn the weights of a whole graph into initializers, in place. Their bytes are read when they are written or used.

    Args:
        model: with weights as inputs.
        lock: where the weights lie.
        files: path of every file of the lock.
    """
    weights = {flat_name(owner, role): weight for owner, role, weight in lock}
    for value in [value for value in model.graph.inputs if value.name in weights]:
        model.graph.inputs.remove(value)
        name = value.name or ""
        value.const_value = tensor_of(name, weights[name], files)
        model.graph.register_initializer(value)
    return model


def tensor_of(name: str, weight: Weight, files: Mapping[str, Path]) -> ir.TensorProtocol:
    """A weight as a tensor: in its file if it is one range there, else joined when it is read."""
    dtype, shape = onnx_dtype(weight), ir.Shape(weight.shape)
    if len(weight.parts) == 1:
        [part] = weight.parts
        path = files[part.file].resolve()
        return ir.ExternalTensor(
            path.name, part.offset, part.bytes, dtype, shape=shape, name=name, base_dir=path.parent
        )

    def joined() -> ir.Tensor:
        array = np.frombuffer(read_parts(weight, files), dtype.numpy()).reshape(weight.shape)
        return ir.Tensor(array, dtype=dtype, name=name)

    return ir.LazyTensor(joined, dtype, shape, name=name)


def read_parts(weight: Weight, files: Mapping[str, Path]) -> bytearray:
    """The bytes of a weight; each file is opened once.

    Raises:
        ArtifactError: a file ends within the weight.
    """
    data, at = bytearray(weight.bytes), 0
    view, handles = memoryview(data), {name: files[name].open("rb") for name in {p.file for p in weight.parts}}
    try:
        for part in weight.parts:
            handle = handles[part.file]
            handle.seek(part.offset)
            if handle.readinto(view[at : at + part.bytes]) != part.bytes:
                raise ArtifactError(f"{files[part.file]} ends within a weight. Copy or download it again.")
            at += part.bytes
    finally:
        for handle in handles.values():
            handle.close()
    return data


def _rows(tensor: object) -> list[str | int]:
    rows, ratio, width = (getattr(tensor, name) for name in ("num_rows", "ratio", "width"))
    return ["batch", f"entries_{ratio}" if ratio else rows, width]


def _value(name: str, dtype: ir.DataType, shape: list[str | int]) -> ir.Value:
    return ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))


def _weights(model: ir.Model, owner: str, lock: WeightsLock, segment: Segment) -> dict[str, ir.Value]:
    """The inputs of the whole graph for the weights of one call, by role."""
    made = {}
    for role in segment.weights:
        weight = lock.weights[owner][role]
        value = ir.Value(
            name=flat_name(owner, role), type=ir.TensorType(onnx_dtype(weight)), shape=ir.Shape(weight.shape)
        )
        model.graph.inputs.append(value)
        made[role] = value
    return made


def _splice(
    model: ir.Model, segment: Segment, given: Mapping[str, ir.Value], weights: Mapping[str, ir.Value]
) -> dict[str, ir.Value]:
    """Move the nodes of a segment into the whole graph; returns its outputs by name."""
    graph = segment.model.graph
    for value in graph.inputs:
        ir.convenience.replace_all_uses_with(value, {**given, **weights}[value.name or ""])
    outputs = {value.name or "": value for value in graph.outputs}
    graph.inputs.clear()
    graph.outputs.clear()
    for value in [graph.initializers.pop(name) for name in list(graph.initializers)]:
        value.name = f"{segment.name}.{value.name}"
        model.graph.register_initializer(value)
    for node in list(graph):
        graph.remove(node)
        node.name = f"{segment.name}.{node.name}"
        for value in node.outputs:
            if value.name not in outputs:
                value.name = f"{segment.name}.{value.name}"
        model.graph.append(node)
    return outputs


def _function(model: ir.Model, segment: Segment) -> str:
    """Add a segment as a function; returns its name."""
    name = PREFIX + "".join(part.capitalize() for part in segment.name.split("-"))
    graph = segment.model.graph
    constants = []
    for key in list(graph.initializers):
        value = graph.initializers.pop(key)
        constant = ir.node("Constant", [], attributes={"value": value.const_value}, name=key)
        constant.outputs[0].name, constant.outputs[0].dtype = f"{key}_", value.dtype
        constant.outputs[0].shape = value.shape
        ir.convenience.replace_all_uses_with(value, constant.outputs[0])
        constants.append(constant)
    graph.insert_before(graph[0], constants)
    inputs, outputs, nodes = list(graph.inputs), list(graph.outputs), list(graph)
    graph.inputs.clear()
    graph.outputs.clear()
    for node in nodes:
        graph.remove(node)
    body = ir.Graph(inputs, outputs, nodes=nodes, opset_imports=graph.opset_imports, name=name)
    model.functions[DOMAIN, name, ""] = ir.Function(DOMAIN, name, "", graph=body, attributes=[])
    return name
