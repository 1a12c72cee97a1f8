"""Seeded cases: windows of text, and key-value streams that ask for one exact value from far back.

Every text that a model is measured on begins with the special tokens that a served prompt begins with, and has no others: what a
tokenizer puts after a text would stand between a question and its answer.
"""

from __future__ import annotations

import hashlib
import platform
import random
import string
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import InputError
from ..inputs import refuse_unreadable_name
from ..runtime.tokenizer import Tokenizer

KEYS = string.ascii_letters
RECORD_BYTES = 4


@dataclass(frozen=True)
class RetrievalCase:
    """A prompt that ends with a key, and the answer that followed the key's only earlier occurrence.

    ``distance`` is in bytes, from that occurrence to the question.
    """

    distance: int
    prompt: str
    answer: str


def retrieval_cases(distances: list[int], per_distance: int, *, seed: int) -> list[RetrievalCase]:
    """Streams of ``<letter><digit><digit>;`` records, the format of examples/tiny-v4/stream.py.

    Every value is asked for once, at a distance that is a multiple of a record; the records in between
    repeat all other letters with other values, so only an exact memory can answer.
    """
    cases = []
    for distance in distances:
        rng = random.Random(f"{seed}:{distance}")
        for _ in range(per_distance):
            target, *others = rng.sample(KEYS, len(KEYS))
            values = {key: rng.randrange(100) for key in KEYS}
            keys = [rng.choice(others) for _ in range(24)]
            keys += [target, *(rng.choice(others) for _ in range(distance // RECORD_BYTES - 1))]
            stream = "".join(f"{key}{values[key]:02d};" for key in keys)
            cases.append(RetrievalCase(distance, stream + target, f"{values[target]:02d}"))
    return cases


def as_prompt(tokenizer: Tokenizer, text: str) -> list[int]:
    """The tokens of a text after those that a served prompt begins with, and nothing after it."""
    return [*tokenizer.prefix, *tokenizer.encode(text, add_special_tokens=False)]


def split_answer(tokenizer: Tokenizer, prompt: str, answer: str) -> tuple[list[int], list[int]]:
    """The tokens that are fed, which are the prompt's and all but the last of the answer's, and those of the answer.

    A tokenizer may join the prompt's end with the answer: the answer then begins with the joined token.
    """
    whole, before = as_prompt(tokenizer, prompt + answer), as_prompt(tokenizer, prompt)
    shared = next((at for at, (a, b) in enumerate(zip(whole, before, strict=False)) if a != b), len(before))
    shared = min(shared, len(whole) - 1)
    return whole[:-1], whole[shared:]


def text_windows(
    tokens: list[int], length: int, count: int, *, seed: int, prefix: Sequence[int] = ()
) -> list[list[int]]:
    """``count`` windows of ``length`` tokens, spread over the text; fewer if the text is short.

    Each begins with ``prefix``, the special tokens that the tokenizer puts before a text: models are served with them.

    Raises:
        InputError: the prefix leaves no room for a token of the text.
    """
    if length <= len(prefix):
        raise InputError(
            f"a window of {length} tokens has no room for text after the {len(prefix)} special tokens that this tokenizer puts before "
            f"every text. Give at least {len(prefix) + 1} (--text-tokens)."
        )
    length -= len(prefix)
    if len(tokens) <= length:
        return [[*prefix, *tokens]]
    rng = random.Random(seed)
    span = len(tokens) - length
    return [[*prefix, *tokens[start : start + length]] for start in sorted(rng.sample(range(span), min(count, span)))]


@dataclass(frozen=True)
class Text:
    """The text to measure on, and where it is from: a file, or files of the running Python."""

    words: str
    name: str

    @property
    def sha256(self) -> str:
        """Of its UTF-8 bytes, in hex."""
        return hashlib.sha256(self.words.encode()).hexdigest()


def load_text(path: Path | None) -> Text:
    """The text of a UTF-8 file; without one, prose and code that every machine with this Python has.

    Raises:
        InputError: the file cannot be read, is not UTF-8, or is empty.
    """
    if path is None:
        import argparse
        import ast
        import heapq

        files = [Path(str(module.__file__)) for module in (heapq, ast, argparse)]
        names = ", ".join(file.name for file in files)
        words = "".join(file.read_text(encoding="utf-8") for file in files)
        return Text(words, f"{names} of Python {platform.python_version()}")
    refuse_unreadable_name(Path(path))
    try:
        words = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"the text {path} cannot be read: {error.strerror}. Give a file of UTF-8 text.") from None
    except UnicodeDecodeError as error:
        raise InputError(
            f"the text {path} is not UTF-8 (byte {error.start}): convert it, for example with iconv."
        ) from None
    if not words.strip():
        raise InputError(f"the text {path} is empty; give some pages of the kind of text that the model will serve.")
    return Text(words, Path(path).name)
