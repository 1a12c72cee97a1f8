"""The plugins' kernels behind ``torch.ops.foldkv``: with them export/model runs on a GPU, without TensorRT.

Torch operators are functions, but plugins update the state in place. So this module first copies the state that a plugin
updates, and the kernels work on the copy. Operators without a plugin (``plugins.spec.BODIES``) keep their eager definition.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from ..export.contract.geometry import ModelSpec
from ..export.contract.layouts import LAYOUTS
from ..export.contract.operators import PLAIN, STATE
from ..export.contract.rows import DENSE, row_format_named
from ..export.contract.state import state_tensors
from ..export.operators.registry import operators
from .cuda import Launcher
from .declarations import PLUGINS, PluginSpec
from .launch import plan
from .plans import Plan

#: Enqueues the launches of a plan: plan, inputs, outputs (those in place are inputs too), scratch memory or None.
LaunchPlan = Callable[[Plan, Sequence[Tensor], Sequence[Tensor], Tensor | None], None]
#: An operator's implementation: its inputs, then its attributes, by position.
Implementation = Callable[..., Any]

_ALIGNMENT = 16  # bytes, of every buffer; kernels are compiled for this (plugins/compile.py)
_DENSE_TYPES = {torch.bfloat16: "bfloat16", torch.float32: "float32"}
_TYPES = {
    "float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8, "int32": torch.int32, "int64": torch.int64
}  # fmt: skip
#: Implementations in use, by device type, then by the operator's ONNX name; the last one wins.
_IN_USE: dict[str, list[Mapping[str, Implementation]]] = {}


def launched_by(launcher: Launcher) -> LaunchPlan:
    """Enqueue plans with a launcher, on torch's current stream of the outputs' device."""

    def launch(steps: Plan, inputs: Sequence[Tensor], outputs: Sequence[Tensor], workspace: Tensor | None) -> None:
        launcher.launch(
            steps, [tensor.data_ptr() for tensor in inputs], [tensor.data_ptr() for tensor in outputs],
            workspace=0 if workspace is None else workspace.data_ptr(),
            stream=torch.cuda.current_stream(outputs[0].device).cuda_stream,
        )  # fmt: skip

    return launch


@dataclass(frozen=True)
class _Prepared:
    """A plan and the shapes and types of the outputs that are not in place."""

    steps: Plan
    outputs: dict[int, tuple[tuple[int, ...], torch.dtype]]


@dataclass
class KernelOperators:
    """Operators that launch their kernels.

    Attributes:
        launch: enqueues a plan, see :func:`launched_by`.
        sm: compute capability of the loaded kernels.
        rope_dim: rotated channels of a row of the model's state.
        calls: how often each operator was called.
        launches: how often each kernel was launched, by its name.
    """

    launch: LaunchPlan
    sm: int
    rope_dim: int
    calls: Counter[str] = field(default_factory=Counter)
    launches: Counter[str] = field(default_factory=Counter)
    _prepared: dict[tuple[Any, ...], _Prepared] = field(default_factory=dict, repr=False)

    def implementations(self) -> dict[str, Implementation]:
        """The implementation of every operator that has a plugin, by ONNX name.

        Operators on plain weights keep their definition: a model in torch has its weights in float32, and kernels take bfloat16.
        """

        def implementation(operator: str) -> Implementation:
            return lambda *arguments: self(operator, arguments)

        return {
            name: implementation(name)
            for name, spec in PLUGINS.items()
            if all(tensor.dtype != PLAIN for tensor in spec.inputs)
        }

    def __call__(self, operator: str, arguments: Sequence[Any]) -> Any:
        """Launch an operator's kernels: its inputs, then its attributes -> a tensor, or a tuple of several.

        The row format is read off the state's tensors: dense by their type, packed (int8) by the bytes of a row.

        Raises:
            FoldkvError: a kernel was not loaded, or the driver refuses a launch.
            ValueError: types, sizes or a row format that the kernels cannot take.
        """
        spec = PLUGINS[operator]
        count = len(spec.inputs)
        inputs, attributes = list(arguments[:count]), dict(zip(spec.attributes, arguments[count:], strict=True))
        key = (operator, *((tensor.shape, tensor.dtype) for tensor in inputs), *attributes.values())
        if key not in self._prepared:
            self._prepared[key] = self._prepare(spec, inputs, attributes)
        prepared = self._prepared[key]
        in_place = set(spec.aliases.values())
        inputs = [_fresh(tensor) if index in in_place else _aligned(tensor) for index, tensor in enumerate(inputs)]
        device = inputs[0].device
        outputs = []
        for index in range(len(spec.outputs)):
            if index in spec.aliases:
                outputs.append(inputs[spec.aliases[index]])
            else:
                shape, dtype = prepared.outputs[index]
                outputs.append(torch.empty(shape, dtype=dtype, device=device))
        size = prepared.steps.workspace
        workspace = torch.empty(size, dtype=torch.uint8, device=device) if size else None
        self.launch(prepared.steps, inputs, outputs, workspace)
        self.calls[operator] += 1
        self.launches.update(one.kernel.name for one in prepared.steps.launches)
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    def _prepare(self, spec: PluginSpec, inputs: Sequence[Tensor], attributes: Mapping[str, Any]) -> _Prepared:
        shapes = [tuple(tensor.shape) for tensor in inputs]
        state = {tensor.dtype for tensor, declared in zip(inputs, spec.inputs, strict=True) if declared.dtype == STATE}
        if len(state) > 1 or state - {*_DENSE_TYPES, torch.int8}:
            raise ValueError(f"{spec.operator}: rows of the state are {listed(state)}; expected one type of rows")
        for tensor, declared in zip(inputs, spec.inputs, strict=True):
            if declared.dtype != STATE:
                expected = declared.stored_type(attributes, rows="bfloat16")
                if tensor.dtype != _TYPES[expected]:
                    raise ValueError(f"{spec.operator}.{declared.name} is {tensor.dtype}; expected {expected}")
        stored = next(iter(state), torch.bfloat16)  # an operator without state has the same kernel for every type
        row_format = self._packed_format(spec, shapes) if stored == torch.int8 else DENSE
        sizes = spec.dimensions(shapes, row_format=row_format) | dict(attributes)
        steps = plan(
            spec.operator, sizes, attributes, sm=self.sm, dtype=_DENSE_TYPES.get(stored, "bfloat16"), row_format=row_format,
            rope_dim=self.rope_dim,
        )  # fmt: skip
        outputs = {
            index: (shape, stored if tensor.dtype == STATE else _TYPES[tensor.dtype])
            for index, (tensor, shape) in enumerate(
                zip(spec.outputs, spec.output_shapes(sizes, row_format=row_format), strict=True)
            )
            if index not in spec.aliases
        }
        return _Prepared(steps, outputs)

    def _packed_format(self, spec: PluginSpec, shapes: Sequence[tuple[int, ...]]) -> str:
        """The packed format whose rows have the same number of bytes as the state's."""
        formats = [format_ for name in sorted(spec.row_formats) if (format_ := row_format_named(name)).packed]
        if not formats:
            raise ValueError(f"{spec.operator} does not read packed rows")
        sizes = spec.dimensions(shapes, row_format=formats[0].name)
        fitting = []
        for format_ in formats:
            with contextlib.suppress(InputError):
                if format_.row_bytes(sizes["D"], format_.kept(self.rope_dim)) == sizes["ROW"]:
                    fitting.append(format_.name)
        if len(fitting) != 1:
            raise ValueError(
                f"{spec.operator}: rows of {sizes['ROW']} bytes for {sizes['D']} channels are "
                f"{' or '.join(fitting) or 'in a format that it does not read'}"
            )
        return fitting[0]


def listed(types: set[torch.dtype]) -> str:
    """Types in words."""
    return ", ".join(sorted(map(str, types)))


def _aligned(tensor: Tensor) -> Tensor:
    """The tensor as kernels need it: contiguous, at an aligned address."""
    tensor = tensor.contiguous()
    return _fresh(tensor) if tensor.data_ptr() % _ALIGNMENT else tensor


def _fresh(tensor: Tensor) -> Tensor:
    return tensor.clone(memory_format=torch.contiguous_format)


@contextlib.contextmanager
def use(implementations: Mapping[str, Implementation], device_type: str = "cuda") -> Iterator[None]:
    """Let ``torch.ops.foldkv`` run these implementations on a device type; other operators keep theirs.

    The registration with torch stays; outside of this context it calls the eager definitions.

    Args:
        implementations: by ONNX name, see :meth:`KernelOperators.implementations`.
        device_type: "cuda", or "cpu" to rehearse.
    """
    if device_type not in _IN_USE:
        for name, operator in operators().items():
            torch.library.register_kernel(
                operator.torch_op.name(), device_type, _chooser(name, operator.eager, device_type)
            )
        _IN_USE[device_type] = []
    in_use = _IN_USE[device_type]
    in_use.append(implementations)
    try:
        yield
    finally:
        in_use.pop()


def use_kernels(kernels: KernelOperators, device_type: str = "cuda") -> contextlib.AbstractContextManager[None]:
    """Let every operator that has a plugin launch its kernels on a device type, see :func:`use`."""
    return use(kernels.implementations(), device_type)


def _chooser(name: str, eager: Implementation, device_type: str) -> Implementation:
    def run(*arguments: Any) -> Any:
        for implementations in reversed(_IN_USE[device_type]):
            if name in implementations:
                return implementations[name](*arguments)
        return eager(*arguments)

    return run


def new_state(
    spec: ModelSpec, context: int, batch: int, *, layout: str, dtype: torch.dtype, device: torch.device | str
) -> list[Tensor]:
    """An empty state as in engines: rows dense or packed according to the layout, carries in float32.

    Args:
        spec: of the model.
        context: tokens that each sequence has room for.
        batch: sequences.
        layout: name of the cache layout, see export/contract/layouts.py.
        dtype: of dense rows.
        device: of the state.

    Returns:
        Tensors [batch, rows, channels or bytes], in the order of ``state_tensors``.

    Raises:
        InputError: rows that do not fit the layout.
    """
    rows, state = LAYOUTS[layout], []
    for tensor in state_tensors(spec):
        name, stored = rows.format_of(tensor.group), rows.stored(tensor, spec.rope_dim)
        dense = name is not None and not row_format_named(name).packed
        kind = dtype if dense else _TYPES[stored.dtype]
        state.append(torch.zeros(batch, stored.capacity(context), stored.width, dtype=kind, device=device))
    return state
