"""Stand-ins for a GPU and for TensorRT's runtime: device memory is the host's, an engine is a model in ONNX Runtime.

The executor then runs whole, with the addresses and shapes that it would give to a GPU.
"""

from __future__ import annotations

import ctypes
import enum
import types
from typing import Any

import numpy as np
import onnxruntime
import torch
from driver import CUresult, FakeDriver

_TYPES = {"tensor(float)": np.float32, "tensor(int32)": np.int32, "tensor(int64)": np.int64}


class HostDriver(FakeDriver):
    """The driver with memory of its own; ``limit`` is what it can give, in bytes."""

    def __init__(self, limit: int = 1 << 40) -> None:
        super().__init__({})
        self.blocks: dict[int, torch.Tensor] = {}
        self.limit = limit

    def cuDeviceGet(self, ordinal: int) -> tuple[CUresult, int]:
        return CUresult.CUDA_SUCCESS, ordinal

    def cuDevicePrimaryCtxRetain(self, device: int) -> tuple[CUresult, int]:
        return CUresult.CUDA_SUCCESS, 1

    def cuDevicePrimaryCtxRelease(self, device: int) -> tuple[CUresult]:
        return (CUresult.CUDA_SUCCESS,)

    def cuCtxSetCurrent(self, context: int) -> tuple[CUresult]:
        return (CUresult.CUDA_SUCCESS,)

    def cuStreamCreate(self, flags: int) -> tuple[CUresult, int]:
        return CUresult.CUDA_SUCCESS, 77

    def cuStreamSynchronize(self, stream: int) -> tuple[CUresult]:
        return (CUresult.CUDA_SUCCESS,)

    def cuStreamDestroy(self, stream: int) -> tuple[CUresult]:
        return (CUresult.CUDA_SUCCESS,)

    def cuMemAlloc(self, size: int) -> tuple[CUresult, int]:
        if sum(block.numel() for block in self.blocks.values()) + size > self.limit:
            return CUresult.CUDA_ERROR_INVALID_VALUE, 0
        block = torch.full((size,), 0xFF, dtype=torch.uint8)  # what was never written is not zero
        self.blocks[block.data_ptr()] = block
        return CUresult.CUDA_SUCCESS, block.data_ptr()

    def cuMemFree(self, address: int) -> tuple[CUresult]:
        del self.blocks[address]
        return (CUresult.CUDA_SUCCESS,)

    def _inside(self, address: int, size: int) -> bool:
        return any(address - start >= 0 and address + size <= start + len(b) for start, b in self.blocks.items())

    def _set(self, address: int, value: int, count: int, item: int) -> tuple[CUresult]:
        if not self._inside(address, count * item):
            return (CUresult.CUDA_ERROR_ILLEGAL_ADDRESS,)
        ctypes.memmove(address, np.full(count, value, f"uint{8 * item}").tobytes(), count * item)
        return (CUresult.CUDA_SUCCESS,)

    def cuMemsetD8(self, address: int, value: int, count: int) -> tuple[CUresult]:
        return self._set(address, value, count, 1)

    def cuMemsetD16(self, address: int, value: int, count: int) -> tuple[CUresult]:
        return self._set(address, value, count, 2)

    def cuMemsetD32(self, address: int, value: int, count: int) -> tuple[CUresult]:
        return self._set(address, value, count, 4)

    def cuMemcpyHtoD(self, target: int, source: int, size: int) -> tuple[CUresult]:
        if not self._inside(target, size):
            return (CUresult.CUDA_ERROR_ILLEGAL_ADDRESS,)
        ctypes.memmove(target, source, size)
        return (CUresult.CUDA_SUCCESS,)

    def cuMemcpyDtoH(self, target: int, source: int, size: int) -> tuple[CUresult]:
        if not self._inside(source, size):
            return (CUresult.CUDA_ERROR_ILLEGAL_ADDRESS,)
        ctypes.memmove(target, source, size)
        return (CUresult.CUDA_SUCCESS,)

    def cuMemcpyHtoDAsync(self, target: int, source: int, size: int, stream: int) -> tuple[CUresult]:
        assert stream == 77
        return self.cuMemcpyHtoD(target, source, size)

    def cuMemcpyDtoHAsync(self, target: int, source: int, size: int, stream: int) -> tuple[CUresult]:
        assert stream == 77
        return self.cuMemcpyDtoH(target, source, size)


class _Execution:
    def __init__(self, session: Any) -> None:
        self.session = session
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shapes[name] = shape
        return max(shape, default=0) < 5000

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
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
        self.trt, self.session = trt, onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
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
        return _Execution(self.session)


def library() -> Any:
    """The module ``tensorrt`` as the executor uses it; a plan is the path of a model."""
    trt: Any = types.ModuleType("tensorrt")
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
