"""A session: one model, its state for a batch of sequences, and decoding on top.

From prompts to tokens: ``generate`` and ``stream`` build on ``prefill`` and ``decode``, and all of them on
``forward``, which feeds any number of tokens to each slot of the batch at the slot's own position. Text is a separate
layer above this one: :mod:`foldkv.runtime.text`.

The last token that a stream gave out is part of its slot's sequence, although it has not been fed yet: whatever is fed to
the slot next comes after it. So a conversation that is fed turn by turn equals the same conversation fed at once.

A session has one state, so only one thread at a time can use it. A second call at the same time is refused, not queued.
Use one session per thread; sessions of one :class:`~foldkv.runtime.Model` share its segments and weights.
"""

from __future__ import annotations

import contextlib
import operator
import threading
from collections.abc import Collection, Generator, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, overload

import numpy as np
import numpy.typing as npt

from ..errors import ArtifactError, CapacityError, FoldkvError, InputError, listing, short
from ..progress import Say, silent
from .backend import Executor, FloatArray, IntArray, Observer
from .bundle import Bundle, StateMeaning
from .model import Model
from .sampling import GREEDY, Sampler, Sampling
from .snapshots import SlotSnapshot, Snapshot
from .wide import AUTO

Logits = Literal["last", "all"]
#: Why a sequence ended: a stop token or stop string, or the number of tokens that was asked for.
FinishReason = Literal["stop", "length"]


class Session:
    """Decoding with a bundle. A context manager; ``close`` frees the model.

    Attributes:
        model: the open model.
        bundle: its bundle, checked.
        context: tokens that each sequence can hold.
        batch: sequences (slots) decoded together.
        chunk: tokens of a sequence that go through the model at once, at most.
        vocab_size: size of the logits.
    """

    def __init__(
        self,
        model: Model | Path,
        *,
        context: int | None = None,
        batch: int = 1,
        threads: int | None = None,
        chunk: int = 256,
        weights_from: Path | None = None,
        devices: Sequence[int] | None = None,
        verify: bool = False,
        place: bool = True,
        matrices: str = AUTO,
        signature: Path | None = None,
        public_key: Path | None = None,
        progress: Say = silent,
    ) -> None:
        """Open the model unless it is given open, and allocate the state.

        Args:
            model: an open model, which can be shared, or the folder of one target, as ``foldkv build`` wrote it.
            context: tokens to plan for, at most the model's ``max_position_embeddings`` and what an engine was built
                for; this maximum is the default.
            batch: number of sequences.
            threads: for a folder: the most threads per operator; see :class:`~foldkv.runtime.Model`.
            chunk: a larger one makes prefill faster and needs more memory while it runs.
            weights_from: for a folder: where the checkpoint's weight files are.
            devices: for a folder of engines: numbers of the GPUs that share the layers.
            verify: for a folder: compare the sha256 of the weight files; see :class:`~foldkv.runtime.Model`.
            place: for a folder: read experts in the order that suits ONNX Runtime; see :class:`~foldkv.runtime.Model`.
            matrices: for a folder: how to read the matrices of a large model; see :class:`~foldkv.runtime.Model`.
            signature, public_key: for a folder: evidence that must vouch for the bundle, and the key; see :class:`~foldkv.runtime.Model`.
            progress: for a folder: called while weights are copied to GPUs or experts to the disk.

        Raises:
            ArtifactError: the bundle is damaged, incomplete, changed or of another version.
            InputError: an argument is out of range, weights are missing, or the state does not fit into memory.
            MissingDependencyError: a package or a device that the bundle's backend needs is missing.
        """
        for name, value in (("context", context), ("batch", batch), ("threads", threads), ("chunk", chunk)):
            if not (value is None and name in ("context", "threads")) and (type(value) is not int or value < 1):
                raise InputError(f"{name} must be an integer of 1 or more, got {value!r}.")
        self._own = None if isinstance(model, Model) else Model(
            model, threads=threads, weights_from=weights_from, devices=devices, context=context, batch=batch, verify=verify, place=place,
            matrices=matrices, signature=signature, public_key=public_key, progress=progress,
        )  # fmt: skip
        opened = model if isinstance(model, Model) else self._own
        assert opened is not None
        if self._own is None and (
            verify
            or not place
            or matrices != AUTO
            or any(one is not None for one in (threads, weights_from, devices, signature, public_key))
        ):
            raise InputError(
                "threads, weights_from, devices, verify, place, matrices, signature and public_key belong to the model, which is open already. Give them to Model."
            )
        self.model: Model = opened
        self.bundle: Bundle = opened.bundle
        self._executor: Executor | None = None
        try:
            self._open(opened, context, batch, chunk)
        except BaseException:
            self.close()
            raise
        self._positions: IntArray = np.zeros(batch, np.int64)
        self._pending: list[int | None] = [None] * batch
        self._written: IntArray = np.zeros(batch, np.int64)  # longest each slot has been since it was cleared
        self._lock = threading.Lock()
        self._torn = False  # a run failed half way: the state is neither before nor after it
        self._steps = 0  # changes of the state, so that a stream notices changes by others
        self._observer: Observer | None = None

    def _open(self, opened: Model, context: int | None, batch: int, chunk: int) -> None:
        """Check the sizes and allocate the state."""
        longest = self.bundle.model.max_position_embeddings
        if context is not None and context > longest:
            raise InputError(f"context is {context}; the model in {self.bundle.folder} takes at most {longest} tokens.")
        self.context: int = min(longest, self.bundle.largest("context") or longest) if context is None else context
        self.batch: int = batch
        self.chunk: int = min(chunk, self.context, self.bundle.largest("chunk") or chunk)
        self.vocab_size: int = self.bundle.model.vocab_size
        self._buffers, self._executor = opened.open(self.context, batch)
        if changes := opened.changes():
            raise ArtifactError(
                listing(f"{self.bundle.folder} was changed while it was opened", changes, "Open it again.")
            )

    # The session as a resource

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Free the model; the session cannot be used any more. Closing twice is fine."""
        executor, self._executor = self._executor, None
        try:
            if executor is not None:
                executor.close()
        finally:
            if self._own is not None:
                self._own.close()

    def not_ready(self) -> tuple[str, ...]:
        """Why this session should get no more work; empty if it is ready. Takes microseconds, so that a probe can ask often.

        The session is closed, a run failed half way, or files of the bundle were written again, replaced or removed. Weights
        are mapped from their files, so a file that is written again changes the answers of an open session. A bundle that was
        replaced as a whole, as ``foldkv build`` does it, leaves them as they were; open the new one when it suits you.
        """
        reasons: tuple[str, ...] = ("the session is closed",) if self._executor is None else ()
        if self._torn and not self._lock.locked():  # a run that is on its way may still end well
            reasons += ("a run failed half way; reset the session or restore a snapshot",)
        return reasons + self.model.changes()

    def ready(self) -> bool:
        """Whether the session can be used and the files under it are those that were opened: :meth:`not_ready` is empty."""
        return not self.not_ready()

    @property
    def positions(self) -> IntArray:
        """Tokens in the caches of each slot: int64 [batch], a copy."""
        return self._positions.copy()

    @property
    def pending(self) -> tuple[int | None, ...]:
        """Per slot, the last token that a stream gave out, if it is not in the caches yet. It is fed before what comes next."""
        return tuple(self._pending)

    @property
    def state_bytes(self) -> int:
        """Bytes of the state buffers: the sum of :func:`foldkv.runtime.buffers.plan_bytes`, plus second buffers for what an
        engine's function bodies write."""
        return self._buffers.bytes

    # Feeding tokens

    def forward(self, chunks: Sequence[Sequence[int]], *, logits: Logits = "last") -> list[FloatArray]:
        """Feed tokens to each slot after what it holds: any number per slot, also none.

        Args:
            chunks: token ids, one sequence per slot; an empty one leaves its slot untouched.
            logits: "last" for the logits after each slot's last token, "all" for those after every token.

        Returns:
            Per slot float32: [n, V] for "all", where n is the length of its chunk; [1, V] for "last", or [0, V] if the slot got
            no token.

        Raises:
            CapacityError: a slot would exceed the context. No slot was changed.
            InputError: a wrong number of chunks or a token that the vocabulary lacks. No slot was changed.
            FoldkvError: the backend failed; call ``reset`` or ``restore`` before going on.
        """
        if logits not in ("last", "all"):
            raise InputError(f"logits must be 'last' or 'all', got {logits!r}.")
        tokens = self._checked(chunks)
        return self._after_pending(tokens, [slot for slot, chunk in enumerate(tokens) if len(chunk)], logits)

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
        self._refuse_empty(_sequence("prompts", prompts))
        after = self.forward(prompts, logits=logits)
        return after if logits == "all" else np.concatenate(after)

    def decode(self, tokens: Sequence[int]) -> FloatArray:
        """Feed one token to every slot; returns the logits after it, float32 [batch, V].

        Raises:
            As :meth:`forward`.
        """
        return np.concatenate(self.forward([[token] for token in _sequence("tokens", tokens)]))

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
        """The new tokens of each prompt. Arguments and errors are as in :meth:`stream`."""
        stream = self.stream(
            prompts,
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            stop_tokens=stop_tokens,
            requests=requests,
            resume=resume,
        )
        new: list[list[int]] = [[] for _ in prompts]
        for slot, token in stream:
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
    ) -> TokenStream:
        """Generate tokens and give each one out as ``(slot, token)`` as soon as it is chosen.

        Prompt ``i`` goes to slot ``i``; slots beyond the prompts stay unused. A slot that has ended is not computed any more.
        Nothing is changed before the first token is asked for.

        Args:
            prompts: at most ``batch`` of them, each of at least one token id.
            max_new_tokens: the most new tokens for each prompt, at least 1.
            sampling: how tokens are chosen.
            stop_tokens: a slot ends before it gives one of them out. None means the model's end-of-sequence
                tokens; an empty collection never stops.
            requests: a number per prompt that separates the random draws; the default is 0, 1, ... A
                prompt with the same number and seed draws the same tokens in any slot and any batch.
            resume: continue after what the slots hold, instead of clearing the session first. A slot holds what was fed
                to it and every token that it gave out, including the last one. It does not hold a stop token, which was
                not given out. With ``resume`` a prompt may be empty, to continue where a stream ended at its length.

        Raises:
            CapacityError: a prompt and ``max_new_tokens`` do not fit into the context. Nothing was changed.
            InputError: an argument is wrong, nothing was changed; or, while iterating, the session was
                used for something else in between.
        """
        if type(max_new_tokens) is not int or max_new_tokens < 1:
            raise InputError(f"max_new_tokens must be an integer of 1 or more, got {max_new_tokens!r}.")
        if type(resume) is not bool:
            raise InputError(f"resume must be True or False, got {resume!r}.")
        if not isinstance(sampling, Sampling):
            raise InputError(f"sampling must be a Sampling, such as Sampling(temperature=0.7), got {short(sampling)}.")
        given = _sequence("prompts", prompts)
        if not 1 <= len(given) <= self.batch:
            raise InputError(f"got {len(given)} prompts; this session takes 1 to {self.batch} (its batch).")
        pending = self._pending if resume else [None] * self.batch
        self._refuse_empty(given, pending)
        numbers = self._requests(requests, len(given))
        stops = self._stops(stop_tokens)
        tokens = self._checked([*given, *[()] * (self.batch - len(given))])
        active = range(len(given))
        ahead = [len(tokens[slot]) + (pending[slot] is not None) + max_new_tokens - 1 for slot in active]
        self._check_capacity(ahead, self._positions if resume else np.zeros_like(self._positions))
        samplers = [Sampler(sampling, number) for number in numbers]
        return TokenStream(self, tokens, max_new_tokens, samplers, stops, resume)

    # What is inside, for tools

    @contextlib.contextmanager
    def observed(self, observer: Observer) -> Iterator[None]:
        """Let ``observer`` see the streams after the embedding and after every layer, of every chunk that is fed meanwhile.

        Each chunk then waits for it after every call. Results are those of a session that nobody observes.
        """
        before, self._observer = self._observer, observer
        try:
            yield
        finally:
            self._observer = before

    def state_rows(self, slot: int = 0) -> dict[str, npt.NDArray[Any]]:
        """Copies of the rows of a slot that are in use, as they are stored: by state tensor (``3.entries``) [used, width]."""
        with self._exclusive():
            rows = self._buffers.copy_slot(slot, int(self._positions[slot]))
        return {tensor.name: copy for tensor, copy in zip(self.bundle.state.tensors, rows, strict=True)}

    # The state as a value

    def snapshot(self) -> Snapshot:
        """A copy of the current state, including tokens that were given out but not fed."""
        with self._exclusive():
            held = tuple(self._positions.tolist())
            rows = tuple(self._buffers.copy_slot(slot, tokens) for slot, tokens in enumerate(held))
            return Snapshot(self.bundle.meaning, self.context, held, self.pending, rows)

    def restore(self, snapshot: Snapshot) -> None:
        """Go back to a snapshot of this session, or of one with the same context, batch and meaning of rows.

        The same steps then give the same bits in a session of the same bundle. Bundles for other machines of the same graph take
        the same rows if their layout and types are the same; they compute in their own precision.

        Raises:
            InputError: the snapshot is of other weights, another profile, layout, context or batch. Nothing was changed.
        """
        if not isinstance(snapshot, Snapshot):
            raise InputError(f"expected what snapshot() returned, got {short(snapshot)}.")
        self._check_same(
            snapshot.meaning,
            ("context", snapshot.context, self.context),
            ("batch", len(snapshot.positions), self.batch),
        )
        with self._exclusive(mend=True):
            np.maximum(self._written, snapshot.positions, out=self._written)
            self._torn = True
            for slot, rows in enumerate(snapshot.rows):
                self._buffers.put_slot(slot, rows)
            self._positions[:] = snapshot.positions
            self._pending = list(snapshot.pending)
            self._torn = False
            self._steps += 1

    def snapshot_slot(self, slot: int) -> SlotSnapshot:
        """A copy of one slot's state, for :meth:`restore_slot` of any slot of any session of the same meaning of rows.

        Raises:
            InputError: a slot number out of range.
        """
        [slot] = self._slot_numbers([slot])
        with self._exclusive():
            held = int(self._positions[slot])
            return SlotSnapshot(self.bundle.meaning, held, self._pending[slot], self._buffers.copy_slot(slot, held))

    def restore_slot(self, slot: int, snapshot: SlotSnapshot) -> None:
        """Let a slot go on from a snapshot, of itself earlier (to rewind), of another one (to fork), or of another session.

        The other slots are not touched. The same steps then give the same bits as after the snapshot, in a session of the same bundle.

        Raises:
            CapacityError: it holds more tokens than this session's context. Nothing was changed.
            InputError: it is of other weights, another profile or layout; or a slot number out of range. Nothing was changed.
        """
        if not isinstance(snapshot, SlotSnapshot):
            raise InputError(f"expected what snapshot_slot() returned, got {short(snapshot)}.")
        [slot] = self._slot_numbers([slot])
        self._check_same(snapshot.meaning)
        if snapshot.position > self.context:
            raise CapacityError(
                f"the snapshot holds {snapshot.position} tokens, which exceeds the context of {self.context}. Nothing was changed. "
                "Open the session with a larger context."
            )
        with self._exclusive():
            before, self._torn = int(self._written[slot]), True
            self._buffers.clear(slot, before)  # no text of the one before stays behind the rows
            self._buffers.put_slot(slot, snapshot.rows)
            self._positions[slot] = self._written[slot] = snapshot.position
            self._pending[slot] = snapshot.pending
            self._torn = False
            self._steps += 1

    def reset(self, slots: Collection[int] | None = None) -> None:
        """Empty all slots, or those given. Their buffers become as in a new session; no old text stays.

        Raises:
            InputError: a slot number out of range; or only some slots while a failed run has damaged the state.
        """
        wanted = list(range(self.batch)) if slots is None else self._slot_numbers(slots)
        with self._exclusive(mend=len(set(wanted)) == self.batch) as executor:
            for slot in wanted:
                self._buffers.clear(slot, int(self._written[slot]))
                self._positions[slot] = self._written[slot] = 0
                self._pending[slot] = None
            executor.forget()
            self._torn = False
            self._steps += 1

    # Checks, all of them before the state is touched

    def _slot_numbers(self, slots: Collection[int]) -> list[int]:
        wanted = _sequence("slots", slots)
        if not all(type(slot) is int and 0 <= slot < self.batch for slot in wanted):
            raise InputError(f"slots must be numbers from 0 to {self.batch - 1}, got {short(slots)}.")
        return wanted

    def _check_same(self, meaning: StateMeaning, *more: tuple[str, int, int]) -> None:
        """Refuse a snapshot whose rows mean something else; ``more`` are other names, its values and ours."""
        theirs, ours = vars(meaning), vars(self.bundle.meaning)
        for name, found, wanted in (*((name, theirs[name], ours[name]) for name in ours), *more):
            if found != wanted:
                raise InputError(
                    f"the snapshot has {name} {found}; this session has {wanted}. Restore it in a matching session."
                )

    def _checked(self, chunks: Sequence[Sequence[int]]) -> list[IntArray]:
        if len(_sequence("chunks", chunks)) != self.batch:
            raise InputError(f"got tokens for {len(chunks)} slots; this session has {self.batch} (its batch).")
        return [self._token_ids(slot, chunk) for slot, chunk in enumerate(chunks)]

    def _token_ids(self, slot: int, chunk: Sequence[int]) -> IntArray:
        try:
            ids = np.asarray(chunk)
        except (ValueError, OverflowError):  # ragged or too large for any integer type
            ids = np.asarray(None)
        if ids.ndim == 1 and ids.size == 0:
            return np.zeros(0, np.int64)
        # numpy reads True among integers as 1.
        truths = not isinstance(chunk, np.ndarray) and bool in set(map(type, chunk)) if ids.ndim else False
        if ids.ndim != 1 or ids.dtype.kind not in "iu" or truths:
            raise InputError(f"slot {slot}: expected a sequence of integer token ids, got {short(chunk)}.")
        wrong = np.flatnonzero((ids < 0) | (ids >= self.vocab_size))
        if wrong.size:
            where = int(wrong[0])
            raise InputError(
                f"slot {slot}: token {where} has the id {ids[where]}; the vocabulary has the ids 0 to {self.vocab_size - 1}. "
                "Encode the text with the tokenizer of this bundle."
            )
        return ids.astype(np.int64)

    def _stops(self, stop_tokens: Collection[int] | None) -> frozenset[int]:
        if stop_tokens is None:
            return frozenset(self.bundle.model.eos_token_ids)
        given = _sequence("stop_tokens", stop_tokens)
        try:
            stops = [-1 if isinstance(token, bool) else operator.index(token) for token in given]
        except TypeError:
            stops = [-1]
        if not all(0 <= token < self.vocab_size for token in stops):
            raise InputError(
                f"stop_tokens must be token ids, 0 to {self.vocab_size - 1}, got {short(stop_tokens)}. "
                "For a text that ends a sequence use `stop` of foldkv.runtime.generate_text."
            )
        return frozenset(stops)

    def _requests(self, requests: Sequence[int] | None, count: int) -> list[int]:
        numbers = list(range(count)) if requests is None else _sequence("requests", requests)
        if len(numbers) != count or not all(type(number) is int and number >= 0 for number in numbers):
            raise InputError(f"requests must be {count} integers of 0 or more, one per prompt, got {short(requests)}.")
        return numbers

    def _refuse_empty(self, prompts: Sequence[Sequence[int]], pending: Sequence[int | None] | None = None) -> None:
        for slot, prompt in enumerate(prompts):
            if np.ndim(prompt) == 1 and len(prompt) == 0 and (pending is None or pending[slot] is None):
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
        """The executor, for one call at a time; with ``mend`` also while the state is damaged."""
        if not self._lock.acquire(blocking=False):
            raise InputError("the session is in use by another thread; only one thread at a time can use it.")
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

    def _after_pending(self, tokens: list[IntArray], slots: Collection[int], logits: Logits) -> list[FloatArray]:
        """Feed ``slots`` their pending tokens, then their new tokens; returns logits as :meth:`forward`."""
        pending = [self._pending[slot] if slot in slots else None for slot in range(self.batch)]
        fed = [
            chunk if first is None else np.concatenate([np.array([first]), chunk])
            for first, chunk in zip(pending, tokens, strict=True)
        ]
        self._check_capacity([len(chunk) for chunk in fed])
        with self._exclusive() as executor:
            rows = self._feed(executor, fed, logits)
            for slot in slots:
                self._pending[slot] = None
        if logits == "all":
            return [row[int(first is not None) :] for first, row in zip(pending, rows, strict=True)]
        return rows

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
            # Before the run, because a run that fails half way has written some of it.
            np.maximum(self._written, after, out=self._written)
            self._torn = True
            chunk_logits = executor.run(
                input_ids, self._positions, num_tokens, int(after.max()), indices,
                # One kind of layer does not need the memory of another's activations, nor do the decode steps that follow.
                trim=length > 1, observe=self._observer,
            )  # fmt: skip
            self._positions[:] = after
            self._steps += 1
            self._torn = False
            for slot, count in enumerate(num_tokens):
                if not count:
                    continue
                if logits == "all":
                    results[slot][start : start + count] = chunk_logits[slot, :count]
                elif start + count == lengths[slot]:
                    results[slot][0] = chunk_logits[slot, 0]
        return results


class TokenStream(Iterator[tuple[int, int]]):
    """The tokens of :meth:`Session.stream`, each as ``(slot, token)`` as soon as it is chosen.

    Attributes:
        finish_reasons: why each prompt ended: "stop" (a stop token, or a call of :meth:`stop`) or "length"; None while it has
            not ended.
        stop_tokens: the stop token that ended each prompt (it was not given out), or None.
    """

    def __init__(
        self,
        session: Session,
        prompts: list[IntArray],
        most: int,
        samplers: list[Sampler],
        stops: frozenset[int],
        resume: bool,
    ) -> None:
        """Takes checked arguments; :meth:`Session.stream` makes it."""
        self.finish_reasons: list[FinishReason | None] = [None] * len(samplers)
        self.stop_tokens: list[int | None] = [None] * len(samplers)
        self._tokens = self._run(session, prompts, most, samplers, stops, resume)

    def __next__(self) -> tuple[int, int]:
        return next(self._tokens)

    def stop(self, slot: int) -> None:
        """End one slot: it gives out no more tokens. The others go on."""
        if self.finish_reasons[slot] is None:
            self.finish_reasons[slot] = "stop"

    def close(self) -> None:
        """Drop the rest. Each slot holds the tokens that it gave out, and ``resume`` continues after them."""
        self._tokens.close()

    def _run(
        self,
        session: Session,
        prompts: list[IntArray],
        most: int,
        samplers: list[Sampler],
        stops: frozenset[int],
        resume: bool,
    ) -> Generator[tuple[int, int]]:
        if not resume:
            session.reset()
        reasons, nothing = self.finish_reasons, [np.zeros(0, np.int64)] * session.batch
        for count in range(1, most + 1):
            active = [slot for slot, reason in enumerate(reasons) if reason is None]
            rows = session._after_pending(prompts if count == 1 else nothing, active, "last")
            own = session._steps
            chosen = {slot: samplers[slot](rows[slot][0]) for slot in active}
            for slot in active:
                if chosen[slot] in stops:
                    reasons[slot], self.stop_tokens[slot] = "stop", chosen[slot]
            for slot in active:
                if reasons[slot] is not None:
                    continue
                if count == most:
                    reasons[slot] = "length"
                session._pending[slot] = chosen[slot]
                yield slot, chosen[slot]
                if session._steps != own:
                    raise InputError(
                        "the session was used while a stream was open, so the stream cannot continue. "
                        "Finish or close the stream first, or use another session."
                    )
            if None not in reasons:
                return


def _sequence(name: str, value: Any) -> list[Any]:
    """The items of a list, tuple, set or array that a caller gave."""
    if isinstance(value, str | bytes | Mapping) or not isinstance(value, Iterable):
        raise InputError(f"{name} must be a list, got {short(value)}.")
    return list(value)
