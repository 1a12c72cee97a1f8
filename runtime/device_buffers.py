"""The state of a session in GPU memory, on one or more GPUs."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import InputError
from ..export.contract.state import STATE_TYPES, StateTensor
from ..plugins.cuda import NON_BLOCKING, Device, check
from .buffers import Rows, StateSpec, fill_value, storage


class DeviceBuffers:
    """The state in GPU memory: one contiguous buffer per tensor, and a second one if it is not updated in place.

    ``addresses`` is where the state is, ``targets`` where the next run writes it. Everything is done in a stream of its own, or the
    one that was given, and is done when a method returns: copies in the default stream would end a capture of another session.
    """

    def __init__(
        self, device: Device, spec: StateSpec, context: int, batch: int, *, in_place: Collection[str],
        stream: int | None = None,
    ) -> None:  # fmt: skip
        """Allocate and fill. ``in_place`` are the names of tensors that need no second buffer.

        Raises:
            InputError: the GPU cannot hold the state.
        """
        self._device, self._driver, self.spec, self._context, self._batch = device, device.driver, spec, context, batch
        self._own: int | None = None
        if stream is None:
            with device.current():
                self._own = stream = int(check(self._driver, self._driver.cuStreamCreate(NON_BLOCKING)))
        self._stream: int = stream
        self.addresses: dict[str, int] = {}
        self._second: dict[str, int] = {}
        places = [(tensor, self.addresses) for tensor in spec.tensors]
        places += [(tensor, self._second) for tensor in spec.tensors if tensor.name not in in_place]
        try:
            with device.current():
                for tensor, addresses in places:
                    status, address = self._driver.cuMemAlloc(tensor.bytes(context, batch))
                    if int(status) != 0:
                        need = sum(one.bytes(context, batch) for one, _ in places)
                        raise InputError(
                            f"the state for context {context} and batch {batch} needs {need} bytes ({need / 2**30:.2f} GiB), "
                            "which the GPU cannot allocate. Choose a smaller context or batch."
                        )
                    addresses[tensor.name] = int(address)
                    self._fill(tensor, int(address), batch * tensor.capacity(context))
                self._wait()
        except BaseException:
            self.close()
            raise

    @property
    def bytes(self) -> int:
        """Bytes allocated."""
        sizes = {tensor.name: tensor.bytes(self._context, self._batch) for tensor in self.spec.tensors}
        return sum(sizes.values()) + sum(sizes[name] for name in self._second)

    @property
    def targets(self) -> dict[str, int]:
        """Where the next run writes each tensor."""
        return self.addresses | self._second

    def written(self) -> None:
        """A run has written the state: swap the buffers, so that the state is where the run wrote it."""
        for name, address in self._second.items():
            self._second[name], self.addresses[name] = self.addresses[name], address

    def clear(self, slot: int, tokens: int) -> None:
        """Reset to their first value the rows that ``tokens`` tokens of a sequence may have written, in both buffers."""
        with self._device.current():
            for addresses in (self.addresses, self._second):
                for tensor in self.spec.tensors:
                    if tensor.name in addresses:
                        self._fill(tensor, self._slot(tensor, addresses, slot), tensor.used_rows(tokens))
            self._wait()

    def shape(self, tensor: StateTensor, batch: int) -> tuple[int, int, int]:
        """The shape of a tensor's rows for that many sequences."""
        return batch, tensor.capacity(self._context), tensor.width

    def slot(self, tensor: StateTensor, slot: int) -> int:
        """Where the rows of a sequence are."""
        return self._slot(tensor, self.addresses, slot)

    def slot_bytes(self, tensor: StateTensor) -> int:
        """Bytes of the rows of a sequence."""
        return tensor.bytes(self._context)

    def copy_slot(self, slot: int, tokens: int) -> Rows:
        """See :class:`~foldkv.runtime.buffers.Buffers`."""
        with self._device.current():
            rows = tuple(self._copy(tensor, slot, tensor.used_rows(tokens)) for tensor in self.spec.tensors)
            self._wait()
        for copy in rows:
            copy.flags.writeable = False
        return rows

    def put_slot(self, slot: int, rows: Rows) -> None:
        """See :class:`~foldkv.runtime.buffers.Buffers`."""
        with self._device.current():
            for tensor, copy in zip(self.spec.tensors, rows, strict=True):
                address = self.slot(tensor, slot)
                check(
                    self._driver, self._driver.cuMemcpyHtoDAsync(address, copy.ctypes.data, copy.nbytes, self._stream)
                )
            self._wait()

    def close(self) -> None:
        """Free the memory; closing twice is fine. Unchecked: after a sticky error every call fails, and all of it must go."""
        with self._device.current():
            if self.addresses:
                self._driver.cuStreamSynchronize(self._stream)
            for address in (*self.addresses.values(), *self._second.values()):
                self._driver.cuMemFree(address)
            if self._own is not None:
                self._driver.cuStreamDestroy(self._own)
        self.addresses, self._second, self._own = {}, {}, None

    def _wait(self) -> None:
        check(self._driver, self._driver.cuStreamSynchronize(self._stream))

    def _slot(self, tensor: StateTensor, addresses: dict[str, int], slot: int) -> int:
        """Where the rows of a slot begin."""
        return addresses[tensor.name] + slot * tensor.bytes(self._context)

    def _copy(self, tensor: StateTensor, slot: int, rows: int) -> npt.NDArray[Any]:
        copy = np.empty((rows, tensor.width), storage(tensor))
        address = self.slot(tensor, slot)
        check(self._driver, self._driver.cuMemcpyDtoHAsync(copy.ctypes.data, address, copy.nbytes, self._stream))
        return copy

    def _fill(self, tensor: StateTensor, address: int, rows: int) -> None:
        item = STATE_TYPES[tensor.dtype].item_bytes
        pattern = np.array(fill_value(tensor), storage(tensor)).view(f"uint{8 * item}")
        driver = self._driver
        fill = {1: driver.cuMemsetD8Async, 2: driver.cuMemsetD16Async, 4: driver.cuMemsetD32Async}[item]
        if rows:
            check(driver, fill(address, int(pattern), rows * tensor.width, self._stream))


class DealtBuffers:
    """The state of a session on several GPUs, each with the layers that it computes, in the order of the layers."""

    def __init__(self, parts: Sequence[DeviceBuffers]) -> None:
        self._parts = tuple(parts)

    @property
    def bytes(self) -> int:
        """Bytes allocated, on all GPUs."""
        return sum(part.bytes for part in self._parts)

    def clear(self, slot: int, tokens: int) -> None:
        """Reset to their first value the rows that ``tokens`` tokens of a sequence may have written."""
        for part in self._parts:
            part.clear(slot, tokens)

    def copy_slot(self, slot: int, tokens: int) -> Rows:
        """See :class:`~foldkv.runtime.buffers.Buffers`."""
        return tuple(row for part in self._parts for row in part.copy_slot(slot, tokens))

    def put_slot(self, slot: int, rows: Rows) -> None:
        """Write what :meth:`copy_slot` returned, here or on other GPUs, of this slot or of another."""
        start = 0
        for part in self._parts:
            end = start + len(part.spec.tensors)
            part.put_slot(slot, rows[start:end])
            start = end

    def close(self) -> None:
        """Free the memory; closing twice is fine."""
        for part in self._parts:
            part.close()
