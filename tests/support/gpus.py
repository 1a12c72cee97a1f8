"""A stand-in for ``cuda.bindings.driver`` with any number of GPUs, whose memory is the host's, and which is as strict as it can be.

- Device addresses lie in spaces of their own, one per GPU: host pointers and another GPU's addresses are refused in their place.
- Work is done when something waits for its stream, and not before; work of another stream only if an event orders it.
- A context is current per thread. Calls that need one fail without it, and a stream's calls fail in another GPU's context.
- Shared memory beyond 48 KiB must have been asked for on the GPU that launches.
- A step that is being captured enqueues nothing, and may neither wait nor allocate.
"""

from __future__ import annotations

import contextlib
import ctypes
import enum
import itertools
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from driver import CUresult, FakeDriver
from torch import Tensor

from foldkv.plugins.plans import Kernel

_SPACE = (
    1 << 44
)  # bytes of one GPU's address space; the first begins here, and the host's heap is not in the first four
_ALIGNED = 512
OK, INVALID = CUresult.CUDA_SUCCESS, CUresult.CUDA_ERROR_INVALID_VALUE


class CUstreamCaptureMode(enum.IntEnum):
    """The one mode that captures what this thread enqueues."""

    CU_STREAM_CAPTURE_MODE_THREAD_LOCAL = 1


@dataclass
class _Stream:
    device: int
    blocking: bool
    thread: int = 0  # that captures
    queue: list[Callable[[], None]] = field(default_factory=list)
    captured: list[Callable[[], None]] | None = None


@dataclass
class _Event:
    stream: _Stream | None = None
    done: list[bool] = field(default_factory=lambda: [True])
    time: float | None = None  # when it was reached; a record that is an order between captured streams has none


class HostDriver(FakeDriver):
    """The driver with memory of its own; ``limit`` is what each GPU can give, in bytes.

    Attributes:
        blocks: the memory that was taken and not given back, by address.
        opened: counts of what else is to be given back.
        peers: whether GPUs reach each other.
    """

    CUstreamCaptureMode = CUstreamCaptureMode

    def __init__(
        self, limit: int = 1 << 40, *, devices: int = 1, peers: bool = True, host_addresses: bool = False,
        kernels: Mapping[str | bytes, Kernel] | None = None,
    ) -> None:  # fmt: skip
        """Args: host_addresses: memory of the one GPU is at the addresses of the host's, for a library that is a CPU's."""
        super().__init__(kernels or {})
        self.host_addresses = host_addresses
        self._owners: dict[int, int] = {}
        #: Operators whose nodes an executed engine computes by their definition in torch, because the interpreter is slow.
        self.by_definition: frozenset[str] = frozenset()
        self.limit, self.devices, self.peers = limit, devices, peers
        self.blocks: dict[int, Tensor] = {}
        self.opened = dict.fromkeys(("context", "stream", "event", "pinned", "graph"), 0)
        self._next: dict[int, int] = {}
        self._handles: dict[int, Any] = {}
        self._pinned: dict[int, Any] = {}
        self._thread = threading.local()
        self._retained, self._ever_retained = dict[int, int](), False
        #: Host threads run side by side, and GPUs do not: kernels in the interpreter share its state.
        self._running = threading.RLock()
        self._handing_out = itertools.count(70)
        self._shared_on: dict[tuple[int, int], int] = {}

    # --- contexts

    @property
    def contexts(self) -> list[int]:
        """The calling thread's contexts, the current one last."""
        if not hasattr(self._thread, "contexts"):
            self._thread.contexts = []
        found: list[int] = self._thread.contexts
        return found

    @property
    def device(self) -> int | None:
        """Number of the GPU whose context is current in this thread; without any, the first until a context was retained."""
        if self.contexts:
            return self.contexts[-1] - 1
        return None if self._ever_retained else 0

    def check_context(self, device: int | None = None) -> None:
        """Fail as a library does that works in the current context."""
        assert self.device is not None, "no context is current in this thread"
        assert device in (None, self.device), f"the context of GPU {self.device} is current; expected {device}"

    @contextlib.contextmanager
    def _as(self, device: int) -> Iterator[None]:
        """A GPU's own work, which needs no thread's context."""
        self.contexts.append(device + 1)
        try:
            yield
        finally:
            self.contexts.pop()

    def _status(self) -> CUresult:
        return OK if self.device is not None else CUresult.CUDA_ERROR_INVALID_CONTEXT

    def _capturing(self) -> bool:
        """Whether this thread captures, or a stream of this GPU that waits for the default stream is being captured."""
        return any(
            isinstance(one, _Stream)
            and one.captured is not None
            and (one.thread == threading.get_ident() or (one.blocking and one.device == self.device))
            for one in list(self._handles.values())
        )

    def _waits(self) -> CUresult:
        """The status of a call that waits or allocates."""
        return INVALID if self._capturing() else self._status()

    def cuDeviceGetCount(self) -> tuple[CUresult, int]:
        return OK, self.devices

    def cuDeviceGet(self, ordinal: int) -> tuple[CUresult, int]:
        return (OK if ordinal < self.devices else INVALID), ordinal

    def cuDeviceGetName(self, length: int, device: int) -> tuple[CUresult, bytes]:
        return OK, b"stand-in".ljust(length, b"\0")

    def cuDeviceTotalMem(self, device: int) -> tuple[CUresult, int]:
        return OK, self.limit

    def cuDeviceCanAccessPeer(self, device: int, other: int) -> tuple[CUresult, int]:
        return OK, int(self.peers and device != other)

    def cuCtxEnablePeerAccess(self, context: int, flags: int) -> tuple[CUresult]:
        return (OK if self.peers else INVALID,)

    def cuDevicePrimaryCtxRetain(self, device: int) -> tuple[CUresult, int]:
        self._ever_retained = True
        self._retained[device] = self._retained.get(device, 0) + 1
        self.opened["context"] += 1
        return OK, device + 1

    def cuDevicePrimaryCtxRelease(self, device: int) -> tuple[CUresult]:
        self._retained[device] -= 1
        self.opened["context"] -= 1
        return (OK,)

    def cuCtxSetCurrent(self, context: int) -> tuple[CUresult]:
        self.contexts[-1:] = [context]
        return (OK,)

    def cuCtxPushCurrent(self, context: int) -> tuple[CUresult]:
        assert context > self.devices or self._retained.get(context - 1), (
            "the context was released by everybody who retained it"
        )
        self.contexts.append(context)
        return (OK,)

    def cuCtxPopCurrent(self) -> tuple[CUresult, int]:
        return (self._status(), self.contexts.pop())

    def cuCtxGetDevice(self) -> tuple[CUresult, int]:
        self.calls.append("cuCtxGetDevice")
        return self._status(), self.device or 0

    # --- streams, events, graphs

    def _keep(self, kind: str, thing: Any) -> int:
        self.opened[kind] += 1
        handle = next(self._handing_out)
        self._handles[handle] = thing
        return handle

    def _drop(self, kind: str, handle: int) -> tuple[CUresult]:
        self.opened[kind] -= 1
        del self._handles[handle]
        return (OK,)

    def _later(self, stream: int, work: Callable[[], None]) -> tuple[CUresult]:
        """Enqueue work on a stream of the current context."""
        one = self._handles.get(stream)
        if not isinstance(one, _Stream) or self.device != one.device:
            return (CUresult.CUDA_ERROR_INVALID_HANDLE if self.device is not None else self._status(),)
        (one.queue if one.captured is None else one.captured).append(work)
        return (OK,)

    def _drain(self, stream: _Stream) -> None:
        with self._running, self._as(stream.device):
            while stream.queue:
                stream.queue.pop(0)()

    def _drain_all(self) -> None:
        """What a call that is not asynchronous does first: streams that wait for the default stream do not run beside it."""
        for one in list(self._handles.values()):
            if isinstance(one, _Stream) and one.device == self.device and one.blocking:
                self._drain(one)

    def cuStreamCreate(self, flags: int) -> tuple[CUresult, int]:
        return self._status(), self._keep("stream", _Stream(self.device or 0, flags == 0))

    def cuStreamSynchronize(self, stream: int) -> tuple[CUresult]:
        status = self._waits()
        if status == OK:
            self._drain(self._handles[stream])
        return (status,)

    def cuStreamDestroy(self, stream: int) -> tuple[CUresult]:
        status = self._status()
        if status == OK:
            self._drain(self._handles[stream])
            self._drop("stream", stream)
        return (status,)

    def cuEventCreate(self, flags: int) -> tuple[CUresult, int]:
        return self._status(), self._keep("event", _Event())

    def cuEventDestroy(self, event: int) -> tuple[CUresult]:
        return self._drop("event", event)

    def cuEventRecord(self, event: int, stream: int) -> tuple[CUresult]:
        return self._record(event, stream, timed=self._handles[stream].captured is None)

    def cuEventRecordWithFlags(self, event: int, stream: int, flags: int) -> tuple[CUresult]:
        assert flags == 1, "CU_EVENT_RECORD_EXTERNAL"
        if self._handles[stream].captured is None:
            return (INVALID,)
        return self._record(event, stream, timed=True)

    def _record(self, event: int, stream: int, *, timed: bool) -> tuple[CUresult]:
        one, done = self._handles[event], [False]

        def mark() -> None:
            done[0] = True
            one.time = time.perf_counter() if timed else None

        one.stream, one.done = self._handles[stream], done
        return self._later(stream, mark)

    def cuEventElapsedTime(self, start: int, end: int) -> tuple[CUresult, float]:
        one, other = self._handles[start], self._handles[end]
        if one.time is None or other.time is None:
            return CUresult.CUDA_ERROR_INVALID_HANDLE, 0.0
        if not (one.done[0] and other.done[0]):
            return INVALID, 0.0
        return self._status(), 1e3 * (other.time - one.time)

    def cuStreamIsCapturing(self, stream: int) -> tuple[CUresult, int]:
        return self._status(), int(self._handles[stream].captured is not None)

    def _await(self, stream: _Stream | None, done: list[bool]) -> None:
        while not done[0]:
            assert stream is not None
            with self._running, self._as(stream.device):
                stream.queue.pop(0)()

    def cuEventSynchronize(self, event: int) -> tuple[CUresult]:
        status, one = self._waits(), self._handles[event]
        if status == OK:
            self._await(one.stream, one.done)
        return (status,)

    def cuStreamWaitEvent(self, stream: int, event: int, flags: int) -> tuple[CUresult]:
        one = self._handles[event]
        source, done = one.stream, one.done
        return self._later(stream, lambda: self._await(source, done))

    def cuStreamBeginCapture(self, stream: int, mode: int) -> tuple[CUresult]:
        assert mode == CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        self._handles[stream].captured, self._handles[stream].thread = [], threading.get_ident()
        return (self._status(),)

    def cuStreamEndCapture(self, stream: int) -> tuple[CUresult, int]:
        work, self._handles[stream].captured = self._handles[stream].captured, None
        return self._status(), self._keep("graph", work)

    def cuGraphInstantiate(self, graph: int, flags: int) -> tuple[CUresult, int]:
        return self._status(), self._keep("graph", list(self._handles[graph]))

    def cuGraphDestroy(self, graph: int) -> tuple[CUresult]:
        return self._drop("graph", graph)

    cuGraphExecDestroy = cuGraphDestroy

    def cuGraphLaunch(self, graph: int, stream: int) -> tuple[CUresult]:
        self.calls.append("cuGraphLaunch")
        status = (OK,)
        for work in self._handles[graph]:
            status = self._later(stream, work)
        return status

    # --- kernels

    def cuKernelSetAttribute(self, attribute: int, value: int, kernel: int, device: int) -> tuple[CUresult]:
        status = self._enter("cuKernelSetAttribute")
        self._shared_on[kernel, device] = value
        return (status,)

    def cuLaunchKernel(self, function: Any, *rest: Any) -> tuple[CUresult]:
        if self.device is None:
            return (self._status(),)
        self._shared[int(function)] = self._shared_on.get((int(function), self.device), 0)
        return super().cuLaunchKernel(function, *rest)

    def _view(self, address: int, type_: str) -> Tensor:
        block, offset = self._at(address)
        rest = block[offset:]
        size = torch.empty((), dtype=_TORCH[type_]).element_size()
        return rest[: rest.numel() // size * size].view(_TORCH[type_])

    # --- memory

    def cuMemAlloc(self, size: int) -> tuple[CUresult, int]:
        status = self._waits()
        if status != OK:
            return status, 0
        assert self.device is not None
        with self._running:
            held = sum(block.numel() for address, block in self.blocks.items() if self._owners[address] == self.device)
            if held + size > self.limit:
                return INVALID, 0
            block = torch.full((size,), 0xFF, dtype=torch.uint8)  # what was never written is not zero
            if self.host_addresses:
                address = block.data_ptr()
            else:
                address = self._next.get(self.device, _SPACE * (1 + self.device))
                # A gap behind each, and no address twice.
                self._next[self.device] = address + (-(-size // _ALIGNED) + 1) * _ALIGNED
            self.blocks[address], self._owners[address] = block, self.device
        return OK, address

    def cuMemFree(self, address: int) -> tuple[CUresult]:
        status = self._waits()
        if status == OK:
            # Not every free waits for streams: what is still enqueued then finds no memory.
            with self._running:
                self._drain_all()
                del self.blocks[address]
        return (status,)

    def cuMemAllocHost(self, size: int) -> tuple[CUresult, int]:
        status = self._waits()
        if status != OK:
            return status, 0
        block = ctypes.create_string_buffer(size)
        address = ctypes.addressof(block)
        self._pinned[address] = block
        self.opened["pinned"] += 1
        return OK, address

    def cuMemFreeHost(self, address: int) -> tuple[CUresult]:
        del self._pinned[address]
        self.opened["pinned"] -= 1
        return (self._status(),)

    def _at(self, address: int) -> tuple[Tensor, int]:
        """The block that an address of the current GPU lies in, and where."""
        with self._running:
            for start, block in self.blocks.items():
                if start <= address < start + max(block.numel(), 1):
                    if self._owners[start] != self.device:
                        raise LookupError(f"{address:#x} is on GPU {self._owners[start]}, not on {self.device}")
                    return block, address - start
        raise LookupError(f"no memory at {address:#x}")

    def read(self, address: int, size: int) -> bytes:
        """Bytes of the current GPU's memory; raises LookupError outside of one block."""
        block, offset = self._at(address)
        if offset + size > block.numel():
            raise LookupError(f"{size} bytes at {address:#x} end outside of their block")
        return block[offset : offset + size].numpy().tobytes()

    def write(self, address: int, content: bytes) -> None:
        """Write bytes to the current GPU's memory; raises LookupError outside of one block."""
        block, offset = self._at(address)
        if offset + len(content) > block.numel():
            raise LookupError(f"{len(content)} bytes at {address:#x} end outside of their block")
        if content:
            block[offset : offset + len(content)] = torch.frombuffer(bytearray(content), dtype=torch.uint8)

    def _host(self, address: int, size: int) -> bytes:
        if not self.host_addresses and _SPACE <= address < _SPACE * (1 + self.devices):
            raise LookupError(f"{address:#x} is a device's address; expected a host's")
        return ctypes.string_at(address, size)

    def _now(self, work: Callable[[], None]) -> tuple[CUresult]:
        """Work that is done when its call returns."""
        status = self._waits()
        if status != OK:
            return (status,)
        self._drain_all()
        try:
            work()
        except LookupError as error:
            return self._refuse(str(error), CUresult.CUDA_ERROR_ILLEGAL_ADDRESS)
        return (OK,)

    def _checked(self, address: int, size: int) -> CUresult:
        """Whether a range lies in one block of the current GPU, which asynchronous calls find out at once."""
        try:
            block, offset = self._at(address)
        except LookupError as error:
            return self._refuse(str(error), CUresult.CUDA_ERROR_ILLEGAL_ADDRESS)[0]
        return OK if offset + size <= block.numel() else CUresult.CUDA_ERROR_ILLEGAL_ADDRESS

    def _set(self, address: int, value: int, count: int, item: int) -> tuple[CUresult]:
        return self._now(lambda: self.write(address, np.full(count, value, f"uint{8 * item}").tobytes()))

    def cuMemsetD8(self, address: int, value: int, count: int) -> tuple[CUresult]:
        return self._set(address, value, count, 1)

    def cuMemsetD16(self, address: int, value: int, count: int) -> tuple[CUresult]:
        return self._set(address, value, count, 2)

    def cuMemsetD32(self, address: int, value: int, count: int) -> tuple[CUresult]:
        return self._set(address, value, count, 4)

    def _set_later(self, address: int, value: int, count: int, item: int, stream: int) -> tuple[CUresult]:
        if (status := self._checked(address, count * item)) != OK:
            return (status,)
        return self._later(stream, lambda: self.write(address, np.full(count, value, f"uint{8 * item}").tobytes()))

    def cuMemsetD8Async(self, address: int, value: int, count: int, stream: int) -> tuple[CUresult]:
        return self._set_later(address, value, count, 1, stream)

    def cuMemsetD16Async(self, address: int, value: int, count: int, stream: int) -> tuple[CUresult]:
        return self._set_later(address, value, count, 2, stream)

    def cuMemsetD32Async(self, address: int, value: int, count: int, stream: int) -> tuple[CUresult]:
        return self._set_later(address, value, count, 4, stream)

    def cuMemcpyHtoD(self, target: int, source: int, size: int) -> tuple[CUresult]:
        return self._now(lambda: self.write(target, self._host(source, size)))

    def cuMemcpyDtoH(self, target: int, source: int, size: int) -> tuple[CUresult]:
        return self._now(lambda: ctypes.memmove(self._to_host(target), self.read(source, size), size))

    def _to_host(self, address: int) -> int:
        self._host(address, 0)
        return address

    def cuMemcpyHtoDAsync(self, target: int, source: int, size: int, stream: int) -> tuple[CUresult]:
        status = self._checked(target, size)
        if status != OK:
            return (status,)
        try:
            content = self._host(source, size)
        except LookupError as error:
            return self._refuse(str(error), CUresult.CUDA_ERROR_ILLEGAL_ADDRESS)
        pinned = any(start <= source < start + len(block) for start, block in self._pinned.items())
        # Memory that is not pinned is copied out before the call returns.
        return self._later(stream, lambda: self.write(target, self._host(source, size) if pinned else content))

    def cuMemcpyDtoHAsync(self, target: int, source: int, size: int, stream: int) -> tuple[CUresult]:
        status = self._checked(source, size)
        if status != OK:
            return (status,)
        self._to_host(target)
        return self._later(stream, lambda: ctypes.memmove(target, self.read(source, size), size))

    def cuMemcpyDtoDAsync(self, target: int, source: int, size: int, stream: int) -> tuple[CUresult]:
        for address in (target, source):
            if (status := self._checked(address, size)) != OK:
                return (status,)
        return self._later(stream, lambda: self.write(target, self.read(source, size)))

    def cuMemcpyPeerAsync(
        self, target: int, there: int, source: int, here: int, size: int, stream: int
    ) -> tuple[CUresult]:
        for address, context in ((target, there), (source, here)):
            with self._as(context - 1):
                if (status := self._checked(address, size)) != OK:
                    return (status,)

        def copy() -> None:
            with self._as(here - 1):
                content = self.read(source, size)
            with self._as(there - 1):
                self.write(target, content)

        return self._later(stream, copy)


_TORCH = {
    "*fp32": torch.float32, "*bf16": torch.bfloat16, "*i32": torch.int32, "*i64": torch.int64, "*i8": torch.int8,
}  # fmt: skip
