"""Compare the compressed entries that the subject attends to with those of the reference.

Sets are compared, never their order. Only queries that have more entries than places count. ``overlap`` is the share of the
reference's entries that the subject chose too; ``mass_recalled`` is the share of the reference's attention on its entries
that falls on these.

Where scores tie at the last place, several sets are equally good, and two correct implementations may choose differently. In
small or random models ReLU makes many scores exactly zero, hundreds of them in one query. :func:`settle_ties` then lets the
reference take the one of its equally good sets that is closest to the subject's. The reference's own scores always put that
set first, so a subject that chose a worse entry is still found.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.integer]
Floats = npt.NDArray[np.floating]
#: How it is known what a subject's indexers chose (inside.py).
OBSERVED, RECOMPUTED = "observed", "recomputed"


@dataclass(frozen=True)
class Selection:
    """The reference's choice in one layer.

    Attributes:
        chosen: entries [n, k], -1 for none, after ties were settled.
        mass: attention [n, E] float64 on every entry, summed over heads.
        tied: [n] bool, queries whose last place was tied.
    """

    chosen: Ints
    mass: npt.NDArray[np.float64]
    tied: npt.NDArray[np.bool_]


@dataclass(frozen=True)
class SelectionFigure:
    """One layer over all queries that had a choice, ``tied`` of them with a tie at the last place; shares are 1 if none had."""

    layer: int
    queries: int
    tied: int
    overlap: float
    overlap_least: float
    mass_recalled: float
    mass_recalled_least: float


def mass_of(weights: Sequence[Any]) -> npt.NDArray[np.float64]:
    """Attention [H, n, E], as tensors or arrays, summed over heads: [n, E] float64. It is all that a comparison needs of it."""
    total = np.zeros(weights[0].shape)
    for head in weights:
        total += np.asarray(head)
    return total


def visible_scores(scores: Floats, ratio: int) -> Floats:
    """Scores [n, E] of an indexer, -inf where an entry is not closed yet: query t sees entry i if i < (t + 1) // ratio."""
    closed = (np.arange(len(scores)) + 1)[:, None] // ratio
    return np.where(np.arange(scores.shape[-1]) >= closed, np.float32(-np.inf), scores)


def settle_ties(scores: Floats, own: Ints, preferred: Ints) -> tuple[Ints, npt.NDArray[np.bool_]]:
    """The choice with ties at the last place settled in favour of ``preferred``, and which queries had a tie.

    Args:
        scores: [n, E]; -inf where an entry is not visible.
        own: [n, k] entries with the k largest scores, -1 for none.
        preferred: [n, places] entries, -1 for none.

    Returns:
        Entries [n, k], changed only where the k-th score equals the score of an entry that was not chosen; and [n] bool.
    """
    count, places = own.shape
    if not places:
        return own, np.zeros(count, bool)
    full = (own >= 0).all(axis=1)
    last = np.where(full, np.take_along_axis(scores, np.maximum(own, 0), axis=1).min(axis=1), np.inf)[:, None]
    tied = full & ((scores >= last).sum(axis=1) > places)
    level, above = scores == last, scores > last
    # On the same level preferred entries come first, then chosen ones, then the rest.
    rank = 4 * above + level * (1 + _members(own, scores.shape[1]) + 2 * _members(preferred, scores.shape[1]))
    best = np.argsort(-np.minimum(rank, 4), axis=1, kind="stable")[:, :places]
    return np.where(tied[:, None], best, own), tied


def as_entries(members: npt.NDArray[np.bool_]) -> Ints:
    """members [n, E] -> the entries of every query [n, most of a query], -1 after the last one."""
    places = int(members.sum(axis=1).max(initial=0))
    order = np.argsort(~members, axis=1, kind="stable")[:, :places]
    return np.where(np.take_along_axis(members, order, axis=1), order, -1)


def _members(chosen: Ints, entries: int) -> npt.NDArray[np.int64]:
    """chosen [n, k] -> [n, entries], 1 where an entry is among them."""
    table = np.zeros((len(chosen), entries + 1), np.int64)
    np.put_along_axis(table, np.where((chosen >= 0) & (chosen < entries), chosen, entries), 1, axis=1)
    return table[:, :entries]


def compare_selections(
    expected: Sequence[Mapping[int, Selection]], actual: Sequence[Mapping[int, Ints]], ratios: Mapping[int, int]
) -> list[SelectionFigure]:
    """One figure per layer, over several texts.

    Args:
        expected: per text, the reference's choice by layer.
        actual: per text, the subject's entries [n, places] by layer.
        ratios: tokens per entry by layer.
    """
    figures = []
    for layer, ratio in ratios.items():
        overlaps: list[float] = []
        masses: list[float] = []
        tied = sum(int(theirs[layer].tied.sum()) for theirs in expected)
        for theirs, ours in zip(expected, actual, strict=True):
            overlap, mass = _one_text(theirs[layer], ours[layer], ratio)
            overlaps += overlap
            masses += mass
        figures.append(
            SelectionFigure(
                layer,
                len(overlaps),
                tied,
                _mean(overlaps),
                min(overlaps, default=1.0),
                _mean(masses),
                min(masses, default=1.0),
            )
        )
    return figures


def _one_text(theirs: Selection, ours: Ints, ratio: int) -> tuple[list[float], list[float]]:
    """Overlap and recalled mass of every query that had a choice."""
    overlaps, masses = [], []
    places = ours.shape[1]
    for query, (wanted, found) in enumerate(zip(theirs.chosen, ours, strict=True)):
        if (query + 1) // ratio <= places:
            continue
        wanted = wanted[wanted >= 0]
        common = wanted[np.isin(wanted, found)]
        mass = theirs.mass[query]
        overlaps.append(len(common) / len(wanted))
        masses.append(float(mass[common].sum() / mass[wanted].sum()))
    return overlaps, masses


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if values else 1.0
