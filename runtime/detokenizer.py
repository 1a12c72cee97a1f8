"""Decode tokens that arrive one by one. The pieces together equal the text of all tokens decoded at once.

A tokenizer's decoder is a chain of steps, each from tokens to tokens. Here each step takes its tokens piece by piece and gives
out what no later token can change. So nothing is decoded twice: the time of a token does not depend on how many came before.
"""

from __future__ import annotations

import codecs
import json
import logging
import re
from collections.abc import Iterable, Sequence
from typing import Any, Protocol


class Decodes(Protocol):
    """What is needed of a :class:`~foldkv.runtime.tokenizer.Tokenizer`."""

    @property
    def decoder(self) -> Any:
        """The decoder of the library, or None."""

    def decode(self, tokens: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of token ids."""

    def token_text(self, token: int, *, skip_special_tokens: bool = False) -> str | None:
        """A token as the vocabulary spells it; None where there is none."""


_log = logging.getLogger(__name__)
#: A token that stands for one byte, as the library's ByteFallback reads it.
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2}|\+[0-9A-Fa-f])>")
#: A character that stands for bytes which are no text of their own.
_NO_TEXT = "\N{REPLACEMENT CHARACTER}"
#: Some text of a token, and whether the token ends with it.
Piece = tuple[str, bool]


class TextStream:
    """A decoder for one sequence of tokens; see :meth:`foldkv.runtime.tokenizer.Tokenizer.stream`.

    Text that a later token could still change is held back: the first bytes of a character, and whatever else the tokenizer's
    decoder reads together. With byte fallback that is a run of single bytes, which is valid text only as a whole.
    """

    def __init__(self, tokenizer: Decodes, *, skip_special_tokens: bool = True, prompt: Sequence[int] = ()) -> None:
        """``prompt`` is the tokens before the first one. They are context; their text is not given out."""
        self._tokenizer, self._skip = tokenizer, skip_special_tokens
        self._steps = decoder_steps(tokenizer.decoder)
        self._held: list[int] = []  # every token, if the decoder is not known
        self._sent = 0
        if self._steps is None:
            self._held = list(prompt)
            self._sent = len(tokenizer.decode(self._held, skip_special_tokens=skip_special_tokens))
        else:
            self._feed(self._context(prompt))

    def push(self, token: int) -> str:
        """The text that the token makes final; often a word, sometimes nothing.

        Raises:
            InputError: ``token`` is not a token id.
        """
        return self._feed((token,))

    def finish(self) -> str:
        """The text still held back, with U+FFFD for an incomplete character. Afterwards the stream is like new."""
        if self._steps is None:
            rest = self._tokenizer.decode(self._held, skip_special_tokens=self._skip)[self._sent :]
        else:
            rest = self._through((), end=True)
        self._steps, self._held, self._sent = decoder_steps(self._tokenizer.decoder), [], 0
        return rest

    def _context(self, prompt: Sequence[int]) -> Sequence[int]:
        """The tokens of a prompt that the text after it can depend on."""
        if self._steps is None or [type(step) for step in self._steps] != [_ByteLevel]:
            return prompt
        # A character that is not whole yet has at most three bytes, and a token that has text at least one.
        first, left = len(prompt), 3
        while first and left:
            first -= 1
            left -= bool(self._tokenizer.token_text(prompt[first], skip_special_tokens=self._skip))
        return prompt[first:]

    def _feed(self, tokens: Iterable[int]) -> str:
        if self._steps is None:
            self._held += [token for token in tokens if self._tokenizer.token_text(token) is not None]
            return ""
        texts = [self._tokenizer.token_text(token, skip_special_tokens=self._skip) for token in tokens]
        return self._through([(text, True) for text in texts if text is not None])

    def _through(self, pieces: Sequence[Piece], *, end: bool = False) -> str:
        assert self._steps is not None
        for step in self._steps:
            if not pieces and not end:
                return ""
            pieces = step.feed(pieces, end=end)
        return "".join(text for text, _ in pieces)


def possible_start(text: str, marks: Iterable[str]) -> int:
    """How many characters at the end of a text may be the start of a mark (not the whole mark): the most that match."""
    longest = 0
    for mark in marks:
        for count in range(min(len(mark) - 1, len(text)), longest, -1):
            if text.endswith(mark[:count]):
                longest = count
                break
    return longest


def token_bytes(tokenizer: Decodes, token: int) -> bytes | None:
    """The bytes that a token alone stands for, which may be a part of a character; None if its decoder does not say which."""
    text = tokenizer.decode([token], skip_special_tokens=False)
    if _NO_TEXT not in text:
        return text.encode()
    spelled, steps = tokenizer.token_text(token) or "", decoder_steps(tokenizer.decoder) or []
    if any(isinstance(step, _ByteLevel) for step in steps) and all(sign in _BYTE_OF for sign in spelled):
        return bytes([_BYTE_OF[sign] for sign in spelled])
    byte = _BYTE.fullmatch(spelled)
    if byte is not None and any(isinstance(step, _ByteFallback) for step in steps):
        return bytes([int(byte[1], 16)])
    return None


def decoder_steps(decoder: Any) -> list[Step] | None:
    """The steps of a ``tokenizers`` decoder (None: there is none), or None for a decoder that this version does not know."""
    if decoder is None:
        return [_Spaced()]
    steps: list[Step] = []
    for facts in _flat(json.loads(decoder.__getstate__())):
        kind = str(facts.get("type"))
        if kind not in _STEPS:
            _log.warning(
                "the tokenizer has a decoder of the type %s, which this version cannot read piece by piece: "
                "the whole text comes at the end.", kind
            )  # fmt: skip
            return None
        steps.append(_STEPS[kind](facts))
    return steps


def _flat(facts: dict[str, Any]) -> list[dict[str, Any]]:
    return [inner for one in facts["decoders"] for inner in _flat(one)] if facts["type"] == "Sequence" else [facts]


class Step(Protocol):
    """One decoder of the chain."""

    def feed(self, pieces: Iterable[Piece], *, end: bool = False) -> list[Piece]:
        """The pieces that are final after these; ``end`` means that no token follows."""


class _PerToken:
    """A step that looks at one whole token after another."""

    def __init__(self) -> None:
        self._open: list[str] = []

    def feed(self, pieces: Iterable[Piece], *, end: bool = False) -> list[Piece]:
        given: list[Piece] = []
        for text, ends in pieces:
            self._open.append(text)
            if ends:
                given += self._token("".join(self._open) if len(self._open) > 1 else text)
                self._open.clear()
        return given + self._rest() if end else given

    def _token(self, text: str) -> list[Piece]:
        raise NotImplementedError

    def _rest(self) -> list[Piece]:
        return []


class _Spaced(_PerToken):
    """Without a decoder: spaces between tokens."""

    _between = ""

    def _token(self, text: str) -> list[Piece]:
        before, self._between = self._between, " "
        return [(before + text, True)]


class _Library(_PerToken):
    """The library's own decoder on single tokens; with ``apart`` the first one is decoded differently from the rest."""

    def __init__(self, facts: dict[str, Any], *, apart: bool = True) -> None:
        super().__init__()
        from tokenizers import decoders

        self._decoder: Any = decoders.Fuse()
        self._decoder.__setstate__(json.dumps(facts).encode())
        self._before, self._first = list[str](), [""] if apart else []

    def _token(self, text: str) -> list[Piece]:
        decoded = self._decoder.decode([*self._before, text])
        self._before = self._first
        return [(decoded, True)]


class _Ctc(_Library):
    """Equal neighbours count as one token; tokens that become empty are dropped."""

    _last: str | None = None

    def _token(self, text: str) -> list[Piece]:
        same, self._last = text == self._last, text
        decoded = "" if same else self._decoder.decode([text])
        return [(decoded, True)] if decoded else []


class _Suffix(_PerToken):
    """BPEDecoder: the suffix of a word becomes a space, except after the last token."""

    def __init__(self, facts: dict[str, Any]) -> None:
        super().__init__()
        self._suffix, self._last = facts["suffix"], list[str]()

    def _token(self, text: str) -> list[Piece]:
        before, self._last = self._last, [text]
        return [(one.replace(self._suffix, " "), True) for one in before]

    def _rest(self) -> list[Piece]:
        return [(one.replace(self._suffix, ""), True) for one in self._last]


class _ByteFallback(_PerToken):
    """A run of byte tokens becomes text if all of it is UTF-8, else one replacement character per byte."""

    def __init__(self, _: dict[str, Any]) -> None:
        super().__init__()
        self._run = bytearray()

    def _token(self, text: str) -> list[Piece]:
        byte = _BYTE.fullmatch(text)
        if byte is None:
            return [*self._rest(), (text, True)]
        self._run.append(int(byte[1], 16))
        return []

    def _rest(self) -> list[Piece]:
        run = bytes(self._run)
        self._run.clear()
        try:
            return [(run.decode(), True)] if run else []
        except UnicodeDecodeError:
            return [(_NO_TEXT, True)] * len(run)


class _ByteLevel(_PerToken):
    """Characters of tokens are bytes; all tokens are one text, with a replacement character for what is not UTF-8."""

    def __init__(self, _: dict[str, Any]) -> None:
        super().__init__()
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def _token(self, text: str) -> list[Piece]:
        try:
            data = bytes([_BYTE_OF[character] for character in text])
        except KeyError:  # a token that was added to the vocabulary as plain text
            data = text.encode()
        return [(self._utf8.decode(data), False)]

    def _rest(self) -> list[Piece]:
        return [(self._utf8.decode(b"", final=True), True)]


class _Fuse:
    """All tokens become one."""

    def __init__(self, _: dict[str, Any]) -> None: ...

    def feed(self, pieces: Iterable[Piece], *, end: bool = False) -> list[Piece]:
        return [*((text, False) for text, _ in pieces), *([("", True)] if end else [])]


class _Strip:
    """Removes a character at the ends of a token, up to ``start`` and ``stop`` times."""

    def __init__(self, facts: dict[str, Any]) -> None:
        self._content, self._start, self._stop = facts["content"], facts["start"], facts["stop"]
        self._leading, self._tail = self._start, ""

    def feed(self, pieces: Iterable[Piece], *, end: bool = False) -> list[Piece]:
        given: list[Piece] = []
        for text, ends in pieces:
            while text and self._leading:
                cut = text[0] == self._content
                text, self._leading = (text[1:], self._leading - 1) if cut else (text, 0)
            text = self._tail + text
            kept = len(text)
            while kept and len(text) - kept < self._stop and text[kept - 1] == self._content:
                kept -= 1
            given.append((text[:kept], ends))
            self._leading, self._tail = (self._start, "") if ends else (self._leading, text[kept:])
        return given


class _Replace:
    """Replaces a text within a token."""

    def __init__(self, pattern: str, content: str) -> None:
        self._pattern, self._content, self._held = pattern, content, ""

    def feed(self, pieces: Iterable[Piece], *, end: bool = False) -> list[Piece]:
        given: list[Piece] = []
        for text, ends in pieces:
            parts = (self._held + text).split(self._pattern)
            held = 0 if ends else possible_start(parts[-1], [self._pattern])
            final = len(parts[-1]) - held
            parts[-1], self._held = parts[-1][:final], parts[-1][final:]
            given.append((self._content.join(parts), ends))
        return given


def _replace(facts: dict[str, Any]) -> Step:
    pattern = facts["pattern"].get("String")
    return _Replace(pattern, facts["content"]) if pattern else _Library(facts, apart=False)


#: From the type of a decoder to the step that replaces it.
_STEPS: dict[str, Any] = {
    "BPEDecoder": _Suffix, "ByteFallback": _ByteFallback, "ByteLevel": _ByteLevel, "CTC": _Ctc, "Fuse": _Fuse,
    "Metaspace": _Library, "Replace": _replace, "Strip": _Strip, "WordPiece": _Library,
}  # fmt: skip


def _byte_of() -> dict[str, int]:
    """The byte that each character of a byte-level vocabulary stands for."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + number): byte for number, byte in enumerate(others)}


_BYTE_OF = _byte_of()
