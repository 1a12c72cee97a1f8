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
import onnxruntime
import torch
from driver import CUresult, FakeDriver
from whole import opened

#: numpy's storage of a type, and ONNX's number for it.
_TYPES: dict[str, tuple[Any, int]] = {
    "tensor(float)": (np.float32, 1), "tensor(int32)": (np.int32, 6), "tensor(int64)": (np.int64, 7),
    "tensor(bfloat16)": (np.uint16, 16), "tensor(int8)": (np.int8, 3), "tensor(float8e4m3fn)": (np.uint8, 17),
}  # fmt: skip


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

    def _inside(self, address: int, size: int) -> bool:
        """Whether a range lies in one block."""
        return any(start <= address and address + size <= start + len(b) for start, b in self.blocks.items())

    def _move(self, target: int, source: Any, size: int, device: int) -> tuple[CUresult]:
        """Copy, if a context is current and the device's side lies inside a block."""
        inside = self._inside(device, size)
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

    def cuMemcpyDtoDAsync(self, target: int, source: int, size: int, stream: int) -> tuple[CUresult]:
        assert stream == 77 and self._inside(target, size)
        return self._move(target, source, size, source)

    def cuMemcpyHtoDAsync(self, target: int, source: int, size: int, stream: int) -> tuple[CUresult]:
        assert stream == 77
        return self.cuMemcpyHtoD(target, source, size)

    def cuMemcpyDtoHAsync(self, target: int, source: int, size: int, stream: int) -> tuple[CUresult]:
        assert stream == 77
        return self.cuMemcpyDtoH(target, source, size)


class _Execution:
    """Takes shapes and addresses, and scratch memory if its user manages that."""

    def __init__(self, trt: Any, engine: Any, *, managed: bool) -> None:
        self.managed = managed
        self.trt, self.engine, self.session = trt, engine, engine.session
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.profile: int | None = None
        self.planned, self.scratch = False, 0

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        self.trt.check_context()
        self.profile = index
        return index in (0, 1)

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        assert name in self.engine.inputs, f"{name} is no input"
        assert self.profile in (None, 0) or shape[0] == 1 or name not in ("input_ids", "positions"), (
            "a chunk has one sequence"
        )
        self.shapes[name], self.planned = shape, False
        return max(shape, default=0) < 5000

    def update_device_memory_size_for_shapes(self) -> int:
        moving = [value.name for value in self.engine.dynamic if value.name != "active_context"]
        assert set(moving) <= self.shapes.keys(), "an input has no shape"
        self.planned = True
        return 4096

    def set_device_memory(self, address: int, size: int) -> None:
        assert self.planned and size >= 4096 and address
        self.scratch = address

    def set_tensor_address(self, name: str, address: int) -> bool:
        host = self.engine.get_tensor_location(name) == self.trt.TensorLocation.HOST
        assert host or address % 16 == 0, f"{name} is at an address that is not aligned"  # torch's own blocks are at 64
        self.addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        self.trt.check_context()
        assert not self.managed or (self.planned and self.scratch), "a context runs without its scratch memory"
        feeds = {}
        for value in self.session.get_inputs():
            kind, number = _TYPES[value.type]
            fixed = tuple(size for size in value.shape)
            shape = self.shapes.get(value.name, (1,) if value.name == "active_context" else fixed)
            size = int(np.prod(shape)) * np.dtype(kind).itemsize
            array = np.frombuffer(ctypes.string_at(self.addresses[value.name], size), kind).reshape(shape)
            feeds[value.name] = onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(array, number)
        names = [value.name for value in self.session.get_outputs()]
        for name, array in zip(names, self.session.run_with_ort_values(names, feeds), strict=True):
            made = np.ascontiguousarray(array.numpy())
            ctypes.memmove(self.addresses[name], made.ctypes.data, made.nbytes)
        return True


class _Engine:
    def __init__(self, trt: Any, path: str) -> None:
        self.trt, self.session = trt, opened(path)
        self.inputs = {value.name: value for value in self.session.get_inputs()}
        self.dynamic = [
            value for value in self.inputs.values() if any(not isinstance(size, int) for size in value.shape)
        ]
        self._tensors = self.inputs | {value.name: value for value in self.session.get_outputs()}

    @property
    def num_io_tensors(self) -> int:
        return len(self._tensors)

    def get_tensor_name(self, index: int) -> str:
        return list(self._tensors)[index]

    def get_tensor_mode(self, name: str) -> Any:
        return self.trt.TensorIOMode.INPUT if name in self.inputs else self.trt.TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name: str) -> str:
        return str(self._tensors[name].type)

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return tuple(size if isinstance(size, int) else -1 for size in self._tensors[name].shape)

    def get_tensor_location(self, name: str) -> Any:
        # A builder keeps a tensor on the host that only shapes depend on.
        location = self.trt.TensorLocation
        return location.HOST if name == "active_context" else location.DEVICE

    def create_execution_context(self, strategy: int = 0) -> _Execution:
        self.trt.check_context()
        return _Execution(self.trt, self, managed=strategy == self.trt.ExecutionContextAllocationStrategy.USER_MANAGED)


def library(driver: HostDriver | None = None) -> Any:
    """The module ``tensorrt`` as the executor uses it; a plan is the path of a model. It works in the driver's context."""
    trt: Any = types.ModuleType("tensorrt")
    trt.check_context = driver.check_context if driver else lambda: None
    trt.TensorLocation = types.SimpleNamespace(HOST=1, DEVICE=0)
    trt.TensorIOMode = types.SimpleNamespace(INPUT=1, OUTPUT=2)
    trt.ExecutionContextAllocationStrategy = types.SimpleNamespace(STATIC=0, USER_MANAGED=2)

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
