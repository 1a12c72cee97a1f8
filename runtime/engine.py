"""Runs the engines of a bundle one after the other over the state of one session, on the GPU.

Every call has execution contexts of its own, with its weights bound once: one for decode steps of all sequences, and one for
chunks, which run one sequence at a time on that sequence's rows of the state. All contexts use the same scratch memory,
because only one runs at a time. The streams go back and forth between two buffers.

State that a plugin updates in place, which the bundle's manifest lists, has one buffer for ``past.X`` and ``present.X``, as
the plugin's alias requires. Function bodies are compiled for inputs and outputs that do not overlap, so the state that they
write has two buffers. A decode step swaps them; a chunk's rows are copied back.

Every call makes the GPU's context current for the calling thread, so a session may be opened in one thread and used in another.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import ArtifactError, FoldkvError, InputError
from ..export.contract.chain import STEP
from ..export.contract.state import StateTensor
from ..plugins.cuda import check
from ..records import to_json
from .backend import FloatArray, IntArray
from .bundle import Bundle
from .chain import AFTER, PAST, PRESENT, STREAMS
from .device_buffers import DeviceBuffers
from .engine_model import ALIGNMENT, EngineModel

#: Bytes of an element of what flows between segments.
_FLOAT, _INDEX = 4, 8


class EngineExecutor:
    """Runs a bundle's engines on the first GPU; see :class:`foldkv.runtime.backend.Executor`."""

    def __init__(self, model: EngineModel, *, context: int, batch: int) -> None:
        """Allocate the state.

        Raises:
            InputError: context or batch are outside of what the engines were built for, or the state does not fit.
        """
        _check_shapes(model.bundle, context, batch)
        self._model, self._batch = model, batch
        self._device, self._driver = model.device, model.device.driver
        self._small: dict[str, tuple[int, int]] = {}  # name to device address and bytes
        self._lanes: dict[bool, _Lane] = {}
        bundle = model.bundle
        with contextlib.ExitStack() as opened, self._device.current():
            self.stream = int(check(self._driver, self._driver.cuStreamCreate(0)))
            opened.callback(self._destroy_stream)
            self.buffers = DeviceBuffers(self._device, bundle.state, context, batch, in_place=bundle.in_place)
            opened.callback(self._free)
            self._opened = opened.pop_all()

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

        A chunk of several tokens runs one sequence after the other; sequences without a token in it get no logits (zeros).

        Raises:
            FoldkvError: an engine failed; the state may be half updated.
        """
        io = self._model.bundle.io
        given: dict[str, npt.NDArray[Any]] = {
            io.input_ids: np.ascontiguousarray(input_ids, np.int64),
            io.positions: np.ascontiguousarray(positions, np.int32),
            io.num_tokens: np.ascontiguousarray(num_tokens, np.int32),
            io.active_context: np.array([active_context], np.int64),
            io.logit_indices: np.ascontiguousarray(logit_indices, np.int64),
        }
        with self._device.current():
            if input_ids.shape[1] == 1:
                return self._lane(decode=True).run(given, None)
            shape = (self._batch, logit_indices.shape[1], self._model.bundle.model.vocab_size)
            logits = np.zeros(shape, np.float32)
            for slot in np.flatnonzero(num_tokens):
                own = {
                    name: value if name == io.active_context else value[slot : slot + 1]
                    for name, value in given.items()
                }
                logits[slot] = self._lane(decode=False).run(own, int(slot))[0]
            return logits

    def forget(self) -> None:
        """See :meth:`foldkv.runtime.backend.Executor.forget`."""
        with self._device.current():
            for address, size in self._small.values():
                check(self._driver, self._driver.cuMemsetD8(address, 0, size))

    def close(self) -> None:
        """Free state and stream; closing twice is fine. The model keeps engines and weights."""
        self._opened.close()

    def space(self, name: str, size: int) -> int:
        """A device buffer of at least this many bytes; it moves when it grows."""
        address, held = self._small.get(name, (0, 0))
        if held < size:
            if address:
                check(self._driver, self._driver.cuStreamSynchronize(self.stream))
                check(self._driver, self._driver.cuMemFree(address))
                del self._small[name]
            status, address = self._driver.cuMemAlloc(size)
            if int(status) != 0:
                raise InputError(
                    f"the GPU cannot allocate {size} bytes ({size / 2**30:.2f} GiB) of {name}. Choose a smaller context, "
                    "batch or chunk."
                )
            self._small[name] = (int(address), size)
        return int(self._small[name][0])

    def _lane(self, *, decode: bool) -> _Lane:
        if decode not in self._lanes:
            self._lanes[decode] = _Lane(self, self._model, self._batch if decode else 1, profile=0 if decode else 1)
        return self._lanes[decode]

    def _free(self) -> None:
        """Free contexts, state and the other buffers when the GPU is done with them."""
        with self._device.current():
            check(self._driver, self._driver.cuStreamSynchronize(self.stream))
            self._lanes = {}
            self.buffers.close()
            for address, _ in self._small.values():
                check(self._driver, self._driver.cuMemFree(address))
        self._small = {}

    def _destroy_stream(self) -> None:
        with self._device.current():
            check(self._driver, self._driver.cuStreamDestroy(self.stream))


class _Lane:
    """Execution contexts for one optimization profile, with weights bound; ``batch`` sequences at once."""

    def __init__(self, executor: EngineExecutor, model: EngineModel, batch: int, *, profile: int) -> None:
        self._executor, self._model, self._batch, self._profile = executor, model, batch, profile
        self._driver, self._trt = model.device.driver, model.trt
        self._state = {
            call.owner: [t for t in model.bundle.state.tensors if t.layer == call.layer] for call in model.table.calls
        }
        self._contexts = {STEP: self._context(STEP)} | {
            call.owner: self._context(call.segment) for call in model.table.calls
        }
        for call in model.table.calls:
            for role, address in model.weights[call.owner].items():
                self._contexts[call.owner].set_tensor_address(role, address)
        self._sizes: tuple[int, int] | None = None
        self._copies = _Copies(executor.buffers, model.bundle.in_place)

    def run(self, given: Mapping[str, npt.NDArray[Any]], slot: int | None) -> FloatArray:
        """Feed a chunk to all sequences, or to the one of ``slot``; returns logits [batch, L, V]."""
        executor, model = self._executor, self._model
        io = model.bundle.io
        chunk, kept = given[io.input_ids].shape[1], given[io.logit_indices].shape[1]
        self._fit(chunk, kept)
        for name, array in given.items():
            self._copy_in(name, array)
        self._bind_flow(given)
        if slot is None:
            self._bind_whole()
        else:
            self._bind_slot(slot)
        model.logger.errors.clear()
        for owner in (STEP, *(call.owner for call in model.table.calls)):
            if not self._contexts[owner].execute_async_v3(executor.stream):
                raise FoldkvError(
                    f"the engine of {owner} in {model.bundle.folder} failed on a chunk of {chunk} tokens: "
                    f"{model.logger.reasons()}. Reset the session or restore a snapshot."
                )
        if slot is None:
            executor.buffers.written()
        else:
            self._copy_back(slot)
        logits = np.empty((self._batch, kept, model.bundle.model.vocab_size), np.float32)
        address = executor.space("logits", logits.nbytes)
        check(self._driver, self._driver.cuMemcpyDtoHAsync(logits.ctypes.data, address, logits.nbytes, executor.stream))
        check(self._driver, self._driver.cuStreamSynchronize(executor.stream))
        return logits

    def _context(self, segment: str) -> Any:
        """An execution context that takes its scratch memory from the executor."""
        model = self._model
        strategy = self._trt.ExecutionContextAllocationStrategy.USER_MANAGED
        context = model.engines[segment].create_execution_context(strategy)
        if context is None or not context.set_optimization_profile_async(self._profile, self._executor.stream):
            raise ArtifactError(
                f"the engine of {segment} in {model.bundle.folder} cannot be executed here: {model.logger.reasons()}. "
                "Make the bundle again."
            )
        return context

    def _calls(self) -> Sequence[tuple[str, str]]:
        return [(STEP, STEP), *((call.owner, call.segment) for call in self._model.table.calls)]

    def _fit(self, chunk: int, kept: int) -> None:
        """Give every context its shapes and scratch memory, unless the sizes are those of the last chunk."""
        if self._sizes == (chunk, kept):
            return
        model, batch, io = self._model, self._batch, self._model.bundle.io
        flow = self._flow_shapes(chunk, kept)
        need = 0
        for owner, segment in self._calls():
            context = self._contexts[owner]
            rows = {PAST + t.group: self._executor.buffers.shape(t, batch) for t in self._state.get(owner, ())}
            shapes = rows | flow
            for name in model.inputs[segment]:
                if name in shapes and name != io.active_context:
                    self._set_shape(context, name, shapes[name])
            need = max(need, context.update_device_memory_size_for_shapes())
        scratch = self._executor.space("scratch", max(need, ALIGNMENT))
        size = max(need, ALIGNMENT)
        for context in self._contexts.values():
            context.set_device_memory(scratch, size)
        self._sizes = (chunk, kept)

    def _flow_shapes(self, chunk: int, kept: int) -> dict[str, tuple[int, ...]]:
        """Shapes of everything that is neither state nor a weight."""
        model, batch, io = self._model, self._batch, self._model.bundle.io
        first = model.table.calls[0].segment
        streams = (batch, chunk, *model.engines[first].get_tensor_shape(STREAMS)[2:])
        step = dict.fromkeys(model.outputs[STEP], (batch, chunk))
        return step | {
            io.input_ids: (batch, chunk), io.positions: (batch,), io.num_tokens: (batch,), io.active_context: (1,),
            io.logit_indices: (batch, kept), STREAMS: streams,
        }  # fmt: skip

    def _set_shape(self, context: Any, name: str, shape: tuple[int, ...]) -> None:
        if not context.set_input_shape(name, shape):
            raise InputError(
                f"the engines in {self._model.bundle.folder} were not built for the shape {shape} of {name!r}; their sizes "
                f"are {to_json(self._model.bundle.manifest.shapes)}."
            )

    def _copy_in(self, name: str, array: npt.NDArray[Any]) -> None:
        executor = self._executor
        address = executor.space(name, array.nbytes)
        check(self._driver, self._driver.cuMemcpyHtoDAsync(address, array.ctypes.data, array.nbytes, executor.stream))

    def _bind_flow(self, given: Mapping[str, npt.NDArray[Any]]) -> None:
        """Bind what flows through the chain: inputs, what the step makes, streams and logits."""
        executor, model, io = self._executor, self._model, self._model.bundle.io
        assert self._sizes is not None
        chunk, kept = self._sizes
        shapes = self._flow_shapes(chunk, kept)
        made = {name: executor.space(name, _INDEX * int(np.prod(shapes[name]))) for name in model.outputs[STEP]}
        streams = [executor.space(f"streams.{half}", _FLOAT * int(np.prod(shapes[STREAMS]))) for half in (0, 1)]
        logits = executor.space("logits", _FLOAT * self._batch * kept * model.bundle.model.vocab_size)
        common = {name: executor.space(name, given[name].nbytes) for name in io.inputs} | made
        for number, (owner, segment) in enumerate(self._calls()):
            context, engine = self._contexts[owner], model.engines[segment]
            for name in model.inputs[segment]:
                if name == STREAMS:
                    context.set_tensor_address(name, streams[(number + 1) % 2])
                elif name in common:
                    host = engine.get_tensor_location(name) == self._trt.TensorLocation.HOST
                    context.set_tensor_address(name, given[name].ctypes.data if host else common[name])
            for name in model.outputs[segment]:
                if name in (STREAMS, AFTER):
                    context.set_tensor_address(name, streams[number % 2])
                elif name == io.logits:
                    context.set_tensor_address(name, logits)
                elif name in made:
                    context.set_tensor_address(name, made[name])

    def _bind_whole(self) -> None:
        """Bind the state of all sequences."""
        buffers = self._executor.buffers
        targets = buffers.targets
        for owner, tensors in self._state.items():
            for tensor in tensors:
                self._bind(owner, tensor, buffers.addresses[tensor.name], targets[tensor.name])

    def _bind_slot(self, slot: int) -> None:
        """Bind one sequence's rows; where they cannot be bound as they lie, a copy of them."""
        executor, copies = self._executor, self._copies
        spare = executor.space("spare", copies.bytes) if copies.bytes else 0
        for owner, tensors in self._state.items():
            for tensor in tensors:
                past = present = executor.buffers.slot(tensor, slot)
                if tensor.name in copies.past:
                    past = present = spare + copies.past[tensor.name]
                    size = executor.buffers.slot_bytes(tensor)
                    moved = self._driver.cuMemcpyDtoDAsync(
                        past, executor.buffers.slot(tensor, slot), size, executor.stream
                    )
                    check(self._driver, moved)
                if tensor.name in copies.present:
                    present = spare + copies.present[tensor.name]
                self._bind(owner, tensor, past, present)

    def _copy_back(self, slot: int) -> None:
        """Copy what a chunk wrote beside the state into the sequence's rows."""
        executor, copies = self._executor, self._copies
        spare = executor.space("spare", copies.bytes) if copies.bytes else 0
        written = copies.past | copies.present
        for tensor in self._model.bundle.state.tensors:
            if tensor.name in written:
                moved = self._driver.cuMemcpyDtoDAsync(
                    executor.buffers.slot(tensor, slot), spare + written[tensor.name],
                    executor.buffers.slot_bytes(tensor), executor.stream,
                )  # fmt: skip
                check(self._driver, moved)

    def _bind(self, owner: str, tensor: StateTensor, past: int, present: int) -> None:
        context = self._contexts[owner]
        context.set_tensor_address(PAST + tensor.group, past)
        context.set_tensor_address(PRESENT + tensor.group, present)


class _Copies:
    """Which state of a sequence a chunk reads and writes beside the state, and where: offsets in bytes by tensor.

    Rows that begin at an address which TensorRT does not take are copied, and function bodies do not write what they read.
    """

    def __init__(self, buffers: DeviceBuffers, in_place: Collection[str]) -> None:
        self.bytes = 0
        self.past: dict[str, int] = {}
        self.present: dict[str, int] = {}
        for tensor in buffers.spec.tensors:
            size = buffers.slot_bytes(tensor)
            if size % ALIGNMENT:
                self.past[tensor.name] = self._take(size)
            if tensor.name not in in_place:
                self.present[tensor.name] = self._take(size)

    def _take(self, size: int) -> int:
        at, self.bytes = self.bytes, self.bytes + -(-size // ALIGNMENT) * ALIGNMENT
        return at


def _check_shapes(bundle: Bundle, context: int, batch: int) -> None:
    shapes = bundle.manifest.shapes
    for name, value, (low, _, high) in (("context", context, shapes.context), ("batch", batch, shapes.batch)):
        if not low <= value <= high:
            raise InputError(
                f"{name} is {value}; the engine in {bundle.folder} was built for {low} to {high}. "
                f"Choose one of these, or build it with other shapes."
            )
