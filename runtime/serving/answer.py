"""One request while it is answered: its completions, where each of them is, and what is given out."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable

from ..backend import FloatArray
from ..completion import Completion, Finish, Usage, Writer
from ..sampling import Sampler, token_logprob
from ..snapshots import SlotSnapshot
from ..tokenizer import Tokenizer
from .constraint import Constraint
from .counts import Counts
from .request import Checked

#: Tokens of a prompt that the text of an answer is decoded after. What stands before them changes no character of it.
_BEFORE = 4096
#: Gets every piece of every completion, and at most one error, after which nothing more comes.
Give = Callable[[Completion | BaseException], None]


class Group:
    """The completions of one request.

    Attributes:
        checked: the request.
        id: for logs.
        answers: its completions.
        arrived: when it came, by ``time.monotonic``.
        deadline: when it must have ended; None for never.
        cancelled: whether nobody wants it any more; any thread may set it.
        cached: tokens of the prompt that were not fed.
        began: when the first of them had a slot; None before.
        first_token: when the first token was chosen; None before.
        tokenizer: gives the text; None for none.
        failed: whether it ended with an error.
        logged: whether its line was logged.
        counts: of the scheduler that has it.
    """

    def __init__(self, checked: Checked, id: str, tokenizer: Tokenizer | None, give: Give) -> None:
        """Begin now."""
        self.checked, self.id, self.give = checked, id, give
        self.arrived = time.monotonic()
        self.deadline = None if checked.request.timeout is None else self.arrived + checked.request.timeout
        self.cancelled, self.cached = False, 0
        self.began: float | None = None
        self.first_token: float | None = None
        self.failed = self.logged = False
        self.counts = Counts()
        self.tokenizer = tokenizer
        self.answers = [Answer(self, index) for index in range(checked.request.n)]

    @property
    def ended(self) -> bool:
        """Whether all completions have ended."""
        return all(answer.ended for answer in self.answers)

    def unwanted(self, now: float) -> Finish | None:
        """Why it must end now, or None."""
        if self.cancelled:
            return "cancelled"
        return "timeout" if self.deadline is not None and now >= self.deadline else None

    def fail(self, error: BaseException) -> None:
        """End all completions with an error, which is given out once."""
        if not self.failed and not self.ended:
            self.failed = True
            for answer in self.answers:
                if not answer.ended:
                    answer.note_end("error")
            self.give(error)


class Answer:
    """One completion.

    Attributes:
        group: its request.
        prompt: the prompt's tokens.
        index: its number among the request's completions.
        slot: where its state is; None while it has none.
        fed: tokens in the caches.
        new: tokens of the answer; the last one is not in the caches.
        cold: whether the state has the bits of a run that used no kept state.
        fork: state and logits after the prompt, if another completion of the request has fed it.
        reason: why it ended, or None.
    """

    def __init__(self, group: Group, index: int) -> None:
        """Nothing is fed, and nothing made that costs time: a request may ask for many and be cancelled."""
        self.group, self.index, self.prompt = group, index, group.checked.prompt
        self.slot: int | None = None
        self.fed, self.cold = 0, True
        self.new: list[int] = []
        self.fork: tuple[SlotSnapshot, FloatArray] | None = None
        self.reason: Finish | None = None
        self._sampler: Sampler | None = None
        self._constraint: Constraint | None = None
        self._writer: Writer | None = None

    def begin(self, slot: int) -> None:
        """Take a slot. A constraint that cannot be made ends the request."""
        request, self.slot = self.group.checked.request, slot
        if self.group.began is None:
            self.group.began = time.monotonic()
        self._sampler = Sampler(request.sampling, self.index, self.prompt)
        self._writer = Writer(
            self.index,
            self.group.tokenizer,
            self.prompt[-_BEFORE:],
            self.group.checked.stop,
            request.skip_special_tokens,
        )
        if request.constraint is not None:
            try:
                self._constraint = request.constraint()
            except Exception as error:  # noqa: BLE001 - the caller's own
                self.group.fail(error)

    @property
    def count(self) -> int:
        """Tokens of the answer so far."""
        return len(self.new)

    @property
    def held(self) -> list[int]:
        """The tokens in the caches."""
        return [*self.prompt, *self.new][: self.fed]

    @property
    def feeding(self) -> bool:
        """Whether a part of the prompt is to be fed."""
        return self.fed < len(self.prompt)

    @property
    def ended(self) -> bool:
        """Whether nothing more comes."""
        return self.reason is not None

    def take(self, logits: FloatArray) -> None:
        """Choose the next token from logits [V], and give out what it makes final. A failure ends the request."""
        checked = self.group.checked
        assert self._sampler is not None and self._writer is not None, "it has a slot"
        try:
            token = self._sampler(logits, None if self._constraint is None else self._constraint.allowed())
            if self._constraint is not None:
                self._constraint.took(token)
        except Exception as error:  # noqa: BLE001 - whatever the caller's constraint raises ends the caller's request alone
            self.group.fail(error)
            return
        if self.group.first_token is None:
            self.group.first_token = time.monotonic()
        if token in checked.stop_tokens:
            self.end("stop", token if token in checked.named else None)
            return
        self.new.append(token)
        self.group.counts.new_tokens += 1
        alternatives = checked.request.logprobs
        piece = self._writer.push(token, None if alternatives is None else token_logprob(logits, token, alternatives))
        if piece is not None and piece.finish_reason is not None:
            self._give_last(piece)
            return
        if piece is not None:
            self.group.give(piece)
        if self._constraint is not None and self._constraint.ended:
            self.end("stop")
        elif self.count == checked.most:
            self.end("length")

    def end(self, reason: Finish, stop_token: int | None = None) -> None:
        """End it, and give out what was held back."""
        if not self.ended:
            writer = self._writer or Writer(self.index, None)  # it never began
            self._give_last(writer.finish(reason, stop_token))

    def note_end(self, reason: Finish) -> None:
        """It has ended, and counts as such."""
        self.reason = reason
        self.group.counts.finished[reason] += 1

    def _give_last(self, piece: Completion) -> None:
        assert piece.finish_reason is not None, "it is the last one"
        self.note_end(piece.finish_reason)
        began, first = self.group.began, self.group.first_token
        usage = Usage(
            len(self.prompt), self.group.cached, self.count, (time.monotonic() if began is None else began) - self.group.arrived,
            None if first is None or began is None else first - began,
        )  # fmt: skip
        self.group.give(dataclasses.replace(piece, usage=usage))
