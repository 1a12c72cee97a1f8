"""The text that a model reads, and which of the special tokens in it the encoding put there.

Somebody may write ``<｜User｜>`` in a message. The encoding's text keeps it as it is, byte for byte, but in the token ids it is
ordinary text, as DeepSeek's own service has it: no message can begin a turn of somebody else.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass

from ..tokenizer import Tokenizer


@dataclass(frozen=True)
class Prompt:
    """A prompt.

    Attributes:
        text: all of it.
        marks: where the encoding put a special token: [start, end) in ``text``, in order.
        tokens: the texts that are tokens only where they are marked; None: all that the tokenizer adds to its vocabulary.
    """

    text: str
    marks: tuple[tuple[int, int], ...]
    tokens: frozenset[str] | None = None

    def __str__(self) -> str:
        return self.text

    @property
    def thinks(self) -> bool:
        """Whether it ends inside the reasoning of an answer, which is then what the model writes first."""
        return bool(self.marks) and self.marks[-1][1] == len(self.text) and self.text.endswith("<think>")

    def token_ids(self, tokenizer: Tokenizer) -> list[int]:
        """The ids to feed, as ``generate_text`` and ``Session`` take them; nothing is added at either end.

        Raises:
            InputError: a message spells out a special token, and the tokenizer has no other way to write it.
        """
        tokens = tokenizer.added_tokens if self.tokens is None else self.tokens
        if tuple(match.span() for match in finder(tokens).finditer(self.text)) == self.marks:
            return tokenizer.encode(self.text, add_special_tokens=False)
        ids, at = list[int](), 0
        for start, end in (*self.marks, (len(self.text), len(self.text))):
            ids += tokenizer.encode_literally(self.text[at:start], tokens)
            ids += tokenizer.encode(self.text[start:end], add_special_tokens=False)
            at = end
        return ids


class Writer:
    """Puts a prompt together from texts of the encoding, in which marks are tokens, and texts of messages."""

    def __init__(self, tokens: Collection[str]) -> None:
        self._find = finder(tokens)
        self._parts, self._length = list[str](), 0
        self._marks: list[tuple[int, int]] = []

    def own(self, text: str) -> None:
        """Add a text of the encoding."""
        self._marks += [(self._length + m.start(), self._length + m.end()) for m in self._find.finditer(text)]
        self.given(text)

    def given(self, text: str) -> None:
        """Add a text of a message, in which nothing is a mark."""
        self._parts.append(text)
        self._length += len(text)

    def prompt(self) -> Prompt:
        """All that was added."""
        return Prompt("".join(self._parts), tuple(self._marks))


def finder(tokens: Collection[str]) -> re.Pattern[str]:
    """A pattern that finds these texts, the longest first where several begin."""
    longest_first = sorted((token for token in tokens if token), key=lambda token: (-len(token), token))
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
