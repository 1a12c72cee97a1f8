"""Values planted at chosen depths of a long stream, and asked for at its end.

The stream has the format of cases.py: ``<letter><digit><digit>;`` records. A planted key occurs once; all other records repeat
the other keys. The questions are records too, one after another, each with its true value. So one sequence of tokens contains
the stream and every question, and subject and reference read the same.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ..errors import InputError
from ..runtime.tokenizer import Tokenizer
from .cases import KEYS, RECORD_BYTES, as_prompt
from .metrics import compare_logits

if TYPE_CHECKING:
    from .runners import Logits, TailRunner

#: Shares of the stream before a planted value.
DEPTHS = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99)
#: Values planted at each depth; with 7 depths 28 of 52 keys, so 24 are left for everything else.
PER_DEPTH = 4
#: Tokens of the longest stream that the reference is asked to read: its cost grows with the square of the length.
REFERENCE_CONTEXT = 1 << 16


@dataclass(frozen=True)
class Planted:
    """A value, and the share of the stream before it."""

    depth: float
    key: str
    value: str


@dataclass(frozen=True)
class Stream:
    """The text before the questions, and the questions in the order in which they are asked."""

    text: str
    questions: tuple[Planted, ...]

    @property
    def tail(self) -> str:
        """All questions with their answers."""
        return "".join(f"{planted.key}{planted.value};" for planted in self.questions)


@dataclass(frozen=True)
class DepthFigure:
    """How many of the values at one depth were answered exactly; ``reference`` is None where it was not run."""

    depth: float
    cases: int
    subject: int
    reference: int | None


@dataclass(frozen=True)
class ContextFigure:
    """One context: how many values were asked for and answered; ``reference`` and ``kl_mean`` (nats, over the questions'
    tokens) are None where the reference was not run."""

    context: int
    cases: int
    subject: int
    reference: int | None
    kl_mean: float | None
    depths: list[DepthFigure]


def planted_stream(
    context: int, *, depths: Sequence[float] = DEPTHS, per_depth: int = PER_DEPTH, seed: int = 0
) -> Stream:
    """The longest stream that fits, with its questions, into ``context`` tokens of one byte each.

    Raises:
        InputError: the context is too short for what is planted, or there are more values than keys.
    """
    count = len(depths) * per_depth
    if count > len(KEYS) - 2:
        raise InputError(f"{count} values cannot be planted: there are {len(KEYS)} keys, and two must be left.")
    records = context // RECORD_BYTES - count
    if records < 4 * count:
        raise InputError(
            f"a context of {context} tokens is too short to plant {count} values; give at least {5 * count * RECORD_BYTES}."
        )
    rng = random.Random(f"{seed}:{context}")
    keys = rng.sample(KEYS, len(KEYS))
    planted, others = keys[:count], keys[count:]
    values = {key: f"{rng.randrange(100):02d}" for key in KEYS}
    stream = [rng.choice(others) for _ in range(records)]
    questions, taken = [], set[int]()
    for number, key in enumerate(planted):
        depth = depths[number // per_depth]
        place = min(int(depth * records), records - 1)
        step = 1 if place < records // 2 else -1
        while place in taken:
            place += step
        taken.add(place)
        stream[place] = key
        questions.append(Planted(depth, key, values[key]))
    rng.shuffle(questions)
    return Stream("".join(f"{key}{values[key]};" for key in stream), tuple(questions))


def answered(stream: Stream, tail: Sequence[int], logits: Logits) -> list[bool]:
    """For each question, whether the likeliest tokens were its value.

    Args:
        stream: the questions.
        tail: their tokens, [n], one for each byte of ``stream.tail``.
        logits: [n, V] after each token of the tail.
    """
    best = logits.argmax(axis=-1)
    size = RECORD_BYTES
    # After the key comes the first digit, after it the second.
    return [
        bool(np.isfinite(logits[at : at + 2]).all()) and best[at : at + 2].tolist() == list(tail[at + 1 : at + 3])
        for at in range(0, len(stream.questions) * size, size)
    ]


def measure_depths(
    subject: TailRunner, reference: TailRunner | None, tokenizer: Tokenizer, context: int, *, seed: int = 0
) -> ContextFigure:
    """Ask the subject, and the reference if there is one, for the values planted in a stream of ``context`` tokens.

    Raises:
        InputError: the tokenizer does not give one token per byte, or the context is too short.
    """
    stream = planted_stream(context - len(tokenizer.prefix), seed=seed)
    tokens, tail = as_prompt(tokenizer, stream.text), tokenizer.encode(stream.tail, add_special_tokens=False)
    if len(tail) != len(stream.tail) or len(tokens) != len(tokenizer.prefix) + len(stream.text):
        raise InputError(
            "long contexts are measured on streams of single bytes, but this tokenizer joins bytes into tokens. "
            "Validate without --context."
        )
    mine = subject.tail_logits(tokens, tail)
    theirs = reference.tail_logits(tokens, tail) if reference is not None else None
    right = answered(stream, tail, mine)
    expected = answered(stream, tail, theirs) if theirs is not None else None
    figures = []
    for depth in dict.fromkeys(sorted(planted.depth for planted in stream.questions)):
        at = [number for number, planted in enumerate(stream.questions) if planted.depth == depth]
        known = sum(expected[number] for number in at) if expected is not None else None
        figures.append(DepthFigure(depth, len(at), sum(right[number] for number in at), known))
    kl = None
    if theirs is not None:
        kl = float(compare_logits(theirs[:-1], mine[:-1], np.array(tail[1:])).kl.mean())
    known = sum(expected) if expected is not None else None
    return ContextFigure(context, len(right), sum(right), known, kl, figures)


def largest_loss(figures: Sequence[ContextFigure]) -> float | None:
    """The largest share of values that the reference answers and the subject does not, over contexts; None without any."""
    losses = [(figure.reference - figure.subject) / figure.cases for figure in figures if figure.reference is not None]
    return max(losses, default=None)


def least_answered(figures: Sequence[ContextFigure]) -> int:
    """The fewest values that the reference answers in a context that it reads; 0 without any."""
    return min((figure.reference for figure in figures if figure.reference is not None), default=0)
