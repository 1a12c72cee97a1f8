"""Lowered graphs in ONNX Runtime, which has no products in bfloat16: their operands are rounded to it, then widened.

What is computed are products of bfloat16 values with sums in float32, which is what matrix units do.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime

from foldkv.export.contract.state import StateTensor
from foldkv.export.external import read_lazily
from foldkv.export.package import read_package
from foldkv.export.stitch import bind_weights, flat_model
from foldkv.optimize.passes.lower import lowered_graph

_LOW, _WIDE = ir.DataType.BFLOAT16, ir.DataType.FLOAT


def lowered(
    graph: Path, out: Path, precision: str, *, sm: int, **options: Any
) -> tuple[list[StateTensor], dict[str, Any], dict[str, Any]]:
    """A package lowered into a folder, as ``lowered_graph`` answers."""
    package = read_package(graph)
    model = bind_weights(ir.from_proto(flat_model(package)), package.lock, package.find_weights())
    return lowered_graph(model, package.spec, out, package.state, precision, sm=sm, **options)


def lowered_logits(
    graph: Path, out: Path, feeds: Mapping[str, np.ndarray], *, sm: int, precision: str
) -> tuple[np.ndarray, dict[str, dict[str, dict[str, int]]]]:
    """The logits of a package lowered for a GPU, run on the CPU, and the formats of its weights."""
    out.mkdir()
    _, _, weights = lowered(graph, out, precision, sm=sm)
    return session(out, out / "widened").run(["logits"], dict(feeds))[0], weights


def session(folder: Path, out: Path) -> onnxruntime.InferenceSession:
    """A lowered graph, its bfloat16 widened to float32 after every rounding."""
    # TensorRT follows links out of the folder, what reads packages does not: a copy has files in their place.
    whole = shutil.copytree(folder, out / "whole")
    model = read_lazily(ir.load(whole / "model.onnx"), whole)
    _widen(model.graph)
    ir.save(model, out / "model.onnx", external_data="weights.bin")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(out / "model.onnx"), options)


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
