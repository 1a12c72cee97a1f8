"""Answers in the shapes of OpenAI's API, whole or in chunks, from the pieces that an engine gives out."""

from __future__ import annotations

import functools
import time
from abc import ABC, abstractmethod
from typing import Any

from ..chat import Arguments, CallEnd, CallStart, Content, Event, Reasoning, joined
from ..completion import Completion, Usage
from ..detokenizer import TextStream, token_bytes
from ..sampling import TokenLogprob
from ..tokenizer import Tokenizer
from .requests import Job
from .service import Service


class Answer:
    """The answer to a job. Feed it every piece; take the chunks of a stream while it grows, or the whole of another at the end.

    Of a stream nothing is kept that has been given out.
    """

    def __init__(self, job: Job, service: Service) -> None:
        """Nothing has been answered yet."""
        chat = job.parser is not None
        self._job, self._service = job, service
        kind = "chat.completion" if chat else "text_completion"
        self._head = {
            "id": job.id, "object": f"{kind}.chunk" if chat and job.stream else kind, "created": int(time.time()),
            "model": service.name, "system_fingerprint": service.fingerprint,
        }  # fmt: skip
        count = len(job.requests) * job.answers
        self._choices = [(_Chat if chat else _Text)(index, job, service.tokenizer) for index in range(count)]
        self._usage: dict[int, Usage] = {}

    def feed(self, prompt: int, piece: Completion) -> list[dict[str, Any]]:
        """The chunks that a piece of an answer to a prompt makes; none if it is no stream."""
        index = prompt * self._job.answers + piece.index
        if piece.usage is not None:
            self._usage[index] = piece.usage
        more = {"usage": None} if self._job.usage else {}
        return [self._head | {"choices": [choice]} | more for choice in self._choices[index].feed(piece)]

    def usage(self) -> dict[str, Any]:
        """The numbers of tokens. A prompt counts once, however many answers it has."""
        rows = [
            [one for index, one in sorted(self._usage.items()) if index // self._job.answers == prompt]
            for prompt in range(len(self._job.requests))
        ]
        prompt = sum(row[0].prompt_tokens for row in rows if row)
        new = sum(one.completion_tokens for row in rows for one in row)
        cached = sum(min(one.cached_tokens for one in row) for row in rows if row)
        return {
            "prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new,
            "prompt_tokens_details": {"cached_tokens": cached},
        }  # fmt: skip

    def last_chunk(self) -> dict[str, Any]:
        """The chunk with the usage."""
        return self._head | {"choices": [], "usage": self.usage()}

    def whole(self) -> dict[str, Any]:
        """All of the answer, which is no stream."""
        return self._head | {"choices": [choice.whole() for choice in self._choices], "usage": self.usage()}


class _Choice(ABC):
    """One of the answers."""

    def __init__(self, index: int, job: Job, tokenizer: Tokenizer) -> None:
        self._index, self._job, self._tokenizer = index, job, tokenizer
        self._ended: Completion | None = None

    @abstractmethod
    def feed(self, piece: Completion) -> list[dict[str, Any]]:
        """The choices of the chunks that a piece makes."""

    @abstractmethod
    def whole(self) -> dict[str, Any]:
        """The choice of the whole answer."""

    def _row(self, content: dict[str, Any], logprobs: Any, reason: str | None) -> dict[str, Any]:
        stopped = self._ended.stop_reason if self._ended is not None and reason is not None else None
        return {"index": self._index, **content, "logprobs": logprobs, "finish_reason": reason, "stop_reason": stopped}


class _Text(_Choice):
    """A choice of /v1/completions."""

    def __init__(self, index: int, job: Job, tokenizer: Tokenizer) -> None:
        super().__init__(index, job, tokenizer)
        self._texts = list[str]()
        self._rows: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        self._stream: TextStream | None = None
        self._offset = 0

    def feed(self, piece: Completion) -> list[dict[str, Any]]:
        """One chunk for each piece that says something."""
        rows = self._logprobs(piece.logprobs or ()) if self._job.logprobs else None
        if piece.finish_reason is not None:
            self._ended = piece
        if not self._job.stream:
            self._texts.append(piece.text)
            for name, values in (rows or {}).items():
                self._rows[name] += values
            return []
        if not piece.text and not piece.logprobs and piece.finish_reason is None:
            return []
        return [self._row({"text": piece.text}, rows, piece.finish_reason)]

    def whole(self) -> dict[str, Any]:
        """The text."""
        reason = self._ended.finish_reason if self._ended is not None else None
        return self._row({"text": "".join(self._texts)}, self._rows if self._job.logprobs else None, reason)

    def _logprobs(self, tokens: tuple[TokenLogprob, ...]) -> dict[str, list[Any]]:
        if self._stream is None:
            prompt = self._index // self._job.answers
            skip = self._job.requests[prompt].skip_special_tokens
            self._stream = self._tokenizer.stream(skip_special_tokens=skip, prompt=self._job.prompts[prompt])
        found: dict[str, list[Any]] = {name: [] for name in self._rows}
        for one in tokens:
            found["tokens"].append(self._name(one.token))
            found["token_logprobs"].append(_finite(one.logprob))
            top: dict[str, float] = {}
            for token, value in one.top:
                top.setdefault(self._name(token), _finite(value))  # the most probable of those with the same text
            found["top_logprobs"].append(top or None)
            found["text_offset"].append(self._offset)
            self._offset += len(self._stream.push(one.token))
        return found

    def _name(self, token: int) -> str:
        text, data = spelled(self._tokenizer, token)
        return text if data is None or text.encode() == data else f"bytes:{text}"


class _Chat(_Choice):
    """A choice of /v1/chat/completions."""

    def __init__(self, index: int, job: Job, tokenizer: Tokenizer) -> None:
        super().__init__(index, job, tokenizer)
        assert job.parser is not None
        self._parser = job.parser()
        self._events = list[Event]()  # of a whole answer
        self._logprobs = list[Any]()  # that no chunk had yet
        self._begun = False
        self._called, self._broken = False, False  # whether there are calls, and one that is not complete

    def feed(self, piece: Completion) -> list[dict[str, Any]]:
        """Chunks for what the piece makes certain; its probabilities go with the first of them."""
        events = self._parser.feed(piece.text)
        if piece.finish_reason is not None:
            events += self._parser.finish()
            self._ended = piece
        for event in events:
            if isinstance(event, CallEnd):
                self._called, self._broken = True, self._broken or not event.complete
        if self._job.logprobs:
            self._logprobs += [_chat_logprob(self._tokenizer, one) for one in piece.logprobs or ()]
        if not self._job.stream:
            self._events += events
            return []
        deltas = [delta for event in events if (delta := _delta(event)) is not None]
        chunks = []
        if not self._begun and (deltas or self._ended is not None):
            self._begun = True
            chunks.append(self._row({"delta": {"role": "assistant", "content": ""}}, None, None))
        chunks += [self._row({"delta": delta}, self._untold(), None) for delta in deltas]
        if self._ended is not None:
            chunks.append(self._row({"delta": {}}, self._untold(), self._reason()))
        return chunks

    def whole(self) -> dict[str, Any]:
        """The message."""
        made = joined(self._events)
        message: dict[str, Any] = {"role": "assistant", "content": made.content, "refusal": None}
        if made.reasoning:
            message["reasoning_content"] = made.reasoning
        if made.tool_calls:
            message["content"] = made.content or None
            message["tool_calls"] = [
                {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
                for call in made.tool_calls
            ]
        return self._row(
            {"message": message}, {"content": self._logprobs} if self._job.logprobs else None, self._reason()
        )

    def _untold(self) -> dict[str, Any] | None:
        untold, self._logprobs = self._logprobs, []
        return {"content": untold} if untold else None

    def _reason(self) -> str | None:
        """ "tool_calls" if the model stopped after calls that are all complete: nobody should run others."""
        reason = self._ended.finish_reason if self._ended is not None else None
        return "tool_calls" if reason == "stop" and self._called and not self._broken else reason


def _delta(event: Event) -> dict[str, Any] | None:
    match event:
        case Content(text):
            return {"content": text}
        case Reasoning(text):
            return {"reasoning_content": text}
        case CallStart(index, call_id, name):
            function = {"name": name, "arguments": ""}
            return {"tool_calls": [{"index": index, "id": call_id, "type": "function", "function": function}]}
        case Arguments(index, text):
            return {"tool_calls": [{"index": index, "function": {"arguments": text}}]}
        case _:
            return None


def _chat_logprob(tokenizer: Tokenizer, one: TokenLogprob) -> dict[str, Any]:
    def row(token: int, logprob: float) -> dict[str, Any]:
        text, data = spelled(tokenizer, token)
        return {"token": text, "logprob": _finite(logprob), "bytes": None if data is None else list(data)}

    return row(one.token, one.logprob) | {"top_logprobs": [row(token, logprob) for token, logprob in one.top]}


def _finite(logprob: float) -> float:
    """JSON has no infinity; this is what OpenAI gives for a token that cannot come."""
    return max(logprob, -9999.0)


def spelled(tokenizer: Tokenizer, token: int) -> tuple[str, bytes | None]:
    """The text and the bytes of one token, special or not.

    Bytes that are no text alone, such as half a character, are written as OpenAI writes them: ``\\xe2\\x82``. Where the tokenizer does
    not say which they are, they are None and the text has U+FFFD.
    """
    return _spelled(tokenizer, token)


@functools.lru_cache(maxsize=65536)
def _spelled(tokenizer: Tokenizer, token: int) -> tuple[str, bytes | None]:
    data = token_bytes(tokenizer, token)
    if data is None:
        return tokenizer.decode([token], skip_special_tokens=False), None
    try:
        return data.decode(), data
    except UnicodeDecodeError:
        return repr(data)[2:-1], data
