"""The key-value stream that the model is trained on and measured with: exact values, far apart.

A stream is a run of 4-byte records ``<key><digit><digit>;``. A key is one ASCII letter or digit-free
symbol of ``KEYS``; within a stream it always has the same value, so the two digits after a key that
occurred before are determined, and those after a new key are not. Nothing else in the stream helps.
"""

from __future__ import annotations

import random
import string

KEYS = string.ascii_letters
RECORD_BYTES = 4


def record(key: str, value: int) -> str:
    """One record; ``value`` is 0 to 99."""
    return f"{key}{value:02d};"


def training_stream(rng: random.Random, records: int) -> tuple[str, list[bool]]:
    """A stream and, for each byte, whether it is a digit that an earlier record determines.

    The pool of keys varies from 4 to all, so that distances between occurrences do too.
    """
    pool = rng.sample(KEYS, rng.choice([4, 8, 16, 32, len(KEYS)]))
    values = {key: rng.randrange(100) for key in pool}
    text, known, seen = [], [], set()
    for _ in range(records):
        key = rng.choice(pool)
        text.append(record(key, values[key]))
        known += [False, key in seen, key in seen, False]
        seen.add(key)
    return "".join(text), known


def retrieval_case(rng: random.Random, distance: int) -> tuple[str, str]:
    """A prompt that ends with a key, and the two digits that followed its only earlier occurrence.

    ``distance`` is in bytes from that occurrence to the question, a multiple of 4; two dozen records stand
    before it. Every other key of the pool occurs in between, with values of its own.
    """
    if distance % RECORD_BYTES or distance < RECORD_BYTES:
        raise ValueError(f"distance is {distance}; expected a positive multiple of {RECORD_BYTES}")
    target, *others = rng.sample(KEYS, len(KEYS))
    values = {key: rng.randrange(100) for key in KEYS}
    before = [rng.choice(others) for _ in range(24)]
    between = [rng.choice(others) for _ in range(distance // RECORD_BYTES - 1)]
    text = "".join(record(key, values[key]) for key in [*before, target, *between])
    return text + target, f"{values[target]:02d}"
