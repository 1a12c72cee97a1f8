"""Where a chain's tensors lie, and how they are bound: in the processor's memory, or in a GPU's.

A tensor on a GPU has an array on the host beside it, which is filled before it is copied there, and into which results are
copied back. ONNX Runtime computes sizes on the processor, also where everything else runs on a GPU. It says for which inputs of
a graph it wants them in the processor's memory: such an input is bound to the array.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ..errors import InputError
from ..export.contract.state import STATE_TYPES, StateTensor
from ..plugins.cuda import Device, check
from .buffers import Buffers, StateBuffers, StateSpec
from .device_buffers import DeviceBuffers

#: ONNX's numbers for the types of what passes between segments.
_ONNX_TYPES = {np.dtype(np.float32): 1, np.dtype(np.int32): 6, np.dtype(np.int64): 7, np.dtype(np.bool_): 9}


class Tensor(Protocol):
    """One tensor at a place that does not change."""

    host: npt.NDArray[Any]

    def bind_input(self, binding: Any, name: str, *, on_host: bool = False) -> None:
        """Let a segment read it; ``on_host`` says that the segment wants it in the processor's memory."""

    def bind_output(self, binding: Any, name: str) -> None:
        """Let a segment write it."""

    def push(self) -> None:
        """Copy ``host`` to where segments compute."""

    def pull(self) -> None:
        """Copy what segments wrote to ``host``."""

    def close(self) -> None:
        """Free it."""


class ChainMemory(Protocol):
    """What holds the tensors of a chain. ``arena`` is ONNX Runtime's name for its own memory there."""

    arena: str

    def tensor(self, array: npt.NDArray[Any], onnx_type: int | None = None) -> Tensor:
        """A tensor with the values of an array, which may be a mapped file.

        Args:
            array: contiguous; a narrow float is stored as an integer of its size.
            onnx_type: ONNX's number for the type; None is that of the array.

        Raises:
            InputError: there is no memory for it.
        """

    def buffers(self, spec: StateSpec, context: int, batch: int) -> Buffers:
        """The state of a session.

        Raises:
            InputError: there is no memory for it.
        """

    def state(self, buffers: Any, tensor: StateTensor, slots: range) -> Tensor:
        """A state tensor of some slots as segments read and write it, in the buffers that :meth:`buffers` gave."""

    def close(self) -> None:
        """Free what it needed for itself."""


class HostTensor:
    """An array that ONNX Runtime reads and writes where it is."""

    def __init__(self, ort: Any, array: npt.NDArray[Any], onnx_type: int) -> None:
        self.host = array
        self._value = ort.OrtValue.ortvalue_from_numpy_with_onnx_type(array, onnx_type)

    def bind_input(self, binding: Any, name: str, *, on_host: bool = False) -> None:
        """See :class:`Tensor`."""
        binding.bind_ortvalue_input(name, self._value)

    def bind_output(self, binding: Any, name: str) -> None:
        """See :class:`Tensor`."""
        binding.bind_ortvalue_output(name, self._value)

    def push(self) -> None:
        """There is one copy only."""

    def pull(self) -> None:
        """There is one copy only."""

    def close(self) -> None:
        """The array belongs to whoever gave it."""


class HostMemory:
    """The processor's memory."""

    arena = "cpu:0"

    def __init__(self, ort: Any) -> None:
        self._ort = ort

    def tensor(self, array: npt.NDArray[Any], onnx_type: int | None = None) -> HostTensor:
        """See :class:`ChainMemory`."""
        return HostTensor(self._ort, array, onnx_type or _ONNX_TYPES[array.dtype])

    def buffers(self, spec: StateSpec, context: int, batch: int) -> StateBuffers:
        """See :class:`ChainMemory`."""
        return StateBuffers(spec, context, batch)

    def state(self, buffers: StateBuffers, tensor: StateTensor, slots: range) -> HostTensor:
        """See :class:`ChainMemory`."""
        rows = buffers.arrays[tensor.name][slots.start : slots.stop]
        return HostTensor(self._ort, rows, STATE_TYPES[tensor.dtype].onnx_type)

    def close(self) -> None:
        """See :class:`ChainMemory`."""


class DeviceTensor:
    """A range of GPU memory, with an array on the host beside it."""

    def __init__(
        self, memory: DeviceMemory, address: int, shape: Sequence[int], onnx_type: int, host: npt.NDArray[Any]
    ) -> None:
        self._memory, self._address, self._shape, self._type = memory, address, tuple(shape), onnx_type
        self.host = host
        self._on_host: HostTensor | None = None

    def bind_input(self, binding: Any, name: str, *, on_host: bool = False) -> None:
        """See :class:`Tensor`."""
        if on_host:
            if self._on_host is None:
                self._on_host = HostTensor(self._memory.ort, self.host, self._type)
            self._on_host.bind_input(binding, name)
            return
        binding.bind_input(name, self._memory.kind, 0, self._type, self._shape, self._address)

    def bind_output(self, binding: Any, name: str) -> None:
        """See :class:`Tensor`."""
        binding.bind_output(name, self._memory.kind, 0, self._type, self._shape, self._address)

    def push(self) -> None:
        """See :class:`Tensor`."""
        self._memory.copy_to(self._address, self.host)

    def pull(self) -> None:
        """See :class:`Tensor`."""
        self._memory.copy_from(self.host, self._address)

    def close(self) -> None:
        """See :class:`Tensor`."""
        self._memory.free(self._address)


class DeviceMemory:
    """The memory of the first GPU."""

    def __init__(self, ort: Any, device: Device | None = None, kind: str = "cuda") -> None:
        """Retain the GPU's context.

        Args:
            ort: the module onnxruntime.
            device: the GPU; the first one by default.
            kind: what ONNX Runtime calls such memory.

        Raises:
            MissingDependencyError: no driver.
        """
        self.ort, self.kind, self.arena = ort, kind, f"{'gpu' if kind == 'cuda' else kind}:0"
        self._device = device or Device()
        self._driver = self._device.driver

    def tensor(self, array: npt.NDArray[Any], onnx_type: int | None = None) -> DeviceTensor:
        """See :class:`ChainMemory`."""
        with self._device.current():
            # At least a byte: a chunk without logits has a tensor without elements.
            status, address = self._driver.cuMemAlloc(max(1, array.nbytes))
        if int(status) != 0:
            raise InputError(
                f"the GPU has no memory for a tensor of {array.nbytes} bytes. `foldkv plan --target` says what a model "
                "needs; choose a GPU with more, or a smaller chunk or batch."
            )
        made = DeviceTensor(self, int(address), array.shape, onnx_type or _ONNX_TYPES[array.dtype], array)
        made.push()
        return made

    def buffers(self, spec: StateSpec, context: int, batch: int) -> DeviceBuffers:
        """See :class:`ChainMemory`."""
        return DeviceBuffers(self._device, spec, context, batch, in_place=[tensor.name for tensor in spec.tensors])

    def state(self, buffers: DeviceBuffers, tensor: StateTensor, slots: range) -> DeviceTensor:
        """See :class:`ChainMemory`. Its values stay on the GPU; the buffers copy them."""
        address, shape = buffers.slot(tensor, slots.start), buffers.shape(tensor, len(slots))
        return DeviceTensor(self, address, shape, STATE_TYPES[tensor.dtype].onnx_type, np.zeros(0, np.uint8))

    def copy_to(self, address: int, array: npt.NDArray[Any]) -> None:
        """Copy an array to the GPU."""
        if array.nbytes:
            with self._device.current():
                check(self._driver, self._driver.cuMemcpyHtoD(address, array.ctypes.data, array.nbytes))

    def copy_from(self, array: npt.NDArray[Any], address: int) -> None:
        """Copy from the GPU into an array."""
        if array.nbytes:
            with self._device.current():
                check(self._driver, self._driver.cuMemcpyDtoH(array.ctypes.data, address, array.nbytes))

    def free(self, address: int) -> None:
        """Free what :meth:`tensor` allocated."""
        with self._device.current():
            check(self._driver, self._driver.cuMemFree(address))

    def close(self) -> None:
        """See :class:`ChainMemory`."""
        self._device.close()
