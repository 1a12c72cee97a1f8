"""What a session has on one GPU: a stream, the state of that GPU's layers, and execution contexts for its calls.

Every call has execution contexts of its own, with its weights bound once: one for decode steps of all sequences, and one for
chunks, which run one sequence at a time on that sequence's rows of the state (a *lane* each). All contexts use the same scratch
memory, because only one runs at a time. The streams go back and forth between two buffers.

State that a plugin updates in place, which the bundle's manifest lists, has one buffer for ``past.X`` and ``present.X``, as
the plugin's alias requires. Function bodies are compiled for inputs and outputs that do not overlap, so the state that they
write has two buffers. A decode step swaps them; a chunk's rows are copied back.

Where nothing moves from one decode step to the next, the second step is captured in a CUDA graph, which the later ones launch:
then no call of a plugin runs in Python any more.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import ArtifactError, FoldkvError, InputError
from ..export.contract.call_weights import ALIGNMENT, aligned
from ..export.contract.chain import STEP
from ..export.contract.state import StateTensor
from ..plugins.cuda import NON_BLOCKING, Device, check
from ..records import to_json
from .backend import FloatArray, Observed, Observer
from .buffers import StateSpec
from .chain import AFTER, PAST, PRESENT, STREAMS
from .device_buffers import DeviceBuffers
from .engine_model import EngineModel
from .engine_part import EnginePart

#: Bytes of an element of what flows between segments.
_FLOAT, _INDEX = 4, 8
Given = Mapping[str, npt.NDArray[Any]]
#: The chunk's inputs, and who gets the streams after every call.
Watch = tuple[Given, Observer]


class EngineStage:
    """One session's work on one GPU. Its methods make the GPU's context current themselves."""

    def __init__(self, model: EngineModel, part: EnginePart, context: int, batch: int) -> None:
        """Allocate the state of the part's layers.

        Raises:
            InputError: the GPU cannot hold it.
        """
        self.model, self.part, self.batch = model, part, batch
        self.driver = part.device.driver
        #: Changes when a buffer moves: whatever is bound to addresses is bound anew then.
        self.version = 0
        self._small: dict[str, tuple[int, int]] = {}  # name to device address and bytes
        self._lanes: dict[bool, _Lane] = {}
        bundle, layers = model.bundle, {call.layer for call in part.calls}
        own = StateSpec(tuple(tensor for tensor in bundle.state.tensors if tensor.layer in layers))
        with contextlib.ExitStack() as opened:
            # A reference of its own to the context: a model that is closed first does not take it away.
            self.device = Device(self.driver, ordinal=part.device.ordinal)
            opened.callback(self.device.close)
            with self.device.current():
                self.stream = int(check(self.driver, self.driver.cuStreamCreate(NON_BLOCKING)))
                opened.callback(self._destroy_stream)
                self.buffers = DeviceBuffers(
                    self.device, own, context, batch, in_place=bundle.in_place, stream=self.stream
                )
                opened.callback(self._free)
            self._opened = opened.pop_all()

    def prepare(self, given: Given, slot: int | None) -> None:
        """Get ready for a chunk of all sequences, or of the one of ``slot``: shapes, inputs, addresses."""
        with self.device.current():
            self._lane(slot).prepare(given, slot)

    def streams_in(self, given: Given, slot: int | None) -> tuple[int, int]:
        """Where the streams of the chunk that :meth:`prepare` was called for come in, and their bytes."""
        return self._lane(slot).streams(given, 0)

    def streams_out(self, given: Given, slot: int | None) -> tuple[int, int]:
        """Where the part's last call leaves the streams, and their bytes."""
        return self._lane(slot).streams(given, len(self.part.calls) % 2)

    def execute(self, slot: int | None, watch: Watch | None = None) -> None:
        """Enqueue the part's calls; with ``watch`` also wait after each of them.

        Raises:
            FoldkvError: an engine failed; the state may be half updated.
        """
        with self.device.current():
            self._lane(slot).execute(slot, watch)

    def logits(self, kept: int, slot: int | None) -> FloatArray:
        """The logits [batch or 1, kept, V] of the chunk, when everything enqueued here is done."""
        count = self.batch if slot is None else 1
        logits = np.empty((count, kept, self.model.bundle.model.vocab_size), np.float32)
        with self.device.current():
            address = self.space("logits", logits.nbytes)
            copied = self.driver.cuMemcpyDtoHAsync(logits.ctypes.data, address, logits.nbytes, self.stream)
            check(self.driver, copied)
        self.wait()
        return logits

    def wait(self) -> None:
        """Wait until everything enqueued here is done."""
        with self.device.current():
            check(self.driver, self.driver.cuStreamSynchronize(self.stream))

    def settle(self) -> None:
        """Wait as :meth:`wait` does, whatever the driver says: after an error the first one matters."""
        with self.device.current():
            self.driver.cuStreamSynchronize(self.stream)

    def forget(self) -> None:
        """Clear the last chunk from every buffer but the state."""
        with self.device.current():
            for address, size in self._small.values():
                check(self.driver, self.driver.cuMemsetD8Async(address, 0, size, self.stream))
        self.wait()

    def close(self) -> None:
        """Free state, contexts and stream; closing twice is fine."""
        self._opened.close()

    def space(self, name: str, size: int) -> int:
        """A device buffer of at least this many bytes; it moves when it grows."""
        address, held = self._small.get(name, (0, 0))
        if held < size:
            if address:
                check(self.driver, self.driver.cuStreamSynchronize(self.stream))
                check(self.driver, self.driver.cuMemFree(address))
                del self._small[name]
            self.version += 1
            status, address = self.driver.cuMemAlloc(size)
            if int(status) != 0:
                raise InputError(
                    f"GPU {self.device.ordinal} cannot allocate {size} bytes ({size / 2**30:.2f} GiB) of {name}. Choose a smaller "
                    "context, batch or chunk."
                )
            self._small[name] = (int(address), size)
        return int(self._small[name][0])

    def _lane(self, slot: int | None) -> _Lane:
        decode = slot is None
        if decode not in self._lanes:
            self._lanes[decode] = _Lane(self, self.batch if decode else 1, profile=0 if decode else 1)
        return self._lanes[decode]

    def _free(self) -> None:
        """Free graphs, contexts, state and the other buffers when the GPU is done with them. Unchecked: all of it must go."""
        with self.device.current():
            self.driver.cuStreamSynchronize(self.stream)
            if self.part.caches is not None:
                self.part.caches.save()
            for lane in self._lanes.values():
                lane.close()
            self._lanes = {}
            self.buffers.close()
            for address, _ in self._small.values():
                self.driver.cuMemFree(address)
        self._small = {}

    def _destroy_stream(self) -> None:
        with self.device.current():
            self.driver.cuStreamDestroy(self.stream)


class _Lane:
    """Execution contexts for one optimization profile, with weights bound; ``batch`` sequences at once."""

    def __init__(self, stage: EngineStage, batch: int, *, profile: int) -> None:
        self._stage, self._part, self._batch, self._profile = stage, stage.part, batch, profile
        self._driver, self._trt, self._io = stage.driver, stage.model.trt, stage.model.bundle.io
        self._state = {
            call.owner: [t for t in stage.buffers.spec.tensors if t.layer == call.layer] for call in self._part.calls
        }
        self._calls = ((STEP, STEP), *((call.owner, call.segment) for call in self._part.calls))
        self._configs: list[Any] = []  # what a context was made with, and must outlive it
        self._contexts = {owner: self._context(segment) for owner, segment in self._calls}
        for owner, weights in self._part.weights.items():
            for role, address in weights.items():
                self._contexts[owner].set_tensor_address(role, address)
        self._copies = _Copies(stage.buffers, stage.model.bundle.in_place)
        self._hosted: dict[str, npt.NDArray[Any]] = {}  # inputs that engines read in the host's memory
        self._sizes: tuple[Any, ...] | None = None
        self._bound: tuple[object, ...] = ()  # what addresses and a captured step hold for
        self._moving = True  # state is at other addresses in the next step
        self._graph: Any = None
        self._steps = 0  # since something was bound anew
        self._captures = True  # False once a capture has failed, until something is bound anew

    def prepare(self, given: Given, slot: int | None) -> None:
        stage = self._stage
        hosted = self._take_hosted(given)
        self._fit(*self._sizes_of(given), hosted)
        addresses = self._flow_addresses(given)
        moving = slot is not None or any(tensor.name not in stage.model.bundle.in_place for tensor in self._tensors())
        if moving or self._bound != (self._sizes, stage.version):
            self.forget_graph()
            self._scratch()
            self._bind_flow(given, addresses)
            self._bind_state(slot)
            self._bound, self._steps, self._moving = (self._sizes, stage.version), 0, moving
            self._captures = True
        for name, array in given.items():
            copied = self._driver.cuMemcpyHtoDAsync(addresses[name], array.ctypes.data, array.nbytes, stage.stream)
            check(self._driver, copied)

    def streams(self, given: Given, half: int) -> tuple[int, int]:
        size = _FLOAT * int(np.prod(self._flow_shapes(*self._sizes_of(given))[STREAMS]))
        return self._stage.space(f"streams.{half}", size), size

    def execute(self, slot: int | None, watch: Watch | None) -> None:
        stage = self._stage
        if watch is not None:
            self._enqueue(lambda number: self._show(number, slot, watch))
        elif self._graph is not None or (self._steps >= 1 and self._can_capture() and self._capture()):
            check(self._driver, self._driver.cuGraphLaunch(self._graph, stage.stream))
        else:
            self._enqueue()
        self._steps += 1
        if slot is None:
            stage.buffers.written()
        else:
            self._copy_back(slot)

    def forget_graph(self) -> None:
        """Free the captured step."""
        if self._graph is not None:
            self._driver.cuGraphExecDestroy(self._graph)
        self._graph = None

    def close(self) -> None:
        """Free the captured step and the contexts, in the GPU's context."""
        self.forget_graph()
        self._contexts.clear()
        self._configs.clear()

    def _enqueue(self, after: Callable[[int], None] | None = None) -> None:
        stage, logger = self._stage, self._part.logger
        logger.forget()
        for number, (owner, _) in enumerate(self._calls):
            if not self._contexts[owner].execute_async_v3(stage.stream):
                raise FoldkvError(
                    f"the engine of {owner} in {stage.model.bundle.folder} failed on GPU {stage.device.ordinal}: {logger.reasons()}. "
                    "Reset the session or restore a snapshot."
                )
            if after is not None:
                after(number)

    def _show(self, number: int, slot: int | None, watch: Watch) -> None:
        """Tell an observer what the call of this number gave, if it gave streams."""
        given, observe = watch
        if not {STREAMS, AFTER} & {*self._part.outputs[self._calls[number][1]]}:
            return
        streams = np.empty(self._flow_shapes(*self._sizes_of(given))[STREAMS], np.float32)
        address, size = self.streams(given, number % 2)
        check(self._driver, self._driver.cuMemcpyDtoHAsync(streams.ctypes.data, address, size, self._stage.stream))
        self._stage.wait()
        observe(Observed(self._part.calls[number - 1].layer, slot, streams))

    def _can_capture(self) -> bool:
        """Whether steps are the same work on the same addresses, and every engine allows it."""
        if not (self._stage.model.captures and self._captures) or self._moving or self._profile != 0:
            return False
        if self._hosted:
            return False  # a graph would keep what such an input was when it was captured
        asks = [getattr(context, "is_stream_capturable", None) for context in self._contexts.values()]
        return all(ask is None or ask(self._stage.stream) for ask in asks)

    def _capture(self) -> bool:
        """Capture the step, which runs nothing yet; False if the library or the driver cannot, so that it is enqueued instead."""
        driver, stream = self._driver, self._stage.stream
        mode = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        status, *_ = driver.cuStreamBeginCapture(stream, mode)
        if int(status) == 0:
            try:
                self._enqueue()
                failed = False
            except FoldkvError:
                failed = True
            status, graph = driver.cuStreamEndCapture(stream)
            if int(status) == 0:
                if not failed:
                    status, made = driver.cuGraphInstantiate(graph, 0)
                    self._graph = made if int(status) == 0 else None
                driver.cuGraphDestroy(graph)
        self._captures = self._graph is not None
        return self._captures

    def _context(self, segment: str) -> Any:
        """An execution context that takes its scratch memory from the stage."""
        part, strategies = self._part, self._trt.ExecutionContextAllocationStrategy
        engine = part.engines[segment]
        if part.caches is None:
            context = engine.create_execution_context(strategies.USER_MANAGED)
        else:
            config = engine.create_runtime_config()
            config.set_execution_context_allocation_strategy(strategies.USER_MANAGED)
            # By default kernels are exchanged for better ones while a session decodes, and its results change with them. Steps
            # have one shape: their kernels are made for it before the first runs. Chunks have hundreds: all take the same kernels.
            kernels = self._trt.DynamicShapesKernelSpecializationStrategy
            one_shape = self._profile == 0 and not any(self._on_host(segment, name) for name in part.inputs[segment])
            config.dynamic_shapes_kernel_specialization_strategy = kernels.EAGER if one_shape else kernels.NONE
            part.caches.attach(config, part.digest(segment))
            self._configs.append(config)
            context = engine.create_execution_context(config)
        if context is None or not context.set_optimization_profile_async(self._profile, self._stage.stream):
            raise ArtifactError(
                f"the engine of {segment} in {part.bundle.folder} cannot be executed on GPU {part.device.ordinal}: "
                f"{part.logger.reasons()}. Make the bundle again."
            )
        return context

    def _tensors(self) -> Sequence[StateTensor]:
        return self._stage.buffers.spec.tensors

    def _on_host(self, segment: str, name: str) -> bool:
        return bool(self._part.engines[segment].get_tensor_location(name) == self._trt.TensorLocation.HOST)

    def _sizes_of(self, given: Given) -> tuple[int, int]:
        return given[self._io.input_ids].shape[1], given[self._io.logit_indices].shape[1]

    def _take_hosted(self, given: Given) -> bytes:
        """Copy the inputs that engines read in the host's memory to where they were bound; returns their bytes."""
        for owner, segment in self._calls:
            for name in self._part.inputs[segment]:
                if name in given and self._on_host(segment, name):
                    if name not in self._hosted or self._hosted[name].shape != given[name].shape:
                        self._hosted[name] = given[name].copy()
                    self._contexts[owner].set_tensor_address(name, self._hosted[name].ctypes.data)
        for name, array in self._hosted.items():
            np.copyto(array, given[name])
        return b"".join(array.tobytes() for array in self._hosted.values())

    def _fit(self, chunk: int, kept: int, hosted: bytes) -> None:
        """Give every context its shapes, and find the scratch memory that they need, unless they are the last chunk's.

        Sizes inside an engine can depend on the values of inputs in the host's memory.
        """
        if self._sizes == (chunk, kept, hosted):
            return
        self.forget_graph()
        self._sizes, self._bound = None, ()  # if this fails half way, some contexts have the new shapes
        flow = self._flow_shapes(chunk, kept)
        need = ALIGNMENT
        for owner, segment in self._calls:
            context = self._contexts[owner]
            rows = {PAST + t.group: self._stage.buffers.shape(t, self._batch) for t in self._state.get(owner, ())}
            shapes = rows | flow
            for name in self._part.inputs[segment]:
                if name in shapes and name != self._io.active_context:
                    self._set_shape(context, name, shapes[name])
            if missing := context.infer_shapes():
                raise FoldkvError(
                    f"the engine of {owner} lacks the sizes of {', '.join(missing)}. Report this as a fault of foldkv."
                )
            need = max(need, context.update_device_memory_size_for_shapes())
        self._need, self._sizes = need, (chunk, kept, hosted)
        self._stage.space("scratch", need)

    def _scratch(self) -> None:
        """Give every context the scratch memory, which another lane may have moved."""
        scratch = self._stage.space("scratch", self._need)
        for context in self._contexts.values():
            context.set_device_memory(scratch, self._need)

    def _flow_shapes(self, chunk: int, kept: int) -> dict[str, tuple[int, ...]]:
        """Shapes of everything that is neither state nor a weight."""
        part, batch, io = self._part, self._batch, self._io
        first = part.calls[0].segment
        streams = (batch, chunk, *part.engines[first].get_tensor_shape(STREAMS)[2:])
        step = dict.fromkeys(part.outputs[STEP], (batch, chunk))
        return step | {
            io.input_ids: (batch, chunk), io.positions: (batch,), io.num_tokens: (batch,), io.active_context: (1,),
            io.logit_indices: (batch, kept), STREAMS: streams,
        }  # fmt: skip

    def _set_shape(self, context: Any, name: str, shape: tuple[int, ...]) -> None:
        if not context.set_input_shape(name, shape):
            bundle = self._stage.model.bundle
            raise InputError(
                f"the engines in {bundle.folder} were not built for the shape {shape} of {name!r}; their sizes are "
                f"{to_json(bundle.manifest.shapes)}."
            )

    def _flow_addresses(self, given: Given) -> dict[str, int]:
        """Buffers for what flows through the chain: inputs, what the step makes, streams and logits."""
        stage, part = self._stage, self._part
        assert self._sizes is not None
        shapes = self._flow_shapes(*self._sizes[:2])
        found = {name: stage.space(name, given[name].nbytes) for name in self._io.inputs}
        found |= {name: stage.space(name, _INDEX * int(np.prod(shapes[name]))) for name in part.outputs[STEP]}
        for half in (0, 1):
            found[f"{STREAMS}.{half}"] = stage.space(f"streams.{half}", _FLOAT * int(np.prod(shapes[STREAMS])))
        if any(self._io.logits in part.outputs[call.segment] for call in part.calls):
            vocabulary = stage.model.bundle.model.vocab_size
            found[self._io.logits] = stage.space("logits", _FLOAT * self._batch * self._sizes[1] * vocabulary)
        return found

    def _bind_flow(self, given: Given, addresses: Mapping[str, int]) -> None:
        for number, (owner, segment) in enumerate(self._calls):
            context = self._contexts[owner]
            for name in self._part.inputs[segment]:
                if name == STREAMS:
                    context.set_tensor_address(name, addresses[f"{STREAMS}.{(number + 1) % 2}"])
                elif name in addresses and not self._on_host(segment, name):
                    context.set_tensor_address(name, addresses[name])
            for name in self._part.outputs[segment]:
                if name in (STREAMS, AFTER):
                    context.set_tensor_address(name, addresses[f"{STREAMS}.{number % 2}"])
                elif name in addresses:
                    context.set_tensor_address(name, addresses[name])

    def _bind_state(self, slot: int | None) -> None:
        """Bind the state of all sequences, or one sequence's rows; where these cannot be bound as they lie, a copy of them."""
        stage, copies = self._stage, self._copies
        if slot is None:
            for owner, tensors in self._state.items():
                for tensor in tensors:
                    name = tensor.name
                    self._bind(owner, tensor, stage.buffers.addresses[name], stage.buffers.targets[name])
            return
        spare = stage.space("spare", copies.bytes) if copies.bytes else 0
        for owner, tensors in self._state.items():
            for tensor in tensors:
                past = present = stage.buffers.slot(tensor, slot)
                if tensor.name in copies.past:
                    past = present = spare + copies.past[tensor.name]
                    size = stage.buffers.slot_bytes(tensor)
                    moved = self._driver.cuMemcpyDtoDAsync(past, stage.buffers.slot(tensor, slot), size, stage.stream)
                    check(self._driver, moved)
                if tensor.name in copies.present:
                    present = spare + copies.present[tensor.name]
                self._bind(owner, tensor, past, present)

    def _copy_back(self, slot: int) -> None:
        """Copy what a chunk wrote beside the state into the sequence's rows."""
        stage, copies = self._stage, self._copies
        spare = stage.space("spare", copies.bytes) if copies.bytes else 0
        written = copies.past | copies.present
        for tensor in self._tensors():
            if tensor.name in written:
                moved = self._driver.cuMemcpyDtoDAsync(
                    stage.buffers.slot(tensor, slot), spare + written[tensor.name],
                    stage.buffers.slot_bytes(tensor), stage.stream,
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
        at, self.bytes = self.bytes, self.bytes + aligned(size)
        return at
