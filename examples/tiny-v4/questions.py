"""Documents with questions that the model is trained on, in the formats of foldkv's cases of behaviour.

A case of ``foldkv validate`` asks one question at the end of a document. Here each document is followed by as many questions as
fit, so that one sequence teaches several times. The random numbers are those of the training run; no seed of a case is used.
Every maker gives the text and, for each byte, whether it belongs to an answer.
"""

from __future__ import annotations

import itertools
import random
import string
from collections.abc import Callable

from stream import KEYS, RECORD_BYTES, record

from foldkv.validation.behaviour_cases import NOUNS, PARAMETERS, VERBS, invented_names

#: A document with its questions: pieces of text, and whether each is an answer.
Pieces = list[tuple[str, bool]]


def offset_stream(rng: random.Random, length: int) -> Pieces:
    """A stream as in ``stream.py`` whose beginning is cut off, in the midst of a record if need be.

    In half of the streams some keys are rare, so that their values have to be found from far back.
    """
    pool = rng.sample(KEYS, rng.choice((4, 8, 16, 32, len(KEYS))))
    values = {key: rng.randrange(100) for key in pool}
    often = (
        [rng.expovariate(1) ** 2 if rng.random() < 0.5 else 1.0 for _ in pool]
        if rng.random() < 0.5
        else [1.0] * len(pool)
    )
    cut = rng.randrange(RECORD_BYTES)
    seen = set[str]()
    pieces: Pieces = []
    for key in rng.choices(pool, often, k=length // RECORD_BYTES + 2):
        whole = record(key, values[key])
        pieces += [(char, at in (1, 2) and key in seen) for at, char in enumerate(whole)]
        if len(pieces) > RECORD_BYTES or not cut:
            seen.add(key)
    return pieces[cut:]


def dense(rng: random.Random, length: int) -> Pieces:
    """Records of different keys, then the same keys in another order."""
    units = min(len(KEYS), rng.randrange(length // 16, length // 5) + 1)
    keys = rng.sample(KEYS, units)
    values = {key: rng.randrange(100) for key in keys}
    pieces: Pieces = [("".join(record(key, values[key]) for key in keys), False)]
    for key in rng.sample(keys, units):
        pieces += [(key, False), (f"{values[key]:02d}", True), (";", False)]
    return pieces


def words(rng: random.Random, length: int) -> Pieces:
    """A stream of records whose keys are words of one to four letters, written in one of many ways."""
    count, size = rng.choice((3, 4, 6, 8, 12)), rng.choice((1, 2, 2, 3, 4))
    if rng.random() < 0.5:
        names = invented_names(rng, count)
    else:
        names = list({"".join(rng.choices(string.ascii_lowercase, k=size)): None for _ in range(count)})
    values = {name: rng.randrange(10, 100) for name in names}
    middle, end = rng.choice(("", " ", " = ", " = ", ": ", " is ")), rng.choice((";", "\n", "\n", ".\n", " "))
    seen = set[str]()
    pieces: Pieces = []
    for name in rng.choices(names, k=length // (len(names[0]) + len(middle) + 3) + 1):
        pieces += [(name + middle, False), (str(values[name]), name in seen), (end, False)]
        seen.add(name)
    return pieces


def _functions(rng: random.Random, count: int) -> list[tuple[str, str]]:
    series = rng.choice((1, 1, 1, 2))
    functions = []
    for place in rng.sample(range(len(VERBS) * len(NOUNS) * series), count):
        at, pair = divmod(place, len(VERBS) * len(NOUNS))
        name = f"{VERBS[pair % 10]}_{NOUNS[pair // 10]}" + (f"_{at}" if at else "")
        first, second = rng.sample(PARAMETERS, 2)
        functions.append((name, f"{first}, {second}={rng.randrange(10, 100)})"))
    return functions


def code(rng: random.Random, length: int) -> Pieces:
    """Functions, then their signatures in comments; or a stream of both."""
    functions = _functions(rng, rng.randrange(2, max(3, length * 8 // 10 // 39) + 1))
    if rng.random() < 0.5:
        seen = set[str]()
        pieces: Pieces = []
        for name, rest in rng.choices(functions, k=length // 28 + 1):
            if rng.random() < 0.8:
                pieces += [(f"# {name}(", False), (rest, name in seen), ("\n", False)]
            else:
                pieces += [(f"def {name}(", False), (rest, name in seen), (":\n    pass\n\n", False)]
            seen.add(name)
        return pieces
    pieces = [("".join(f"def {name}({rest}:\n    pass\n\n" for name, rest in functions), False)]
    for name, rest in rng.sample(functions, len(functions)):
        pieces += [(f"# {name}(", False), (rest, True), ("\n", False)]
    return pieces


_CLAUSE = ["", "The", "licensee", "shall", "give", "notice", "of", "a", "change", "within"][1:]


def clauses(rng: random.Random, length: int) -> Pieces:
    """Near-duplicate clauses, then their terms or their numbers. In half of the documents the clauses begin in their midst."""
    kept = rng.randrange(len(_CLAUSE)) if rng.random() < 0.5 else len(_CLAUSE)
    phrase = "".join(f" {word}" for word in _CLAUSE[len(_CLAUSE) - kept :])
    units = rng.randrange(2, min(9, max(3, length * 7 // 10 // (len(phrase) + 12))) + 1)
    terms = rng.sample(range(10, 100), units)
    pieces: Pieces = [(f"{number}.{phrase} {term} days.\n", False) for number, term in enumerate(terms, 1)]
    by_number = rng.random() < 0.5
    for at in rng.sample(range(units), units):
        if by_number:
            pieces += [(f"Clause {at + 1}:", False), (f" {terms[at]} days", True), (".\n", False)]
        else:
            pieces += [(f"{terms[at]} days: clause", False), (f" {at + 1}.", True), ("\n", False)]
    return pieces


def hops(rng: random.Random, length: int) -> Pieces:
    """Chains of up to two references to a value, then the values of names of any place in a chain."""
    depth = rng.choice((1, 1, 1, 2, 2, 3))
    line = 10 + 12 * (depth - 1)
    units = rng.randrange(2, max(3, length * 6 // 10 // line) + 1)
    names = invented_names(rng, depth * units)
    chains = [names[at : at + depth] for at in range(0, len(names), depth)]
    values = [rng.randrange(10, 100) for _ in chains]
    lines = [f"{one} = {other}\n" for chain in chains for one, other in itertools.pairwise(chain)]
    lines += [f"{chain[-1]} = {value}\n" for chain, value in zip(chains, values, strict=True)]
    rng.shuffle(lines)
    pieces: Pieces = [("".join(lines), False)]
    for at in rng.sample(range(units), units):
        place = 0 if rng.random() < 0.6 else rng.randrange(depth)
        pieces += [(f"So {chains[at][place]} is", False), (f" {values[at]}", True), (".\n", False)]
    return pieces


def aggregation(rng: random.Random, length: int) -> Pieces:
    """Lists of words, each followed by the word that occurs most often in it."""
    pieces: Pieces = []
    size = 0
    while size < length:
        units = rng.choice((5, rng.randrange(5, max(6, (length - 20) // 5))))
        words = invented_names(rng, 8)
        most = max(2, units // 3)
        kinds = min(7, rng.randrange(1, 8) if units < 18 else 7)
        rest = (
            [words[1 + at % kinds] for at in range(units - most)]
            if units >= 12
            else rng.sample(words[1:], min(7, units - most))
        )
        stream = [words[0]] * most + rest
        rng.shuffle(stream)
        text = f"{' '.join(stream)}\nMost often:"
        pieces += [(text, False), (f" {words[0]}", True), ("\n\n", False)]
        size += len(text) + 7
    return pieces


#: Makers by the name of the kind of behaviour; the stream stands for the sweep.
MAKERS: dict[str, Callable[[random.Random, int], Pieces]] = {
    "sweep": offset_stream,  "dense": dense, "words": words, "code": code, "clauses": clauses, "hops": hops, "aggregation": aggregation,
}  # fmt: skip


def document(rng: random.Random, kind: str, length: int) -> tuple[list[int], list[bool]]:
    """``length`` bytes of a document of a kind, cut at its end, and whether each byte is of an answer."""
    pieces = MAKERS[kind](rng, length)
    while sum(len(text) for text, _ in pieces) < length:
        pieces += MAKERS[kind](rng, length)
    text = "".join(text for text, _ in pieces)
    answers = [answer for text, answer in pieces for _ in text]
    return list(text.encode())[:length], answers[:length]
