"""Runs a chain over the state of one session: every call has its weights, its state and its buffers bound.

Weights are ranges of mapped files, or copies of them on a GPU (runtime/chain_memory.py). State buffers are bound as ``past.X`` and
as ``present.X``, so caches are updated in place: a segment reads a part of its state before it writes it, or what it has written.

A slot's rows of a state tensor lie together, so any range of slots can run on its part of the state. A step of one token runs for
the slots from the first to the last that has one, a longer chunk for one slot after the other: nobody pays for the padding of others,
and a sequence that is alone is computed as in a batch of one. The
streams go back and forth between two buffers. What all layers share (positions, angles, masks) is made once per step by the segment
``step``, in buffers that every layer has bound.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import ArtifactError, FoldkvError
from ..export.contract.chain import STEP, Call
from .backend import FloatArray, IntArray, Observed, Observer
from .buffers import Buffers
from .chain import AFTER, PAST, PRESENT, STREAMS, ChainModel, first_line
from .chain_memory import Tensor

_NUMPY = {"tensor(float)": np.float32, "tensor(int64)": np.int64, "tensor(int32)": np.int32, "tensor(bool)": np.bool_}
_SIZE = re.compile(r"(batch|chunk|kept)(?: ([+*]) (\d+))?")


class ChainExecutor:
    """Runs a chain over the state of one session."""

    def __init__(self, model: ChainModel, context: int, batch: int) -> None:
        """Allocate state for ``batch`` sequences of up to ``context`` tokens.

        Raises:
            InputError: the state does not fit into memory.
        """
        self._model, self._batch = model, batch
        self.buffers: Buffers = model.memory.buffers(model.bundle.state, context, batch)
        self._trim = model.ort.RunOptions()
        self._trim.add_run_config_entry("memory.enable_memory_arena_shrinkage", model.memory.arena)
        self._lanes: dict[bool, _Lane] = {}

    def run(
        self,
        input_ids: IntArray,
        positions: IntArray,
        num_tokens: IntArray,
        active_context: int,
        logit_indices: IntArray,
        *,
        trim: bool = False,
        observe: Observer | None = None,
    ) -> FloatArray:
        """See :meth:`foldkv.runtime.backend.Executor.run`.

        A chunk of several tokens runs one sequence after the other. Sequences without a token get no logits that mean something.

        Raises:
            FoldkvError: ONNX Runtime failed; the state may be half updated.
        """
        shape = (self._batch, logit_indices.shape[1], self._model.bundle.model.vocab_size)
        logits = np.zeros(shape, np.float32)
        if input_ids.shape[1] == 1:
            active = np.flatnonzero(num_tokens)
            some = slice(int(active[0]), int(active[-1]) + 1)
            made = self._chunk(
                range(self._batch)[some], input_ids[some], positions[some], num_tokens[some], active_context, logit_indices[some],
                trim, observe,
            )  # fmt: skip
            if len(made) == self._batch:
                return made
            logits[some] = made
            return logits
        for slot in np.flatnonzero(num_tokens):
            own, count = slice(slot, slot + 1), int(num_tokens[slot])
            # Without its padding: the shape is that of the sequence's own chunk.
            logits[slot] = self._chunk(
                range(self._batch)[own], input_ids[own, :count], positions[own], num_tokens[own], int(positions[slot]) + count,
                np.minimum(logit_indices[own], count - 1), trim, observe, long=True,
            )[0]  # fmt: skip
        return logits

    def _chunk(
        self,
        slots: range,
        input_ids: IntArray,
        positions: IntArray,
        num_tokens: IntArray,
        active_context: int,
        logit_indices: IntArray,
        trim: bool,
        observe: Observer | None,
        *,
        long: bool = False,
    ) -> FloatArray:
        """Feed a chunk to the sequences of ``slots``; returns logits [slots, L, V]. ``long`` if chunks of several tokens are fed."""
        lane = self._lane(slots, input_ids.shape[1], logit_indices.shape[1], long)
        lane.give(input_ids, positions, num_tokens, active_context, logit_indices)
        owner = STEP
        try:
            for owner, go in lane.runs():
                go(self._trim if trim else None)
                if observe is not None:
                    lane.show(owner, observe)
        except Exception as error:
            raise self._failure(owner, input_ids.shape, error) from error
        return lane.logits()

    def run_call(
        self,
        owner: str,
        input_ids: IntArray,
        positions: IntArray,
        num_tokens: IntArray,
        active_context: int,
        logit_indices: IntArray,
        streams: FloatArray | None,
    ) -> tuple[FloatArray, dict[str, npt.NDArray[Any]]]:
        """Run one call of the chain alone: what :meth:`run` does there, given what the call before it made.

        It is for a batch of one. Only the state of the call's own layer is read and updated. So many chunks can go through one layer before any goes through
        the next, and each weight is read once for all of them.

        Args:
            owner: name of the call: ``embed``, ``layers.0`` and so on, ``head``.
            input_ids, positions, num_tokens, active_context, logit_indices: as of :meth:`run`.
            streams: [B, S, N, C] after the call before it; None for ``embed``.

        Returns:
            Streams [B, S, N, C] after it, or the logits [B, L, V] of ``head``; and copies of outputs that nothing else takes.

        Raises:
            FoldkvError: ONNX Runtime failed; the layer's state may be half updated.
        """
        if self._batch != 1:
            raise ValueError("calls run alone for one sequence only")
        chunk = input_ids.shape[1]
        lane = self._lane(range(1), chunk, logit_indices.shape[1], chunk > 1)
        lane.give(input_ids, positions, num_tokens, active_context, logit_indices)
        try:
            return lane.run_call(owner, streams)
        except Exception as error:
            raise self._failure(owner, input_ids.shape, error) from error

    def _lane(self, slots: range, chunk: int, kept: int, long: bool) -> _Lane:
        if long not in self._lanes:
            sessions = self._model.sessions if long else self._model.decode_sessions
            self._lanes[long] = _Lane(self._model, sessions, self.buffers, long)
        self._lanes[long].bind_state(slots)
        self._lanes[long].fit(len(slots), chunk, kept)
        return self._lanes[long]

    def _failure(self, owner: str, shape: tuple[int, ...], error: Exception) -> FoldkvError:
        return FoldkvError(
            f"ONNX Runtime failed in {owner} on a chunk of {shape[1]} tokens in a batch of {shape[0]} with "
            f"{self._model.bundle.folder}: {first_line(error)}. Reset the session or restore a snapshot; "
            "if memory ran out, use a smaller chunk."
        )

    def forget(self) -> None:
        """See :meth:`foldkv.runtime.backend.Executor.forget`."""
        for lane in self._lanes.values():
            for tensor in lane.tensors():
                tensor.host.fill(0)
                tensor.push()

    def close(self) -> None:
        """Drop the bindings, and free what is on a GPU; closing twice is fine."""
        for lane in self._lanes.values():
            lane.close()
        self._lanes = {}
        self.buffers.close()


class _Lane:
    """The segments of a chain with everything bound: for one token of some slots, or for longer chunks of one."""

    def __init__(self, model: ChainModel, sessions: Mapping[str, Any], buffers: Buffers, long: bool) -> None:
        """Bind the weights of every call."""
        self._model, self._sessions, self._buffers, self._long = model, sessions, buffers, long
        self._slots = range(0)  # of the state that is bound
        self._given: dict[str, Tensor] = {}
        self._logits = model.memory.tensor(np.zeros(0, np.float32))
        self._made: dict[str, Tensor] = {}
        self._shape: tuple[int, int, int] | None = None
        self._step = sessions[STEP].io_binding()
        self._calls: list[tuple[Call, Any]] = []
        self._extra: dict[str, dict[str, int]] = {}
        for call in model.table.calls:
            binding, on_host = sessions[call.segment].io_binding(), model.on_host[call.segment]
            for role, weight in model.weights[call.owner].items():
                weight.bind_input(binding, role, on_host=role in on_host)
            self._calls.append((call, binding))
        read = {name for call in model.table.calls for name in model.on_host[call.segment]}
        #: What the step makes on a GPU and a segment reads in the processor's memory.
        self._read = sorted(read & set(model.outputs[STEP]))

    def bind_state(self, slots: range) -> None:
        """Bind the state of these slots, unless it is bound."""
        if slots == self._slots:
            return
        model = self._model
        for call, binding in self._calls:
            for tensor in model.bundle.state.tensors:
                if tensor.layer == call.layer:
                    rows = model.memory.state(self._buffers, tensor, slots)
                    rows.bind_input(binding, PAST + tensor.group)
                    rows.bind_output(binding, PRESENT + tensor.group)
            if call.owner not in self._extra:
                self._extra[call.owner] = self._bind_extra(binding, call)
        self._slots = slots

    def runs(self) -> Iterator[tuple[str, Callable[[Any], Any]]]:
        """What to call, in order, with options of a run; and the name of each call."""
        yield STEP, self._run_step
        for call, binding in self._calls:
            self._free_extra(binding, call.owner)
            yield call.owner, partial(self._sessions[call.segment].run_with_iobinding, binding)

    def run_call(self, owner: str, streams: FloatArray | None) -> tuple[FloatArray, dict[str, npt.NDArray[Any]]]:
        """See :meth:`ChainExecutor.run_call`."""
        self._run_step(None)
        number, call, binding = self._numbered(owner)
        if streams is not None:
            before = self._made[f"{STREAMS}.{(number + 1) % 2}"]
            before.host[...] = streams
            before.push()
        self._free_extra(binding, owner)
        self._sessions[call.segment].run_with_iobinding(binding, None)
        more = {name: value.copy() for name, value in self._more(owner, binding).items()}
        if not self._gives_streams(call):
            return self.logits().copy(), more
        after = self._made[f"{STREAMS}.{number % 2}"]
        after.pull()
        return after.host.copy(), more

    def _run_step(self, options: Any) -> None:
        self._sessions[STEP].run_with_iobinding(self._step, options)
        for name in self._read:
            self._made[name].pull()

    def logits(self) -> FloatArray:
        """The logits [B, L, V] of the last run, in a buffer that the next run overwrites."""
        self._logits.pull()
        array: FloatArray = self._logits.host
        return array

    def give(
        self,
        input_ids: IntArray,
        positions: IntArray,
        num_tokens: IntArray,
        active_context: int,
        logit_indices: IntArray,
    ) -> None:
        """Write the inputs of a step into their buffers."""
        names = self._model.bundle.io
        for name, value in (
            (names.input_ids, input_ids), (names.positions, positions), (names.num_tokens, num_tokens),
            (names.active_context, active_context), (names.logit_indices, logit_indices),
        ):  # fmt: skip
            self._given[name].host[...] = value
            self._given[name].push()

    def show(self, owner: str, observe: Observer) -> None:
        """Tell an observer what a call gave, if it gave streams."""
        if owner == STEP:
            return
        number, call, binding = self._numbered(owner)
        if not self._gives_streams(call):
            return
        streams = self._made[f"{STREAMS}.{number % 2}"]
        streams.pull()
        observe(Observed(call.layer, self._slots[0] if self._long else None, streams.host, self._more(owner, binding)))

    def _numbered(self, owner: str) -> tuple[int, Call, Any]:
        [found] = [(n, call, binding) for n, (call, binding) in enumerate(self._calls) if call.owner == owner]
        return found

    def _gives_streams(self, call: Call) -> bool:
        return bool({STREAMS, AFTER} & self._model.outputs[call.segment].keys())

    def _more(self, owner: str, binding: Any) -> dict[str, npt.NDArray[Any]]:
        """Outputs of a call that nothing else takes."""
        if not self._extra[owner]:
            return {}
        values = binding.get_outputs()  # in the order in which they were first bound
        return {name: values[at].numpy() for name, at in self._extra[owner].items()}

    def tensors(self) -> Iterator[Tensor]:
        """All buffers but the state's."""
        yield from (*self._given.values(), *self._made.values(), self._logits)

    def close(self) -> None:
        """Free them."""
        for tensor in self.tensors():
            tensor.close()

    def _bind_extra(self, binding: Any, call: Call) -> dict[str, int]:
        """Let ONNX Runtime allocate outputs that nothing takes; returns their numbers among the bound outputs."""
        names = list(self._model.outputs[call.segment])
        state = [name for name in names if name.startswith(PRESENT)]
        extra = [name for name in names if name not in (*state, STREAMS, AFTER, self._model.bundle.io.logits)]
        for name in extra:
            binding.bind_output(name, "cpu")
        return {name: len(state) + number for number, name in enumerate(extra)}

    def _free_extra(self, binding: Any, owner: str) -> None:
        """Let ONNX Runtime allocate such outputs anew: those of the run before may have another shape."""
        for name in self._extra[owner]:
            binding.bind_output(name, "cpu")

    def fit(self, batch: int, chunk: int, kept: int) -> None:
        """Make and bind buffers for chunks of this length and this many logits, unless the shape is the same as before."""
        if self._shape == (batch, chunk, kept):
            return
        model, names, memory = self._model, self._model.bundle.io, self._model.memory
        sizes = {"batch": batch, "chunk": chunk, "kept": kept}
        first = model.outputs[model.table.calls[0].segment][STREAMS]
        self.close()
        self._given = {
            name: memory.tensor(array)
            for name, array in (
                (names.input_ids, np.zeros((batch, chunk), np.int64)), (names.positions, np.zeros(batch, np.int32)),
                (names.num_tokens, np.zeros(batch, np.int32)), (names.active_context, np.zeros(1, np.int64)),
                (names.logit_indices, np.zeros((batch, kept), np.int64)),
            )
        }  # fmt: skip
        self._logits = memory.tensor(np.zeros((batch, kept, model.bundle.model.vocab_size), np.float32))
        self._made = {name: memory.tensor(_buffer(value, sizes)) for name, value in model.outputs[STEP].items()}
        self._made |= {f"{STREAMS}.{half}": memory.tensor(_buffer(first, sizes)) for half in (0, 1)}
        values = self._given | self._made
        for name in model.inputs[STEP]:
            values[name].bind_input(self._step, name, on_host=name in model.on_host[STEP])
        for name in model.outputs[STEP]:
            values[name].bind_output(self._step, name)
        for number, (call, binding) in enumerate(self._calls):
            here, after = values[f"{STREAMS}.{(number + 1) % 2}"], values[f"{STREAMS}.{number % 2}"]
            for name in model.inputs[call.segment]:
                if name == STREAMS:
                    here.bind_input(binding, name)
                elif name in values:
                    values[name].bind_input(binding, name, on_host=name in model.on_host[call.segment])
            for name in model.outputs[call.segment]:
                if name in (STREAMS, AFTER):
                    after.bind_output(binding, name)
                elif name == names.logits:
                    self._logits.bind_output(binding, name)
        self._shape = (batch, chunk, kept)


def _buffer(value: Any, sizes: Mapping[str, int]) -> npt.NDArray[Any]:
    """A buffer for an output whose sizes follow from batch, chunk and number of logits."""
    shape = []
    for size in value.shape:
        if isinstance(size, int):
            shape.append(size)
            continue
        match = _SIZE.fullmatch(str(size))
        if match is None:
            raise ArtifactError(f"the output {value.name!r} of a segment has the size {size!r}. Make the bundle again.")
        base, number = sizes[match[1]], int(match[3] or 0)
        shape.append(base if not match[2] else base + number if match[2] == "+" else base * number)
    return np.zeros(shape, _NUMPY[value.type])
