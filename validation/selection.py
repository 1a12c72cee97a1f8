"""Which compressed entries the subject attends to, against those of the reference.

Sets are compared, never their order: scores tie at zero, and either of two equal entries is right. Only queries that have
more entries to choose from than places count. ``overlap`` is the share of the reference's entries that the subject chose
too; ``mass_recalled`` is the share of the reference's attention on its entries that lies on those.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.integer]
Floats = npt.NDArray[np.floating]


@dataclass(frozen=True)
class Selection:
    """The reference's choice in one layer: entries [n, k] (-1: none) and attention weights [H, n, E] on all entries."""

    chosen: Ints
    weights: Floats


@dataclass(frozen=True)
class SelectionFigure:
    """One layer over all queries that had a choice; shares are 1 where none had."""

    layer: int
    queries: int
    overlap: float
    overlap_least: float
    mass_recalled: float
    mass_recalled_least: float


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
        for theirs, ours in zip(expected, actual, strict=True):
            overlap, mass = _one_text(theirs[layer], ours[layer], ratio)
            overlaps += overlap
            masses += mass
        figures.append(
            SelectionFigure(
                layer,
                len(overlaps),
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
        weights = theirs.weights[:, query].astype(np.float64).sum(axis=0)
        overlaps.append(len(common) / len(wanted))
        masses.append(float(weights[common].sum() / weights[wanted].sum()))
    return overlaps, masses


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if values else 1.0
