"""What goes through the layers of a reference, and what is kept of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
from torch import Tensor

from .selection import Ints, Selection

Floats = npt.NDArray[np.float32]


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
        keep_streams: keep the streams after every layer.
        streams: kept, [n, N, C] by layer.
        selections: kept, by layer with an indexer.
        entries: likewise, the entries [n, k] that an indexer chose itself, of a job with ``given``.
    """

    tokens: Sequence[int]
    edges: Sequence[int] | None = None
    chosen: Mapping[int, Ints] | None = None
    given: Sequence[Floats] | None = None
    keys: Mapping[int, Tensor] | None = None
    keep_streams: bool = False
    streams: list[Floats] = dataclasses.field(default_factory=list)
    selections: dict[int, Selection] = dataclasses.field(default_factory=dict)
    entries: dict[int, Ints] = dataclasses.field(default_factory=dict)
