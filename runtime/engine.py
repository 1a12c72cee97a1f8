"""Run a bundle's TensorRT or TensorRT-RTX engine with its state on the GPU. Needs neither torch nor Triton.

The engine's plugins launch the bundle's kernels. State that a plugin updates in place, which the bundle's manifest lists, has one
buffer for ``past.X`` and ``present.X``, as the plugin's alias requires. Function bodies are compiled for inputs and outputs that do not overlap, so the state that they
write has two buffers, which are swapped after every run. Small inputs and the logits go through buffers that are made once per
shape.

Every call makes the GPU's context current for the calling thread, so a session may be opened in one thread and used in another.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.metadata
import logging
from collections import deque
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import ArtifactError, FoldkvError, InputError, MissingDependencyError
from ..export.contract.state import STATE_TYPES, StateTensor
from ..plugins.cuda import Device, check
from ..plugins.tensorrt import provide_kernels, register_plugins
from ..records import to_json
from .backend import FloatArray, IntArray
from .buffers import Copies, StateSpec, fill_value, storage
from .bundle import Bundle
from .plugin_check import bundle_kernels

#: Gets every message of the library, at the same level.
log = logging.getLogger("foldkv.engine")
_LEVELS = {"INTERNAL_ERROR": logging.ERROR, "ERROR": logging.ERROR, "WARNING": logging.WARNING, "INFO": logging.INFO,
           "VERBOSE": logging.DEBUG}  # fmt: skip


@functools.cache
def library_logger(trt: Any) -> Any:
    """The logger for ``tensorrt`` or ``tensorrt_rtx``. There is one per process, because the library keeps the first one.

    Messages go to the logger ``foldkv.engine``; ``reasons()`` returns the last errors as one text, and clears them.
    """

    class Messages(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: deque[str] = deque(maxlen=3)

        def log(self, severity: Any, text: str) -> None:
            level = _LEVELS.get(str(severity).rsplit(".", 1)[-1], logging.WARNING)
            log.log(level, "%s", text)
            if level >= logging.ERROR:
                self.errors.append(" ".join(text.split())[:400])

        def reasons(self) -> str:
            text = "; ".join(self.errors) or "the library gave no reason"
            self.errors.clear()
            return text

    return Messages()


class DeviceBuffers:
    """The state in GPU memory: one contiguous buffer per tensor, and a second one if it is not updated in place.

    ``addresses`` is where the state is, ``targets`` where the next run writes it.
    """

    def __init__(self, device: Device, spec: StateSpec, context: int, batch: int, *, in_place: Collection[str]) -> None:
        """Allocate and fill. ``in_place`` are the names of tensors that need no second buffer.

        Raises:
            InputError: the GPU cannot hold the state.
        """
        self._device, self._driver, self.spec, self._context, self._batch = device, device.driver, spec, context, batch
        self.addresses: dict[str, int] = {}
        self._second: dict[str, int] = {}
        places = [(tensor, self.addresses) for tensor in spec.tensors]
        places += [(tensor, self._second) for tensor in spec.tensors if tensor.name not in in_place]
        with device.current():
            for tensor, addresses in places:
                status, address = self._driver.cuMemAlloc(tensor.bytes(context, batch))
                if int(status) != 0:
                    self.close()
                    need = sum(one.bytes(context, batch) for one, _ in places)
                    raise InputError(
                        f"the state for context {context} and batch {batch} needs {need} bytes ({need / 2**30:.2f} GiB), "
                        "which the GPU cannot allocate. Choose a smaller context or batch."
                    )
                addresses[tensor.name] = int(address)
                self._fill(tensor, int(address), batch * tensor.capacity(context))

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

    def copy_used(self, tokens: Sequence[int]) -> Copies:
        """Copies of the rows in use if the sequences hold ``tokens`` tokens each: by slot and tensor [used, width]."""
        with self._device.current():
            return tuple(
                tuple(self._copy(tensor, slot, tensor.used_rows(held)) for tensor in self.spec.tensors)
                for slot, held in enumerate(tokens)
            )

    def put_used(self, copies: Copies) -> None:
        """Write what :meth:`copy_used` returned into the same slots."""
        with self._device.current():
            for slot, rows in enumerate(copies):
                for tensor, copy in zip(self.spec.tensors, rows, strict=True):
                    address = self._slot(tensor, self.addresses, slot)
                    check(self._driver, self._driver.cuMemcpyHtoD(address, copy.ctypes.data, copy.nbytes))

    def close(self) -> None:
        """Free the memory."""
        with self._device.current():
            for address in (*self.addresses.values(), *self._second.values()):
                check(self._driver, self._driver.cuMemFree(address))
        self.addresses, self._second = {}, {}

    def _slot(self, tensor: StateTensor, addresses: dict[str, int], slot: int) -> int:
        """Where the rows of a slot begin."""
        return addresses[tensor.name] + slot * tensor.bytes(self._context)

    def _copy(self, tensor: StateTensor, slot: int, rows: int) -> npt.NDArray[Any]:
        copy = np.empty((rows, tensor.width), storage(tensor))
        address = self._slot(tensor, self.addresses, slot)
        check(self._driver, self._driver.cuMemcpyDtoH(copy.ctypes.data, address, copy.nbytes))
        copy.flags.writeable = False
        return copy

    def _fill(self, tensor: StateTensor, address: int, rows: int) -> None:
        item = STATE_TYPES[tensor.dtype].item_bytes
        pattern = np.array(fill_value(tensor), storage(tensor)).view(f"uint{8 * item}")
        fill = {1: self._driver.cuMemsetD8, 2: self._driver.cuMemsetD16, 4: self._driver.cuMemsetD32}[item]
        if rows:
            check(self._driver, fill(address, int(pattern), rows * tensor.width))


class EngineExecutor:
    """Runs a bundle's engine on the first GPU; see :class:`foldkv.runtime.backend.Executor`."""

    def __init__(self, bundle: Bundle, *, context: int, batch: int) -> None:
        """Load kernels and engine, allocate the state.

        Raises:
            ArtifactError: the engine cannot be deserialised, or is not the one that the manifest describes.
            InputError: context or batch are outside of what the engine was built for, or the state does not fit.
            MissingDependencyError: the library is of another version than the engine.
        """
        _check_shapes(bundle, context, batch)
        self._bundle, self._batch = bundle, batch
        self._device = device = Device()
        self._driver = device.driver
        self._small: dict[str, tuple[int, int]] = {}  # name to device address and bytes
        with contextlib.ExitStack() as opened:
            opened.callback(device.close)
            with device.current():
                self._open(context, batch, opened)
            self._opened = opened.pop_all()

    def _open(self, context: int, batch: int, opened: contextlib.ExitStack) -> None:
        """Load and allocate; ``opened`` collects what must be freed."""
        driver, bundle = self._driver, self._bundle
        trt = _library(bundle)
        kernels = bundle.manifest.kernels
        if kernels is not None:
            provide_kernels(kernels.library, bundle_kernels(bundle.folder, kernels), driver=driver)
            register_plugins(trt)
        self._logger = library_logger(trt)
        opened.callback(self._drop_engine)
        self._runtime = trt.Runtime(self._logger)
        self._logger.reasons()  # forget errors of an earlier engine
        self._engine = self._runtime.deserialize_cuda_engine(bundle.engine.read_bytes())
        if self._engine is None:
            raise ArtifactError(
                f"{bundle.engine} cannot be deserialised here: {self._logger.reasons()}. Build it again."
            )
        self._execution = self._engine.create_execution_context()
        if self._execution is None:
            raise ArtifactError(f"{bundle.engine} cannot be executed here: {self._logger.reasons()}. Build it again.")
        self._stream = int(check(driver, driver.cuStreamCreate(0)))
        opened.callback(self._destroy_stream)
        self._on_host = {
            name for name in bundle.io.inputs if self._engine.get_tensor_location(name) == trt.TensorLocation.HOST
        }
        self.buffers = DeviceBuffers(self._device, bundle.state, context, batch, in_place=bundle.in_place)
        opened.callback(self._free)
        for tensor in bundle.state.tensors:
            shape = (batch, tensor.capacity(context), tensor.width)
            self._set_shape(tensor.input, shape)
        self._bind(bundle.state.tensors)
        self._moving = [tensor for tensor in bundle.state.tensors if tensor.name not in bundle.in_place]

    def run(
        self,
        input_ids: IntArray,
        positions: IntArray,
        num_tokens: IntArray,
        active_context: int,
        logit_indices: IntArray,
        *,
        trim: bool = False,
    ) -> FloatArray:
        """See :meth:`foldkv.runtime.backend.Executor.run`; ``trim`` has no effect here.

        Raises:
            FoldkvError: the engine failed; the state may be half updated.
        """
        with self._device.current():
            return self._run(input_ids, positions, num_tokens, active_context, logit_indices)

    def _run(
        self,
        input_ids: IntArray,
        positions: IntArray,
        num_tokens: IntArray,
        active_context: int,
        logit_indices: IntArray,
    ) -> FloatArray:
        names = self._bundle.io
        arrays: dict[str, npt.NDArray[Any]] = {
            names.input_ids: np.ascontiguousarray(input_ids, np.int64),
            names.positions: np.ascontiguousarray(positions, np.int32),
            names.num_tokens: np.ascontiguousarray(num_tokens, np.int32),
            names.active_context: np.array([active_context], np.int64),
            names.logit_indices: np.ascontiguousarray(logit_indices, np.int64),
        }
        for name, array in arrays.items():
            if name in self._on_host:
                self._execution.set_tensor_address(name, array.ctypes.data)
            else:
                self._set_shape(name, array.shape)
                address = self._space(name, array.nbytes)
                copied = self._driver.cuMemcpyHtoDAsync(address, array.ctypes.data, array.nbytes, self._stream)
                check(self._driver, copied)
        logits = np.empty((self._batch, logit_indices.shape[1], self._bundle.model.vocab_size), np.float32)
        address = self._space(names.logits, logits.nbytes)
        self._logger.errors.clear()
        if not self._execution.execute_async_v3(self._stream):
            raise FoldkvError(
                f"the engine {self._bundle.engine} failed on a chunk of {input_ids.shape[1]} tokens: "
                f"{self._logger.reasons()}. Reset the session or restore a snapshot."
            )
        check(self._driver, self._driver.cuMemcpyDtoHAsync(logits.ctypes.data, address, logits.nbytes, self._stream))
        check(self._driver, self._driver.cuStreamSynchronize(self._stream))
        self.buffers.written()
        self._bind(self._moving)
        return logits

    def forget(self) -> None:
        """See :meth:`foldkv.runtime.backend.Executor.forget`."""
        with self._device.current():
            for address, size in self._small.values():
                check(self._driver, self._driver.cuMemsetD8(address, 0, size))

    def close(self) -> None:
        """Free engine, state and stream; closing twice is fine. The kernels stay loaded for other sessions of the process."""
        self._opened.close()

    def _free(self) -> None:
        """Free the state and the small buffers when the GPU is done with them."""
        with self._device.current():
            check(self._driver, self._driver.cuStreamSynchronize(self._stream))
            self.buffers.close()
            for address, _ in self._small.values():
                check(self._driver, self._driver.cuMemFree(address))
        self._small = {}

    def _destroy_stream(self) -> None:
        with self._device.current():
            check(self._driver, self._driver.cuStreamDestroy(self._stream))

    def _drop_engine(self) -> None:
        with self._device.current():
            self._execution = self._engine = self._runtime = None

    def _bind(self, tensors: Sequence[StateTensor]) -> None:
        """Bind these tensors to their buffers for the next run."""
        targets = self.buffers.targets
        for tensor in tensors:
            self._execution.set_tensor_address(tensor.input, self.buffers.addresses[tensor.name])
            self._execution.set_tensor_address(tensor.output, targets[tensor.name])

    def _set_shape(self, name: str, shape: Sequence[int]) -> None:
        if not self._execution.set_input_shape(name, tuple(shape)):
            raise InputError(
                f"the engine {self._bundle.engine} was not built for the shape {tuple(shape)} of {name!r}; "
                f"its sizes are {to_json(self._bundle.manifest.shapes)}."
            )

    def _space(self, name: str, size: int) -> int:
        """A device buffer of at least this many bytes, bound to a tensor."""
        address, held = self._small.get(name, (0, 0))
        if held < size:
            if address:
                check(self._driver, self._driver.cuStreamSynchronize(self._stream))
                check(self._driver, self._driver.cuMemFree(address))
            address = int(check(self._driver, self._driver.cuMemAlloc(size)))
            self._small[name] = (address, size)
        self._execution.set_tensor_address(name, address)
        return address


def _library(bundle: Bundle) -> Any:
    backend, module = bundle.backend.name, bundle.backend.module
    wanted, found = bundle.manifest.tool_versions.get(backend), importlib.metadata.version(module)
    if wanted != found:
        raise MissingDependencyError(
            f"the engine in {bundle.folder} was built by {backend} {wanted}; {found} is installed. "
            f"Run `pip install {module}=={wanted}`, or build the bundle again."
        )
    return importlib.import_module(module)


def _check_shapes(bundle: Bundle, context: int, batch: int) -> None:
    shapes = bundle.manifest.shapes
    for name, value, (low, _, high) in (("context", context, shapes.context), ("batch", batch, shapes.batch)):
        if not low <= value <= high:
            raise InputError(
                f"{name} is {value}; the engine in {bundle.folder} was built for {low} to {high}. "
                f"Choose one of these, or build it with other shapes."
            )
