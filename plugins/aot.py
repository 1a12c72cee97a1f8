"""The plugins as TensorRT 11 takes them ahead of time: PTX, a launch and nothing of Python left in the engine.

The package ``tensorrt.plugin`` wants three functions per operator: what comes out (``register``), of which types and
formats (``autotune``), and the kernel with its launch in symbolic sizes (``aot_impl``). All are made here from
:class:`PluginSpec` and :func:`foldkv.plugins.launch.plan`; nothing about an operator is said twice.

TensorRT fixes the kernel's arguments: addresses of the inputs, then extra arguments, then addresses of the outputs,
those that alias an input among them. Extra arguments are int32 and no sum or product of sizes is one: only single
axes are passed (tokens of a chunk, entries of a cache), and a profile whose axes or grids do not fit is refused.
Kernels compute offsets over the batch in 64 bits themselves.

One launch per node, no workspace: attention does not split its keys over programs. Whether TensorRT asks the driver for
more than 48 KiB of shared memory on a kernel's behalf is unknown, since it has no documented way to: this form has tiles
that need no more, and a kernel that does is refused. ``foldkv build`` uses the other form, plugins/tensorrt.py: this one
is for builds of one's own. No engine with these plugins was run yet.
"""

from __future__ import annotations

import importlib
import inspect
import re
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import GenericAlias
from typing import Any

from foldkv.errors import BuildError, FoldkvError, MissingDependencyError
from foldkv.export.layouts import DENSE
from foldkv.plugins.compile import SHARED_LIMITS, CompiledKernel, compile_kernels
from foldkv.plugins.launch import DYNAMIC, Arithmetic, Kernel, Launch, Plan, plan
from foldkv.plugins.spec import FIELDS, NAMESPACE, PLUGINS, STATE, PluginSpec

#: Attributes of a node beside the operator's own; the compute capability is given when the plugins are registered.
EXTRAS: dict[str, type] = {name: FIELDS[name] for name in ("rows", "layout_version", "rotary")}
#: Bytes of shared memory that every kernel may use without asking the driver for more.
SHARED_WITHOUT_ASKING = 48 << 10
#: The most programs along x, y and z that CUDA launches.
GRID_LIMITS = (2**31 - 1, 65_535, 65_535)
_INT32_LIMIT = 2**31 - 1
_HIDDEN_PARAMETERS = 2  # Triton appends pointers to two kinds of scratch memory, which plugins/compile.py refuses
_VERSION = "1"  # tensorrt.plugin gives every plugin this one
_DATA_TYPES = {
    "float32": "FLOAT",
    "float16": "HALF",
    "bfloat16": "BF16",
    "int8": "INT8",
    "int32": "INT32",
    "int64": "INT64",
}
_TUNED_TYPES = _DATA_TYPES | {"float32": "FP32", "float16": "FP16"}

_registered: dict[Any, _Target] = {}


def register_plugins(
    trt: Any, *, sm: int, cache: Path | None = None, shared_limit: int = SHARED_WITHOUT_ASKING
) -> None:
    """Register every operator's ahead-of-time plugin with TensorRT; a second call for the same target does nothing.

    Kernels are compiled when TensorRT asks for them, which is during the build of an engine: a plugin that cannot serve
    a node raises :class:`BuildError` there.

    Args:
        trt: the module ``tensorrt``, version 11 (not ``tensorrt_rtx``, which has no such plugins).
        sm: compute capability of the engines to build. A process builds for one: TensorRT keeps the plugins.
        cache: folder of compiled kernels, see :func:`compile_kernels`.
        shared_limit: most bytes of shared memory of a kernel.

    Raises:
        BuildError: no kernels for ``sm``, plugins for another target, or the other form of the plugins, are registered.
        MissingDependencyError: the module has no ahead-of-time plugins.
    """
    if sm not in SHARED_LIMITS:
        raise BuildError(f"no kernel for sm{sm}; there are sm{', sm'.join(map(str, SHARED_LIMITS))}.")
    package = _plugin_package(trt)
    target = _Target(trt, package, sm, cache, shared_limit)
    known = _registered.get(package)
    if known is not None:
        if (known.sm, known.shared_limit) != (sm, shared_limit):
            raise BuildError(f"plugins for sm{known.sm} are registered in this process; build for sm{sm} in another.")
        return
    registry = trt.get_plugin_registry()
    taken = [name for name in PLUGINS if registry.get_creator(name, _VERSION, NAMESPACE) is not None]
    if taken:
        raise BuildError(
            f"{', '.join(taken)}: plugins of this name are registered in this process; use one form of them per process."
        )
    for spec in PLUGINS.values():
        _register(target, spec)
    _registered[package] = target


def _plugin_package(trt: Any) -> Any:
    if not hasattr(trt, "QuickPluginCreationRequest"):
        raise MissingDependencyError(f"{trt.__name__} has no ahead-of-time plugins; they need TensorRT 11.")
    try:
        return importlib.import_module(f"{trt.__name__}.plugin")
    except ImportError as error:
        raise MissingDependencyError(f"{trt.__name__}.plugin cannot be imported: {error}.") from None


@dataclass(frozen=True, eq=False)
class _Target:
    """What kernels are compiled for, and those that were."""

    trt: Any
    package: Any
    sm: int
    cache: Path | None
    shared_limit: int
    compiled: dict[Kernel, CompiledKernel] = field(default_factory=dict)
    # By the first descriptor that a node answered with, which tensorrt.plugin hands back when it asks for the kernel.
    attributes: weakref.WeakKeyDictionary[Any, dict[str, Any]] = field(default_factory=weakref.WeakKeyDictionary)

    def compile(self, kernel: Kernel) -> CompiledKernel:
        """The kernel compiled once; TensorRT asks for a launch per type, format and profile."""
        if kernel not in self.compiled:
            self.compiled[kernel] = compile_kernels([(kernel, self.sm)], jobs=1, cache=self.cache)[0]
        found = self.compiled[kernel]
        if found.shared > self.shared_limit:
            raise BuildError(
                f"kernel {kernel.name} needs {found.shared} B of shared memory on sm{self.sm} and a plugin ahead of time "
                f"gets {self.shared_limit}: whether TensorRT asks for more is unknown. Build with plugins of the other form."
            )
        return found

    def data_type(self, dtype: str) -> Any:
        return getattr(self.trt.DataType, _DATA_TYPES[dtype])


def _register(target: _Target, spec: PluginSpec) -> None:
    package, name = target.package, f"{NAMESPACE}::{spec.operator}"
    descs = GenericAlias(tuple, (package.TensorDesc,) * len(spec.outputs))
    kernel = GenericAlias(tuple, (str, str, package.KernelLaunchParams, package.SymIntExprs))
    outputs, tactic = {"outputs": descs}, {"outputs": descs, "tactic": int}
    package.register(name)(_function(target, spec, _outputs, {}, descs))
    package.autotune(name)(
        _function(target, spec, _combinations, outputs, GenericAlias(list, (package.AutoTuneCombination,)))
    )
    package.aot_impl(name)(_function(target, spec, _implementation, tactic, kernel))


def _function(
    target: _Target, spec: PluginSpec, answer: Callable[[_Node], Any], ends: Mapping[str, Any], returns: Any
) -> Callable[..., Any]:
    """A function with the operator's tensors and attributes as parameters, which is how tensorrt.plugin reads them."""
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    attributes = {**spec.attributes, **EXTRAS}
    # Attributes are known by name and tensors by position: of a tensor and an attribute alike, the tensor gives way.
    tensors = [f"{tensor.name}_tensor" if tensor.name in attributes else tensor.name for tensor in spec.inputs]
    parameters = [inspect.Parameter(name, kind, annotation=target.package.TensorDesc) for name in tensors]
    parameters += [inspect.Parameter(name, kind, annotation=type_) for name, type_ in attributes.items()]
    parameters += [inspect.Parameter(name, kind, annotation=type_) for name, type_ in ends.items()]
    signature = inspect.Signature(parameters, return_annotation=returns)

    def function(*args: Any, **kwargs: Any) -> Any:
        try:
            given = signature.bind(*args, **kwargs).arguments
        except TypeError as error:
            raise BuildError(f"{spec.operator}: {error}; inject the graph with this version of foldkv.") from None
        values = {name: given[name] for name in attributes}
        values["rows"] = values["rows"].rstrip("\0")  # the ONNX parser ends a string with a NUL
        node = _Node(target, spec, [given[name] for name in tensors], values, given.get("outputs"))
        try:
            return answer(node)
        except FoldkvError:
            raise
        except ValueError as error:  # sizes, formats or versions that no kernel takes
            raise BuildError(str(error)) from None

    function.__name__ = function.__qualname__ = spec.operator + answer.__name__
    function.__signature__ = signature  # type: ignore[attr-defined]
    return function


@dataclass(frozen=True, eq=False)
class _Node:
    """One node: descriptors of its inputs and the values of its attributes."""

    target: _Target
    spec: PluginSpec
    inputs: list[Any]
    values: dict[str, Any]
    outputs: Any = None

    @property
    def rows(self) -> str:
        return str(self.values["rows"])

    @property
    def state(self) -> str:
        """The type of the state's tensors; of no account where there are none."""
        kinds = [
            desc.dtype for desc, tensor in zip(self.inputs, self.spec.inputs, strict=True) if tensor.dtype == STATE
        ]
        wanted = sorted(self.spec.dtypes) if self.rows == DENSE else ["int8"]
        found = [name for name in wanted if not kinds or all(kind == self.target.data_type(name) for kind in kinds)]
        if not found:
            raise BuildError(f"{self.spec.operator}: state of type {kinds} in {self.rows} rows; expected {wanted}.")
        return found[0]

    def dtype(self, dtype: str) -> str:
        return self.state if dtype == STATE else dtype

    def check(self) -> None:
        """Refuse what no kernel takes while TensorRT still asks for types.

        Raises:
            BuildError: the row format, or the type of an input.
        """
        dtype = self.state if self.rows == DENSE else min(self.spec.dtypes)
        reasons = self.spec.refusals(sm=self.target.sm, dtype=dtype, rows=self.rows)
        if reasons:
            raise BuildError(f"{self.spec.operator}: {'; '.join(reasons)}.")
        for desc, tensor in zip(self.inputs, self.spec.inputs, strict=True):
            wanted = self.target.data_type(self.dtype(tensor.dtype))
            if desc.dtype != wanted:
                raise BuildError(f"{self.spec.operator}.{tensor.name} is {desc.dtype}; expected {wanted}.")

    def expressions(self) -> dict[str, Any]:
        """The symbolic size of every symbol that is an axis of its own."""
        found: dict[str, Any] = {}
        for desc, tensor in zip(self.inputs, self.spec.inputs, strict=True):
            if desc.ndim != tensor.rank:
                raise BuildError(f"{self.spec.operator}.{tensor.name} has {desc.ndim} axes; expected {tensor.dims}.")
            for axis, symbol in enumerate(tensor.stored_dims(self.rows)):
                found.setdefault(str(symbol), desc.shape_expr[axis])
        return found

    def bounds(self) -> list[dict[str, int]]:
        """The size of every symbol at the profile's smallest and largest shapes."""
        ends = []
        for end in ("min", "max"):
            shapes = [tuple(getattr(desc.shape, end) if desc.is_dynamic else desc.shape) for desc in self.inputs]
            ends.append(self.spec.dimensions(shapes, rows=self.rows))
        least, most = ends
        moving = [name for name in least if name not in DYNAMIC and least[name] != most[name]]
        if moving:
            raise BuildError(
                f"{self.spec.operator}: {', '.join(moving)} of a profile go from {[least[name] for name in moving]} to "
                f"{[most[name] for name in moving]}; kernels are compiled for one size each."
            )
        return ends

    def steps(self, sizes: Mapping[str, Any], arithmetic: Arithmetic | None = None) -> Plan:
        values, spec = self.values, self.spec
        attributes = {name: values[name] for name in spec.attributes}
        dtype = self.state if self.rows == DENSE else "bfloat16"
        options: dict[str, Any] = {} if arithmetic is None else {"arithmetic": arithmetic}
        return plan(
            spec.operator, {**sizes, **attributes}, attributes, sm=self.target.sm, dtype=dtype, rows=self.rows,
            rotary=values["rotary"], layout_version=values["layout_version"], single=True, **options,
        )  # fmt: skip


def _outputs(node: _Node) -> tuple[Any, ...]:
    """Descriptors of the outputs: of every shape and type from the spec, and in place where it says so."""
    node.check()
    spec, package, sizes = node.spec, node.target.package, node.expressions()

    def size(symbol: str | int) -> Any:
        if isinstance(symbol, int):
            return symbol
        if symbol in node.spec.attributes:
            return node.values[symbol]
        if symbol in sizes:
            return sizes[symbol]
        first, *rest = (sizes[part.strip()] for part in symbol.split("+"))
        return sum(rest, first)

    made = []
    for index, tensor in enumerate(spec.outputs):
        if index in spec.aliases:
            made.append(node.inputs[spec.aliases[index]].aliased())
        else:
            shape = tuple(size(symbol) for symbol in tensor.stored_dims(node.rows))
            made.append(package.from_shape_expr(shape, node.target.data_type(node.dtype(tensor.dtype))))
    node.target.attributes[made[0]] = node.values
    return tuple(made)


def _combinations(node: _Node) -> list[Any]:
    """Row-major tensors; the state's are all of one type."""
    state = "|".join(_TUNED_TYPES[name] for name in sorted(node.spec.dtypes)) if node.rows == DENSE else "INT8"
    tensors = (*node.spec.inputs, *node.spec.outputs)
    types = [state if tensor.dtype == STATE else _TUNED_TYPES[tensor.dtype] for tensor in tensors]
    return [node.target.package.AutoTuneCombination(", ".join(types), "LINEAR")]


def _implementation(node: _Node) -> tuple[str, str, Any, Any]:
    """Entry point, PTX, launch and extra arguments."""
    package = node.target.package
    # tensorrt.plugin passes attributes by name until here, and here by position in the order of the node's fields.
    if node.target.attributes.get(node.outputs[0], node.values) != node.values:
        raise BuildError(f"{node.spec.operator}: attributes came in another order than {list(node.values)}.")
    least, most = node.bounds()
    dynamic = {name: _Size(package, expr) for name, expr in node.expressions().items() if name in DYNAMIC}
    launch = _only_launch(node, node.steps({**most, **dynamic}, _arithmetic(package)))
    for sizes in (least, most):
        _check_numbers(node, launch, _only_launch(node, node.steps(sizes)))
    kernel = node.target.compile(launch.kernel)
    extras = [argument.value for argument in launch.arguments if argument.kind == "int32"]
    x, y, z = (_expression(package, value) for value in launch.grid)
    parameters = package.KernelLaunchParams(
        grid_x=x, grid_y=y, grid_z=z, block_x=kernel.threads, shared_mem=kernel.shared
    )
    symbols = package.SymIntExprs(len(extras))
    for index, value in enumerate(extras):
        symbols[index] = package.SymInt32(_expression(package, value))
    return kernel.entry, drop_hidden_parameters(kernel.ptx, len(launch.arguments)), parameters, symbols


def _only_launch(node: _Node, steps: Plan) -> Launch:
    """The launch of a plan that TensorRT can launch.

    Raises:
        BuildError: several launches, a workspace, or arguments in another order than TensorRT passes them.
    """
    spec = node.spec
    if len(steps.launches) != 1 or steps.workspace:
        raise BuildError(
            f"{spec.operator} takes {len(steps.launches)} launches and {steps.workspace} B of workspace; a plugin ahead of "
            "time has one launch and no workspace."
        )
    [launch] = steps.launches
    found = [(argument.kind, argument.value) for argument in launch.arguments if argument.kind != "int32"]
    order = [argument.kind for argument in launch.arguments]
    wanted = [("input", i) for i in range(len(spec.inputs))] + [("output", i) for i in range(len(spec.outputs))]
    if found != wanted or order != sorted(order, key=("input", "int32", "output").index):
        raise BuildError(f"{spec.operator} does not launch with inputs, int32 values and outputs in TensorRT's order.")
    return launch


def _check_numbers(node: _Node, launch: Launch, numbers: Launch) -> None:
    """Refuse a profile for which the symbolic launch would be another, or none that CUDA takes."""
    name = node.spec.operator
    if numbers.kernel != launch.kernel:
        raise BuildError(f"{name} would launch another kernel at other sizes of the profile; a plugin has one.")
    if any(size > limit for size, limit in zip(numbers.grid, GRID_LIMITS, strict=True)):
        raise BuildError(f"{name} would launch a grid of {numbers.grid} programs; CUDA takes {GRID_LIMITS}.")
    large = [value.value for value in numbers.arguments if value.kind == "int32" and value.value > _INT32_LIMIT]
    if large:
        raise BuildError(f"{name} would pass {large} to a kernel, which takes 32 bits.")


class _Size:
    """A symbolic size that may stand on either side of an operator; ``tensorrt.plugin``'s stand on the left only.

    It has no order and no truth: code that would choose by a size fails instead of choosing once for all sizes.
    """

    def __init__(self, package: Any, expression: Any) -> None:
        self.package, self.expression = package, expression

    def lift(self, value: Any) -> Any:
        return _expression(self.package, value)

    def __add__(self, other: Any) -> _Size:
        return _Size(self.package, self.expression + self.lift(other))

    def __sub__(self, other: Any) -> _Size:
        return _Size(self.package, self.expression - self.lift(other))

    def __mul__(self, other: Any) -> _Size:
        return _Size(self.package, self.expression * self.lift(other))

    def __rsub__(self, other: Any) -> _Size:
        return _Size(self.package, self.lift(other) - self.expression)

    __radd__, __rmul__ = __add__, __mul__

    def __bool__(self) -> bool:
        raise BuildError("a launch depends on whether a size is zero, which is not known ahead of time.")


def _expression(package: Any, value: Any) -> Any:
    return value.expression if isinstance(value, _Size) else package.ShapeExpr(value)


def _arithmetic(package: Any) -> Arithmetic:
    def of(operation: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
        return lambda a, b: _Size(package, operation(_expression(package, a), _expression(package, b)))

    return Arithmetic(cdiv=of(package.cdiv), maximum=of(package.max))


def drop_hidden_parameters(ptx: str, declared: int) -> str:
    """PTX whose entry point takes its first ``declared`` parameters and no more.

    Triton appends two pointers to scratch memory to every kernel. A kernel that needs none never reads them.

    Raises:
        BuildError: there are not exactly two more parameters than declared, or the code uses one of them.
    """
    entries = list(re.finditer(r"\.entry\s+(\w+)\s*\((.*?)\)", ptx, re.DOTALL))
    if len(entries) != 1:
        raise BuildError(f"the PTX has {len(entries)} entry points; expected one.")
    [entry] = entries
    parameters = [text.strip() for text in entry[2].split(",")]
    if len(parameters) != declared + _HIDDEN_PARAMETERS:
        raise BuildError(
            f"kernel {entry[1]} has {len(parameters)} parameters; expected {declared} and the {_HIDDEN_PARAMETERS} that "
            "Triton appends."
        )
    rest = ptx[: entry.start()] + ptx[entry.end() :]
    hidden = [text.split()[-1] for text in parameters[declared:]]
    used = [name for name in hidden if re.search(rf"\b{re.escape(name)}\b", rest)]
    if used:
        raise BuildError(f"kernel {entry[1]} uses {', '.join(used)}: scratch memory, which TensorRT does not give it.")
    kept = ",\n\t".join(parameters[:declared])
    return f"{ptx[: entry.start(2)]}\n\t{kept}\n{ptx[entry.end(2) :]}"
