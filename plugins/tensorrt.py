"""The plugins for TensorRT and TensorRT-RTX: one ``IPluginV3`` class over :class:`PluginSpec`.

At build time a plugin gives shapes, types, aliases and workspace; it needs no kernel and no GPU. At run time it
launches the bundle's compiled kernels through the CUDA driver, without torch or Triton. The two libraries share their
Python API, so the module (``tensorrt`` or ``tensorrt_rtx``) is an argument.

Kernels belong to a bundle: a node has the bundle's ``library`` name, and :func:`provide_kernels` loads the kernels of that
name in this process.
"""

from __future__ import annotations

import functools
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from ..export.contract.operators import TensorSpec
from ..export.contract.rows import row_format_named
from .cuda import KernelImage, Launcher
from .declarations import FIELDS, NAMESPACE, PLUGINS, PluginSpec
from .launch import largest_workspace, plan
from .plans import Plan

_LIBRARIES: dict[str, Launcher] = {}
_USERS: Counter[str] = Counter()
_LOCK = threading.Lock()


def provide_kernels(library: str, images: Iterable[KernelImage], *, driver: Any = None) -> None:
    """Load the kernels that plugins of ``library`` launch, once per process, and prepare them for the current device.

    Every call needs one of :func:`release_kernels`.

    Raises:
        FoldkvError: the driver refuses a kernel.
        MissingDependencyError: no driver.
    """
    with _LOCK:
        if library in _LIBRARIES:
            _LIBRARIES[library].prepare()
        else:
            _LIBRARIES[library] = Launcher(images, driver=driver)
        _USERS[library] += 1


def release_kernels(library: str) -> None:
    """Give back what a call of :func:`provide_kernels` took: the last one unloads the kernels. No engine of it may still run."""
    with _LOCK:
        _USERS[library] -= 1
        if _USERS[library] <= 0:
            del _USERS[library]
            launcher = _LIBRARIES.pop(library, None)
            if launcher is not None:
                launcher.close()


def register_plugins(trt: Any, *, observe: Callable[[str, Plan], None] | None = None) -> None:
    """Register a creator per operator in the library's plugin registry; a second call does nothing.

    Args:
        trt: the module ``tensorrt`` or ``tensorrt_rtx``.
        observe: called with the operator and the launches at the largest sizes of every plugin that a build configures.
    """
    registry = trt.get_plugin_registry()
    # The registry logs an error if asked for a creator that it does not have; lean TensorRT's registry cannot be listed.
    listed = getattr(registry, "all_creators", None)
    known = {(one.name, one.plugin_version) for one in listed or () if one.plugin_namespace == NAMESPACE}
    for spec in PLUGINS.values():
        if (spec.operator, spec.version) in known:
            continue
        if listed is not None or registry.get_creator(spec.operator, spec.version, NAMESPACE) is None:
            registry.register_creator(_creator_class(trt)(spec, observe), NAMESPACE)


@functools.cache
def _creator_class(trt: Any) -> type:
    plugin_class = _plugin_class(trt)

    class Creator(trt.IPluginCreatorV3One):  # type: ignore[misc]
        """Makes plugins of one operator from the attributes of an ONNX node or the fields of an engine."""

        def __init__(self, spec: PluginSpec, observe: Callable[[str, Plan], None] | None) -> None:
            trt.IPluginCreatorV3One.__init__(self)
            self.spec, self.observe = spec, observe
            self.name, self.plugin_version, self.plugin_namespace = spec.operator, spec.version, NAMESPACE
            kinds = {
                int: trt.PluginFieldType.INT32, tuple: trt.PluginFieldType.INT32, float: trt.PluginFieldType.FLOAT32,
                str: trt.PluginFieldType.CHAR,
            }  # fmt: skip
            fields = [trt.PluginField(name, np.array([]), kinds[type_]) for name, type_ in field_types(spec).items()]
            self.field_names = trt.PluginFieldCollection(fields)

        def create_plugin(self, name: str, fields: Any, phase: Any) -> Any:
            """A plugin; raises ValueError for a missing field, or a version that no kernel reads."""
            return plugin_class(self.spec, read_fields(self.spec, fields), self.observe)

    return Creator


def field_types(spec: PluginSpec) -> dict[str, type]:
    """The fields of a plugin: the operator's attributes, and what injection adds."""
    return {**spec.attributes, **FIELDS}


def read_fields(spec: PluginSpec, fields: Iterable[Any]) -> dict[str, Any]:
    """The values of a plugin's fields.

    Raises:
        ValueError: a field is missing, or the row format or its version is one that the kernels do not read.
    """
    types = field_types(spec)
    values = {field.name: _field_value(field.data, types[field.name]) for field in fields if field.name in types}
    missing = [name for name in types if name not in values]
    if missing:
        raise ValueError(f"{spec.operator} lacks {', '.join(missing)}; inject the graph with this version of foldkv")
    if spec.row_formats and values["row_format"] not in spec.row_formats:
        raise ValueError(
            f"{spec.operator}: rows are in {values['row_format']!r}; its kernels read {', '.join(sorted(spec.row_formats))}"
        )
    if values["layout_version"] != spec.layout_version:
        raise ValueError(
            f"{spec.operator}: rows have layout version {values['layout_version']}; its kernels read {spec.layout_version}"
        )
    return values


def _field_value(data: Any, type_: type) -> Any:
    if type_ is str:  # the ONNX parser ends a string with a NUL
        return bytes(np.asarray(data).tobytes()).rstrip(b"\0").decode()
    if type_ is tuple:
        return tuple(int(value) for value in np.asarray(data).reshape(-1))
    return type_(np.asarray(data).reshape(-1)[0])


def _field_array(value: Any) -> Any:
    if isinstance(value, str):
        return np.frombuffer(value.encode() + b"\0", np.int8)  # as the ONNX parser gives it, and never empty
    if isinstance(value, tuple):
        return np.array(value, np.int32)
    return np.array([value], np.float32 if isinstance(value, float) else np.int32)


@functools.cache
def _plugin_class(trt: Any) -> type:
    kinds = {
        "float32": trt.DataType.FLOAT, "bfloat16": trt.DataType.BF16,
        "int8": trt.DataType.INT8, "int32": trt.DataType.INT32, "int64": trt.DataType.INT64,
    }  # fmt: skip

    kinds_of_fields = {
        np.dtype(np.int8): trt.PluginFieldType.CHAR, np.dtype(np.int32): trt.PluginFieldType.INT32,
        np.dtype(np.float32): trt.PluginFieldType.FLOAT32,
    }  # fmt: skip

    class Plugin(trt.IPluginV3, trt.IPluginV3OneCore, trt.IPluginV3OneBuildV2, trt.IPluginV3OneRuntime):  # type: ignore[misc]
        """One node of a network."""

        def __init__(
            self, spec: PluginSpec, values: Mapping[str, Any], observe: Callable[[str, Plan], None] | None
        ) -> None:
            for base in (trt.IPluginV3, trt.IPluginV3OneCore, trt.IPluginV3OneBuildV2, trt.IPluginV3OneRuntime):
                base.__init__(self)
            self.spec, self.values, self.observe = spec, dict(values), observe
            self.packed = row_format_named(values["row_format"]).packed
            self.plugin_name, self.plugin_version, self.plugin_namespace = spec.operator, spec.version, NAMESPACE
            self.num_outputs = len(spec.outputs)
            self.timing_cache_id = ""
            self.steps: Plan | None = None

        # --- core

        def get_capability_interface(self, kind: Any) -> Any:
            return self

        def clone(self) -> Any:
            copy = Plugin(self.spec, self.values, self.observe)
            copy.steps = self.steps
            return copy

        # --- build

        def get_output_data_types(self, input_types: Sequence[Any]) -> list[Any]:
            return [kinds[self._stored(tensor)] for tensor in self.spec.outputs]

        def get_output_shapes(self, inputs: Sequence[Any], shape_inputs: Sequence[Any], builder: Any) -> list[Any]:
            sizes: dict[str, Any] = {}
            for tensor, shape in zip(self.spec.inputs, inputs, strict=True):
                for symbol, size in tensor.sized(shape, packed=self.packed):
                    sizes.setdefault(str(symbol), size)
            add = trt.DimensionOperation.SUM

            def of(symbol: str | int) -> Any:
                if symbol in self.values:
                    return builder.constant(self.values[str(symbol)])
                if symbol not in sizes and "+" in str(symbol):
                    left, right = (part.strip() for part in str(symbol).split("+"))
                    return builder.operation(add, sizes[left], sizes[right])
                return sizes[str(symbol)]

            shapes = []
            for tensor in self.spec.outputs:
                dims = tensor.stored_dims(packed=self.packed)
                shape = trt.DimsExprs(len(dims))
                for axis, symbol in enumerate(dims):
                    shape[axis] = of(symbol)
                shapes.append(shape)
            return shapes

        def supports_format_combination(self, position: int, in_out: Sequence[Any], num_inputs: int) -> bool:
            tensor = (*self.spec.inputs, *self.spec.outputs)[position]
            desc = in_out[position].desc
            return bool(desc.format == trt.TensorFormat.LINEAR and desc.type == kinds[self._stored(tensor)])

        def configure_plugin(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
            largest = self._plan([tuple(tensor.max) for tensor in inputs])
            if self.observe is not None:
                for steps in (largest, self._plan([tuple(tensor.min) for tensor in inputs])):
                    self.observe(self.spec.operator, steps)

        def get_workspace_size(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> int:
            return int(self._plan([tuple(tensor.max) for tensor in inputs], of=largest_workspace))

        def get_valid_tactics(self) -> list[int]:
            return []

        def get_aliased_input(self, output: int) -> int:
            return self.spec.aliases.get(output, -1)

        # --- run time

        def get_fields_to_serialize(self) -> Any:
            # A PluginField points at its data and does not own it: the arrays must outlive this call.
            self._field_data = {name: _field_array(self.values[name]) for name in field_types(self.spec)}
            fields = [
                trt.PluginField(name, data, kinds_of_fields[data.dtype]) for name, data in self._field_data.items()
            ]
            return trt.PluginFieldCollection(fields)

        def attach_to_context(self, context: Any) -> Any:
            return self.clone()

        def set_tactic(self, tactic: int) -> None:
            pass

        def on_shape_change(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
            self.steps = self._plan([tuple(tensor.dims) for tensor in inputs])

        def enqueue(
            self, input_desc: Any, output_desc: Any, inputs: Sequence[int], outputs: Sequence[int], workspace: int,
            stream: int,
        ) -> None:  # fmt: skip
            assert self.steps is not None
            _launcher(self.values["library"]).launch(self.steps, inputs, outputs, workspace=workspace, stream=stream)

        # --- shared

        def _stored(self, tensor: TensorSpec) -> str:
            return tensor.stored_type(self.values, rows="int8" if self.packed else str(self.values["dtype"]))

        def _plan(self, shapes: Sequence[Sequence[int]], of: Callable[..., Any] = plan) -> Any:
            values, spec = self.values, self.spec
            attributes = {name: values[name] for name in spec.attributes}
            return of(
                spec.operator, spec.dimensions(shapes, row_format=values["row_format"]) | attributes, attributes, sm=values["sm"],
                dtype=values["dtype"], row_format=values["row_format"], rope_dim=values["rope_dim"],
                layout_version=values["layout_version"],
            )  # fmt: skip

    return Plugin


def _launcher(library: str) -> Launcher:
    try:
        return _LIBRARIES[library]
    except KeyError:
        raise RuntimeError(
            f"the kernels of plugin library {library!r} are not loaded in this process; open the bundle with foldkv.runtime"
        ) from None
