"""From logits to a token: greedy, or drawn with temperature, top-k and top-p from a seeded generator.

The draw of a request depends only on its logits, the seed and the request's number, never on the rest
of the batch.
"""

from __future__ import annotations

import math
import numbers
from dataclasses import dataclass
from typing import TypeGuard

import numpy as np
import numpy.typing as npt

from ..errors import FoldkvError, InputError


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. The default is greedy: the largest logit, the lowest id among equals.

    Attributes:
        temperature: 0 is greedy; otherwise logits are divided by it.
        top_k: keep the k largest logits (the lowest ids among equals); None keeps all.
        top_p: keep the smallest set of most probable tokens whose probability reaches this, at least one; 1 keeps all.
        seed: starts the generator; the same seed gives the same tokens.

    Raises:
        InputError: a value is out of its range.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not _is_number(self.temperature) or not 0 <= self.temperature < math.inf:
            raise InputError(f"temperature must be a finite number of 0 or more, got {self.temperature!r}.")
        if self.top_k is not None and (type(self.top_k) is not int or self.top_k < 1):
            raise InputError(f"top_k must be an integer of 1 or more, or None for all tokens, got {self.top_k!r}.")
        if not _is_number(self.top_p) or not 0 < self.top_p <= 1:
            raise InputError(f"top_p must be greater than 0 and at most 1, got {self.top_p!r}.")
        if type(self.seed) is not int or self.seed < 0:
            raise InputError(f"seed must be an integer of 0 or more, got {self.seed!r}.")


class Sampler:
    """Chooses the tokens of one request, one after the other."""

    def __init__(self, sampling: Sampling, request: int = 0) -> None:
        """``request`` is the number of the request; requests with the same seed draw independently."""
        self._sampling = sampling
        self._generator = np.random.Generator(np.random.PCG64([sampling.seed, request]))

    def __call__(self, logits: npt.NDArray[np.float32]) -> int:
        """The next token for logits [V].

        Raises:
            FoldkvError: the logits have NaN or +inf, or only -inf: the model cannot be trusted.
        """
        if not math.isfinite(float(logits.max())):
            raise FoldkvError(
                "the logits are not finite (NaN or infinite values): the model or its state is damaged. "
                "Validate the bundle with `foldkv validate`."
            )
        if self._sampling.temperature == 0:
            return int(logits.argmax())
        tokens, probabilities = distribution(logits, self._sampling)
        edges = probabilities.cumsum()
        drawn = edges.searchsorted(self._generator.random() * edges[-1], side="right")
        # Rounding may put the draw on the last edge itself.
        return int(tokens[min(int(drawn), len(tokens) - 1)])


def distribution(
    logits: npt.NDArray[np.float32], sampling: Sampling
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """The tokens that may be drawn, most probable first, and their probabilities (sum 1), for logits [V].

    The order of the filters is temperature, top-k, top-p; equal logits are ordered by token id.
    """
    if sampling.temperature == 0:
        return np.array([logits.argmax()], np.int64), np.ones(1)
    tokens = _largest(logits, sampling.top_k)
    with np.errstate(over="ignore"):  # a tiny temperature makes the others -inf, which is right
        scaled = (logits[tokens].astype(np.float64) - float(logits.max())) / sampling.temperature
    weights = np.exp(scaled)
    probabilities = weights / weights.sum()
    if sampling.top_p < 1:
        # The token that crosses top_p is kept, so at least one token is.
        kept = int((probabilities.cumsum() < sampling.top_p).sum()) + 1
        tokens, probabilities = tokens[:kept], probabilities[:kept]
    possible = probabilities > 0
    tokens, probabilities = tokens[possible], probabilities[possible]
    return tokens, probabilities / probabilities.sum()


def _largest(logits: npt.NDArray[np.float32], count: int | None) -> npt.NDArray[np.int64]:
    """Ids of the ``count`` largest logits, largest first, lower ids first among equals."""
    candidates = np.arange(len(logits))
    if count is not None and count < len(logits):
        # Only what reaches the k-th largest value needs sorting, not the whole vocabulary.
        least = np.partition(logits, len(logits) - count)[len(logits) - count]
        candidates = np.flatnonzero(logits >= least)
    order = np.argsort(-logits[candidates], kind="stable")
    return candidates[order][:count]


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


#: The most likely token, always.
GREEDY = Sampling()
