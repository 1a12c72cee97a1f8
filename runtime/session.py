"""A session: one bundle, its state for a batch of sequences, and decoding on top.

From prompts to tokens: ``generate`` and ``stream`` over ``prefill`` and ``decode``, all of them over
``forward``, which feeds any number of tokens to each slot of the batch at the slot's own position.

A session is for one thread at a time: it has one state. Two calls at once are refused, not queued. Use
a session per thread (the weight file's pages are shared by the system where ONNX Runtime maps them).
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, overload

import numpy as np
import numpy.typing as npt

from foldkv.errors import CapacityError, FoldkvError, InputError
from foldkv.runtime.backend import Executor, FloatArray, IntArray, OnnxRuntimeExecutor
from foldkv.runtime.bundle import ONNXRUNTIME, Bundle, load_bundle, require_backend
from foldkv.runtime.sampling import GREEDY, Sampler, Sampling
from foldkv.runtime.state import Buffers, StateBuffers

Logits = Literal["last", "all"]


@dataclass(frozen=True)
class Snapshot:
    """A copy of a session's state, for :meth:`Session.restore`; independent of what the session does next.

    Only rows in use are copied, so that its size follows the tokens held, not the context planned.
    """

    digest: str
    context: int
    positions: tuple[int, ...]
    rows: tuple[npt.NDArray[Any], ...]

    @property
    def bytes(self) -> int:
        """Bytes of the copied rows."""
        return sum(rows.nbytes for rows in self.rows)


class Session:
    """Decoding with a bundle. A context manager; ``close`` frees the model.

    Attributes:
        bundle: the checked bundle.
        context: tokens that each sequence can hold.
        batch: sequences (slots) decoded together.
        chunk: tokens of a sequence that go through the model at once, at most.
        vocab_size: size of the logits.
    """

    def __init__(
        self,
        bundle: Path,
        *,
        context: int | None = None,
        batch: int = 1,
        threads: int | None = None,
        chunk: int = 256,
        spin: bool = True,
    ) -> None:
        """Check the bundle (sha256 of every file), allocate the state, load the model.

        Args:
            bundle: the folder of one target, as ``foldkv build`` wrote it.
            context: tokens to plan for, at most the model's ``max_position_embeddings`` and what an engine was built
                for, which is the default.
            batch: number of sequences.
            threads: of one operator; the default is the processors this process may use.
            chunk: a larger one makes prefill faster and needs more memory while it runs.
            spin: let ONNX Runtime's idle threads wait actively: faster on an idle machine, slow where other work needs it.

        Raises:
            ArtifactError: the bundle is damaged, incomplete, changed or of another version.
            InputError: an argument is out of range, or the state does not fit into memory.
            MissingDependencyError: a package or a device that the bundle's backend needs is not here.
        """
        for name, value in (("context", context), ("batch", batch), ("threads", threads), ("chunk", chunk)):
            if not (value is None and name in ("context", "threads")) and (type(value) is not int or value < 1):
                raise InputError(f"{name} must be an integer of 1 or more, got {value!r}.")
        self.bundle: Bundle = load_bundle(Path(bundle))
        require_backend(self.bundle)
        longest = self.bundle.model.max_position_embeddings
        if context is not None and context > longest:
            raise InputError(f"context is {context}; the model in {bundle} takes {longest} tokens at most.")
        self.context: int = min(longest, self.bundle.largest("context") or longest) if context is None else context
        self.batch: int = batch
        self.chunk: int = min(chunk, self.context, self.bundle.largest("chunk") or chunk)
        self.vocab_size: int = self.bundle.model.vocab_size
        self._buffers, executor = _open(self.bundle, self.context, batch, threads, spin)
        self._executor: Executor | None = executor
        self._positions: IntArray = np.zeros(batch, np.int64)
        self._written: IntArray = np.zeros(batch, np.int64)  # longest each slot has been since it was cleared
        self._lock = threading.Lock()
        self._torn = False  # a run failed half way: the state is neither before nor after it
        self._steps = 0  # changes of the state, so that a stream notices those that are not its own

    # The session as a resource

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Free the model; the session cannot be used any more. Closing twice is fine."""
        if self._executor is not None:
            self._executor.close()
            self._executor = None

    @property
    def positions(self) -> IntArray:
        """Tokens that each slot holds: int64 [batch], a copy."""
        return self._positions.copy()

    @property
    def state_bytes(self) -> int:
        """Bytes of the state buffers: the sum of :func:`foldkv.runtime.state.plan_bytes`, and again what an engine's function
        bodies write, which takes a second buffer."""
        return self._buffers.bytes

    # Feeding tokens

    def forward(self, chunks: Sequence[Sequence[int]], *, logits: Logits = "last") -> list[FloatArray]:
        """Feed tokens to each slot at its position: any number per slot, also none.

        Args:
            chunks: token ids, one sequence per slot; an empty one leaves its slot untouched.
            logits: those after each slot's last token, or after every token.

        Returns:
            Per slot float32 [n, V] for "all"; [1, V] for "last", or [0, V] if the slot got no token.

        Raises:
            CapacityError: a slot would exceed the context. No slot was changed.
            InputError: a wrong number of chunks or a token that the vocabulary lacks. No slot was changed.
            FoldkvError: the backend failed; ``reset`` or ``restore`` before going on.
        """
        if logits not in ("last", "all"):
            raise InputError(f"logits must be 'last' or 'all', got {logits!r}.")
        tokens = self._checked(chunks)
        self._check_capacity([len(chunk) for chunk in tokens])
        with self._exclusive() as executor:
            return self._feed(executor, tokens, logits)

    @overload
    def prefill(self, prompts: Sequence[Sequence[int]], *, logits: Literal["last"] = "last") -> FloatArray: ...
    @overload
    def prefill(self, prompts: Sequence[Sequence[int]], *, logits: Literal["all"]) -> list[FloatArray]: ...
    def prefill(self, prompts: Sequence[Sequence[int]], *, logits: Logits = "last") -> FloatArray | list[FloatArray]:
        """Feed a prompt of at least one token to every slot, after what the slot holds.

        Returns:
            float32 [batch, V] after the last token of each prompt ("last"), or a list of [n, V] ("all").

        Raises:
            As :meth:`forward`; InputError also for an empty prompt.
        """
        self._refuse_empty(prompts)
        after = self.forward(prompts, logits=logits)
        return after if logits == "all" else np.concatenate(after)

    def decode(self, tokens: Sequence[int]) -> FloatArray:
        """Feed one token to every slot; returns the logits after it, float32 [batch, V].

        Raises:
            As :meth:`forward`.
        """
        return np.concatenate(self.forward([[token] for token in tokens]))

    # Generation

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        sampling: Sampling = GREEDY,
        stop_tokens: Collection[int] | None = None,
        requests: Sequence[int] | None = None,
        resume: bool = False,
    ) -> list[list[int]]:
        """The new tokens of each prompt; arguments and errors are those of :meth:`stream`."""
        new: list[list[int]] = [[] for _ in prompts]
        for slot, token in self.stream(
            prompts,
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            stop_tokens=stop_tokens,
            requests=requests,
            resume=resume,
        ):
            new[slot].append(token)
        return new

    def stream(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        sampling: Sampling = GREEDY,
        stop_tokens: Collection[int] | None = None,
        requests: Sequence[int] | None = None,
        resume: bool = False,
    ) -> Iterator[tuple[int, int]]:
        """Generate, giving each token out as ``(slot, token)`` as soon as it is chosen.

        Prompt ``i`` goes to slot ``i``; slots beyond the prompts stay unused. A slot that is finished costs
        no state. The last token of a slot is given out but not fed: its position is prompt + new - 1.

        Args:
            prompts: at most ``batch`` of them, each of at least one token id.
            max_new_tokens: the most for each prompt, at least 1.
            sampling: how tokens are chosen.
            stop_tokens: a slot ends before it would give one of them out. None takes the end-of-sequence
                tokens of the model, an empty collection never stops.
            requests: a number per prompt that separates the random draws; the default is 0, 1, ... A
                prompt with the same number and seed draws the same tokens in any slot and any batch.
            resume: go on after what the slots hold, instead of clearing the session first.

        Raises:
            CapacityError: a prompt and ``max_new_tokens`` do not fit into the context. Nothing was changed.
            InputError: an argument is wrong, nothing was changed; or, while iterating, the session was
                used for something else in between.
        """
        if type(max_new_tokens) is not int or max_new_tokens < 1:
            raise InputError(f"max_new_tokens must be an integer of 1 or more, got {max_new_tokens!r}.")
        if not 1 <= len(prompts) <= self.batch:
            raise InputError(f"got {len(prompts)} prompts; this session takes 1 to {self.batch} (its batch).")
        self._refuse_empty(prompts)
        numbers = list(range(len(prompts))) if requests is None else list(requests)
        if len(numbers) != len(prompts) or not all(type(number) is int and number >= 0 for number in numbers):
            raise InputError(
                f"requests must be {len(prompts)} integers of 0 or more, one per prompt, got {requests!r}."
            )
        tokens = self._checked([*prompts, *[()] * (self.batch - len(prompts))])
        ahead = [len(chunk) + max_new_tokens - 1 if len(chunk) else 0 for chunk in tokens]
        self._check_capacity(ahead, self._positions if resume else np.zeros_like(self._positions))
        stops = frozenset(self.bundle.model.eos_token_ids if stop_tokens is None else stop_tokens)
        samplers = [Sampler(sampling, number) for number in numbers]
        return self._stream(tokens, max_new_tokens, samplers, stops, resume)

    def _stream(
        self, tokens: list[IntArray], most: int, samplers: list[Sampler], stops: frozenset[int], resume: bool
    ) -> Iterator[tuple[int, int]]:
        if not resume:
            self.reset()
        active = list(range(len(samplers)))
        for _ in range(most):
            rows = self.forward(tokens)  # type: ignore[arg-type]  # arrays are sequences of ints to it
            own = self._steps
            chosen = {slot: samplers[slot](rows[slot][0]) for slot in active}
            active = [slot for slot in active if chosen[slot] not in stops]
            if not active:
                return
            for slot in active:
                yield slot, chosen[slot]
                if self._steps != own:
                    raise InputError(
                        "the session was used while a stream was open, so that the stream cannot go on. "
                        "Finish or drop the stream first, or use a session of its own."
                    )
            tokens = [np.array([chosen[slot]] if slot in active else [], np.int64) for slot in range(self.batch)]

    # The state as a value

    def snapshot(self) -> Snapshot:
        """A copy of the state as it is now."""
        with self._exclusive():
            rows = self._buffers.copy_used(self._positions.tolist())
            return Snapshot(self.bundle.digest, self.context, tuple(self._positions.tolist()), rows)

    def restore(self, snapshot: Snapshot) -> None:
        """Go back to a snapshot of this session, or of one with the same bundle, context and batch.

        The same steps then give the same bits.

        Raises:
            InputError: the snapshot is of another bundle, context or batch. Nothing was changed.
        """
        for name, found, wanted in (
            ("bundle", snapshot.digest[:16], self.bundle.digest[:16]),
            ("context", snapshot.context, self.context),
            ("batch", len(snapshot.positions), self.batch),
        ):
            if found != wanted:
                raise InputError(
                    f"the snapshot has {name} {found}; this session has {wanted}. Restore it in a like session."
                )
        with self._exclusive(mend=True):
            self._buffers.put_used(snapshot.rows)
            self._positions[:] = snapshot.positions
            np.maximum(self._written, self._positions, out=self._written)
            self._torn = False
            self._steps += 1

    def reset(self, slots: Collection[int] | None = None) -> None:
        """Empty all slots, or those given: their buffers are as in a new session, nothing of the old text stays.

        Raises:
            InputError: a slot number out of range; or only some slots while a failed run has damaged the state.
        """
        wanted = range(self.batch) if slots is None else sorted(set(slots))
        if not all(slot in range(self.batch) for slot in wanted):
            raise InputError(f"slots must be among 0 to {self.batch - 1}, got {list(wanted)}.")
        with self._exclusive(mend=len(wanted) == self.batch):
            for slot in wanted:
                self._buffers.clear(slot, int(self._written[slot]))
                self._positions[slot] = self._written[slot] = 0
            self._torn = False
            self._steps += 1

    # Checks, all of them before the state is touched

    def _checked(self, chunks: Sequence[Sequence[int]]) -> list[IntArray]:
        if len(chunks) != self.batch:
            raise InputError(f"got tokens for {len(chunks)} slots; this session has {self.batch} (its batch).")
        return [self._token_ids(slot, chunk) for slot, chunk in enumerate(chunks)]

    def _token_ids(self, slot: int, chunk: Sequence[int]) -> IntArray:
        try:
            ids = np.asarray(chunk)
        except (ValueError, OverflowError):  # ragged or too large for any integer type
            ids = np.asarray(None)
        if ids.ndim == 1 and ids.size == 0:
            return np.zeros(0, np.int64)
        if ids.ndim != 1 or ids.dtype.kind not in "iu":
            raise InputError(f"slot {slot}: expected a sequence of integer token ids, got {_short(chunk)}.")
        wrong = np.flatnonzero((ids < 0) | (ids >= self.vocab_size))
        if wrong.size:
            where = int(wrong[0])
            raise InputError(
                f"slot {slot}: token {where} has the id {ids[where]}; the vocabulary has the ids 0 to {self.vocab_size - 1}. "
                "Encode the text with the tokenizer of this bundle."
            )
        return ids.astype(np.int64)

    def _refuse_empty(self, prompts: Sequence[Sequence[int]]) -> None:
        for slot, prompt in enumerate(prompts):
            if np.ndim(prompt) == 1 and len(prompt) == 0:
                raise InputError(
                    f"prompt {slot} is empty; give at least one token, such as the beginning-of-sequence token."
                )

    def _check_capacity(self, ahead: Sequence[int], start: IntArray | None = None) -> None:
        held = self._positions if start is None else start
        for slot, count in enumerate(ahead):
            if held[slot] + count > self.context:
                raise CapacityError(
                    f"slot {slot} holds {held[slot]} tokens and {count} more were asked for: {held[slot] + count} exceed the "
                    f"context of {self.context}. Nothing was changed. Open the session with a larger context or ask for less."
                )

    @contextlib.contextmanager
    def _exclusive(self, *, mend: bool = False) -> Iterator[Executor]:
        """The executor, while no other call may use the session; ``mend`` also while the state is damaged."""
        if not self._lock.acquire(blocking=False):
            raise InputError("the session is in use by another thread; a session is for one thread at a time.")
        try:
            if self._executor is None:
                raise InputError("the session is closed. Open a new one.")
            if self._torn and not mend:
                raise FoldkvError(
                    "the last run failed and left the state damaged. Reset the session or restore a snapshot."
                )
            yield self._executor
        finally:
            self._lock.release()

    # The one loop through the model

    def _feed(self, executor: Executor, tokens: list[IntArray], logits: Logits) -> list[FloatArray]:
        lengths = np.array([len(chunk) for chunk in tokens])
        keep = lengths if logits == "all" else np.minimum(lengths, 1)
        results: list[FloatArray] = [np.empty((kept, self.vocab_size), np.float32) for kept in keep]
        longest = int(lengths.max())
        for start in range(0, longest, self.chunk):
            length = min(self.chunk, longest - start)
            num_tokens = np.clip(lengths - start, 0, length)
            input_ids = np.zeros((self.batch, length), np.int64)
            for slot, count in enumerate(num_tokens):
                input_ids[slot, :count] = tokens[slot][start : start + count]
            if logits == "all":
                indices = np.broadcast_to(np.arange(length), (self.batch, length))
            else:
                indices = np.maximum(num_tokens - 1, 0)[:, None]
            after = self._positions + num_tokens
            self._torn = True
            chunk_logits = executor.run(
                input_ids, self._positions, num_tokens, int(after.max()), indices,
                # The memory of a long chunk's activations is of no use to the decode steps that follow.
                trim=length > 1 and start + length == longest,
            )  # fmt: skip
            self._positions[:] = after
            np.maximum(self._written, after, out=self._written)
            self._steps += 1
            self._torn = False
            for slot, count in enumerate(num_tokens):
                if logits == "all":
                    results[slot][start : start + count] = chunk_logits[slot, :count]
                elif count and start + count == lengths[slot]:
                    results[slot][0] = chunk_logits[slot, 0]
        return results


def _open(bundle: Bundle, context: int, batch: int, threads: int | None, spin: bool) -> tuple[Buffers, Executor]:
    """The state and the executor of a bundle's backend."""
    if bundle.backend == ONNXRUNTIME:
        buffers = StateBuffers(bundle.state, context, batch)
        return buffers, OnnxRuntimeExecutor(bundle, buffers, batch=batch, threads=threads, spin=spin)
    from foldkv.runtime.engine import EngineExecutor

    engine = EngineExecutor(bundle, context=context, batch=batch)
    return engine.buffers, engine


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
