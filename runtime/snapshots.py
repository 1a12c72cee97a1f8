"""Copies of a session's state, of one slot or of all. Their rows are read-only, so that many users can share one copy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy.typing as npt

from .bundle import StateMeaning


@dataclass(frozen=True)
class SlotSnapshot:
    """The state of one sequence, independent of what the session does next.

    Only rows in use are copied, so its size depends on the tokens held, not on the planned context.

    Attributes:
        meaning: what its rows mean. A session takes rows of its own meaning only.
        position: tokens in the caches.
        pending: the token that was given out but not fed, or None.
        rows: by state tensor, in the order of the bundle's table [used, width]; read-only.
    """

    meaning: StateMeaning
    position: int
    pending: int | None
    rows: tuple[npt.NDArray[Any], ...]

    @property
    def bytes(self) -> int:
        """Bytes of the copied rows."""
        return sum(rows.nbytes for rows in self.rows)


@dataclass(frozen=True)
class Snapshot:
    """A copy of a session's state, for :meth:`Session.restore`; independent of what the session does next.

    Only rows in use are copied, so its size depends on the tokens held, not on the planned context.

    Attributes:
        meaning: what its rows mean: weights, profile, version and row formats. Bundles for other machines may have the same.
        context: tokens that each slot could hold.
        positions: tokens in the caches of each slot.
        pending: the token of each slot that was given out but not fed, or None.
        rows: by slot and state tensor [used, width].
    """

    meaning: StateMeaning
    context: int
    positions: tuple[int, ...]
    pending: tuple[int | None, ...]
    rows: tuple[tuple[npt.NDArray[Any], ...], ...]

    @property
    def bytes(self) -> int:
        """Bytes of the copied rows."""
        return sum(rows.nbytes for slot in self.rows for rows in slot)
