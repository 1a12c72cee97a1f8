"""Run an operator's launches in Triton's interpreter, with the grids and arguments that the plan gives."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np
import torch
import triton.language as tl
from torch import Tensor
from triton.runtime import interpreter

from foldkv.export.contract.operators import STATE
from foldkv.export.contract.rows import DENSE
from foldkv.plugins.declarations import PLUGINS
from foldkv.plugins.launch import plan
from foldkv.plugins.plans import Plan

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16,
          "int32": torch.int32, "int64": torch.int64, "int8": torch.int8}  # fmt: skip


_NUMPY = {tl.bfloat16: np.dtype(ml_dtypes.bfloat16), tl.float16: np.dtype(np.float16), tl.float32: np.dtype(np.float32)}
_VIEWS = {"*i32": torch.int32, "*bf16": torch.bfloat16}
_BITS = {2: np.uint16, 4: np.uint32}
_convert = interpreter._convert_float


def _convert_float(data: Any, source: Any, target: Any, rounding: Any) -> Any:
    """The bits of ``data`` in another type, rounded to nearest even as GPUs do; the interpreter cuts bits off."""
    if source not in _NUMPY or target not in _NUMPY:
        return _convert(data, source, target, rounding)
    values = np.asarray(data).view(_NUMPY[source]).astype(_NUMPY[target])
    return values.view(_BITS[values.itemsize])


def _widen(handle: Any) -> Any:
    if handle.dtype.scalar != tl.bfloat16:
        return handle
    return interpreter.TensorHandle(handle.data.view(ml_dtypes.bfloat16).astype(np.float32), tl.float32)


# The interpreter keeps bfloat16 as its bits and multiplies those (triton issue 11584): give `dot` their values.
_dot = interpreter.InterpreterBuilder.create_dot
interpreter.InterpreterBuilder.create_dot = lambda self, a, b, *rest: _dot(self, _widen(a), _widen(b), *rest)
interpreter._convert_float = _convert_float


def launch(steps: Plan, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
    """Run every launch of the plan; a workspace is filled with NaN first."""
    workspace = torch.full((steps.workspace // 4,), torch.nan)
    values = {
        "input": lambda i: inputs[i],
        "output": lambda i: outputs[i],
        "int32": lambda value: value,
        "workspace": lambda offset: workspace[offset // 4 :],
    }
    for one in steps.launches:
        module, name = one.kernel.function.split(".")
        function = getattr(importlib.import_module(f"foldkv.plugins.kernels.{module}"), name)
        arguments = {}
        given = iter(one.arguments)
        for argument, type_ in one.kernel.arguments:
            value = None if type_ is None else values[(given_one := next(given)).kind](given_one.value)
            if type_ in _VIEWS and value.dtype == torch.float32:  # the workspace holds numbers of any type
                value = value.view(_VIEWS[type_])
            arguments[argument] = value
        assert next(given, None) is None
        function[one.grid](**arguments, **dict(one.kernel.constants))


def run(
    operator: str, inputs: Sequence[Tensor], *, sm: int = 80, dtype: str = "float32",
    row_format: str = DENSE, rope_dim: int = 0, **attributes: Any,
) -> list[Tensor]:  # fmt: skip
    """The operator's outputs; inputs are not changed. Outputs are filled with NaN (or -7) before."""
    spec = PLUGINS[operator]
    if "rope_dim" in spec.attributes:  # the operator's own, not only a property of its rows
        attributes["rope_dim"] = rope_dim
    inputs = [value.clone().contiguous() for value in inputs]
    sizes = spec.dimensions([tuple(value.shape) for value in inputs], row_format=row_format) | attributes
    outputs, shapes = [], spec.output_shapes(sizes, row_format=row_format)
    for index, (tensor, shape) in enumerate(zip(spec.outputs, shapes, strict=True)):
        if index in spec.aliases:
            outputs.append(inputs[spec.aliases[index]])
            continue
        state = dtype if row_format == DENSE else "int8"
        kind = DTYPES[state if tensor.dtype == STATE else tensor.dtype]
        outputs.append(torch.full(shape, torch.nan if kind.is_floating_point else -7, dtype=kind))
    launch(
        plan(operator, sizes, attributes, sm=sm, dtype=dtype, row_format=row_format, rope_dim=rope_dim), inputs, outputs
    )
    return outputs
