"""A stand-in for ``cuda.bindings.driver`` whose device is this process: memory is the host's, kernels run interpreted.

It takes what the driver takes, the packed addresses of a kernel's parameters included, and refuses what it refuses. So
the code that launches on a GPU runs unchanged, down to the bytes of an argument.
"""

from __future__ import annotations

import ctypes
import enum
import importlib
from collections.abc import Mapping
from typing import Any

import interpreter  # noqa: F401  (mends Triton's interpreter)
import torch
from torch import Tensor

from foldkv.plugins.plans import Kernel

SHARED_WITHOUT_ASKING = 48 << 10
GRID_LIMITS = (2**31 - 1, 65_535, 65_535)
_ELEMENTS = {
    "*fp32": torch.float32, "*bf16": torch.bfloat16, "*fp16": torch.float16, "*i32": torch.int32, "*i64": torch.int64,
    "*i8": torch.int8,
}  # fmt: skip


class CUresult(enum.IntEnum):
    """The statuses that this driver gives."""

    CUDA_SUCCESS = 0
    CUDA_ERROR_INVALID_VALUE = 1
    CUDA_ERROR_INVALID_IMAGE = 200
    CUDA_ERROR_INVALID_CONTEXT = 201
    CUDA_ERROR_INVALID_HANDLE = 400
    CUDA_ERROR_NOT_FOUND = 500
    CUDA_ERROR_ILLEGAL_ADDRESS = 700


class CUfunction_attribute(enum.IntEnum):
    """The one attribute that launching needs."""

    CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES = 8


class CUfunction(int):
    """A handle."""


class FakeDriver:
    """The driver API of a process with one device and a current context.

    ``calls`` are the names of the calls so far, ``launches`` grid, block and bytes of shared memory of every launch.
    ``failures`` maps a call's name to the status that it gives instead of doing anything. ``memory`` keeps tensors that
    were registered.
    """

    CUfunction = CUfunction
    CUfunction_attribute = CUfunction_attribute

    def __init__(self, kernels: Mapping[str | bytes, Kernel]) -> None:
        """Args: kernels: what the bytes of a cubin, or else the name of an entry point, stand for."""
        self.kernels = dict(kernels)
        self.calls: list[str] = []
        self.launches: list[tuple[tuple[int, ...], int, int]] = []
        self.failures: dict[str, CUresult] = {}
        self.reasons: list[str] = []
        self.memory: list[Tensor] = []
        self._libraries: dict[int, bytes] = {}
        self._functions: dict[int, tuple[int, Kernel]] = {}
        self._shared: dict[int, int] = {}

    def register(self, tensor: Tensor) -> int:
        """Make a contiguous tensor readable and writable by kernels; its address."""
        assert tensor.is_contiguous() and tensor.device.type == "cpu"
        self.memory.append(tensor)
        return tensor.data_ptr()

    def _enter(self, call: str) -> CUresult:
        self.calls.append(call)
        return self.failures.get(call, CUresult.CUDA_SUCCESS)

    def _refuse(self, reason: str, status: CUresult = CUresult.CUDA_ERROR_INVALID_VALUE) -> tuple[CUresult]:
        self.reasons.append(reason)
        return (status,)

    # --- the driver's calls, each a tuple of status and results

    def cuInit(self, flags: int) -> tuple[CUresult]:
        return (self._enter("cuInit"),)

    def cuGetErrorName(self, status: int) -> tuple[CUresult, bytes]:
        return CUresult.CUDA_SUCCESS, CUresult(status).name.encode()

    def cuCtxGetDevice(self) -> tuple[CUresult, int]:
        return self._enter("cuCtxGetDevice"), 0

    def cuLibraryLoadData(self, code: bytes, *options: Any) -> tuple[CUresult, int]:
        status = self._enter("cuLibraryLoadData")
        handle = 1 + len(self._libraries)
        if not code:
            status = CUresult.CUDA_ERROR_INVALID_IMAGE
        if status == CUresult.CUDA_SUCCESS:
            self._libraries[handle] = bytes(code)
        return status, handle

    def cuLibraryGetKernel(self, library: int, name: bytes) -> tuple[CUresult, int]:
        status = self._enter("cuLibraryGetKernel")
        kernel = self.kernels.get(self._libraries[library]) or self.kernels.get(name.decode())
        handle = 1000 + len(self._functions)
        if kernel is None:
            return CUresult.CUDA_ERROR_NOT_FOUND, 0
        if status == CUresult.CUDA_SUCCESS:
            self._functions[handle] = library, kernel
        return status, handle

    def cuKernelSetAttribute(self, attribute: int, value: int, kernel: int, device: int) -> tuple[CUresult]:
        status = self._enter("cuKernelSetAttribute")
        assert attribute == CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES and device == 0
        self._shared[kernel] = value
        return (status,)

    def cuLibraryUnload(self, library: int) -> tuple[CUresult]:
        status = self._enter("cuLibraryUnload")
        if self._libraries.pop(library, None) is None:
            return (CUresult.CUDA_ERROR_INVALID_HANDLE,)
        self._functions = {handle: held for handle, held in self._functions.items() if held[0] != library}
        return (status,)

    def cuLaunchKernel(
        self, function: Any, grid_x: int, grid_y: int, grid_z: int, block_x: int, block_y: int, block_z: int,
        shared: int, stream: int, parameters: int, extra: int,
    ) -> tuple[CUresult]:  # fmt: skip
        """Refuse what a GPU refuses, read the parameters from their addresses and run the kernel's programs."""
        status = self._enter("cuLaunchKernel")
        if status != CUresult.CUDA_SUCCESS:
            return (status,)
        if int(function) not in self._functions:
            return self._refuse("the kernel is not loaded", CUresult.CUDA_ERROR_INVALID_HANDLE)
        kernel = self._functions[int(function)][1]
        grid = (grid_x, grid_y, grid_z)
        if any(not 0 < size <= limit for size, limit in zip(grid, GRID_LIMITS, strict=True)):
            return self._refuse(f"grid {grid}")
        if (block_x, block_y, block_z) != (32 * kernel.num_warps, 1, 1):
            return self._refuse(f"block {(block_x, block_y, block_z)} of a kernel with {kernel.num_warps} warps")
        if shared > max(SHARED_WITHOUT_ASKING, self._shared.get(int(function), 0)):
            return self._refuse(f"{shared} bytes of shared memory without asking")
        self.launches.append((grid, block_x, shared))
        try:
            arguments = self._arguments(kernel, parameters)
        except LookupError as error:
            return self._refuse(str(error), CUresult.CUDA_ERROR_ILLEGAL_ADDRESS)
        module, name = kernel.function.split(".")
        program = getattr(importlib.import_module(f"foldkv.plugins.kernels.{module}"), name)
        program[grid](**arguments, **dict(kernel.constants))
        return (CUresult.CUDA_SUCCESS,)

    # --- memory

    def _arguments(self, kernel: Kernel, parameters: int) -> dict[str, Any]:
        """The kernel's arguments from an array of addresses of values, as ``cuLaunchKernel`` takes them."""
        types = [type_ for _, type_ in kernel.arguments if type_ is not None]
        places = (ctypes.c_void_p * (len(types) + 2)).from_address(parameters)
        values: list[Any] = []
        for type_, place in zip([*types, "hidden", "hidden"], places, strict=True):
            if type_ == "i32":
                values.append(ctypes.c_int32.from_address(place).value)
            else:
                values.append(ctypes.c_uint64.from_address(place).value)
        *values, first, second = values
        if first or second:
            raise LookupError(f"pointers to scratch memory are {first:#x} and {second:#x}; expected null")
        given = iter(values)
        arguments: dict[str, Any] = {}
        for name, type_ in kernel.arguments:
            value = None if type_ is None else next(given)
            arguments[name] = value if type_ in (None, "i32") else self._view(value, type_)
        return arguments

    def _view(self, address: int, type_: str) -> Tensor:
        """What lies at an address up to the end of its tensor, in the pointer's type."""
        for tensor in self.memory:
            offset = address - tensor.data_ptr()
            if 0 <= offset < tensor.nbytes:
                rest = tensor.view(-1).view(torch.uint8)[offset:]
                size = _ELEMENTS[type_].itemsize
                return rest[: rest.numel() // size * size].view(_ELEMENTS[type_])
        raise LookupError(f"no memory at {address:#x}")
