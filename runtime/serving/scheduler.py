"""Who runs next: requests join and leave a session's slots between any two steps.

A step is either one token of every sequence that is being answered, or one chunk of one prompt. The two take turns while there are
both, so a long prompt delays the answers of others by one chunk at a time, and prompts take turns with each other. These are the
two shapes that engines are built for.

A prompt is always fed in chunks that begin at multiples of the session's chunk, so the same tokens have the same bits in the caches,
whoever feeds them and whatever else runs.

A kept state that is only on disk is read by other threads, while its request has a slot already: so no more of them are in memory than
there are slots, and nobody else waits for the disk.

Only one thread uses a scheduler.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable

import numpy as np

from ...errors import FoldkvError
from ..backend import FloatArray
from ..session import Session
from .answer import Answer, Group
from .counts import Counts
from .prefix_reads import PrefixReads
from .prefixes import Hit, PrefixIndex

LOG = logging.getLogger("foldkv.serving")


class Scheduler:
    """Answers requests with the slots of a session."""

    def __init__(
        self,
        session: Session,
        prefixes: PrefixIndex | None = None,
        *,
        batch_invariant: bool = False,
        wake: Callable[[], object] = lambda: None,
        hand_over: Callable[[], object] = lambda: None,
    ) -> None:
        """Begin with nothing to do.

        Args:
            session: whose slots are used; nobody else uses it.
            prefixes: states to start from, and where to keep them.
            batch_invariant: compute every sequence's steps alone, so that its bits do not depend on who else runs.
            wake: called by another thread when a kept state was read, so that a step would do something.
            hand_over: called within a step after something was given out: before the model runs, and after it.
        """
        self.counts = Counts()
        self._hand_over = hand_over
        self._session, self._prefixes, self._alone = session, prefixes, batch_invariant
        self._waiting: deque[Answer] = deque()  # first completions of requests, in the order in which they came
        self._forks: deque[Answer] = deque()  # others, whose prompt has been fed
        self._fork_is_next = False
        self._slots: list[Answer | None] = [None] * session.batch
        self._turns: deque[Answer] = deque()  # those whose prompts are fed, in the order of their turns
        self._chunk_is_next = True
        self._reads = None if prefixes is None else PrefixReads(prefixes, wake)

    def close(self) -> None:
        """Wait for what is being read from disk. Closing twice is fine."""
        if self._reads is not None:
            self._reads.close()

    def add(self, group: Group) -> None:
        """Queue a request. Its other completions follow when the prompt has been fed."""
        group.counts = self.counts
        self._waiting.append(group.answers[0])

    @property
    def waiting(self) -> int:
        """Requests that have not begun."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Completions in slots."""
        return sum(answer is not None for answer in self._slots)

    @property
    def held_tokens(self) -> int:
        """Tokens in the caches of all slots."""
        return sum(answer.fed for answer in self._slots if answer is not None)

    @property
    def busy(self) -> bool:
        """Whether a request has not ended."""
        return bool(self._waiting or self._forks) or self.running > 0

    @property
    def idle(self) -> bool:
        """Whether a step would do nothing, unless somebody leaves: all that go on wait for kept states that are being read."""
        there = [answer for answer in self._slots if answer is not None]
        free = len(there) < len(self._slots) and (self._waiting or self._forks)
        return self._reads is not None and not free and all(self._reads.waits(answer) for answer in there)

    def step(self) -> None:
        """Do what comes next: nothing, one token of all, or a chunk of one."""
        started = time.perf_counter()
        try:
            self._end_unwanted()
            self._take_read()
            self._admit()
            self._hand_over()
            running = [answer for answer in self._slots if answer is not None and not answer.feeding]
            if self._turns and (self._chunk_is_next or not running):
                self._chunk_is_next = False
                self._feed(self._turns[0])
            elif running:
                self._chunk_is_next = True
                self._decode(running)
            self._leave()
            self._hand_over()
        finally:
            self.counts.seconds += time.perf_counter() - started

    def fail_all(self, error: BaseException) -> None:
        """End everything with an error, and empty the slots."""
        for answer in self._everyone():
            answer.group.fail(error)
        self._drop_ended()
        self._leave(keep=False)

    def end_all(self) -> None:
        """End everything as cancelled."""
        for answer in self._everyone():
            answer.group.cancelled = True
        self._end_unwanted()
        self._leave(keep=False)

    # Who is there

    def _everyone(self) -> list[Answer]:
        return [answer for answer in (*self._slots, *self._waiting, *self._forks) if answer is not None]

    def _end_unwanted(self) -> None:
        now = time.monotonic()
        for answer in self._everyone():
            if reason := answer.group.unwanted(now):
                for one in answer.group.answers:
                    one.end(reason)
        self._drop_ended()
        self._leave()

    def _drop_ended(self) -> None:
        """Take those that have ended out of the queues."""
        for queue in (self._waiting, self._forks):
            for answer in [one for one in queue if one.ended]:
                queue.remove(answer)
                self._note_end(answer)

    def _admit(self) -> None:
        """Fill free slots. Requests and further completions of others take turns, so that nobody waits for all of a large request."""
        while (self._waiting or self._forks) and None in self._slots:
            fork = bool(self._forks) and (self._fork_is_next or not self._waiting)
            queue, self._fork_is_next = (self._forks, False) if fork else (self._waiting, True)
            answer, slot = queue[0], self._slots.index(None)
            self._slots[slot] = answer
            queue.popleft()
            answer.begin(slot)
            if answer.ended:
                self._leave()
                continue
            if answer.fork is not None:
                snapshot, logits = answer.fork
                answer.fork = None
                self._session.restore_slot(slot, snapshot)
                answer.fed = len(answer.prompt)
                answer.take(logits)
            else:
                self._start(answer)
        self._leave()

    def _start(self, answer: Answer) -> None:
        """Begin a prompt, after a kept state if there is one."""
        request, prompt = answer.group.checked.request, answer.prompt
        self.counts.prompt_tokens += len(prompt)
        if self._prefixes is None or self._reads is None or not request.use_prefixes:
            self._turns.append(answer)
            return
        self.counts.looked_up_tokens += len(prompt)
        tokens = np.array(prompt, np.int64)
        if not self._reads.begin(answer, tokens, exact=request.exact):
            self._start_after(answer, self._prefixes.find(tokens, exact=request.exact, read=False))

    def _start_after(self, answer: Answer, hit: Hit | None) -> None:
        """Have the rest of a prompt fed."""
        if hit is not None:
            assert answer.slot is not None
            self._session.restore_slot(answer.slot, hit.snapshot)
            # A state of an engine with other chunks may have been kept under the same name.
            answer.fed, answer.cold = hit.length, hit.exact and hit.length % self._session.chunk == 0
            answer.group.cached = hit.length
            self.counts.cached_tokens += hit.length
        self._turns.append(answer)

    def _take_read(self) -> None:
        """Begin the prompts whose kept states were read."""
        if self._prefixes is None or self._reads is None:
            return
        for answer, fetched in self._reads.done():
            exact = answer.group.checked.request.exact
            self._start_after(answer, self._prefixes.find(answer.prompt, exact=exact, read=False, fetched=fetched))

    def _leave(self, *, keep: bool = True) -> None:
        """Free the slots of completions that have ended."""
        for slot, answer in enumerate(self._slots):
            if answer is None or answer.reason is None:
                continue
            if keep and not answer.feeding and answer.reason in ("stop", "length"):
                self._keep(answer, exact=False)
            self._slots[slot] = answer.slot = None
            if self._reads is not None:
                self._reads.drop(answer)
            if answer in self._turns:
                self._turns.remove(answer)
            self._session.reset([slot])
            self._note_end(answer)

    def _note_end(self, answer: Answer) -> None:
        """Log a request when the last of its completions has ended."""
        group = answer.group
        if not group.ended or group.logged:
            return
        group.logged = True
        now = time.monotonic()
        first = "-" if group.first_token is None else f"{1e3 * (group.first_token - group.arrived):.0f} ms"
        LOG.info(
            "request %s: %d prompt tokens, %d of them kept, %d new in %d completions, first after %s, %.2f s, %s",
            group.id, len(group.checked.prompt), group.cached, sum(one.count for one in group.answers), len(group.answers), first,
            now - group.arrived, ", ".join(sorted({one.reason or "" for one in group.answers})),
        )  # fmt: skip

    # The two kinds of steps

    def _feed(self, answer: Answer) -> None:
        """Feed the next chunk of a prompt."""
        self._turns.rotate(-1)
        size, start, prompt = self._session.chunk, answer.fed, answer.prompt
        end = min((start // size + 1) * size, len(prompt))
        self.counts.chunk_steps += 1
        rows = self._forward({answer: list(prompt[start:end])})
        if rows is None:
            return
        answer.fed = end
        if end == len(prompt):
            self._turns.remove(answer)
            self._keep(answer, exact=answer.cold and end % size == 0)
            logits = rows[answer]
            self._fork(answer, logits)
            answer.take(logits)
        elif end % size == 0 and is_kept(end // size, len(prompt) // size):
            self._keep(answer, exact=answer.cold)

    def _fork(self, answer: Answer, logits: FloatArray) -> None:
        """Let the request's other completions begin after the prompt that this one has fed."""
        others = answer.group.answers[1:]
        if not others or answer.slot is None:
            return
        fork = self._session.snapshot_slot(answer.slot), logits.copy()
        for other in others:
            other.fork, other.cold = fork, answer.cold
            self._forks.append(other)

    def _decode(self, running: list[Answer]) -> None:
        """One token of every sequence."""
        self.counts.decode_steps += 1
        for group in [[answer] for answer in running] if self._alone else [running]:
            if not (fed := {answer: answer.new[-1:] for answer in group if not answer.ended}):
                continue
            rows = self._forward(fed)
            if rows is None:
                return
            for answer in group:
                answer.fed += 1
                if not answer.ended:  # another completion of its request may have failed in this very step
                    answer.take(rows[answer])
            if self._alone:
                self._hand_over()

    def _forward(self, fed: dict[Answer, list[int]]) -> dict[Answer, FloatArray] | None:
        """The logits [V] after the tokens of each; None if the backend failed, which ends whoever was in a slot."""
        chunks: list[list[int]] = [[] for _ in self._slots]
        for answer, tokens in fed.items():
            assert answer.slot is not None
            chunks[answer.slot] = tokens
        started = time.perf_counter()
        try:
            rows = self._session.forward(chunks)
        except FoldkvError as error:
            LOG.error("a step failed; the %d completions in slots end with this error: %s", self.running, error)
            for other in self._slots:
                if other is not None:
                    other.group.fail(error)
                    other.fed = 0  # nothing of it is left that could be kept
            self._session.reset()
            return None
        finally:
            self.counts.model_seconds += time.perf_counter() - started
        return {answer: rows[answer.slot][0] for answer in fed if answer.slot is not None}

    def _keep(self, answer: Answer, *, exact: bool) -> None:
        """Keep the state of a completion for requests that begin with the same tokens. One that cannot be kept is not missed."""
        request = answer.group.checked.request
        if self._prefixes is None or answer.slot is None or not request.use_prefixes or not answer.fed:
            return
        if request.exact and not exact:
            return
        try:
            tokens = np.array(answer.held, np.int64)
            if not self._prefixes.holds(tokens, exact=exact):
                self._prefixes.put(tokens, self._session.snapshot_slot(answer.slot), exact=exact)
        except (FoldkvError, MemoryError):
            LOG.exception("request %s: its state was not kept", answer.group.id)


def is_kept(chunk: int, last: int) -> bool:
    """Whether the state after this many chunks of a prompt is kept, if the prompt has ``last`` whole ones.

    A state's bytes grow with its tokens, so keeping all would take the square of a prompt's length. Kept are the last one, the
    first four, and four of each doubling: a prefix that two prompts share is found up to a fifth of its length, and all states of
    a prompt together take as much as six or seven of the last.
    """
    return chunk == last or chunk % (1 << max(0, chunk.bit_length() - 3)) == 0
