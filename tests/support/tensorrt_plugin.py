"""TensorRT 11's Python package for plugins on a CPU, and what its builder asks of a plugin.

The package ``tensorrt.plugin`` comes unmodified from the wheel of TensorRT's bindings, whose own library does not load
here. Enumerations, descriptors, fields and base classes under it are those of TensorRT-RTX; only what that lacks stands
in: symbolic sizes that can be evaluated, the base of ahead-of-time plugins and their creation request. The registry is one
of its own, since that of TensorRT-RTX belongs to the whole process.
"""

from __future__ import annotations

import contextlib
import enum
import importlib
import importlib.util
import sys
import types
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np


class IDimensionExpr:
    """An integer of named sizes. ``eval`` gives its value, as TensorRT computes it when shapes are known."""

    def __init__(self, value: Callable[[Mapping[str, int]], int], constant: int | None = None) -> None:
        self._value, self._constant = value, constant

    def is_constant(self) -> bool:
        return self._constant is not None

    def get_constant_value(self) -> int:
        assert self._constant is not None
        return self._constant

    def eval(self, sizes: Mapping[str, int]) -> int:
        return self._value(sizes)


def _operations(kinds: Any) -> dict[Any, Callable[[int, int], int]]:
    return {
        kinds.SUM: lambda a, b: a + b, kinds.SUB: lambda a, b: a - b, kinds.PROD: lambda a, b: a * b,
        kinds.MAX: max, kinds.MIN: min, kinds.FLOOR_DIV: lambda a, b: a // b, kinds.CEIL_DIV: lambda a, b: -(-a // b),
        kinds.EQUAL: lambda a, b: int(a == b), kinds.LESS: lambda a, b: int(a < b),
    }  # fmt: skip


class IExprBuilder:
    """Makes expressions; ``size`` is this stand-in's own way to name one."""

    operations: Mapping[Any, Callable[[int, int], int]] = {}

    def constant(self, value: int) -> IDimensionExpr:
        return IDimensionExpr(lambda _: value, value)

    def size(self, name: str) -> IDimensionExpr:
        return IDimensionExpr(lambda sizes: sizes[name])

    def operation(self, kind: Any, left: IDimensionExpr, right: IDimensionExpr) -> IDimensionExpr:
        of = self.operations[kind]
        known = left.is_constant() and right.is_constant()
        constant = of(left.get_constant_value(), right.get_constant_value()) if known else None
        return IDimensionExpr(lambda sizes: of(left.eval(sizes), right.eval(sizes)), constant)


class DimsExprs(list):  # type: ignore[type-arg]
    """The expressions of a shape."""

    def __init__(self, axes: int | Sequence[IDimensionExpr]) -> None:
        super().__init__([None] * axes if isinstance(axes, int) else axes)


class ISymExpr:
    """A typed expression."""


class IPluginV3QuickAOTBuild:
    """Base of ahead-of-time plugins."""


class QuickPluginCreationRequest(enum.IntEnum):
    """Which form of a plugin a network wants."""

    UNKNOWN = 0
    PREFER_JIT = 1
    PREFER_AOT = 2
    STRICT_JIT = 3
    STRICT_AOT = 4


class PluginRegistry:
    """Creators by name, version and namespace."""

    def __init__(self) -> None:
        self._creators: dict[tuple[str, str, str], Any] = {}

    def register_creator(self, creator: Any, namespace: str) -> bool:
        return self._creators.setdefault((creator.name, creator.plugin_version, namespace), creator) is creator

    def get_creator(self, name: str, version: str, namespace: str = "") -> Any:
        return self._creators.get((name, version, namespace))


@contextlib.contextmanager
def tensorrt_stand_in() -> Iterator[Any]:
    """The module ``tensorrt`` with its package ``plugin``, importable inside the context and gone after it."""
    import tensorrt_rtx as rtx

    bindings = importlib.util.find_spec("tensorrt_bindings")
    assert bindings is not None and bindings.origin is not None
    trt: Any = types.ModuleType("tensorrt")
    trt.__dict__.update({name: value for name, value in vars(rtx).items() if not name.startswith("__")})
    trt.__path__ = [str(Path(bindings.origin).parent)]
    for kind in (IDimensionExpr, IExprBuilder, DimsExprs, ISymExpr, IPluginV3QuickAOTBuild, QuickPluginCreationRequest):
        setattr(trt, kind.__name__, kind)
    IExprBuilder.operations = _operations(rtx.DimensionOperation)
    registry = PluginRegistry()
    trt.get_plugin_registry = lambda: registry
    hidden = _take_out("tensorrt")
    sys.modules["tensorrt"] = trt
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # escape sequences in the package's docstrings
            importlib.import_module("tensorrt.plugin")
        yield trt
    finally:
        _take_out("tensorrt")
        sys.modules.update(hidden)


def _take_out(package: str) -> dict[str, types.ModuleType]:
    names = [name for name in sys.modules if name == package or name.startswith(f"{package}.")]
    return {name: sys.modules.pop(name) for name in names}


@dataclass(frozen=True)
class Input:
    """An input of a node: name of a ``DataType``, and per axis a number, a name, or a sum of both ("16 + S")."""

    dtype: str
    dims: tuple[int | str, ...]

    def shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """The axes at these sizes."""
        return tuple(sum(_part(text, sizes) for text in str(dim).split("+")) for dim in self.dims)


def _part(text: str, sizes: Mapping[str, int]) -> int:
    return int(text) if text.strip().isdigit() else sizes[text.strip()]


@dataclass(frozen=True)
class Answers:
    """What a plugin tells the builder. Shapes, grid and extra arguments are expressions."""

    types: list[Any]
    shapes: list[list[IDimensionExpr]]
    aliases: dict[int, int]
    combinations: list[list[tuple[Any, Any]]]
    grid: list[IDimensionExpr]
    block: tuple[int, ...]
    shared: int
    extras: list[Any]
    entry: str
    code: bytes

    def shape(self, output: int, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """The shape of an output."""
        return tuple(axis.eval(sizes) for axis in self.shapes[output])

    def launch(self, sizes: Mapping[str, int]) -> tuple[tuple[int, ...], list[int]]:
        """Grid and extra arguments."""
        return tuple(axis.eval(sizes) for axis in self.grid), [extra.expr.eval(sizes) for extra in self.extras]


@dataclass
class _Params:
    """The launch that a plugin fills in."""

    grid_x: Any = None
    grid_y: Any = None
    grid_z: Any = None
    block_x: Any = None
    block_y: Any = None
    block_z: Any = None
    shared_mem: Any = None


class _Extras(dict):  # type: ignore[type-arg]
    """The extra arguments that a plugin fills in."""

    nbSymExprs = 0


def build(
    trt: Any, operator: str, attributes: Mapping[str, Any], inputs: Sequence[Input], profile: Sequence[Mapping[str, int]],
    *, namespace: str = "foldkv",
) -> Answers:  # fmt: skip
    """Create a plugin as the ONNX parser does and ask it everything that the builder asks, in the same order.

    Args:
        trt: of :func:`tensorrt_stand_in`.
        operator: name of the plugin.
        attributes: of the node, delivered in this order.
        inputs: of the node.
        profile: the smallest, the best and the largest sizes by name.
        namespace: of the plugin.
    """
    creator = trt.get_plugin_registry().get_creator(operator, "1", namespace)
    held = {name: _field_data(value) for name, value in attributes.items()}  # a PluginField keeps an address only
    kinds = {"b": trt.PluginFieldType.CHAR, "f": trt.PluginFieldType.FLOAT32, "i": trt.PluginFieldType.INT32}
    fields = trt.PluginFieldCollection([trt.PluginField(name, data, kinds[of]) for name, (data, of) in held.items()])
    plugin = creator.create_plugin(
        operator, namespace, fields, trt.TensorRTPhase.BUILD, QuickPluginCreationRequest.STRICT_AOT
    )
    given = [getattr(trt.DataType, one.dtype) for one in inputs]
    types = plugin.get_output_data_types(given, [len(one.dims) for one in inputs])
    builder = IExprBuilder()
    dims = [DimsExprs([_expression(trt, builder, dim) for dim in one.dims]) for one in inputs]
    shapes = plugin.get_output_shapes(dims, [], builder)
    aliases = {index: plugin.get_aliased_input(index) for index in range(plugin.num_outputs)}
    ranges = [[one.shape(sizes) for sizes in profile] for one in inputs]
    ranges += [[tuple(axis.eval(sizes) for axis in shape) for sizes in profile] for shape in shapes]
    described = [_described(trt, kind, least) for kind, least in zip([*given, *types], ranges, strict=True)]
    offered = plugin.get_supported_format_combinations(described, len(inputs))
    pairs = [(one.type, one.format) for one in offered]
    combinations = [pairs[at : at + len(described)] for at in range(0, len(pairs), len(described))]
    plugin.configure_plugin(described[: len(inputs)], described[len(inputs) :])
    [tactic] = plugin.get_valid_tactics() or [0]
    plugin.set_tactic(tactic)
    params, extras = _Params(), _Extras()
    plugin.get_launch_params(dims, described, len(inputs), params, extras, builder)
    entry, code = plugin.get_kernel(
        [one.desc for one in described[: len(inputs)]], [one.desc for one in described[len(inputs) :]]
    )
    assert extras.nbSymExprs == len(extras)
    block = [one.expr.get_constant_value() for one in (params.block_x, params.block_y, params.block_z)]
    return Answers(
        types, shapes, {output: source for output, source in aliases.items() if source >= 0}, combinations,
        [params.grid_x.expr, params.grid_y.expr, params.grid_z.expr], tuple(block),
        params.shared_mem.expr.get_constant_value(), [extras[i] for i in range(len(extras))], entry, code,
    )  # fmt: skip


def _field_data(value: Any) -> tuple[Any, str]:
    """The data of a field as TensorRT's ONNX parser delivers it, and what it is: strings end with a NUL."""
    if isinstance(value, str):
        return value.encode() + b"\0", "b"
    return (np.array([value], np.float32), "f") if isinstance(value, float) else (np.array([value], np.int32), "i")


def _expression(trt: Any, builder: IExprBuilder, dim: int | str) -> IDimensionExpr:
    parts = [text.strip() for text in str(dim).split("+")]
    made = [builder.constant(int(text)) if text.isdigit() else builder.size(text) for text in parts]
    return made[0] if len(made) == 1 else builder.operation(trt.DimensionOperation.SUM, *made)


def _described(trt: Any, kind: Any, shapes: Sequence[tuple[int, ...]]) -> Any:
    made = trt.DynamicPluginTensorDesc()
    made.desc.type, made.desc.format = kind, trt.TensorFormat.LINEAR
    made.desc.dims = tuple(sizes[0] if len(set(sizes)) == 1 else -1 for sizes in zip(*shapes, strict=True))
    made.min, made.opt, made.max = shapes
    return made
