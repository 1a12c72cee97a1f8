"""Write optimize/cuda_kernels.json: the kernels that ONNX Runtime's CUDA provider has, as the provider itself lists them.

Run it with a Python that has onnxruntime-gpu and no onnxruntime, in an environment of its own. It needs no GPU (stand_ins.py):

    python -m venv build/onnxruntime-gpu && build/onnxruntime-gpu/bin/pip install onnxruntime-gpu==1.31.1
    build/onnxruntime-gpu/bin/python benchmarks/cuda/provider_kernels.py

A kernel is kept if ONNX Runtime would take it for a node of the graphs' opset: the kernel is registered for the version in which
the operator was last changed, or for a range that ends and has this version in it (KernelRegistry::VerifyKernelDef).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from stand_ins import restart_with_stand_ins

PROVIDER = "CUDAExecutionProvider"
TABLE = Path(__file__).parents[2] / "optimize" / "cuda_kernels.json"
_OPEN = 2**31 - 1  # the end of a range that does not end
_DOMAINS = {"": "", "com.microsoft": "com.microsoft."}

Kernel = dict[str, list[str]]


def table(opset: int) -> dict[str, Any]:
    """The whole file as JSON values."""
    import onnxruntime
    from onnxruntime.capi import build_and_package_info
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    schemas: dict[tuple[str, str], Any] = {}
    for schema in state.get_all_operator_schema():
        key, newest = (schema.domain, schema.name), opset if schema.domain == "" else 1
        if schema.since_version <= newest and (key not in schemas or schema.since_version > schemas[key].since_version):
            schemas[key] = schema
    operators: dict[str, Any] = {}
    for definition in state.get_all_opkernel_def():
        schema = schemas.get((definition.domain, definition.op_name))
        if definition.provider != PROVIDER or schema is None or definition.domain not in _DOMAINS or schema.deprecated:
            continue
        first, last = definition.version_range
        since = schema.since_version
        if first != since and not (first < since <= last != _OPEN):
            continue
        row = operators.setdefault(
            _DOMAINS[definition.domain] + definition.op_name,
            {"inputs": _formals(schema.inputs), "outputs": _formals(schema.outputs), "kernels": []},
        )
        row["kernels"].append({name: _names(types) for name, types in definition.type_constraints.items()})
    for row in operators.values():
        row["kernels"] = _merged(row["kernels"])
    return {
        "provider": PROVIDER, "package": "onnxruntime-gpu", "version": onnxruntime.__version__,
        "cuda": build_and_package_info.cuda_version, "opset": opset, "operators": dict(sorted(operators.items())),
    }  # fmt: skip


def _formals(parameters: Iterable[Any]) -> list[str]:
    """The type variable of every parameter; one that takes any number of values ends in ``*``."""
    return [parameter.typeStr + ("*" if parameter.option.name == "Variadic" else "") for parameter in parameters]


def _names(types: Iterable[str]) -> list[str]:
    """``tensor(float)`` as ``float``; sequences and other types are in no graph of foldkv."""
    return sorted(one.removeprefix("tensor(").removesuffix(")") for one in types if one.startswith("tensor("))


def _merged(kernels: list[Kernel]) -> list[Kernel]:
    """The same kernels in fewer rows: two that differ in the types of one variable are one."""
    rows: list[Kernel] = []
    for kernel in kernels:
        for row in rows:
            other = [name for name in kernel if kernel[name] != row.get(name)]
            if kernel.keys() == row.keys() and len(other) <= 1:
                for name in other:
                    row[name] = sorted({*row[name], *kernel[name]})
                break
        else:
            rows.append(dict(kernel))
    return rows


def write(content: dict[str, Any], path: Path) -> None:
    """Write the table, an operator a line."""
    head = {key: value for key, value in content.items() if key != "operators"}
    lines = [
        f"  {json.dumps(name)}: {json.dumps(row, separators=(',', ':'))}" for name, row in content["operators"].items()
    ]
    text = json.dumps(head)[:-1] + ', "operators": {\n' + ",\n".join(lines) + "\n}}\n"
    path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--opset", type=int, default=20, help="of the graphs (export/operators/registry.py)")
    arguments.add_argument("--gpu", action="store_true", help="this machine has a GPU and CUDA: use no stand-ins")
    given = arguments.parse_args()
    if not given.gpu:
        restart_with_stand_ins()
    write(table(given.opset), TABLE)
