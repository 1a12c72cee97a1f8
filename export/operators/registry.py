"""Operator: connects a torch operator, its ONNX node and its ONNX function body."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import onnx
import onnxscript
import torch
from onnxscript.values import Opset

DOMAIN = "foldkv"
ONNX_OPSET = 20
#: Custom domain of the operators; its version is the version of their meaning.
OPSET = Opset(DOMAIN, 1)
TORCH_NAMESPACE = "foldkv"
_TENSOR_TYPES = [f"tensor({name})" for name in ("float", "bfloat16", "int32", "int64", "int8")]


@dataclass(frozen=True)
class Operator:
    """One operator: ``FoldkvXxx`` in ONNX, ``torch.ops.foldkv.xxx`` in torch.

    ``inputs`` are tensors in order, ``attributes`` follow them in the torch schema by position. ``eager`` is the
    definition in torch, which runs on any device.
    """

    name: str
    torch_op: Any
    eager: Callable[..., Any]
    function: onnxscript.OnnxFunction
    inputs: tuple[str, ...]
    attributes: tuple[str, ...]
    outputs: tuple[str, ...]


_OPERATORS: dict[str, Operator] = {}


def operator(
    name: str,
    *,
    eager: Callable[..., Any],
    fake: Callable[..., Any],
    function: onnxscript.OnnxFunction,
    inputs: tuple[str, ...],
    attributes: tuple[str, ...] = (),
    outputs: tuple[str, ...],
) -> Any:
    """Register an operator and return the torch callable.

    ``eager`` must not return a view of an input (a rule of ``torch.library``); ``fake`` gives shapes.
    """
    torch_name = name.removeprefix("Foldkv").lower()
    custom = torch.library.custom_op(f"{TORCH_NAMESPACE}::{torch_name}", eager, mutates_args=())
    custom.register_fake(fake)
    overload = getattr(torch.ops.foldkv, torch_name).default
    _OPERATORS[name] = Operator(name, overload, eager, function, inputs, attributes, outputs)
    return overload


def operators() -> dict[str, Operator]:
    """All operators by ONNX name. Importing the operator modules registers them."""
    from . import (  # noqa: F401
        attention,
        compress,
        compress_online,
        experts,
        index,
        quantize,
        rope,
        sinkhorn,
        window,
    )

    return dict(_OPERATORS)


def translation_table() -> dict[Any, Callable[..., Any]]:
    """For ``torch.onnx.export(custom_translation_table=...)``: torch operator to ONNX node."""
    return {op.torch_op: _translation(op) for op in operators().values()}


def schema(op: Operator) -> onnx.defs.OpSchema:
    """The ONNX schema of an operator. Tensors can have any type; the body determines which work."""
    formal = onnx.defs.OpSchema.FormalParameter
    kinds = {int: onnx.defs.OpSchema.AttrType.INT, float: onnx.defs.OpSchema.AttrType.FLOAT}
    types = {
        argument.name: type_ for argument, type_ in zip(op.torch_op._schema.arguments, _python_types(op), strict=True)
    }
    names = [*(f"T{i}" for i in range(len(op.inputs))), *(f"U{i}" for i in range(len(op.outputs)))]
    return onnx.defs.OpSchema(
        op.name,
        DOMAIN,
        OPSET.version,
        inputs=[formal(name, f"T{i}") for i, name in enumerate(op.inputs)],
        outputs=[formal(f"{name}_out", f"U{i}") for i, name in enumerate(op.outputs)],
        type_constraints=[(name, _TENSOR_TYPES, "") for name in names],
        attributes=[onnx.defs.OpSchema.Attribute(name, kinds[types[name]], required=True) for name in op.attributes],
    )


def _python_types(op: Operator) -> list[type]:
    known = {"Tensor": torch.Tensor, "int": int, "float": float}
    return [known[str(argument.type)] for argument in op.torch_op._schema.arguments]


def _translation(op: Operator) -> Callable[..., Any]:
    count = len(op.inputs)
    node = onnxscript.values.Op(OPSET, op.name, schema(op))

    def translate(*args: Any) -> Any:
        return node(*args[:count], **dict(zip(op.attributes, args[count:], strict=True)))

    return translate
