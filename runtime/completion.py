"""What a model wrote after a prompt: its tokens turned into text as they come, up to a stop string.

The names are vLLM's: ``stop``, ``finish_reason``, ``stop_reason``, ``skip_special_tokens``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from ..errors import InputError, short
from .detokenizer import possible_start
from .sampling import TokenLogprob
from .tokenizer import Tokenizer

#: Why a completion ended: a stop token or string, the number of tokens, who asked for it, its time limit, or a failure.
Finish = Literal["stop", "length", "cancelled", "timeout", "error"]


@dataclass(frozen=True)
class Usage:
    """What a completion took.

    Attributes:
        prompt_tokens: tokens of the prompt.
        cached_tokens: those that were not fed, because the state after them was kept.
        completion_tokens: tokens of the completion.
        queue_seconds: from the request to its first slot.
        prefill_seconds: from then to the first token of any of its completions; None if there was none.
    """

    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    queue_seconds: float = field(default=0.0, compare=False)
    prefill_seconds: float | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Completion:
    """What the model wrote after one prompt, or a piece of it.

    Attributes:
        index: number of the prompt, or of the completion of a request that asked for several.
        text: the text, which ends before a stop string.
        token_ids: all tokens that were given out, including those of a stop string: what the state is of.
        finish_reason: why it ended; None if more pieces follow.
        stop_reason: the stop string, or the id from ``stop_tokens``, that ended the text; None at the model's end of sequence.
        logprobs: of every token of ``token_ids``, if they were asked for.
        usage: of the whole completion, on its last piece, from an engine.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: Finish | None = None
    stop_reason: int | str | None = None
    logprobs: tuple[TokenLogprob, ...] = ()
    usage: Usage | None = None


def joined(pieces: Sequence[Completion]) -> Completion:
    """The whole completion of its pieces, of which there is at least one."""
    last = pieces[-1]
    return Completion(
        last.index,
        "".join(piece.text for piece in pieces),
        tuple(token for piece in pieces for token in piece.token_ids),
        last.finish_reason,
        last.stop_reason,
        tuple(one for piece in pieces for one in piece.logprobs),
        last.usage,
    )


class Writer:
    """The text of one prompt's tokens, up to a stop string."""

    def __init__(
        self,
        index: int,
        tokenizer: Tokenizer | None,
        before: Sequence[int] = (),
        stop: tuple[str, ...] = (),
        skip_special_tokens: bool = True,
    ) -> None:
        """Begin after the tokens ``before``.

        Args:
            index: number of the prompt, or of the completion.
            tokenizer: gives the text; without it there is none, and no stop string.
            before: tokens before the first that is pushed.
            stop: the text ends before any of these; see :func:`stop_strings`.
            skip_special_tokens: leave special tokens out of the text.
        """
        self.index, self.ended = index, False
        self._stream = (
            None if tokenizer is None else tokenizer.stream(skip_special_tokens=skip_special_tokens, prompt=before)
        )
        self._stop, self._held = stop, ""
        self._tokens: list[int] = []  # given out since the last piece
        self._logprobs: list[TokenLogprob] = []

    def push(self, token: int, logprob: TokenLogprob | None = None) -> Completion | None:
        """The piece that the token makes final, if it has text. It is the last one if a stop string is complete."""
        self._tokens.append(token)
        if logprob is not None:
            self._logprobs.append(logprob)
        if self._stream is None:
            return self._piece("")
        text, mark = self._released(self._stream.push(token))
        if mark is not None:
            return self._piece(text, "stop", mark)
        return self._piece(text) if text else None

    def finish(self, reason: Finish, stop_token: int | None = None) -> Completion:
        """The last piece, with all text that was held back."""
        text, mark = self._released(self._stream.finish() if self._stream else "")
        if mark is not None:
            return self._piece(text, "stop", mark)
        return self._piece(text + self._held, reason, stop_token)

    def _released(self, text: str) -> tuple[str, str | None]:
        """The part of held-back text and ``text`` that can be given out, and the stop string that ends it, or None."""
        text = self._held + text
        found = [(at + len(mark), at, mark) for mark in self._stop if (at := text.find(mark)) >= 0]
        if found:
            _, at, mark = min(found)
            self._held = ""
            return text[:at], mark
        kept = len(text) - possible_start(text, self._stop)
        self._held = text[kept:]
        return text[:kept], None

    def _piece(self, text: str, reason: Finish | None = None, stop_reason: int | str | None = None) -> Completion:
        tokens, self._tokens = tuple(self._tokens), []
        logprobs, self._logprobs = tuple(self._logprobs), []
        self.ended = reason is not None
        return Completion(self.index, text, tokens, reason, stop_reason, logprobs)


def stop_strings(stop: str | Sequence[str]) -> tuple[str, ...]:
    """The stop strings of a request, each once.

    Raises:
        InputError: it is not a text or a list of texts, or one of them is empty.
    """
    if isinstance(stop, str):
        stop = (stop,)
    if not isinstance(stop, Iterable) or not all(isinstance(mark, str) for mark in stop):
        raise InputError(f"stop must be a text or a list of texts, got {short(stop)}. For tokens use stop_tokens.")
    if "" in stop:
        raise InputError("a stop string is empty, which would end every text before its start. Leave it out.")
    return tuple(dict.fromkeys(stop))
