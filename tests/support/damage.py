"""Damage to a graph package or its weights, so that a bundle of it computes something else; and references that answer once."""

from __future__ import annotations

import copy
import functools
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from safetensors.torch import load_file, save_file

from foldkv.artifact import staged
from foldkv.errors import EXIT_OK
from foldkv.export.checkpoint.reader import Checkpoint
from foldkv.export.package import read_package
from foldkv.export.roles import lock_of, sources_of
from foldkv.manifests import GraphInputs, write
from foldkv.optimize.build import build_bundles

Damage = Callable[["Model"], None]


def answered_once(method: Callable[..., Any]) -> Callable[..., Any]:
    known: dict[Any, Any] = {}

    @functools.wraps(method)
    def answer(self: Any, tokens: Sequence[int], *choices: dict[int, np.ndarray], **options: Any) -> Any:
        # There is more than one checkpoint, and how a reference settles ties depends on what the subject chose.
        key = (
            _weights(self),
            tuple(tokens),
            *(chosen.tobytes() for one in choices for chosen in one.values()),
            *options.items(),
        )
        if key not in known:
            known[key] = method(self, tokens, *choices, **options)
        return copy.deepcopy(known[key])

    return answer


def _weights(runner: Any) -> float:
    """A number that tells checkpoints apart, also if they differ in one matrix."""
    if not hasattr(runner, "weights_told_apart"):
        model = getattr(runner, "model", None) or runner._decoder
        runner.weights_told_apart = sum(float(one.double().square().sum()) for one in model.parameters())
    return float(runner.weights_told_apart)


class Model:
    """A package that is to be damaged: its segments by name, and changes to the values of its weights."""

    def __init__(self, graph: Path) -> None:
        self.package = read_package(graph)
        files = {name: row.file for name, row in self.package.manifest.segments.items()}
        self.files = files
        self.segments = {name: onnx.load(graph / file) for name, file in files.items()}
        self.values: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {}

    def of_kind(self, start: str) -> list[onnx.ModelProto]:
        """The segments whose name starts like this; all with an empty one."""
        return [model for name, model in self.segments.items() if name.startswith(start)]


def damaged_bundle(graph: Path, folder: Path, damage: Damage) -> Path:
    """A bundle of a package that was changed and whose manifest was written for the changed package."""
    model = Model(graph)
    damage(model)
    checkpoint = folder / "checkpoint"
    shutil.copytree(model.package.checkpoint, checkpoint)
    for file in checkpoint.glob("*.safetensors"):
        tensors = load_file(file)
        for name in model.values.keys() & tensors.keys():
            tensors[name] = model.values[name](tensors[name].clone()).contiguous()
        save_file(tensors, file, metadata={"format": "pt"})
    source = Checkpoint(checkpoint)
    with staged(folder / "graph", kind="foldkv.graph") as work:
        shutil.copytree(graph, work, dirs_exist_ok=True)
        for name, file in model.files.items():
            onnx.save(model.segments[name], work / file)
        lock_of(source, sources_of(source)).write(work / "weights.lock.json")
        (work / "manifest.json").unlink()
        made = replace(model.package.manifest.inputs.checkpoint, path=str(checkpoint), files=None)
        write(work, replace(model.package.manifest, inputs=GraphInputs(made)))
    report = build_bundles(folder / "graph", folder, ["cpu"])
    assert report.exit_code == EXIT_OK, report.results
    return report.results[0].folder


def functions(model: Model, name: str) -> list[onnx.FunctionProto]:
    """The bodies with that name, one in each segment that uses it."""
    found = [function for one in model.of_kind("") for function in one.functions if function.name == name]
    assert found
    return found


def nodes(model: onnx.ModelProto, op_type: str) -> list[onnx.NodeProto]:
    return [node for node in model.graph.node if node.op_type == op_type]


def insert_after(function: onnx.FunctionProto, output: str, op_type: str, operand: onnx.NodeProto) -> None:
    """Let ``op_type(value, operand)`` stand wherever the value ``output`` of a function was read."""
    at = next(i for i, node in enumerate(function.node) if output in node.output)
    for node in list(function.node)[at + 1 :]:
        for place, name in enumerate(node.input):
            if name == output:
                node.input[place] = f"{output}_damaged"
    function.node.insert(at + 1, operand)
    function.node.insert(at + 2, onnx.helper.make_node(op_type, [output, operand.output[0]], [f"{output}_damaged"]))


def constant(value: int, name: str) -> onnx.NodeProto:
    return onnx.helper.make_node("Constant", [], [name], value_int=value)
