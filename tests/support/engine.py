"""Stand-ins for a GPU and for TensorRT's runtime: device memory is the host's, an engine is a model in ONNX Runtime.

The executor then runs whole, with the addresses and shapes that it would give to a GPU.
"""

from __future__ import annotations

import ctypes
import enum
import threading
import types
from typing import Any

import numpy as np
import torch
from driver import CUresult, FakeDriver
from whole import opened

_TYPES = {"tensor(float)": np.float32, "tensor(int32)": np.int32, "tensor(int64)": np.int64}


CONTEXT = 1


class HostDriver(FakeDriver):
    """The driver with memory of its own; ``limit`` is what it can give, in bytes.

    Contexts are per thread, as CUDA's are: once the primary context is retained, a call from a thread in which none is current is
    refused. ``opened`` counts what is to be given back: the primary context and streams.
    """

    def __init__(self, limit: int = 1 << 40) -> None:
        super().__init__({})
        self.blocks: dict[int, torch.Tensor] = {}
        self.limit = limit
        self.opened = {"context": 0, "stream": 0}
        self._thread, self._retained = threading.local(), False

    @property
    def contexts(self) -> list[int]:
        """The calling thread's contexts, the current one last."""
        if not hasattr(self._thread, "contexts"):
            self._thread.contexts = []
        found: list[int] = self._thread.contexts
        return found

    def _status(self, status: CUresult = CUresult.CUDA_SUCCESS) -> CUresult:
        """What a call gives that needs a context."""
        return status if self.contexts or not self._retained else CUresult.CUDA_ERROR_INVALID_CONTEXT

    def check_context(self) -> None:
        """Fail as a library does that works in the current context."""
        assert self._status() == CUresult.CUDA_SUCCESS, "no context is current in this thread"

    def cuDeviceGet(self, ordinal: int) -> tuple[CUresult, int]:
        return CUresult.CUDA_SUCCESS, ordinal

    def cuDevicePrimaryCtxRetain(self, device: int) -> tuple[CUresult, int]:
        self._retained = True
        self.opened["context"] += 1
        return CUresult.CUDA_SUCCESS, CONTEXT

    def cuDevicePrimaryCtxRelease(self, device: int) -> tuple[CUresult]:
        self.opened["context"] -= 1
        return (CUresult.CUDA_SUCCESS,)

    def cuCtxSetCurrent(self, context: int) -> tuple[CUresult]:
        self.contexts[-1:] = [context]
        return (CUresult.CUDA_SUCCESS,)

    def cuCtxPushCurrent(self, context: int) -> tuple[CUresult]:
        self.contexts.append(context)
        return (CUresult.CUDA_SUCCESS,)

    def cuCtxPopCurrent(self) -> tuple[CUresult, int]:
        return (self._status(), self.contexts.pop())

    def cuStreamCreate(self, flags: int) -> tuple[CUresult, int]:
        self.opened["stream"] += 1
        return self._status(), 77

    def cuStreamSynchronize(self, stream: int) -> tuple[CUresult]:
        return (self._status(),)

    def cuStreamDestroy(self, stream: int) -> tuple[CUresult]:
        self.opened["stream"] -= 1
        return (self._status(),)

    def cuMemAlloc(self, size: int) -> tuple[CUresult, int]:
        if self._status() != CUresult.CUDA_SUCCESS:
            return self._status(), 0
        if sum(block.numel() for block in self.blocks.values()) + size > self.limit:
            return CUresult.CUDA_ERROR_INVALID_VALUE, 0
        block = torch.full((size,), 0xFF, dtype=torch.uint8)  # what was never written is not zero
        self.blocks[block.data_ptr()] = block
        return CUresult.CUDA_SUCCESS, block.data_ptr()

    def cuMemFree(self, address: int) -> tuple[CUresult]:
        del self.blocks[address]
        return (self._status(),)

    def _move(self, target: int, source: Any, size: int, device: int) -> tuple[CUresult]:
        """Copy, if a context is current and the device's side lies inside a block."""
        inside = any(device - start >= 0 and device + size <= start + len(b) for start, b in self.blocks.items())
        status = self._status(CUresult.CUDA_SUCCESS if inside else CUresult.CUDA_ERROR_ILLEGAL_ADDRESS)
        if status == CUresult.CUDA_SUCCESS:
            ctypes.memmove(target, source, size)
        return (status,)

    def _set(self, address: int, value: int, count: int, item: int) -> tuple[CUresult]:
        return self._move(address, np.full(count, value, f"uint{8 * item}").tobytes(), count * item, address)

    def cuMemsetD8(self, address: int, value: int, count: int) -> tuple[CUresult]:
        return self._set(address, value, count, 1)

    def cuMemsetD16(self, address: int, value: int, count: int) -> tuple[CUresult]:
        return self._set(address, value, count, 2)

    def cuMemsetD32(self, address: int, value: int, count: int) -> tuple[CUresult]:
        return self._set(address, value, count, 4)

    def cuMemcpyHtoD(self, target: int, source: int, size: int) -> tuple[CUresult]:
        return self._move(target, source, size, target)

    def cuMemcpyDtoH(self, target: int, source: int, size: int) -> tuple[CUresult]:
        return self._move(target, source, size, source)

    def cuMemcpyHtoDAsync(self, target: int, source: int, size: int, stream: int) -> tuple[CUresult]:
        assert stream == 77
        return self.cuMemcpyHtoD(target, source, size)

    def cuMemcpyDtoHAsync(self, target: int, source: int, size: int, stream: int) -> tuple[CUresult]:
        assert stream == 77
        return self.cuMemcpyDtoH(target, source, size)


class _Execution:
    def __init__(self, trt: Any, session: Any) -> None:
        self.trt, self.session = trt, session
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shapes[name] = shape
        return max(shape, default=0) < 5000

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        self.trt.check_context()
        feeds = {}
        for value in self.session.get_inputs():
            kind = np.dtype(_TYPES[value.type])
            shape = self.shapes.get(value.name, (1,))
            size = int(np.prod(shape)) * kind.itemsize
            feeds[value.name] = np.frombuffer(ctypes.string_at(self.addresses[value.name], size), kind).reshape(shape)
        names = [value.name for value in self.session.get_outputs()]
        for name, array in zip(names, self.session.run(names, feeds), strict=True):
            ctypes.memmove(self.addresses[name], np.ascontiguousarray(array).ctypes.data, array.nbytes)
        return True


class _Engine:
    def __init__(self, trt: Any, path: str) -> None:
        self.trt, self.session = trt, opened(path)
        self._tensors = {value.name: value for value in (*self.session.get_inputs(), *self.session.get_outputs())}

    @property
    def num_io_tensors(self) -> int:
        return len(self._tensors)

    def get_tensor_name(self, index: int) -> str:
        return list(self._tensors)[index]

    def get_tensor_dtype(self, name: str) -> str:
        return str(self._tensors[name].type)

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return tuple(size if isinstance(size, int) else -1 for size in self._tensors[name].shape)

    def get_tensor_location(self, name: str) -> Any:
        # A builder keeps a tensor on the host that only shapes depend on.
        location = self.trt.TensorLocation
        return location.HOST if name == "active_context" else location.DEVICE

    def create_execution_context(self) -> _Execution:
        self.trt.check_context()
        return _Execution(self.trt, self.session)


def library(driver: HostDriver | None = None) -> Any:
    """The module ``tensorrt`` as the executor uses it; a plan is the path of a model. It works in the driver's context."""
    trt: Any = types.ModuleType("tensorrt")
    trt.check_context = driver.check_context if driver else lambda: None
    trt.TensorLocation = types.SimpleNamespace(HOST=1, DEVICE=0)

    class Severity(enum.Enum):
        ERROR = 1

    class ILogger:
        def log(self, severity: Severity, text: str) -> None:
            raise NotImplementedError

    class Runtime:
        def __init__(self, logger: Any) -> None:
            self.logger = logger

        def deserialize_cuda_engine(self, plan: bytes) -> Any:
            if plan.startswith(b"/"):
                return _Engine(trt, plan.decode())
            self.logger.log(Severity.ERROR, "no plan\nof any version")
            return None

    trt.ILogger, trt.Runtime = ILogger, Runtime
    return trt
