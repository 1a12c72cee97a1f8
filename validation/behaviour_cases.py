"""Seeded cases of behaviour, one kind for each way in which long contexts fail in use; needle tests do not predict them.

Every case is a synthetic document with a question at its end, and one answer that only the document can give. Where the form of the
answer is not plain from the document, worked questions stand before the real one, so that a base model needs no instruction. Sizes
are in tokens of the checkpoint's own tokenizer.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..errors import InputError
from ..runtime.tokenizer import Tokenizer
from .cases import KEYS, RECORD_BYTES, as_prompt, split_answer

DENSE, CODE, CLAUSES, HOPS, AGGREGATION, SWEEP = "dense", "code", "clauses", "hops", "aggregation", "sweep"
#: What each kind asks for, in the order of the report.
KINDS = {
    DENSE: "one of many different key-value pairs: an exact value",
    CODE: "the exact signature of a named function among similar ones",
    CLAUSES: "near-duplicate licence clauses: the term of one of them, or which one has a term",
    HOPS: "a value at the end of two references to other names",
    AGGREGATION: "the word that occurs most often",
    SWEEP: "an exact value, with prompts of every length mod 4 and around multiples of 128 and of the window",
}
#: Lengths of the sweep, from a multiple of 128 or of the window: with the edge itself they are every residue mod 4.
OFFSETS = (-1, 0, 1, 2)
EDGE = 128


@dataclass(frozen=True)
class Question:
    """A case in words: a document with its question, the answer, and the chance that a guess among the document's answers is right."""

    prompt: str
    answer: str
    guess: float


@dataclass(frozen=True)
class BehaviourCase:
    """A case in tokens.

    Attributes:
        kind: one of ``KINDS``.
        groups: of a sweep, what it is reported by: residue, place at an edge, distance.
        tokens: what is fed: the prompt and all but the last token of the answer.
        answer: tokens that should be the likeliest ones, one after another.
        guess: the chance of a guess.
    """

    kind: str
    groups: tuple[str, ...]
    tokens: list[int]
    answer: list[int]
    guess: float


def _name(rng: random.Random, syllables: int = 2) -> str:
    return "".join(rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") for _ in range(syllables))


def invented_names(rng: random.Random, count: int) -> list[str]:
    """Different invented words, longer ones if there are many."""
    syllables = 2 if count < 1000 else 3 if count < 50_000 else 4
    found = dict[str, None]()
    while len(found) < count:
        found[_name(rng, syllables)] = None
    return list(found)


def _dense(rng: random.Random, units: int) -> Question:
    """``<key><digit><digit>;`` records of different keys: letters while they suffice, as in cases.py, else words."""
    keys = rng.sample(KEYS, units) if units <= len(KEYS) else invented_names(rng, units)
    values = [rng.randrange(100) for _ in keys]
    at = rng.randrange(units)
    stream = "".join(f"{key}{value:02d};" for key, value in zip(keys, values, strict=True))
    return Question(stream + keys[at], f"{values[at]:02d}", 1 / units)


#: Functions are named ``<verb>_<noun>``, with a number if there are many.
VERBS = ("load", "save", "sort", "merge", "count", "parse", "check", "write", "find", "split")
NOUNS = ("rows", "items", "names", "paths", "pages", "words", "users", "files", "lines", "keys")
#: What their parameters are named.
PARAMETERS = ("path", "size", "limit", "depth", "start", "mode", "text", "step", "width", "order")


def _code(rng: random.Random, units: int) -> Question:
    places = rng.sample(range(len(VERBS) * len(NOUNS) * math.ceil(units / 50)), units)
    functions = []
    for place in places:
        series, pair = divmod(place, len(VERBS) * len(NOUNS))
        name = f"{VERBS[pair % 10]}_{NOUNS[pair // 10]}" + (f"_{series}" if series else "")
        first, second = rng.sample(PARAMETERS, 2)
        functions.append((name, f"{first}, {second}={rng.randrange(10, 100)})"))
    file = "".join(f"def {name}({rest}:\n    pass\n\n" for name, rest in functions)
    shown, asked = rng.sample(functions, 2)
    return Question(f"{file}# {shown[0]}({shown[1]}\n# {asked[0]}(", asked[1], 1 / units)


def _clauses(rng: random.Random, units: int) -> Question:
    terms = rng.sample(range(10, 10 + max(90, 2 * units)), units)
    text = "".join(
        f"{number}. The licensee shall give notice of a change within {term} days.\n"
        for number, term in enumerate(terms, 1)
    )
    shown, asked = rng.sample(range(units), 2)
    if rng.random() < 0.5:
        return Question(f"{text}Clause {shown + 1}: {terms[shown]} days.\nClause {asked + 1}:", f" {terms[asked]} days", 1 / units)  # fmt: skip
    return Question(f"{text}{terms[shown]} days: clause {shown + 1}.\n{terms[asked]} days: clause", f" {asked + 1}.", 1 / units)  # fmt: skip


def _hops(rng: random.Random, units: int) -> Question:
    names = invented_names(rng, 3 * units)
    chains = [names[at : at + 3] for at in range(0, len(names), 3)]
    values = [rng.randrange(10, 100) for _ in chains]
    lines = [f"{one} = {other}\n" for chain in chains for one, other in itertools.pairwise(chain)]
    lines += [f"{chain[2]} = {value}\n" for chain, value in zip(chains, values, strict=True)]
    rng.shuffle(lines)
    shown, asked = rng.sample(range(units), 2)
    return Question(
        f"{''.join(lines)}So {chains[shown][0]} is {values[shown]}.\nSo {chains[asked][0]} is",
        f" {values[asked]}",
        1 / units,
    )


def _aggregation(rng: random.Random, units: int) -> Question:
    """The asked word is a third of all, every other one has an equal part of the rest."""
    words = invented_names(rng, 8)
    often, most = words[:2], max(2, units // 3)
    rest = [words[1 + at % 7] for at in range(units - most)]
    stream = [often[0]] * most + rest
    rng.shuffle(stream)
    one, other, third = words[5:]
    return Question(
        f"{one} {other} {other} {third} {other}\nMost often: {other}\n\n{' '.join(stream)}\nMost often:",
        f" {often[0]}",
        1 / len(words),
    )


#: A maker, and the fewest units (pairs, functions, clauses, chains, words) with which its question makes sense.
_MAKERS: dict[str, tuple[Callable[[random.Random, int], Question], int]] = {
    DENSE: (_dense, 8), CODE: (_code, 3), CLAUSES: (_clauses, 3), HOPS: (_hops, 3), AGGREGATION: (_aggregation, 18),
}  # fmt: skip


def question(kind: str, seed: str, tokenizer: Tokenizer, tokens: int) -> Question:
    """The case of a kind and a seed with the most units whose prompt and answer fit into ``tokens``.

    Raises:
        InputError: not even the fewest units fit.
    """
    make, least = _MAKERS[kind]

    def made(units: int) -> Question:
        return make(random.Random(f"{seed}:{kind}"), units)

    def fits(units: int) -> bool:
        return size(units) <= tokens

    def size(units: int) -> int:
        found = made(units)
        return len(as_prompt(tokenizer, found.prompt + found.answer))

    if not fits(least):
        raise InputError(
            f"a case of the kind {kind} takes {size(least)} tokens with this tokenizer; {tokens} were given (--case-tokens)."
        )
    low, high = least, 2 * least
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    # Letters are the form that small models know; words take over where letters leave half of the room empty.
    if kind == DENSE and len(KEYS) < low < 2 * len(KEYS):
        low = len(KEYS)
    return made(low)


def kind_cases(tokenizer: Tokenizer, per_kind: int, tokens: int, *, seed: int) -> list[BehaviourCase]:
    """``per_kind`` cases of every kind but the sweep, of at most ``tokens`` tokens."""
    cases = []
    for kind in _MAKERS:
        for number in range(per_kind):
            found = question(kind, f"{seed}:{number}", tokenizer, tokens)
            fed, answer = split_answer(tokenizer, found.prompt, found.answer)
            cases.append(BehaviourCase(kind, (), fed, answer, found.guess))
    return cases


def sweep_lengths(window: int, tokens: int, prefix: int = 0) -> list[tuple[int, str]]:
    """Prompt lengths around edges of up to ``tokens`` tokens, and the names of their places in the report.

    The ``prefix`` tokens that every prompt begins with count, as they do for windows and edges. A prompt holds two records after them.
    """
    found: dict[int, str] = {}
    for edge in sorted({window, 2 * window, EDGE, 2 * EDGE, tokens // EDGE * EDGE}):
        if prefix + 2 * RECORD_BYTES < edge <= tokens:
            of = " and ".join(word for word, size in ((str(EDGE), EDGE), ("the window", window)) if edge % size == 0)
            found |= {edge + offset: f"a multiple of {of} {offset:+d}" for offset in OFFSETS}
    return sorted(found.items())


def sweep_cases(
    tokenizer: Tokenizer, window: int, tokens: int, distances: Sequence[int], per_length: int, *, seed: int
) -> list[BehaviourCase]:
    """Streams as in cases.py whose prompts have chosen lengths: the beginning is cut off, in the midst of a record if need be.

    The cases of a length take the distances that fit in turn.
    """
    cases = []
    prefix = list(tokenizer.prefix)
    for place, (length, edge) in enumerate(sweep_lengths(window, tokens, len(prefix))):
        room = length - len(prefix)
        fitting = [one for one in distances if one + 2 * RECORD_BYTES <= room]
        fitting = fitting or [max(1, room // RECORD_BYTES - 2) * RECORD_BYTES]
        for number in range(per_length):
            distance = fitting[(place + place // len(OFFSETS) + number) % len(fitting)]
            rng = random.Random(f"{seed}:sweep:{length}:{number}")
            target, *others = rng.sample(KEYS, len(KEYS))
            values = {key: f"{rng.randrange(100):02d}" for key in KEYS}
            # A record has at least one token, so this is enough to cut from.
            before = max(0, length - distance // RECORD_BYTES) + 1
            keys = [rng.choice(others) for _ in range(before)]
            keys += [target, *(rng.choice(others) for _ in range(distance // RECORD_BYTES - 1))]
            stream = "".join(f"{key}{values[key]};" for key in keys)
            fed, answer = split_answer(tokenizer, stream + target, values[target])
            prompt = fed[: len(fed) - len(answer) + 1]
            kept = prompt[len(prompt) - room :]
            groups = (f"length mod 4 = {length % 4}", edge, f"distance {distance}")
            cases.append(BehaviourCase(SWEEP, groups, [*prefix, *kept, *answer[:-1]], answer, 1 / 100))
    return cases
