"""Find where two models diverge: compare the residual streams of the bundle and the reference after every layer.

The streams are what flows from segment to segment, so every bundle has them. A layer is compared twice: with the reference's streams
there, to which all layers before it have added their errors, and with what the reference makes of the bundle's own streams before
the layer, which is the error of this layer alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Streams = npt.NDArray[np.float32]
#: Relative error above which a layer counts as different from the reference's. Float32 in another
#: order of summation gives 1e-6 to 1e-5 after a few layers; the smallest planted damage gives above 1e-2.
DIVERGED = 1e-3
#: A layer in bfloat16 may add this many times what PyTorch's own bfloat16 adds there, beside what float32 may.
FACTOR = 2.0
#: A token has moved if its own error is this many times the typical token's limit: it took another expert or another entry.
MOVED = 5.0
#: Share of the tokens that may move in a layer beside those that move in PyTorch's own bfloat16.
MAY_MOVE = 0.05


@dataclass(frozen=True)
class LayerFigure:
    """What a layer computes, against the reference. Errors are largest differences of a token's streams after the layer, over the
    reference's root mean square there.

    Attributes:
        layer: its number.
        kind: of its attention.
        error: with all errors of the layers before it: the worst token's; in the profile ``served`` the typical one's.
        own: of this layer alone, the typical (median) token's.
        moved: share of the tokens whose own error is more than ``MOVED`` times the limit.
        yardstick: ``own`` of PyTorch's bfloat16 on the same streams; None if float32 is expected.
        limit: of ``own`` where there is a yardstick, else of ``error``.
        moved_limit: of ``moved`` where there is a yardstick.
    """

    layer: int
    kind: str
    error: float
    own: float
    moved: float
    yardstick: float | None = None
    limit: float = DIVERGED
    moved_limit: float = MAY_MOVE

    @property
    def excess(self) -> float:
        """Its error over its limit."""
        if self.yardstick is None:
            return self.error / self.limit
        return max(self.own / self.limit, self.moved / self.moved_limit)

    @property
    def diverged(self) -> bool:
        """Whether the layer computes something else than the reference. NaN counts as diverged."""
        return not self.excess <= 1


def token_errors(expected: Streams, actual: Streams) -> npt.NDArray[np.float64]:
    """Streams [n, N, C] -> [n], the largest difference of every token over the root mean square of all expected ones.

    Infinite where the actual ones are not finite.
    """
    scale = math.sqrt(float(np.mean(np.square(expected, dtype=np.float64)))) or 1.0
    largest = np.abs(actual - expected).max(axis=tuple(range(1, expected.ndim))).astype(np.float64) / scale
    return np.where(np.isfinite(largest), largest, np.inf)


def layer_figure(
    layer: int, kind: str, total: npt.NDArray[np.float64], own: npt.NDArray[np.float64],
    yardstick: npt.NDArray[np.float64] | None, *, typical: bool,
) -> LayerFigure:  # fmt: skip
    """The figure of a layer from errors by token [n].

    Args:
        layer: its number.
        kind: of its attention.
        total: with the errors of the layers before it.
        own: of this layer alone.
        yardstick: of PyTorch's bfloat16 there, alone; None if float32 is expected.
        typical: let ``error`` be the median token's, for computations that round to few bits, where a single token may
            correctly round either way.
    """
    error = float(np.median(total) if typical else total.max())
    limit = DIVERGED if yardstick is None else DIVERGED + FACTOR * float(np.median(yardstick))
    may_move = MAY_MOVE if yardstick is None else MAY_MOVE + FACTOR * _moved(yardstick, limit)
    return LayerFigure(
        layer, kind, error if np.isfinite(total).all() else math.inf, float(np.median(own)), _moved(own, limit),
        None if yardstick is None else float(np.median(yardstick)), limit, may_move,
    )  # fmt: skip


def _moved(errors: npt.NDArray[np.float64], limit: float) -> float:
    return float((errors > MOVED * limit).mean())


def first_divergence(figures: Sequence[LayerFigure]) -> int | None:
    """The first layer that diverges, or None."""
    return next((figure.layer for figure in figures if figure.diverged), None)
