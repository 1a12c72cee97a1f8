"""Figures that compare two models' logits on the same tokens. numpy, float64."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.floating[Any]]
_ROWS = 64


def log_softmax(logits: Floats) -> npt.NDArray[np.float64]:
    """logits [..., V] -> log probabilities [..., V] float64."""
    wide = logits.astype(np.float64)
    wide -= wide.max(axis=-1, keepdims=True)
    result: npt.NDArray[np.float64] = wide - np.log(np.exp(wide).sum(axis=-1, keepdims=True))
    return result


@dataclass(frozen=True)
class TokenFigures:
    """Per predicted token, all [n] float64: KL in nats, the largest logit difference, agreement, losses in nats."""

    kl: npt.NDArray[np.float64]
    logit_error: npt.NDArray[np.float64]
    same_top: npt.NDArray[np.float64]
    loss_reference: npt.NDArray[np.float64]
    loss_subject: npt.NDArray[np.float64]
    delta_p: npt.NDArray[np.float64]


def compare_logits(reference: Floats, subject: Floats, targets: npt.NDArray[np.int64]) -> TokenFigures:
    """Compare logits [n, V] of both models at positions whose next tokens are ``targets`` [n].

    KL is sum p_ref (log p_ref - log p_sub), the direction that llama.cpp's perplexity tool reports; delta_p
    is p_sub - p_ref of the target. A subject that is not finite gives infinite KL and error there.
    """
    return concatenate([_compare(reference[at], subject[at], targets[at]) for at in blocks(len(targets))])


def blocks(rows: int) -> list[slice]:
    """The rows of logits a few at a time: in float64 and with a vocabulary of 129,280 each takes a mebibyte for every step of a formula."""
    return [slice(start, start + _ROWS) for start in range(0, max(rows, 1), _ROWS)]


def _compare(reference: Floats, subject: Floats, targets: npt.NDArray[np.int64]) -> TokenFigures:
    finite = np.asarray(np.isfinite(subject).all(axis=-1))
    safe = np.where(finite[:, None], subject, 0.0)
    ref, sub = log_softmax(reference), log_softmax(safe)
    rows = np.arange(len(targets))
    kl = np.maximum((np.exp(ref) * (ref - sub)).sum(axis=-1), 0.0)
    error = np.abs(reference.astype(np.float64) - safe).max(axis=-1)
    return TokenFigures(
        kl=np.where(finite, kl, np.inf),
        logit_error=np.where(finite, error, np.inf),
        same_top=(finite & (reference.argmax(axis=-1) == safe.argmax(axis=-1))).astype(np.float64),
        loss_reference=-ref[rows, targets],
        loss_subject=np.where(finite, -sub[rows, targets], np.inf),
        delta_p=np.where(finite, np.exp(sub[rows, targets]) - np.exp(ref[rows, targets]), np.nan),
    )


def concatenate(parts: list[TokenFigures]) -> TokenFigures:
    """The figures of several texts as one."""
    names = TokenFigures.__dataclass_fields__
    return TokenFigures(**{name: np.concatenate([getattr(part, name) for part in parts]) for name in names})


#: Names and shares of the quantiles of KL, and of delta p, that llama.cpp's perplexity tool prints.
KL_QUANTILES = {"kl_p999": 0.999, "kl_p99": 0.99, "kl_p95": 0.95, "kl_p90": 0.9, "kl_p50": 0.5, "kl_p10": 0.1, "kl_p5": 0.05, "kl_p1": 0.01, "kl_p01": 0.001}  # fmt: skip
DELTA_QUANTILES = {
    "delta_p_p999": 0.999, "delta_p_p99": 0.99, "delta_p_p95": 0.95, "delta_p_p90": 0.9, "delta_p_p75": 0.75, "delta_p_p50": 0.5,
    "delta_p_p25": 0.25, "delta_p_p10": 0.1, "delta_p_p5": 0.05, "delta_p_p1": 0.01, "delta_p_p01": 0.001,
}  # fmt: skip


def summary(figures: TokenFigures) -> dict[str, float]:
    """The figures that gates read, and all of llama.cpp's table: KL (nats), agreement, perplexities, delta p.

    A name that ends in ``_error`` is the standard error of the one before it, over the tokens; NaN with fewer than two tokens, or where
    the subject is not finite. Errors of functions of means are those of their linear part: ``d exp(x) = exp(x) dx``, and
    ``d sqrt(x) = dx / (2 sqrt(x))``.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        loss_reference, loss_subject = figures.loss_reference.mean(), figures.loss_subject.mean()
        reference, subject = np.exp(loss_reference), np.exp(loss_subject)
        ratio, ratio_error = subject / reference, standard_error(figures.loss_subject - figures.loss_reference)
        squares = np.square(figures.delta_p)
        delta = np.sqrt(squares.mean())
        result = {
            "tokens": float(len(figures.kl)),
            "kl_mean": float(figures.kl.mean()),
            "kl_mean_error": standard_error(figures.kl),
            "kl_max": float(figures.kl.max()),
            **{name: _quantile(figures.kl, share) for name, share in KL_QUANTILES.items()},
            "kl_min": float(figures.kl.min()),
            "top1_agreement": float(figures.same_top.mean()),
            "top1_agreement_error": standard_error(figures.same_top),
            "logit_error_max": float(figures.logit_error.max()),
            "perplexity_reference": float(reference),
            "perplexity_reference_error": float(reference * standard_error(figures.loss_reference)),
            "perplexity_subject": float(subject),
            "perplexity_subject_error": float(subject * standard_error(figures.loss_subject)),
            "loss_correlation": _correlation(figures.loss_reference, figures.loss_subject),
            "log_perplexity_ratio": float(loss_subject - loss_reference),
            "log_perplexity_ratio_error": ratio_error,
            "perplexity_ratio": float(ratio),
            "perplexity_ratio_error": float(ratio * ratio_error),
            "perplexity_difference": float(subject - reference),
            "perplexity_difference_error": standard_error(
                subject * figures.loss_subject - reference * figures.loss_reference
            ),
            "delta_p_mean": float(figures.delta_p.mean()),
            "delta_p_mean_error": standard_error(figures.delta_p),
            "delta_p_max": float(figures.delta_p.max()),
            **{name: _quantile(figures.delta_p, share) for name, share in DELTA_QUANTILES.items()},
            "delta_p_min": float(figures.delta_p.min()),
            "delta_p_rms": float(delta),
            "delta_p_rms_error": standard_error(squares) / (2 * float(delta)) if delta else 0.0,
        }
    return result


def standard_error(values: npt.NDArray[np.float64]) -> float:
    """Of the mean: the sample's standard deviation (n - 1) over the root of n; NaN for fewer than two or infinite values."""
    if len(values) < 2 or not np.isfinite(values).all():
        return math.nan
    return float(values.std(ddof=1) / math.sqrt(len(values)))


def _correlation(one: npt.NDArray[np.float64], other: npt.NDArray[np.float64]) -> float:
    """Pearson's, over tokens; NaN where it is not defined."""
    if not np.isfinite(other).all() or len(one) < 2 or min(one.std(), other.std()) == 0:
        return math.nan
    return float(np.corrcoef(one, other)[0, 1])


def _quantile(values: npt.NDArray[np.float64], share: float) -> float:
    # "higher" never interpolates with infinity.
    return float(np.quantile(values, share, method="higher"))


def mcnemar(reference: npt.NDArray[np.bool_], subject: npt.NDArray[np.bool_]) -> float:
    """One-sided exact McNemar test: the chance of this many losses if subject and reference were equally good.

    Counts cases that only one of them solves; under the hypothesis each such case is a fair coin.
    """
    lost, won = int((reference & ~subject).sum()), int((~reference & subject).sum())
    trials = lost + won
    return 1.0 if trials == 0 else sum(math.comb(trials, k) for k in range(lost, trials + 1)) / 2**trials


def wilson(solved: int, cases: int, z: float = 1.96) -> tuple[float, float]:
    """The 95 % Wilson score interval of a share."""
    if not cases:
        return 0.0, 1.0
    share, square = solved / cases, z * z
    centre = (share + square / (2 * cases)) / (1 + square / cases)
    half = z / (1 + square / cases) * ((share * (1 - share) / cases + square / (4 * cases**2)) ** 0.5)
    return max(0.0, centre - half), min(1.0, centre + half)
