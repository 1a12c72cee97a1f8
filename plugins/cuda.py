"""Launch a plan's kernels through the CUDA driver API. Neither torch nor Triton.

A :class:`Launcher` loads its kernels when it is made. :meth:`Launcher.launch` only enqueues, allocates nothing and waits
for nothing, so a CUDA graph can capture it.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import FoldkvError, InputError, MissingDependencyError
from ..packages import installed, lacks
from .plans import Launch, Plan

# Triton adds two pointers to scratch memory to every kernel's arguments; plugins/compile.py refuses kernels that use them.
_HIDDEN_POINTERS = 2
#: Flag of a stream that does not wait for the default stream, nor the default stream for it.
NON_BLOCKING = 1
_SHARED_WITHOUT_ASKING = 48 << 10  # bytes of shared memory that every kernel can use


_PEER_ACCESS_ALREADY_ENABLED = 704


@dataclass(frozen=True)
class KernelImage:
    """A compiled kernel: its name (``Kernel.name``), entry point, threads per block, bytes of shared memory, cubin."""

    name: str
    entry: str
    threads: int
    shared: int
    cubin: bytes


def cuda_driver() -> Any:
    """The module ``cuda.bindings.driver``, initialized.

    Raises:
        MissingDependencyError: the package or the driver is not installed.
    """
    if not installed("cuda.bindings"):
        raise lacks("launching on a GPU", ["cuda.bindings"])
    from cuda.bindings import driver

    try:
        check(driver, driver.cuInit(0))
    except RuntimeError as error:  # without libcuda.so.1 the package raises its own subclass
        raise MissingDependencyError(f"no usable NVIDIA driver: {error}. Run on a machine with a GPU.") from None
    return driver


def _driver_library() -> Any:
    """libcuda.so.1, initialized, or None: to look for a GPU without any package."""
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    return None if library.cuInit(0) else library


def device_count() -> int:
    """The number of NVIDIA GPUs that the driver offers; 0 without a driver."""
    library, count = _driver_library(), ctypes.c_int(0)
    return 0 if library is None or library.cuDeviceGetCount(ctypes.byref(count)) else count.value


def device_name(ordinal: int = 0) -> str:
    """The driver's name of a GPU; "" without it."""
    library, device, name = _driver_library(), ctypes.c_int(), ctypes.create_string_buffer(256)
    if library is None or library.cuDeviceGet(ctypes.byref(device), ordinal):
        return ""
    return "" if library.cuDeviceGetName(name, len(name), device) else name.value.decode(errors="replace")


def device_capability() -> int | None:
    """Compute capability of the first GPU (90 for 9.0), or None without one."""
    library, device = _driver_library(), ctypes.c_int()
    if library is None or library.cuDeviceGet(ctypes.byref(device), 0):
        return None
    major, minor = ctypes.c_int(), ctypes.c_int()
    for value, attribute in ((major, 75), (minor, 76)):  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, _MINOR
        if library.cuDeviceGetAttribute(ctypes.byref(value), attribute, device):
            return None
    return 10 * major.value + minor.value


def check(driver: Any, result: tuple[Any, ...]) -> Any:
    """The result of a driver call without its status; several values as a tuple.

    Raises:
        FoldkvError: the call failed.
    """
    status, *values = result
    if int(status) != 0:
        _, name = driver.cuGetErrorName(status)
        raise FoldkvError(f"the CUDA driver failed: {name.decode() if name else int(status)}")
    return values[0] if len(values) == 1 else tuple(values)


class Device:
    """A GPU with its primary context, for any thread.

    A context is current per thread: a thread that opens a session makes it current only for itself. So put calls of the
    driver, and of libraries on top of it, inside ``with device.current():``.

    Attributes:
        ordinal: its number on this machine, as CUDA counts.
        context: the primary context.
    """

    def __init__(self, driver: Any = None, *, ordinal: int = 0) -> None:
        """Retain the primary context.

        Args:
            driver: the driver API; the default is :func:`cuda_driver`.
            ordinal: number of the GPU.

        Raises:
            InputError: there is no such GPU.
            FoldkvError: the driver refuses.
            MissingDependencyError: no driver.
        """
        self.driver = driver = driver or cuda_driver()
        count = check(driver, driver.cuDeviceGetCount())
        if not 0 <= ordinal < count:
            known = ", ".join(map(str, range(count))) or "none"
            raise InputError(f"GPU {ordinal} was asked for; this machine has {known}.")
        self.ordinal = ordinal
        self._device = check(driver, driver.cuDeviceGet(ordinal))
        self.context = check(driver, driver.cuDevicePrimaryCtxRetain(self._device))

    @contextlib.contextmanager
    def current(self) -> Iterator[None]:
        """Make the context current in the calling thread; at the end, restore the thread's earlier context."""
        check(self.driver, self.driver.cuCtxPushCurrent(self.context))
        try:
            yield
        finally:
            # Unchecked: after a sticky error every call fails, and only the first error matters.
            self.driver.cuCtxPopCurrent()

    def name(self) -> str:
        """What the driver calls it."""
        name: bytes = check(self.driver, self.driver.cuDeviceGetName(256, self._device))
        return name.split(b"\0")[0].decode(errors="replace")

    def memory_bytes(self) -> int:
        """Bytes of its memory, taken or not."""
        return int(check(self.driver, self.driver.cuDeviceTotalMem(self._device)))

    def reaches(self, other: Device) -> bool:
        """Whether another GPU's memory can be read without the host's; if so, that is switched on."""
        if not check(self.driver, self.driver.cuDeviceCanAccessPeer(self._device, other._device)):
            return False
        with self.current():
            [status] = self.driver.cuCtxEnablePeerAccess(other.context, 0)
        return int(status) in (0, _PEER_ACCESS_ALREADY_ENABLED)

    def close(self) -> None:
        """Release the context."""
        check(self.driver, self.driver.cuDevicePrimaryCtxRelease(self._device))


class Launcher:
    """Loaded kernels. A library is loaded once and serves the contexts of all GPUs; the shared memory that a kernel may use is set
    for each GPU.
    """

    def __init__(self, images: Iterable[KernelImage], *, driver: Any = None) -> None:
        """Load all images, and prepare them for the current device.

        Args:
            images: kernels for the compute capability of the devices.
            driver: the driver API; the default is :func:`cuda_driver`.

        Raises:
            FoldkvError: the driver refuses a kernel.
            MissingDependencyError: no driver.
        """
        self._driver = driver = driver or cuda_driver()
        self._libraries: list[Any] = []
        self._kernels: dict[str, tuple[Any, KernelImage]] = {}
        self._asking: list[tuple[Any, int]] = []  # kernels that need more shared memory than every kernel can use
        self._prepared: set[int] = set()
        try:
            for image in images:
                library = check(driver, driver.cuLibraryLoadData(image.cubin, [], [], 0, [], [], 0))
                self._libraries.append(library)
                kernel = check(driver, driver.cuLibraryGetKernel(library, image.entry.encode()))
                if image.shared > _SHARED_WITHOUT_ASKING:
                    self._asking.append((kernel, image.shared))
                self._kernels[image.name] = driver.CUfunction(int(kernel)), image
            self.prepare()
        except BaseException:
            self.close()
            raise

    def prepare(self) -> None:
        """Let the kernels be launched on the current device; once per device.

        Raises:
            FoldkvError: the device does not have the shared memory that a kernel needs.
        """
        driver = self._driver
        device = check(driver, driver.cuCtxGetDevice())
        if int(device) in self._prepared:
            return
        attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        for kernel, shared in self._asking:
            check(driver, driver.cuKernelSetAttribute(attribute, shared, kernel, device))
        self._prepared.add(int(device))

    def launch(
        self, steps: Plan, inputs: Sequence[int], outputs: Sequence[int], *, workspace: int = 0, stream: int = 0
    ) -> None:
        """Enqueue every launch of ``steps``.

        Args:
            steps: from :func:`foldkv.plugins.launch.plan`, with numbers for sizes.
            inputs: device addresses of the operator's inputs.
            outputs: device addresses of its outputs.
            workspace: device address of at least ``steps.workspace`` bytes.
            stream: handle of the stream.

        Raises:
            FoldkvError: a kernel of the plan was not loaded, or the driver refuses a launch.
        """
        addresses = {"input": inputs, "output": outputs}
        for one in steps.launches:
            if 0 in one.grid:
                continue  # nothing to do, and CUDA refuses an empty grid
            function, image = self._loaded(one)
            values: list[Any] = []
            for argument in one.arguments:
                if argument.kind == "int32":
                    values.append(ctypes.c_int32(argument.value))
                elif argument.kind == "workspace":
                    values.append(ctypes.c_uint64(workspace + argument.value))
                else:
                    values.append(ctypes.c_uint64(addresses[argument.kind][argument.value]))
            values += [ctypes.c_uint64(0)] * _HIDDEN_POINTERS
            parameters = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
            result = self._driver.cuLaunchKernel(
                function, *one.grid, image.threads, 1, 1, image.shared, stream, ctypes.addressof(parameters), 0
            )
            check(self._driver, result)

    def _loaded(self, one: Launch) -> tuple[Any, KernelImage]:
        try:
            return self._kernels[one.kernel.name]
        except KeyError:
            raise FoldkvError(
                f"kernel {one.kernel.name} is not among those loaded ({len(self._kernels)}). "
                "The bundle was built for other sizes: build it again."
            ) from None

    def close(self) -> None:
        """Unload the kernels. No launch may be running."""
        for library in self._libraries:
            self._driver.cuLibraryUnload(library)  # unchecked: the others must go too
        self._libraries, self._kernels, self._asking, self._prepared = [], {}, [], set()
