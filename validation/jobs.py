"""What goes through the layers of a reference, and what is kept of it."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from ..artifact import sha256_json
from .selection import Ints, Selection

Floats = npt.NDArray[np.float32]
#: Tokens that go through the layers in one pass: each takes streams, attention's output and the answers of its experts, 272 KiB
#: at V4-Flash's width (room.py).
TOKENS_AT_ONCE = 8192


@dataclasses.dataclass
class Job:
    """A text that goes through the layers, and what is to be kept of it.

    Attributes:
        tokens: [n].
        edges: where chunks end, with transformers' own cache between them; None for one chunk without a cache.
        chosen: by layer, a subject's entries [n, places]; ties of the indexer are settled in their favour, and the choice is kept in
            ``selections``. A layer that is not in it keeps its own choice. None keeps no choice. For a job of one chunk.
        given: a subject's streams [n, N, C] after every layer: each layer takes those after the layer before it, and not what that
            layer made of them.
        keys: by layer, values of index rows [entries, D] that the indexer takes instead of its own.
        deployment: of the oracle: as which deployment it rounds (deployments.py); "" as none.
        keep_streams: keep the streams after every layer.
        keep_rows: keep the rows of a subject's state.
        last: tokens at the end whose logits are wanted; None for all.
        streams: kept, [n, N, C] by layer.
        selections: kept, by layer with an indexer.
        entries: likewise, the entries [n, k] that an indexer chose itself: of a job with ``given``, or of a subject whose segments say it.
        rows: kept, by state tensor [used, width], as they are stored.
    """

    tokens: Sequence[int]
    edges: Sequence[int] | None = None
    chosen: Mapping[int, Ints] | None = None
    given: Sequence[Floats] | None = None
    keys: Mapping[int, Tensor] | None = None
    deployment: str = ""
    keep_streams: bool = False
    keep_rows: bool = False
    last: int | None = None
    streams: list[Floats] = dataclasses.field(default_factory=list)
    selections: dict[int, Selection] = dataclasses.field(default_factory=dict)
    entries: dict[int, Ints] = dataclasses.field(default_factory=dict)
    rows: dict[str, npt.NDArray[Any]] = dataclasses.field(default_factory=dict)

    @functools.cached_property
    def key(self) -> str:
        """A digest of what is asked."""
        rows = [_digest(one) for one in (self.chosen, self.given, self.keys)]
        return sha256_json(
            [
                list(self.tokens),
                list(self.edges or ()),
                *rows,
                self.deployment,
                self.keep_streams,
                self.keep_rows,
                self.last,
            ]
        )


def _digest(values: Mapping[int, Any] | Sequence[Any] | None) -> str | None:
    if values is None:
        return None
    rows = values.items() if isinstance(values, Mapping) else enumerate(values)
    return sha256_json(
        [[key, hashlib.sha256(np.ascontiguousarray(value).tobytes()).hexdigest()] for key, value in rows]
    )


def in_batches(jobs: Sequence[Job]) -> Iterator[list[Job]]:
    """Jobs in order, as many together as may be in memory; one at least."""
    batch: list[Job] = []
    for job in jobs:
        if batch and sum(len(one.tokens) for one in (*batch, job)) > TOKENS_AT_ONCE:
            yield batch
            batch = []
        batch.append(job)
    if batch:
        yield batch
