"""Operator: connects a declared operator with its torch definition and its ONNX function body.

Names, tensors and attributes come from export/contract/operators.py; so do both schemas and the shapes of outputs.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import onnx
import onnxscript
import torch
from onnxscript.values import Opset
from torch import Tensor

from ...errors import InputError, listing
from ..contract.operators import ANY, STATE, OperatorSpec, TensorSpec, operator_spec

DOMAIN = "foldkv"
ONNX_OPSET = 20
#: Custom domain of the operators; its version is the version of their meaning.
OPSET = Opset(DOMAIN, 1)
TORCH_NAMESPACE = "foldkv"
_TORCH_TYPES = {"float32": torch.float32, "int32": torch.int32, "int64": torch.int64}
_SCALARS = {int: "SymInt", float: "float", str: "str", tuple: "int[]"}  # in torch's schemas
_TENSOR_TYPES = [f"tensor({name})" for name in ("float", "bfloat16", "int32", "int64", "int8")]


@dataclass(frozen=True)
class Operator:
    """One operator: ``FoldkvXxx`` in ONNX, ``torch.ops.foldkv.xxx`` in torch.

    ``eager`` is the definition in torch, which runs on any device; ``function`` the same in standard ONNX operators.
    """

    spec: OperatorSpec
    torch_op: Any
    eager: Callable[..., Any]
    function: onnxscript.OnnxFunction

    @property
    def name(self) -> str:
        """In ONNX."""
        return self.spec.name


_OPERATORS: dict[str, Operator] = {}


def operator(name: str, *, eager: Callable[..., Any], function: onnxscript.OnnxFunction) -> Any:
    """Give a declared operator its definitions, and return the torch callable.

    Args:
        name: in ONNX, declared in export/contract/operators.py.
        eager: takes the tensors, then the attributes; it must not return a view of an input (a rule of ``torch.library``).
        function: the body in ONNX.

    Raises:
        InputError: the operator is not declared, or a definition has other tensors or attributes.
    """
    spec = operator_spec(name)
    _check_signatures(spec, eager, function)
    torch_name = name.removeprefix("Foldkv").lower()
    custom = torch.library.custom_op(
        f"{TORCH_NAMESPACE}::{torch_name}", eager, mutates_args=(), schema=torch_schema(spec)
    )
    custom.register_fake(lambda *arguments: empty_outputs(spec, arguments))
    overload = getattr(torch.ops.foldkv, torch_name).default
    _OPERATORS[name] = Operator(spec, overload, eager, function)
    return overload


def _check_signatures(spec: OperatorSpec, eager: Callable[..., Any], function: onnxscript.OnnxFunction) -> None:
    tensors, attributes = [tensor.name for tensor in spec.inputs], list(spec.attributes)
    found = {
        "the torch definition takes": (list(inspect.signature(eager).parameters), [*tensors, *attributes]),
        "the ONNX body takes the tensors": ([value.name for value in function.function_ir.inputs], tensors),
        "the ONNX body has the attributes": (
            sorted(attribute.name for attribute in function.function_ir.attrs), sorted(attributes)
        ),
    }  # fmt: skip
    wrong = [f"{what} {have}; declared are {want}" for what, (have, want) in found.items() if have != want]
    if wrong:
        raise InputError(listing(f"{spec.name} differs from its declaration", wrong, "Make them equal."))


def torch_schema(spec: OperatorSpec) -> str:
    """The schema in torch's language: tensors, then attributes."""
    given = [f"Tensor {tensor.name}" for tensor in spec.inputs]
    given += [f"{_SCALARS[type_]} {name}" for name, type_ in spec.attributes.items()]
    out = ", ".join("Tensor" for _ in spec.outputs)
    return f"({', '.join(given)}) -> {out if len(spec.outputs) == 1 else f'({out})'}"


def empty_outputs(spec: OperatorSpec, arguments: Sequence[Any]) -> Any:
    """Outputs of the right shapes and types without values, for tracing: a tensor, or a tuple of several."""
    tensors = dict(zip(spec.inputs, arguments, strict=False))
    sizes: dict[str, Any] = dict(zip(spec.attributes, arguments[len(spec.inputs) :], strict=True))
    for declared, tensor in tensors.items():
        if ANY not in declared.dims:
            sizes |= {
                str(dim): size for dim, size in zip(declared.dims, tensor.shape, strict=True) if str(dim) not in sizes
            }
    outputs = tuple(_empty(declared, tensors, sizes) for declared in spec.outputs)
    return outputs[0] if len(outputs) == 1 else outputs


def _empty(declared: TensorSpec, tensors: dict[TensorSpec, Tensor], sizes: dict[str, Any]) -> Tensor:
    for given, tensor in tensors.items():
        if (given.dims, given.dtype) == (declared.dims, declared.dtype):
            return torch.empty_like(tensor)
    first = next(iter(tensors.values()))
    shape = [_size(str(dim), sizes) for dim in declared.dims]
    if declared.may_end:  # a backend can omit columns, so the graph has a separate size for their number
        shape[-1] = torch.library.get_ctx().new_dynamic_size()
    if declared.dtype == STATE:
        kept = next(tensor for given, tensor in tensors.items() if given.dtype == STATE)
        return kept.new_empty(shape)
    return first.new_empty(shape, dtype=_TORCH_TYPES[declared.dtype])


def _size(dim: str, sizes: dict[str, Any]) -> Any:
    """The size of an axis: of a symbol, of a sum of symbols, or a number."""
    if dim in sizes:
        return sizes[dim]
    if "+" in dim:
        left, right = dim.split("+")
        return _size(left.strip(), sizes) + _size(right.strip(), sizes)
    return int(dim)


def operators() -> dict[str, Operator]:
    """All operators by ONNX name. Importing the modules of this folder registers them."""
    package = __name__.rpartition(".")[0]
    for module in pkgutil.iter_modules(importlib.import_module(package).__path__):
        importlib.import_module(f"{package}.{module.name}")
    return dict(_OPERATORS)


def translation_table() -> dict[Any, Callable[..., Any]]:
    """For ``torch.onnx.export(custom_translation_table=...)``: torch operator to ONNX node."""
    return {op.torch_op: _translation(op) for op in operators().values()}


def schema(spec: OperatorSpec) -> onnx.defs.OpSchema:
    """The ONNX schema of an operator. Tensors can have any type; the body determines which work."""
    formal = onnx.defs.OpSchema.FormalParameter
    types = onnx.defs.OpSchema.AttrType
    kinds = {int: types.INT, float: types.FLOAT, str: types.STRING, tuple: types.INTS}
    names = [*(f"T{i}" for i in range(len(spec.inputs))), *(f"U{i}" for i in range(len(spec.outputs)))]
    return onnx.defs.OpSchema(
        spec.name,
        DOMAIN,
        OPSET.version,
        inputs=[formal(tensor.name, f"T{i}") for i, tensor in enumerate(spec.inputs)],
        outputs=[formal(f"{tensor.name}_out", f"U{i}") for i, tensor in enumerate(spec.outputs)],
        type_constraints=[(name, _TENSOR_TYPES, "") for name in names],
        attributes=[
            onnx.defs.OpSchema.Attribute(name, kinds[type_], required=True) for name, type_ in spec.attributes.items()
        ],
    )


def _translation(op: Operator) -> Callable[..., Any]:
    count = len(op.spec.inputs)
    node = onnxscript.values.Op(OPSET, op.name, schema(op.spec))

    def translate(*args: Any) -> Any:
        return node(*args[:count], **dict(zip(op.spec.attributes, args[count:], strict=True)))

    return translate
