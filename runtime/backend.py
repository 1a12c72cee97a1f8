"""What a session needs from a backend: run one chunk over state that stays in place."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Observed:
    """What one call of a chain made from a chunk. The arrays may be overwritten when the observer returns.

    Attributes:
        layer: its layer; None for the embedding.
        slot: the sequence of the chunk; None for all of them at once.
        streams: [slots or 1, S, N, C], what the next call reads; a step of one token may leave out slots before the first and behind the last that
            has one.
        more: outputs that nothing else takes, by name; only graphs for tools have any.
    """

    layer: int | None
    slot: int | None
    streams: FloatArray
    more: Mapping[str, npt.NDArray[Any]] = field(default_factory=dict)


#: Is called after every call of a chain that makes streams.
Observer = Callable[[Observed], None]


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
        observe: Observer | None = None,
    ) -> FloatArray:
        """Feed one chunk and update the state in place.

        Chunks of several tokens go through one sequence after the other, a step of one token for all sequences at once.

        Args:
            input_ids: [B, S]; tokens after ``num_tokens`` are padding.
            positions: [B] tokens that are in the state.
            num_tokens: [B] valid tokens of the chunk, 0 to S, not all of them 0.
            active_context: an upper bound of ``positions + num_tokens``.
            logit_indices: [B, L] offsets in the chunk that get logits.
            trim: return memory that only this chunk needed to the system.
            observe: gets the streams after every call, copied to the host. The run waits for it, and an engine's step is
                enqueued call by call instead of launched as a captured graph; the results are the same.

        Returns:
            Logits [B, L, V] float32, IN A BUFFER THAT THE NEXT RUN OVERWRITES. Rows of sequences without a token mean
            nothing.
        """

    def forget(self) -> None:
        """Clear the last chunk from the buffers of inputs and logits."""

    def close(self) -> None:
        """Free what the executor holds."""


def default_threads() -> int:
    """The processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
