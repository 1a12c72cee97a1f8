"""Stand-ins for TensorRT's runtime, over the stand-in of the driver (gpus.py). A plan is the path of a model.

A float32 segment runs in ONNX Runtime: that tests binding only. A lowered, injected graph is executed as a builder got it: plugin
nodes by the real plugins, whose kernels run in Triton's interpreter, and the others by onnx's reference evaluator (executing.py).
"""

from __future__ import annotations

import ctypes
import enum
import types
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from gpus import OK, HostDriver
from whole import opened

#: numpy's storage of a type, and ONNX's number for it.
_TYPES: dict[str, tuple[Any, int]] = {
    "tensor(float)": (np.float32, 1), "tensor(int32)": (np.int32, 6), "tensor(int64)": (np.int64, 7),
    "tensor(bfloat16)": (np.uint16, 16), "tensor(int8)": (np.int8, 3), "tensor(float8e4m3fn)": (np.uint8, 17),
}  # fmt: skip
#: Bytes of scratch memory that every context asks for, per element of its largest input.
_SCRATCH = 16


class Execution:
    """An execution context: shapes, addresses, and scratch memory if its user manages that."""

    def __init__(self, engine: Any, *, managed: bool, config: RuntimeConfig | None = None) -> None:
        self.engine, self.driver, self.managed, self.config = engine, engine.driver, managed, config
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.profile: int | None = None
        self.scratch, self.scratch_size = 0, 0
        self._need: int | None = None

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        self.driver.check_context(self.engine.device)
        self.profile = index
        return index in (0, 1)

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        assert name in self.engine.inputs, f"{name} is no input"
        assert self.profile in (None, 0) or shape[0] == 1 or name not in ("input_ids", "positions"), (
            "a chunk has one sequence"
        )
        assert self.profile in (None, 1) or name != "input_ids" or shape[1] == 1, "a decode step has one token"
        self.shapes[name], self._need = shape, None
        return max(shape, default=0) < 5000

    def infer_shapes(self) -> list[str]:
        return sorted(
            name
            for name in self.engine.inputs
            if (name in self.engine.dynamic and name not in self.shapes and name != "active_context")
            or (self.engine.get_tensor_location(name) == HOST and name not in self.addresses)
        )

    def update_device_memory_size_for_shapes(self) -> int:
        moving = set(self.engine.dynamic) - {"active_context"}
        assert moving <= self.shapes.keys(), f"no shape for {sorted(moving - self.shapes.keys())}"
        self._need = _SCRATCH * max(int(np.prod(shape)) for shape in self.shapes.values()) if self.shapes else 0
        return self._need

    def set_device_memory(self, address: int, size: int) -> None:
        assert self._need is not None and size >= self._need and address % 256 == 0
        self.scratch, self.scratch_size = address, size

    def set_tensor_address(self, name: str, address: int) -> bool:
        assert name in self.engine.types, f"{name} is neither an input nor an output"
        host = self.engine.get_tensor_location(name) == HOST
        assert host or address % 256 == 0 or self.driver.host_addresses, f"{name} is at an address that is not aligned"
        self.addresses[name] = address
        return True

    def is_stream_capturable(self, stream: int) -> bool:
        return True

    def execute_async_v3(self, stream: int) -> bool:
        """Check what can be checked at once, and enqueue the work."""
        self.driver.check_context(self.engine.device)
        assert not self.managed or (self._need is not None and self.scratch), (
            "a context runs without its scratch memory"
        )
        assert self.engine.types.keys() <= self.addresses.keys(), (
            f"no address for {sorted(self.engine.types.keys() - self.addresses.keys())}"
        )
        addresses, shapes = dict(self.addresses), dict(self.shapes)
        if self.config is not None:
            self.config.compile(shapes)
        hosted = {
            name: ctypes.string_at(addresses[name], 8)
            for name in self.engine.inputs
            if self.engine.get_tensor_location(name) == HOST
        }
        scratch = (self.scratch, self._need or 0)

        def work() -> None:
            if self.managed and scratch[1]:
                self.driver.write(scratch[0], b"\xaa" * scratch[1])  # it must be there, and nobody else may count on it
            self.engine.run(addresses, shapes, hosted)

        return bool(self.driver._later(stream, work)[0] == OK)


class RuntimeCache:
    """Kernels that were compiled, by the shapes for which they were."""

    def __init__(self, gpu: str) -> None:
        self.gpu, self.kernels = gpu, set[str]()

    def serialize(self) -> memoryview:
        return memoryview("\n".join([self.gpu, *sorted(self.kernels)]).encode())

    def deserialize(self, content: bytes) -> bool:
        gpu, *kernels = content.decode().split("\n")
        if gpu == self.gpu:
            self.kernels |= set(kernels)
        return gpu == self.gpu


class RuntimeConfig:
    """How an engine of TensorRT-RTX is executed."""

    def __init__(self, engine: Any) -> None:
        self.engine, self.allocation, self.cache = engine, 0, RuntimeCache(GPU)
        self.dynamic_shapes_kernel_specialization_strategy = "LAZY"

    def set_execution_context_allocation_strategy(self, strategy: int) -> None:
        self.allocation = strategy

    def create_runtime_cache(self) -> RuntimeCache:
        return RuntimeCache(GPU)

    def set_runtime_cache(self, cache: RuntimeCache) -> bool:
        self.cache = cache
        return True

    def compile(self, shapes: dict[str, tuple[int, ...]]) -> None:
        """What an execution at these shapes needs, if it was not compiled before; ``calls`` of the driver counts that."""
        strategy = self.dynamic_shapes_kernel_specialization_strategy
        assert strategy in ("EAGER", "NONE"), "kernels change while a session decodes"
        kernel = "for any shape" if strategy == "NONE" else str(sorted(shapes.items()))
        if kernel not in self.cache.kernels:
            self.engine.driver.calls.append(f"compile {kernel}")
            self.cache.kernels.add(kernel)


HOST, DEVICE = 1, 0
#: The allocation strategy USER_MANAGED, and the GPU that kernels are compiled for.
MANAGED, GPU = 2, "stand-in"


class Engine:
    """What TensorRT says of an engine on the GPU whose context was current when it was deserialised."""

    inputs: tuple[str, ...]
    types: dict[str, str]
    dims: dict[str, tuple[int, ...]]

    def __init__(self, driver: HostDriver) -> None:
        self.driver, self.device = driver, driver.device

    @property
    def dynamic(self) -> list[str]:
        return [name for name in self.inputs if -1 in self.dims[name]]

    @property
    def num_io_tensors(self) -> int:
        return len(self.types)

    def get_tensor_name(self, index: int) -> str:
        return list(self.types)[index]

    def get_tensor_mode(self, name: str) -> int:
        return 1 if name in self.inputs else 2

    def get_tensor_dtype(self, name: str) -> str:
        return self.types[name]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self.dims[name]

    def get_tensor_location(self, name: str) -> int:
        return DEVICE

    def create_execution_context(self, made: RuntimeConfig | int = 0) -> Execution:
        self.driver.check_context(self.device)
        if isinstance(made, RuntimeConfig):
            assert made.engine is self
            return Execution(self, managed=made.allocation == MANAGED, config=made)
        return Execution(self, managed=made == MANAGED)

    def create_runtime_config(self) -> RuntimeConfig:
        return RuntimeConfig(self)

    def run(self, addresses: dict[str, int], shapes: dict[str, tuple[int, ...]], hosted: dict[str, bytes]) -> None:
        """Compute the outputs from what lies at the addresses."""
        raise NotImplementedError


class BoundEngine(Engine):
    """A float32 segment in ONNX Runtime: shapes and addresses are what a GPU would get, the arithmetic is not."""

    def __init__(self, driver: HostDriver, path: str) -> None:
        super().__init__(driver)
        self.session = opened(path)
        tensors = [*self.session.get_inputs(), *self.session.get_outputs()]
        self.inputs = tuple(value.name for value in self.session.get_inputs())
        self.types = {value.name: str(value.type) for value in tensors}
        self.dims = {
            value.name: tuple(size if isinstance(size, int) else -1 for size in value.shape) for value in tensors
        }

    def get_tensor_location(self, name: str) -> int:
        # A builder keeps a tensor on the host that only shapes depend on.
        return HOST if name == "active_context" else DEVICE

    def run(self, addresses: dict[str, int], shapes: dict[str, tuple[int, ...]], hosted: dict[str, bytes]) -> None:
        feeds = {}
        for name in self.inputs:
            kind, number = _TYPES[self.types[name]]
            shape = shapes.get(name, (1,) if name == "active_context" else self.dims[name])
            size = int(np.prod(shape)) * np.dtype(kind).itemsize
            content = hosted[name] if name in hosted else self.driver.read(addresses[name], size)
            array = np.frombuffer(content, kind).reshape(shape)
            feeds[name] = onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(array, number)
        names = [value.name for value in self.session.get_outputs()]
        for name, value in zip(names, self.session.run_with_ort_values(names, feeds), strict=True):
            self.driver.write(addresses[name], np.ascontiguousarray(value.numpy()).tobytes())


def library(driver: HostDriver, *, rtx: bool = False) -> Any:
    """The module ``tensorrt``, or ``tensorrt_rtx``, as the executor uses it; a plan is the path of a model. It works in the
    current context."""
    trt: Any = types.ModuleType("tensorrt")
    trt.TensorLocation = types.SimpleNamespace(HOST=HOST, DEVICE=DEVICE)
    trt.TensorIOMode = types.SimpleNamespace(INPUT=1, OUTPUT=2)
    trt.ExecutionContextAllocationStrategy = types.SimpleNamespace(STATIC=0, USER_MANAGED=MANAGED)
    if rtx:
        trt.DynamicShapesKernelSpecializationStrategy = types.SimpleNamespace(LAZY="LAZY", EAGER="EAGER", NONE="NONE")

    class Severity(enum.Enum):
        ERROR = 1

    class ILogger:
        def log(self, severity: Severity, text: str) -> None:
            raise NotImplementedError

    class Runtime:
        def __init__(self, logger: Any) -> None:
            self.logger = logger
            driver.check_context()

        def deserialize_cuda_engine(self, plan: bytes) -> Any:
            if plan.startswith(b"/"):
                path = Path(plan.decode())
                if path.name == LOWERED:
                    from executing import ExecutingEngine

                    return ExecutingEngine(driver, path)
                return BoundEngine(driver, str(path))
            self.logger.log(Severity.ERROR, "no plan\nof any version")
            return None

    trt.ILogger, trt.Runtime = ILogger, Runtime
    return trt


#: Name of a lowered graph's file (optimize/passes/lower.py).
LOWERED = "model.onnx"
