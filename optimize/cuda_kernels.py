"""Which nodes of a graph have a kernel in ONNX Runtime's CUDA provider.

A node without one runs on the processor, in every step: its inputs are copied from the GPU, and its outputs back. The provider's
own list of kernels is in cuda_kernels.json, with the version of ONNX Runtime that it is of; benchmarks/cuda/provider_kernels.py writes it.

A node *with* a kernel may run on the processor too: ONNX Runtime puts small integer computations there that follow from the
sizes of tensors, because their results are needed there. This costs no copy of data, and the runtime looks at what it did
(runtime/placement.py).
"""

from __future__ import annotations

import functools
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from importlib import resources
from typing import Any

import onnx_ir as ir

from ..errors import BuildError, listing

# Nodes that have no kernel anywhere: ONNX Runtime makes initializers of them when it loads a graph.
_FOLDED = ("Constant",)
_LISTED = 12


@functools.cache
def kernel_table() -> Mapping[str, Any]:
    """The provider's kernels as JSON values: ``version``, ``opset``, and ``operators`` with types by type variable."""
    text = resources.files("foldkv.optimize").joinpath("cuda_kernels.json").read_text(encoding="utf-8")
    return dict(json.loads(text))


def kernel_gaps(model: ir.Model) -> Counter[str]:
    """What a graph without functions asks for and the provider has no kernel for, with the number of nodes.

    Args:
        model: the graph; types of values are read where the operators' type variables do not say them.
    """
    table, found = kernel_table(), Counter[str]()
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        if node.op_type in _FOLDED and not node.domain:
            continue
        name = f"{node.domain}.{node.op_type}" if node.domain else node.op_type
        row = table["operators"].get(name)
        if row is None:
            found[f"{name}, for any type"] += 1
        elif (types := _types(node, row)) and not any(_takes(kernel, types) for kernel in row["kernels"]):
            found[f"{name} of {', '.join(f'{key} = {value}' for key, value in sorted(types.items()))}"] += 1
    return found


def check_kernels(models: Mapping[str, ir.Model]) -> None:
    """Check that the provider has a kernel for every node of the segments.

    Args:
        models: segments by name, of the opset of the table.

    Raises:
        BuildError: some nodes have none, or a segment has another opset; all are listed.
    """
    table, findings = kernel_table(), list[str]()
    for name, model in models.items():
        opset = model.graph.opset_imports.get("", 0)
        if opset != table["opset"]:
            findings.append(f"{name} has opset {opset}; the table of kernels is for {table['opset']}")
        findings += [f"{name}: {count} x {gap}" for gap, count in kernel_gaps(model).items()]
    if findings:
        title = f"the CUDA provider of ONNX Runtime {table['version']} has no kernel for nodes that would run on the processor in every step"
        raise BuildError(listing(title, findings, "Report this as a fault of foldkv."))


def _types(node: ir.Node, row: Mapping[str, Any]) -> dict[str, str]:
    """The types of a node's type variables, as far as they are known."""
    found: dict[str, str] = {}
    for values, formals in ((node.inputs, row["inputs"]), (node.outputs, row["outputs"])):
        for value, variable in zip(values, _formals(formals, len(values)), strict=False):
            if value is not None and value.dtype is not None and not variable.startswith("tensor("):
                found.setdefault(variable, value.dtype.name.lower())
    return found


def _formals(formals: Iterable[str], count: int) -> list[str]:
    """The type variable of each of ``count`` values; the last one may stand for any number of them."""
    known = list(formals)
    if known and known[-1].endswith("*"):
        known += [known[-1]] * (count - len(known))
    return [variable.removesuffix("*") for variable in known]


def _takes(kernel: Mapping[str, list[str]], types: Mapping[str, str]) -> bool:
    return all(types[variable] in kernel[variable] for variable in types if variable in kernel)
