"""Snapshots of one slot whose rows follow from their tokens, so that a wrong one shows."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from foldkv.runtime.bundle import StateMeaning
from foldkv.runtime.snapshots import SlotSnapshot

MEANING = StateMeaning(weights="0123abcd", profile="hf", foldkv="0.1.0", rows="dense (float32; 4567cdef)")
#: How state tensors are stored.
STORED = (np.uint8, np.int8, np.uint16, np.float16, np.float32, np.int32)


def snapshot(tokens: Sequence[int], *, row: int = 8, salt: int = 0, meaning: StateMeaning = MEANING) -> SlotSnapshot:
    """A snapshot after ``tokens`` with one tensor of each type, ``row`` values per token, and one without rows."""
    return _made(tuple(tokens), row, salt, meaning)


@functools.lru_cache(maxsize=256)
def _made(tokens: tuple[int, ...], row: int, salt: int, meaning: StateMeaning) -> SlotSnapshot:
    random = np.random.default_rng([salt, len(tokens), *tokens])
    rows = []
    for kind in STORED:
        width = row * np.dtype(kind).itemsize
        values: np.ndarray[Any, Any] = np.frombuffer(random.bytes(len(tokens) * width), kind).reshape(len(tokens), row)
        rows.append(values)
    empty = np.zeros((0, 5), np.float16)
    empty.flags.writeable = False
    return SlotSnapshot(meaning, len(tokens), None, (*rows, empty))


def equal(one: SlotSnapshot, other: SlotSnapshot) -> bool:
    """Whether two snapshots are the same to the bit."""
    return (one.meaning, one.position, one.pending, len(one.rows)) == (
        other.meaning, other.position, other.pending, len(other.rows),
    ) and all(
        (mine.dtype, mine.shape, mine.tobytes()) == (theirs.dtype, theirs.shape, theirs.tobytes())
        for mine, theirs in zip(one.rows, other.rows, strict=True)
    )  # fmt: skip
