"""Executes a lowered, injected graph as the builder got it: plugin nodes by the plugins themselves, with kernels in Triton's
interpreter, and the others by onnx's reference evaluator with ml_dtypes.

Plugins get the addresses that were bound: weights and state lie where the executor put them, and state is written in place.
Intermediate results lie in memory of the stand-in's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import onnx
import tensorrt_rtx as trt
import torch
from engine import Engine
from gpus import OK, HostDriver
from onnx.reference import ReferenceEvaluator

from foldkv.export.checkpoint.formats import FP4, FP4_GROUP, FP8, FP8_BLOCK, Format
from foldkv.export.checkpoint.values import dequantised
from foldkv.export.contract.operators import PACKED_EXPERTS, ROUTED_EXPERTS
from foldkv.export.contract.weights import E2M1, EXPONENT
from foldkv.export.operators.registry import operators
from foldkv.plugins.declarations import NAMESPACE, PLUGINS
from foldkv.plugins.inject import NAMESPACE_ATTRIBUTE

_NUMPY = {
    onnx.TensorProto.FLOAT: np.dtype(np.float32), onnx.TensorProto.INT32: np.dtype(np.int32),
    onnx.TensorProto.INT64: np.dtype(np.int64), onnx.TensorProto.INT8: np.dtype(np.int8),
    onnx.TensorProto.BFLOAT16: np.dtype(ml_dtypes.bfloat16), onnx.TensorProto.BOOL: np.dtype(bool),
}  # fmt: skip
_STORED = {
    "float32": np.dtype(np.float32), "int32": np.dtype(np.int32), "int64": np.dtype(np.int64), "int8": np.dtype(np.int8),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}  # fmt: skip


class Field(NamedTuple):
    """An attribute as the ONNX parser gives it to a plugin."""

    name: str
    data: Any


class _Place(NamedTuple):
    """A value in the GPU's memory."""

    address: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def bytes(self) -> int:
        return int(np.prod(self.shape)) * self.dtype.itemsize


class ExecutingEngine(Engine):
    """The engine of a lowered, injected graph."""

    def __init__(self, driver: HostDriver, path: Path) -> None:
        super().__init__(driver)
        model = onnx.load(path)
        graph, known = model.graph, {tensor.name for tensor in model.graph.initializer}
        given = [value for value in graph.input if value.name not in known]
        self.inputs = tuple(value.name for value in given)
        values = [*given, *graph.output]
        self._dtypes = {value.name: _NUMPY[value.type.tensor_type.elem_type] for value in values}
        self.types = {value.name: str(self._dtypes[value.name]) for value in values}
        self.dims = {
            value.name: tuple(
                dim.dim_value if dim.HasField("dim_value") else -1 for dim in value.type.tensor_type.shape.dim
            )
            for value in values
        }
        self._outputs = tuple(value.name for value in graph.output)
        self._constants = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
        self._steps = [_step(model, nodes) for nodes in _runs(list(graph.node))]

    def run(self, addresses: dict[str, int], shapes: dict[str, tuple[int, ...]], hosted: dict[str, bytes]) -> None:
        held: dict[str, Any] = dict(self._constants)
        for name in self.inputs:
            shape = shapes.get(name, (1,) if name == "active_context" else self.dims[name])
            held[name] = _Place(addresses[name], shape, self._dtypes[name])
        taken: list[int] = []
        try:
            for step in self._steps:
                step.run(self.driver, held, addresses, taken)
            for name in self._outputs:
                value = held[name]
                if isinstance(value, _Place):
                    assert value.address == addresses[name], f"{name} is bound elsewhere than the plugin's alias says"
                else:
                    self.driver.write(addresses[name], np.ascontiguousarray(value, self._dtypes[name]).tobytes())
        finally:
            for address in taken:
                del self.driver.blocks[address]


def _runs(nodes: Sequence[onnx.NodeProto]) -> list[list[onnx.NodeProto]]:
    """Nodes in order: every plugin node alone, the others between them together."""
    found: list[list[onnx.NodeProto]] = [[]]
    for node in nodes:
        if any(attribute.name == NAMESPACE_ATTRIBUTE for attribute in node.attribute):
            found += [[node], []]
        else:
            found[-1].append(node)
    return [run for run in found if run]


def _step(model: onnx.ModelProto, nodes: list[onnx.NodeProto]) -> _Standard | _Plugin:
    plugin = any(attribute.name == NAMESPACE_ATTRIBUTE for attribute in nodes[0].attribute)
    return _Plugin(nodes[0]) if plugin else _Standard(model, nodes)


class _Standard:
    """Nodes of standard operators."""

    def __init__(self, model: onnx.ModelProto, nodes: list[onnx.NodeProto]) -> None:
        made = {name for node in nodes for name in node.output}
        self._given = list(dict.fromkeys(name for node in nodes for name in node.input if name and name not in made))
        self._made = [name for node in nodes for name in node.output if name]
        unknown = [onnx.ValueInfoProto(name=name) for name in (*self._given, *self._made)]
        graph = onnx.GraphProto(name="part", node=nodes, input=unknown[: len(self._given)])
        graph.output.extend(unknown[len(self._given) :])
        part = onnx.ModelProto(graph=graph, ir_version=model.ir_version, opset_import=model.opset_import)
        part.functions.extend(model.functions)
        self._evaluator = ReferenceEvaluator(part)

    def run(self, driver: HostDriver, held: dict[str, Any], addresses: dict[str, int], taken: list[int]) -> None:
        feeds = {}
        for name in self._given:
            value = held[name]
            if isinstance(value, _Place):
                value = np.frombuffer(driver.read(value.address, value.bytes), value.dtype).reshape(value.shape)
            feeds[name] = value
        with np.errstate(all="ignore"):  # a GPU says nothing of a logarithm of zero
            held.update(zip(self._made, self._evaluator.run(None, feeds), strict=True))


class _Plugin:
    """A plugin node: the plugin that an engine would create, with its fields."""

    def __init__(self, node: onnx.NodeProto) -> None:
        self.node, self.spec = node, PLUGINS[node.op_type]
        values = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
        creator = trt.get_plugin_registry().get_creator(self.spec.operator, self.spec.version, NAMESPACE)
        made = creator.create_plugin(
            node.name, [_field(name, value) for name, value in values.items()], trt.TensorRTPhase.RUNTIME
        )
        self.plugin = made.attach_to_context(None)

    def run(self, driver: HostDriver, held: dict[str, Any], addresses: dict[str, int], taken: list[int]) -> None:
        if self.node.op_type in driver.by_definition:
            self._define(driver, held)
            return
        inputs = [self._placed(driver, held[name], taken) for name in self.node.input]
        spec, values = self.spec, self.plugin.values
        sizes = spec.dimensions([place.shape for place in inputs], row_format=values["row_format"])
        sizes |= {name: value for name, value in values.items() if name in spec.attributes and isinstance(value, int)}
        shapes = spec.output_shapes(sizes, row_format=values["row_format"])
        outputs = []
        for number, (name, shape, tensor) in enumerate(zip(self.node.output, shapes, spec.outputs, strict=True)):
            dtype = _STORED[self.plugin._stored(tensor)]
            if number in spec.aliases:
                outputs.append(_Place(inputs[spec.aliases[number]].address, tuple(shape), dtype))
            elif name in addresses:
                outputs.append(_Place(addresses[name], tuple(shape), dtype))
            else:
                empty = (
                    np.full(shape, -1, np.int8).astype(dtype) if dtype.kind == "i" else np.full(shape, np.nan, dtype)
                )
                outputs.append(self._placed(driver, empty, taken))
        self.plugin.on_shape_change(_described(inputs), _described(outputs))
        workspace = self._placed(driver, np.full(max(1, self.plugin.steps.workspace), 0xFF, np.uint8), taken)
        refused = len(driver.reasons)
        self.plugin.enqueue(
            _described(inputs), _described(outputs), [place.address for place in inputs],
            [place.address for place in outputs], workspace.address, 0,
        )  # fmt: skip
        assert len(driver.reasons) == refused, driver.reasons[refused:]
        held.update(zip(self.node.output, outputs, strict=True))

    def _define(self, driver: HostDriver, held: dict[str, Any]) -> None:
        """By the operator's definition in torch, which is quick. State is written in place."""
        inputs = []
        for name in self.node.input:
            value = held[name]
            if isinstance(value, _Place):
                value = np.frombuffer(driver.read(value.address, value.bytes), value.dtype).reshape(value.shape)
            bits = value.dtype == ml_dtypes.bfloat16
            tensor = torch.from_numpy(np.array(value.view(np.uint16) if bits else value))
            inputs.append(tensor.view(torch.bfloat16).float() if bits else tensor)
        attributes = {name: self.plugin.values[name] for name in self.spec.attributes}
        if self.node.op_type in PACKED_EXPERTS.values():
            made = _packed_experts(self.node.op_type, inputs, attributes)
        else:
            made = operators()[self.node.op_type].eager(*inputs, *attributes.values())
        outputs = made if isinstance(made, tuple) else (made,)
        for number, (name, one) in enumerate(zip(self.node.output, outputs, strict=True)):
            held[name] = one.numpy()
            if number in self.spec.aliases:
                place = held[self.node.input[self.spec.aliases[number]]]
                driver.write(place.address, one.numpy().astype(place.dtype).tobytes())
                held[name] = place

    @staticmethod
    def _placed(driver: HostDriver, value: Any, taken: list[int]) -> _Place:
        """A value in the GPU's memory, of the stand-in's own if it is not there yet."""
        if isinstance(value, _Place):
            return value
        array = np.ascontiguousarray(value)
        limit, driver.limit = driver.limit, 1 << 60
        status, address = driver.cuMemAlloc(max(array.nbytes, 1))
        driver.limit = limit
        assert status == OK
        taken.append(address)
        driver.write(address, array.tobytes())
        return _Place(address, array.shape, array.dtype)


def _packed_experts(operator: str, inputs: Sequence[torch.Tensor], attributes: dict[str, Any]) -> torch.Tensor:
    """The routed experts of packed rows, which hold w1, w2 and w3 of an expert, by the definition of plain ones."""
    x, chosen, weights, codes, scales, slots = inputs
    [(weight, scale)] = [form for form, name in PACKED_EXPERTS.items() if name == operator]
    format_ = Format(FP4, (1, FP4_GROUP)) if weight == E2M1 else Format(FP8, FP8_BLOCK)
    matrices = []
    for number in range(3):
        shape, grid = (tuple(attributes[name][2 * number : 2 * number + 2]) for name in ("shapes", "grids"))
        rows, columns = format_.stored_shape(shape)
        at, scale_at = attributes["codes_at"][number], attributes["scales_at"][number]
        stored = codes.flatten(1)[slots, at : at + rows * columns].unflatten(1, (rows, columns))
        factors = scales.flatten(1)[slots, scale_at : scale_at + grid[0] * grid[1]].unflatten(1, grid)
        stored = stored if weight == E2M1 else stored.view(torch.float8_e4m3fn)
        factors = factors.view(torch.uint8) if scale == EXPONENT else factors
        matrices.append(dequantised(stored, factors, format_))
    w1, w2, w3 = matrices
    made = operators()[ROUTED_EXPERTS].eager(x, chosen, weights, torch.cat((w1, w3), 1), w2, attributes["limit"])
    assert isinstance(made, torch.Tensor)
    return made


def _described(places: Sequence[_Place]) -> list[Any]:
    found = []
    for place in places:
        description = trt.PluginTensorDesc()
        description.dims = place.shape
        found.append(description)
    return found


def _field(name: str, value: Any) -> Field:
    if isinstance(value, bytes):  # the parser ends a string with a NUL
        return Field(name, np.frombuffer(value + b"\0", np.int8))
    kind = np.float32 if isinstance(value, float) else np.int32
    return Field(name, np.atleast_1d(np.array(value, kind)))
