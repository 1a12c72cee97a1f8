"""What a session needs from a backend: run one chunk over state that stays in place."""

from __future__ import annotations

import os
from typing import Protocol

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float32]


class Executor(Protocol):
    """What a session needs from a backend."""

    def run(
        self,
        input_ids: IntArray,
        positions: IntArray,
        num_tokens: IntArray,
        active_context: int,
        logit_indices: IntArray,
        *,
        trim: bool = False,
    ) -> FloatArray:
        """Feed one chunk and update the state in place.

        Args:
            input_ids: [B, S]; tokens after ``num_tokens`` are padding.
            positions: [B] tokens that are in the state.
            num_tokens: [B] valid tokens of the chunk, 0 to S.
            active_context: an upper bound of ``positions + num_tokens``.
            logit_indices: [B, L] offsets in the chunk that get logits.
            trim: return memory that only this chunk needed to the system.

        Returns:
            Logits [B, L, V] float32, IN A BUFFER THAT THE NEXT RUN OVERWRITES.
        """

    def forget(self) -> None:
        """Clear the last chunk from the buffers of inputs and logits."""

    def close(self) -> None:
        """Free what the executor holds."""


def default_threads() -> int:
    """The processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
