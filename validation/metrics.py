"""Figures that compare two models' logits on the same tokens. numpy, float64."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.floating[Any]]


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


def summary(figures: TokenFigures) -> dict[str, float]:
    """The figures that gates read: KL statistics (nats), agreement, perplexities and their ratio, RMS of delta p."""
    with np.errstate(over="ignore"):
        reference, subject = np.exp(figures.loss_reference.mean()), np.exp(figures.loss_subject.mean())
    return {
        "tokens": float(len(figures.kl)),
        "kl_mean": float(figures.kl.mean()),
        "kl_p50": _quantile(figures.kl, 0.50),
        "kl_p99": _quantile(figures.kl, 0.99),
        "kl_p999": _quantile(figures.kl, 0.999),
        "kl_max": float(figures.kl.max()),
        "top1_agreement": float(figures.same_top.mean()),
        "logit_error_max": float(figures.logit_error.max()),
        "perplexity_reference": float(reference),
        "perplexity_subject": float(subject),
        "perplexity_ratio": float(subject / reference),
        "delta_p_rms": float(np.sqrt(np.mean(np.square(figures.delta_p)))),
    }


def _quantile(values: npt.NDArray[np.float64], share: float) -> float:
    # "higher" never interpolates with infinity.
    return float(np.quantile(values, share, method="higher"))


def mcnemar(reference: npt.NDArray[np.bool_], subject: npt.NDArray[np.bool_]) -> float:
    """One-sided exact McNemar test: the chance of this many losses if subject and reference were equally good.

    Counts cases that only one of them solves; under the hypothesis each such case is a fair coin.
    """
    from math import comb

    lost, won = int((reference & ~subject).sum()), int((~reference & subject).sum())
    trials = lost + won
    return 1.0 if trials == 0 else sum(comb(trials, k) for k in range(lost, trials + 1)) / 2**trials


def wilson(solved: int, cases: int, z: float = 1.96) -> tuple[float, float]:
    """The 95 % Wilson score interval of a share."""
    if not cases:
        return 0.0, 1.0
    share, square = solved / cases, z * z
    centre = (share + square / (2 * cases)) / (1 + square / cases)
    half = z / (1 + square / cases) * ((share * (1 - share) / cases + square / (4 * cases**2)) ** 0.5)
    return max(0.0, centre - half), min(1.0, centre + half)
