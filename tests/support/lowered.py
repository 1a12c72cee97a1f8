"""Lowered segments in ONNX Runtime, which has no products in bfloat16: their operands are rounded to it, then widened.

What is computed are products of bfloat16 values with sums in float32, which is what matrix units do. Weights are brought into
the form that the engines take by what the runtime has for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import onnxruntime

from foldkv.export.contract.engine_set import Taken
from foldkv.export.contract.lock import Weight, WeightsLock
from foldkv.export.package import Package, read_package
from foldkv.export.segments import Segment
from foldkv.export.stitch import flat, flat_name, stitched
from foldkv.optimize.passes.lower import MODEL, Lowered, lowered_segment
from foldkv.runtime.weight_files import WeightFiles
from foldkv.runtime.weight_forms import load_weight

_LOW, _WIDE = ir.DataType.BFLOAT16, ir.DataType.FLOAT
_STORED = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "int64": "I64", "int32": "I32", "int8": "I8",
           "float8e4m3fn": "F8_E4M3"}  # fmt: skip
_ARRAYS = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16, "int64": np.int64,
           "int32": np.int32, "int8": np.int8, "float8e4m3fn": ml_dtypes.float8_e4m3fn}  # fmt: skip


@dataclass(frozen=True)
class Set:
    """The lowered segments of a package, by name."""

    package: Package
    folder: Path
    segments: dict[str, Lowered]

    def model(self, name: str) -> ir.Model:
        """The lowered graph of a segment."""
        return ir.load(self.folder / name / MODEL)


def lowered(graph: Path, out: Path, precision: str, **options: Any) -> Set:
    """Every segment of a package, lowered into a folder of its name."""
    package, made = read_package(graph), {}
    for name in package.manifest.segments:
        (out / name).mkdir(parents=True)
        owner = next((owner for owner, segment in package.calls() if segment == name), None)
        roles = package.lock.weights[owner] if owner else {}
        made[name] = lowered_segment(
            package.segment(name).model, roles, package.spec, out / name, package.own_state(name), precision, **options
        )
    return Set(package, out, made)


def lowered_logits(graph: Path, out: Path, feeds: Mapping[str, np.ndarray], *, precision: str) -> np.ndarray:
    """The logits of a package lowered for a GPU, run on the CPU."""
    found = lowered(graph, out, precision)
    package, files = found.package, WeightFiles()
    for name, path in package.find_weights().items():
        files.open(name, path, package.lock.files[name])
    weights, arrays = {}, {}
    for owner, name in package.calls():
        stored = package.lock.weights[owner]
        taken = found.segments[name].weights
        weights[owner] = {role: Weight(_STORED[one.dtype], one.shape, ()) for role, one in taken.items()}
        arrays |= {flat_name(owner, role): _array(one, stored, role, files) for role, one in taken.items()}
    segments = {}
    for name, facts in package.manifest.segments.items():
        taken = found.segments[name].weights
        model = found.model(name)
        takes = {value.name for value in model.graph.inputs}
        arguments = tuple(argument for argument in facts.arguments if argument in takes)
        segments[name] = Segment(name, model, arguments, facts.groups, tuple(taken))
    model = flat(stitched(package, segments, WeightsLock(package.lock.files, weights, {})))
    _type_state(model, found)
    return run(model, arrays, feeds, out)[0]


def _array(one: Taken, stored: Mapping[str, Weight], role: str, files: WeightFiles) -> np.ndarray:
    made = np.ascontiguousarray(load_weight(one, stored[role], files, stored.get(one.scale)))
    return made.view(np.uint8).reshape(-1).view(np.dtype(_ARRAYS[one.dtype])).reshape(one.shape)


def _type_state(model: ir.Model, found: Set) -> None:
    """The stitched graph declares the state in float32; the segments may keep it in bfloat16."""
    kept = {}
    for layer, name in enumerate(found.package.layers):
        for row, own in zip(found.package.state_of(layer), found.segments[name].state, strict=True):
            kept |= {row.input: own.dtype, row.output: own.dtype}
    for value in (*model.graph.inputs, *model.graph.outputs):
        if kept.get(value.name or "") == "bfloat16":
            value.dtype = _LOW


def run(
    model: ir.Model, weights: Mapping[str, np.ndarray], feeds: Mapping[str, np.ndarray], out: Path
) -> list[np.ndarray]:
    """The outputs of a graph, its bfloat16 widened to float32 after every rounding; weights become part of it."""
    for value in [value for value in model.graph.inputs if value.name in weights]:
        model.graph.inputs.remove(value)
        value.const_value = ir.Tensor(weights[value.name or ""], name=value.name)
        model.graph.register_initializer(value)
    _widen(model.graph)
    ir.save(model, out / "widened.onnx", external_data="widened.bin")
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    session = onnxruntime.InferenceSession(str(out / "widened.onnx"), options)
    return list(session.run(None, dict(feeds)))


def _widen(graph: ir.Graph) -> None:
    for value in graph.initializers.values():
        if value.dtype == _LOW:
            assert value.const_value is not None
            value.const_value = ir.Tensor(value.const_value.numpy().astype(np.float32), name=value.name)
    made = [value for node in graph for value in node.outputs]
    for value in (*graph.inputs, *graph.outputs, *graph.initializers.values(), *made):
        if value.dtype == _LOW:
            value.dtype = _WIDE
    for node in list(graph):
        for name, attribute in list(node.attributes.items()):
            if attribute.type == ir.AttributeType.GRAPH:
                _widen(attribute.as_graph())
            elif attribute.type == ir.AttributeType.TENSOR and attribute.as_tensor().dtype == _LOW:
                wide = attribute.as_tensor().numpy().astype(np.float32)
                node.attributes[name] = ir.AttrTensor(name, ir.Tensor(wide))
        if node.op_type == "Cast" and node.attributes["to"].as_int() == int(_LOW):
            _round(graph, node)


def _round(graph: ir.Graph, cast: ir.Node) -> None:
    rounded = cast.outputs[0]
    users = list(rounded.uses())
    wide = ir.node("Cast", [rounded], attributes={"to": int(_WIDE)})
    graph.insert_after(cast, wide)
    wide.outputs[0].name, wide.outputs[0].dtype, rounded.dtype = f"{rounded.name}_wide", _WIDE, _LOW
    for user, place in users:
        user.replace_input_with(place, wide.outputs[0])
    for place, value in enumerate(graph.outputs):
        if value is rounded:
            graph.outputs[place] = wide.outputs[0]
