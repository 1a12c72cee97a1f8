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
        self.special = tokenizer.special_tokens
        self.bytes: list[bytes] = []
        for token in range(tokenizer.vocab_size):
            text = tokenizer.token_text(token) or ""
            own = text in tokenizer.added_tokens
            self.bytes.append(text.encode() if own else bytes(byte_of[sign] for sign in text))

    def text(self, tokens: Iterable[int]) -> bytes:
        """The bytes of tokens; those that are not known have none."""
        return b"".join(self.bytes[token] for token in tokens if token < len(self.bytes))


def follow(constraint: Constraint, spelling: Spelling, text: str) -> str:
    """Take a text with the longest allowed tokens; what is left of it where none goes on, "" for nothing."""
    left = text.encode()
    while left:
        fitting = [
            token for token in np.flatnonzero(constraint.allowed())
            if token < len(spelling.bytes) and spelling.bytes[token] and left.startswith(spelling.bytes[token])
        ]  # fmt: skip
        if not fitting:
            break
        token = int(max(fitting, key=lambda token: len(spelling.bytes[token])))
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
        allowed = np.flatnonzero(constraint.allowed())
        if not wish and wishes and random_.random() < 0.3:
            wish = random_.choice(wishes).encode()
        wanted = [
            token for token in allowed
            if wish and token < len(spelling.bytes) and spelling.bytes[token] and wish.startswith(spelling.bytes[token])
        ]  # fmt: skip
        if eos in allowed and random_.random() < 0.3:
            token = eos
        elif wanted:
            token = int(random_.choice(wanted))
            wish = wish[len(spelling.bytes[token]) :]
        else:
            token, wish = int(random_.choice(allowed)), b""
        constraint.took(token)
        tokens.append(token)
    return tokens if constraint.ended else None
