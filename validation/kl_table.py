"""The table that llama.cpp's ``llama-perplexity --kl-divergence`` prints, from the figures of metrics.py.

A quantile here is a value that was measured: the smallest that is not below the share. llama.cpp interpolates between two.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from .metrics import DELTA_QUANTILES, KL_QUANTILES


@dataclass(frozen=True)
class Row:
    """A line of the table: its title, the metric, and the metric with its standard error (None if it has none)."""

    title: str
    metric: str
    error: str | None = None
    percent: bool = False


def _quantiles(words: str, names: Mapping[str, float], *, percent: bool = False) -> tuple[Row, ...]:
    titles = {share: "Median" if share == 0.5 else f"{100 * share:.1f} %" for share in names.values()}
    return tuple(Row(f"{titles[share]} {words}", name, percent=percent) for name, share in names.items())


#: Its three parts, in llama.cpp's order; the bundle is Q, the reference is the base.
TABLE = {
    "Perplexity": (
        Row("Mean PPL(Q)", "perplexity_subject", "perplexity_subject_error"),
        Row("Mean PPL(base)", "perplexity_reference", "perplexity_reference_error"),
        Row("Cor(ln(PPL(Q)), ln(PPL(base)))", "loss_correlation", percent=True),
        Row("Mean ln(PPL(Q)/PPL(base))", "log_perplexity_ratio", "log_perplexity_ratio_error"),
        Row("Mean PPL(Q)/PPL(base)", "perplexity_ratio", "perplexity_ratio_error"),
        Row("Mean PPL(Q)-PPL(base)", "perplexity_difference", "perplexity_difference_error"),
    ),
    "KL divergence, nats": (
        Row("Mean KLD", "kl_mean", "kl_mean_error"),
        Row("Maximum KLD", "kl_max"),
        *_quantiles("KLD", KL_QUANTILES),
        Row("Minimum KLD", "kl_min"),
    ),
    "Probability of the token that follows": (
        Row("Mean Δp", "delta_p_mean", "delta_p_mean_error", percent=True),
        Row("Maximum Δp", "delta_p_max", percent=True),
        *_quantiles("Δp", DELTA_QUANTILES, percent=True),
        Row("Minimum Δp", "delta_p_min", percent=True),
        Row("RMS Δp", "delta_p_rms", "delta_p_rms_error", percent=True),
        Row("Same top p", "top1_agreement", "top1_agreement_error", percent=True),
    ),
}
#: Every metric that the table shows.
METRICS = frozenset(name for rows in TABLE.values() for row in rows for name in (row.metric, row.error) if name)
