"""From logits to a token: greedy, or drawn with temperature, top-k, top-p and min-p from a seeded generator.

The draw of a request depends only on its logits, its own tokens, the seed and the request's number, never on the rest of the batch.
Names and formulas are vLLM's, and so is the order: bias, penalties, what may come next at all, temperature, min-p, top-k, top-p.
"""

from __future__ import annotations

import math
import numbers
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TypeGuard

import numpy as np
import numpy.typing as npt

from ..errors import FoldkvError, InputError, short

#: Least and most of the repetition penalty. Logits are in float32, where 1 / 1e-50 is infinite.
PENALTIES = (0.01, 100.0)
#: The largest number of float32.
_LARGEST = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. The default is greedy: the largest logit, the lowest id among equals.

    Attributes:
        temperature: 0 is greedy; otherwise logits are divided by it.
        top_k: keep the k largest logits (the lowest ids among equals); None keeps all.
        top_p: keep the smallest set of most probable tokens whose probability reaches this, at least one; 1 keeps all.
        min_p: keep tokens that are at least this times as probable as the most probable one; 0 keeps all.
        presence_penalty: is subtracted once from the logit of every token that the answer has; -2 to 2.
        frequency_penalty: is subtracted from it as often as the answer has the token; -2 to 2.
        repetition_penalty: divides a logit above 0, and multiplies one below, of every token of the prompt or the answer; 1 changes
            nothing; 0.01 to 100.
        logit_bias: is added to the logits of these tokens, by id; finite in float32.
        seed: starts the generator; the same seed gives the same tokens.

    Raises:
        InputError: a value is out of its range.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int = 0

    def __post_init__(self) -> None:
        if not _is_number(self.temperature) or not 0 <= float(self.temperature) < math.inf:
            raise InputError(f"temperature must be a finite number of 0 or more, got {self.temperature!r}.")
        if self.top_k is not None and (type(self.top_k) is not int or self.top_k < 1):
            raise InputError(f"top_k must be an integer of 1 or more, or None for all tokens, got {self.top_k!r}.")
        if not _is_number(self.top_p) or not 0 < self.top_p <= 1:
            raise InputError(f"top_p must be greater than 0 and at most 1, got {self.top_p!r}.")
        if not _is_number(self.min_p) or not 0 <= self.min_p <= 1:
            raise InputError(f"min_p must be from 0 to 1, got {self.min_p!r}.")
        for name in ("presence_penalty", "frequency_penalty"):
            value = getattr(self, name)
            if not _is_number(value) or not -2 <= value <= 2:
                raise InputError(f"{name} must be from -2 to 2, got {value!r}.")
        least, most = PENALTIES
        if not _is_number(self.repetition_penalty) or not least <= float(self.repetition_penalty) <= most:
            raise InputError(f"repetition_penalty must be from {least:g} to {most:g}, got {self.repetition_penalty!r}.")
        if not isinstance(self.logit_bias, Mapping) or not all(
            type(token) is int and token >= 0 and _is_number(value) and abs(float(value)) <= _LARGEST
            for token, value in self.logit_bias.items()
        ):
            raise InputError(
                f"logit_bias must be a table from token ids to numbers that are finite in float32, got {short(self.logit_bias)}."
            )
        if type(self.seed) is not int or self.seed < 0:
            raise InputError(f"seed must be an integer of 0 or more, got {self.seed!r}.")


class Sampler:
    """Chooses the tokens of one request, one after the other."""

    def __init__(self, sampling: Sampling, request: int = 0, prompt: Iterable[int] = ()) -> None:
        """Start before the first token.

        Args:
            sampling: how tokens are chosen.
            request: number of the request; requests with the same seed draw independently.
            prompt: the tokens before the answer, for the repetition penalty.
        """
        self._sampling = sampling
        self._generator = np.random.Generator(np.random.PCG64([sampling.seed, request]))
        self._counts: Counter[int] = Counter()
        self._seen = set(prompt) if sampling.repetition_penalty != 1 else set[int]()
        self._bias = np.array([*sampling.logit_bias], np.int64), np.array([*sampling.logit_bias.values()], np.float32)

    def __call__(self, logits: npt.NDArray[np.float32], allowed: npt.NDArray[np.bool_] | None = None) -> int:
        """The next token for logits [V]; it counts as part of the answer from now on.

        Args:
            logits: of the model; they are not changed.
            allowed: [V], the tokens that may come next; None allows all.

        Raises:
            FoldkvError: the logits have NaN or +inf, or only -inf: the model cannot be trusted.
            InputError: no token is allowed or none of those has a finite logit, bias and penalties make a logit infinite, or a token of
                ``logit_bias`` is not in the vocabulary.
        """
        token = self._chosen(logits, allowed)
        self._counts[token] += 1
        return token

    def _chosen(self, logits: npt.NDArray[np.float32], allowed: npt.NDArray[np.bool_] | None) -> int:
        if not math.isfinite(float(logits.max())):
            raise FoldkvError(
                "the logits are not finite (NaN or infinite values): the model or its state is damaged. "
                "Validate the bundle with `foldkv validate`."
            )
        with np.errstate(over="ignore", invalid="ignore"):  # told in words below
            logits = self._changed(logits)
        if not math.isfinite(float(logits.max())):
            raise InputError(
                "logit_bias and repetition_penalty together make logits that are not finite. Give values nearer to 0 and 1."
            )
        if allowed is not None:
            if not allowed.any():
                raise InputError("no token may come next, so the answer cannot go on.")
            logits = np.where(allowed, logits, np.float32(-np.inf))
            if not math.isfinite(float(logits.max())):
                raise InputError("no token that may come next has a finite logit, so the answer cannot go on.")
        if self._sampling.temperature == 0:
            return int(logits.argmax())
        tokens, probabilities = distribution(logits, self._sampling)
        edges = probabilities.cumsum()
        drawn = edges.searchsorted(self._generator.random() * edges[-1], side="right")
        # Rounding may put the draw on the last edge itself.
        return int(tokens[min(int(drawn), len(tokens) - 1)])

    def _changed(self, logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """The logits with bias and penalties: a copy if there are any."""
        settings = self._sampling
        tokens, values = self._bias
        answered = settings.presence_penalty or settings.frequency_penalty
        if not len(tokens) and not answered and settings.repetition_penalty == 1:
            return logits
        logits = logits.copy()
        if len(tokens):
            if tokens.max() >= len(logits):
                raise InputError(
                    f"logit_bias has the token {int(tokens.max())}; the vocabulary has the ids 0 to {len(logits) - 1}."
                )
            logits[tokens] += values
        if settings.repetition_penalty != 1:
            seen = np.array(sorted(self._seen | self._counts.keys()), np.int64)
            theirs, penalty = logits[seen], np.float32(settings.repetition_penalty)
            logits[seen] = np.where(theirs > 0, theirs / penalty, theirs * penalty)
        if answered and self._counts:
            own = np.array([*self._counts], np.int64)
            counts = np.array([*self._counts.values()], np.float32)
            logits[own] -= settings.frequency_penalty * counts + np.float32(settings.presence_penalty)
        return logits


@dataclass(frozen=True)
class TokenLogprob:
    """How probable the model found a token, before anything that :class:`Sampling` does.

    Attributes:
        token: its id.
        logprob: natural logarithm of its probability: log_softmax of the logits.
        top: the most probable tokens and their logarithms, most probable first.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


def token_logprob(logits: npt.NDArray[np.float32], token: int, alternatives: int) -> TokenLogprob:
    """The logarithm of a token's probability for logits [V], and those of the ``alternatives`` most probable tokens."""
    values = logits.astype(np.float64)
    values -= values.max()
    total = math.log(np.exp(values).sum())
    top = _largest(logits, alternatives) if alternatives else ()
    return TokenLogprob(
        int(token), float(values[token]) - total, tuple((int(one), float(values[one]) - total) for one in top)
    )


def distribution(
    logits: npt.NDArray[np.float32], sampling: Sampling
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """The tokens that may be drawn, most probable first, and their probabilities (sum 1), for logits [V].

    The order of the filters is temperature, min-p, top-k, top-p; equal logits are ordered by token id. Bias and penalties, which
    depend on the tokens before, are not in it.
    """
    if sampling.temperature == 0:
        return np.array([logits.argmax()], np.int64), np.ones(1)
    tokens = _largest(logits, sampling.top_k)
    with np.errstate(over="ignore"):  # a tiny temperature makes the others -inf, which is right
        scaled = (logits[tokens].astype(np.float64) - float(logits.max())) / sampling.temperature
    weights = np.exp(scaled)
    if sampling.min_p:  # the most probable token weighs 1
        tokens, weights = tokens[weights >= sampling.min_p], weights[weights >= sampling.min_p]
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
    """Whether it is a number that a float can be; an integer may be too large for one."""
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        return False
    try:
        float(value)
    except OverflowError:
        return False
    return True


#: The most likely token, always.
GREEDY = Sampling()
