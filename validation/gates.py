"""Gates: what a release must hold, each with a threshold and the reason for it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from foldkv.errors import InputError, nearest
from foldkv.export.profiles import HF, SERVED


@dataclass(frozen=True)
class Gate:
    """``metric`` must be at most (``<=``) or at least (``>=``) the threshold."""

    name: str
    metric: str
    comparison: str
    threshold: float
    reason: str


@dataclass(frozen=True)
class Verdict:
    """A gate with the value that was measured."""

    gate: Gate
    value: float

    @property
    def passed(self) -> bool:
        """Whether the gate holds; a value that is not a number never passes."""
        if math.isnan(self.value):
            return False
        within = (
            self.value <= self.gate.threshold if self.gate.comparison == "<=" else self.value >= self.gate.threshold
        )
        return within


DEFAULT_GATES = (
    Gate("finite", "not_finite", "<=", 0, "One NaN or infinite logit means that memory was read which was never written, or an overflow."),
    Gate("kl-mean", "kl_mean", "<=", 1e-6, "In float32 both compute the same function; rounding gives about 1e-10 nats, and bfloat16 weights would give 1e-4."),
    Gate("kl-tail", "kl_p999", "<=", 1e-4, "The mean hides rare tokens; one entry too many or too few shows here first."),
    Gate("top1", "top1_agreement", ">=", 0.999, "Greedy text must be the reference's, up to ties of equal logits."),
    Gate("perplexity", "perplexity_ratio", "<=", 1.001, "0.1 % is below what a change of test text gives, and any real loss is above it."),
    Gate("logits", "logit_error_max", "<=", 5e-3, "Float32 sums in another order differ by about 1e-5; two entries swapped at an exact tie may give more, so the bar leaves room for a tie and none for a wrong entry."),
    Gate("chunks", "chunk_error_max", "<=", 1e-3, "Chunk edges inside a compression window are where deployed engines have lost digits."),
    Gate("layers", "layer_error_max", "<=", 1e-3, "Largest difference of the residual streams after a layer, over their root mean square: float32 gives about 1e-5, and the first layer above the bar is where to look."),
    Gate("retrieval", "retrieval_loss", "<=", 0.01, "Exact values at a distance are what compression puts at risk; one point is the resolution of the default number of cases."),
    Gate("retrieval-test", "retrieval_p", ">=", 0.01, "An exact paired test: fewer than 1 in 100 equally good subjects would lose as many cases."),
)  # fmt: skip

#: ``served`` rounds rows and index to few bits on purpose. Two questions have gates of their own: does the bundle compute
#: the profile (against its oracle), and what does the profile cost (against transformers).
SERVED_GATES = (
    Gate("finite", "not_finite", "<=", 0, "One NaN or infinite logit means that memory was read which was never written, or an overflow."),
    Gate("oracle", "oracle_kl_mean", "<=", 1e-6, "A bundle computes its profile up to values on the border of two codes, which either side may round: that gives 1e-11 to 3e-8 nats, and the whole profile against none 1e-4 and more."),
    Gate("chunks", "chunk_kl_mean", "<=", 1e-6, "Chunk edges inside a compression window are where deployed engines have lost digits; sums in another order move borders of codes as above."),
    Gate("layers", "layer_error_max", "<=", 1e-3, "Of the residual streams against the oracle's, the median token's largest difference over their root mean square: float32 gives about 1e-5, and the first layer above the bar is where to look."),
    Gate("kl-mean", "kl_mean", "<=", 5e-3, "What fp8 rows and an fp4 index cost: 1e-4 to 5e-4 nats on the model of this repository; ten times as much is damage, not rounding."),
    Gate("top1", "top1_agreement", ">=", 0.97, "Rounding changes the likeliest token where two are nearly as likely: 0.3 to 1.6 % of the time on the model of this repository."),
    Gate("perplexity", "perplexity_ratio", "<=", 1.01, "Quantised rows change the mean loss by less than 0.1 % on the model of this repository; 1 % would be seen in use."),
    Gate("topk-overlap", "topk_overlap", ">=", 0.85, "Of the entries that the reference's indexer chooses, the share that the subject chooses too: 92 % on the model of this repository in the worst layer. An fp4 index swaps entries near the last place; a wrong rotation or row swaps most."),
    Gate("mass-recalled", "mass_recalled", ">=", 0.9, "The reference's attention on its entries that falls on those chosen too, in the worst layer: 94 % on the model of this repository, more than the share of the entries, since those that are swapped weigh little."),
    Gate("retrieval", "retrieval_loss", "<=", 0.03, "Exact values at a distance are what quantised rows put at risk; three points are what the default number of cases can tell from none."),
    Gate("retrieval-test", "retrieval_p", ">=", 0.01, "An exact paired test: fewer than 1 in 100 equally good subjects would lose as many cases."),
)  # fmt: skip
LONG_CONTEXT = "long-context"
#: Judged where long contexts were measured and the reference read them too.
_LONG = Gate(LONG_CONTEXT, "long_context_loss", "<=", 0.04, "Of the values planted in the worst context, those that the reference answers and the subject does not: one of 28 is the resolution, and a near tie may fall either way.")  # fmt: skip
PROFILE_GATES = {HF: (*DEFAULT_GATES, _LONG), SERVED: (*SERVED_GATES, _LONG)}


def resolve_gates(overrides: Mapping[str, float], profile: str = HF) -> list[Gate]:
    """The default gates of a profile with some thresholds replaced.

    Raises:
        InputError: an unknown gate, with the nearest known one.
    """
    gates = PROFILE_GATES[profile]
    names = [gate.name for gate in gates]
    for name, value in overrides.items():
        if name not in names:
            raise InputError(f"unknown gate {name!r}{nearest(name, names)}. Gates are {', '.join(names)}.")
        if isinstance(value, bool) or not isinstance(value, (int, float)) or math.isnan(value):
            raise InputError(f"gate {name} has threshold {value!r}; expected a number.")
    return [replace(gate, threshold=float(overrides.get(gate.name, gate.threshold))) for gate in gates]


def judge(gates: list[Gate], metrics: Mapping[str, float]) -> list[Verdict]:
    """Every gate with its measured value; that of long contexts only where they were measured."""
    return [
        Verdict(gate, metrics[gate.metric]) for gate in gates if gate.name != LONG_CONTEXT or gate.metric in metrics
    ]
