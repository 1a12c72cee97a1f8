"""Texts through constraints: one that is given, and ones that a constraint allows, chosen at random."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from foldkv.runtime.serving.constraint import Constraint
from foldkv.runtime.tokenizer import Tokenizer

#: What the small vocabulary is trained on, so that it has tokens across the borders of markup, JSON and words.
_TEXT = (
    '{"name": "value", "count": 12, "list": ["one", "two"]} true false null 3.25 -1e9 '
    '<invoke name="weather">\n<parameter name="city" string="true">Rome</parameter>\n</invoke>\n</tool_calls>\n\n<tool_calls>\n'
    "The weather in Rome is fine, and it is warm. Größe 日本 é "
)


def small_bpe(path: Path, special: Sequence[str], added: Sequence[str] = ()) -> Tokenizer:
    """A tokenizer with all bytes, some longer tokens, and tokens that are ``special`` or only ``added``."""
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    made.train_from_iterator([_TEXT] * 4, trainer)
    made.add_special_tokens(list(special))
    made.add_tokens(list(added))
    made.save(str(path))
    return Tokenizer(path)


class Spelling:
    """The bytes of each token."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
        byte_of = {chr(byte): byte for byte in plain}
        byte_of |= {chr(256 + i): byte for i, byte in enumerate(sorted(set(range(256)) - set(plain)))}
        self.marks = [mark.encode() for mark in tokenizer.added_tokens]
        self.bytes: list[bytes] = []
        for token in range(tokenizer.vocab_size):
            text = tokenizer.token_text(token) or ""
            own = text in tokenizer.added_tokens
            self.bytes.append(text.encode() if own else bytes(byte_of[sign] for sign in text))

        self._of = {spelled: token for token, spelled in enumerate(self.bytes) if spelled}
        self._longest = max(map(len, self._of))

    def starts(self, text: bytes) -> list[int]:
        """The tokens with which a text begins, the longest last."""
        found = (self._of.get(text[:size]) for size in range(1, min(len(text), self._longest) + 1))
        return [token for token in found if token is not None]

    def text(self, tokens: Iterable[int]) -> bytes:
        """The bytes of tokens; those that are not known have none."""
        return b"".join(self.bytes[token] for token in tokens if token < len(self.bytes))


def follow(constraint: Constraint, spelling: Spelling, text: str) -> str:
    """Take a text with the longest allowed tokens; what is left of it where none goes on, "" for nothing.

    No token goes over the start of what is a token of its own, as tokenizers have it.
    """
    left = text.encode()
    while left:
        reach = min((at for mark in spelling.marks if (at := left.find(mark, 1)) > 0), default=len(left))
        allowed = constraint.allowed()
        fitting = [token for token in spelling.starts(left[:reach]) if allowed[token]]
        if not fitting:
            break
        token = fitting[-1]
        constraint.took(token)
        left = left[len(spelling.bytes[token]) :]
    return left.decode(errors="replace")


def walk(
    constraint: Constraint, spelling: Spelling, eos: int, seed: int, *, steps: int, wishes: Sequence[str] = ()
) -> list[int] | None:
    """Random allowed tokens until the constraint has ended; None if it has not after so many steps.

    Where anything may come, the walk at times wants one of the texts ``wishes``, and takes of it what it may: otherwise it would
    never find the way out of a free text.
    """
    random_, tokens, wish = random.Random(seed), list[int](), b""
    for _ in range(steps):
        if constraint.ended:
            return tokens
        mask = constraint.allowed()
        allowed = np.flatnonzero(mask)
        if not wish and wishes and random_.random() < 0.3:
            wish = random_.choice(wishes).encode()
        wanted = [token for token in spelling.starts(wish) if mask[token]]
        if mask[eos] and random_.random() < 0.3:
            token = eos
        elif wanted:
            token = random_.choice(wanted)
            wish = wish[len(spelling.bytes[token]) :]
        else:
            token, wish = int(random_.choice(allowed)), b""
        constraint.took(token)
        tokens.append(token)
    return tokens if constraint.ended else None
