"""Gates: what a release must meet, each with a threshold, the reason for it, and the evidence that it needs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from ..backends import FLOAT32
from ..errors import InputError, nearest
from ..export.contract.profiles import HF, SERVED

HOLDS, FAILS, NOT_INFORMATIVE = "holds", "fails", "not informative"
LOOSENED, TIGHTENED = "loosened", "tightened"
#: What a gate's figure comes from; two reports can be compared only if it is the same.
TEXT, RETRIEVAL, CONTEXTS, BEHAVIOUR = "text", "retrieval", "contexts", "behaviour"


@dataclass(frozen=True)
class Need:
    """The evidence that a gate needs before its value says anything.

    Attributes:
        metric: the metric that counts it.
        least: how much of it is needed, or a function of the gate's threshold.
        what: the words after the number.
        remedy: what to change if there is less.
    """

    metric: str
    least: float | Callable[[float], float]
    what: str
    remedy: str

    def least_for(self, threshold: float) -> float:
        """What a gate with this threshold needs."""
        return self.least(threshold) if callable(self.least) else self.least

    def words(self, threshold: float) -> str:
        """For example ``32 predicted tokens``."""
        return f"{self.least_for(threshold):g} {self.what}"

    def lack(self, threshold: float, metrics: Mapping[str, float]) -> str | None:
        """Why the gate says nothing with these metrics, or None. A missing metric counts as 0."""
        found = metrics.get(self.metric, 0.0)
        if found >= self.least_for(threshold):
            return None
        return f"measured on {found:.3g} {self.what}; it needs {self.least_for(threshold):g}: {self.remedy}"


@dataclass(frozen=True)
class Yardstick:
    """How far PyTorch's own bfloat16 is from float32 on the same inputs, which says what a bundle in bfloat16 may be.

    Attributes:
        metric: of PyTorch's bfloat16 against float32.
        factor: how many times its distance from the perfect value is allowed, beside what float32 is allowed.
        perfect: the value of a perfect copy.
        sense: the limit must stay on the perfect value's side of this, else the gate says nothing.
    """

    metric: str
    factor: float
    perfect: float
    sense: float

    def limit(self, float32: float, metrics: Mapping[str, float]) -> float:
        """The threshold in bfloat16, from the one in float32; NaN if there is no yardstick."""
        distance = abs(metrics.get(self.metric, math.nan) - self.perfect)
        return float32 + self.factor * (distance if float32 >= self.perfect else -distance)

    def lack(self, limit: float) -> str | None:
        """Why a limit says nothing, or None."""
        if math.isfinite(limit) and abs(limit - self.perfect) <= abs(self.sense - self.perfect):
            return None
        return (
            f"PyTorch's own bfloat16 is too far from float32 on these texts: the limit would be {limit:.3g}, and beyond {self.sense:g} "
            "it says nothing. Measure on texts like those that the model was trained on."
        )


@dataclass(frozen=True)
class Gate:
    """``metric`` must be at most (``<=``) or at least (``>=``) the threshold, ``default`` unless another was ``given``.

    Thresholds are from 0 to below ``beyond`` (``<=``), or above 0 and up to 1 (``>=``, a share): others never fail or never hold.
    """

    name: str
    metric: str
    comparison: Literal["<=", ">="]
    default: float
    reason: str
    needs: tuple[Need, ...]
    of: str = TEXT
    beyond: float = math.inf
    given: float | None = None
    yardstick: Yardstick | None = None

    def measured(self, metrics: Mapping[str, float]) -> Gate:
        """The gate with the default that the yardstick gives, if it has one."""
        return self if self.yardstick is None else replace(self, default=self.yardstick.limit(self.default, metrics))

    def lack(self, metrics: Mapping[str, float]) -> str | None:
        """Why its value says nothing with these metrics, or None."""
        if self.yardstick is not None and self.given is None and (lack := self.yardstick.lack(self.default)):
            return lack
        return next((lack for need in self.needs if (lack := need.lack(self.threshold, metrics))), None)

    @property
    def threshold(self) -> float:
        """The threshold in use."""
        return self.default if self.given is None else self.given

    @property
    def changed(self) -> str | None:
        """Whether the threshold is looser or tighter than the default; None if it is the default."""
        if self.threshold == self.default:
            return None
        return LOOSENED if (self.threshold > self.default) == (self.comparison == "<=") else TIGHTENED

    def at(self, threshold: object) -> Gate:
        """The gate with another threshold.

        Raises:
            InputError: not a number, or one with which the gate could never fail or never hold.
        """
        low = self.comparison == ">="
        expected = "a number above 0 and up to 1" if low else f"a number of 0 or more and below {self.beyond:g}"
        if isinstance(threshold, bool) or not isinstance(threshold, (int, float)):
            raise InputError(f"gate {self.name} has threshold {threshold!r}; expected {expected}.")
        if not (0 < threshold <= 1 if low else 0 <= threshold < self.beyond):
            raise InputError(
                f"gate {self.name} has threshold {threshold!r}; expected {expected}. With others it could never fail, or never hold."
            )
        return replace(self, given=float(threshold))


@dataclass(frozen=True)
class Verdict:
    """A gate with its measured value (None if nothing was measured), and why the value says nothing (None if it does)."""

    gate: Gate
    value: float | None
    lack: str | None = None

    @property
    def word(self) -> str:
        """``holds``, ``fails`` or ``not informative``. A value that is not a number fails. A failure needs no more evidence, but
        a limit in which to fail."""
        if self.value is None or math.isnan(self.gate.threshold):
            return NOT_INFORMATIVE
        within = (
            self.value <= self.gate.threshold if self.gate.comparison == "<=" else self.value >= self.gate.threshold
        )
        if not within:
            return FAILS
        return HOLDS if self.lack is None else NOT_INFORMATIVE

    @property
    def passed(self) -> bool:
        """Whether the gate holds on enough evidence."""
        return self.word == HOLDS


#: A fault in one token of ten is seen among this many with a chance of 97 %.
_TOKENS = Need("tokens", 32, "predicted tokens", "give a longer text or more of it (--text, --text-tokens, --texts).")
_WINDOWS = Need("text_windows", 2, "windows of the largest compression ratio in a text", "give a longer text, or more tokens of it (--text, --text-tokens).")  # fmt: skip
_ON_TEXT = (_TOKENS, _WINDOWS)
_CHOICE = (
    Need("queries_with_choice", 32, "queries with more entries than places, in the worst layer", "give more tokens of a text (--text-tokens)."),
)  # fmt: skip
#: Values that the reference must answer. With fewer, even the loss of all could be chance, at 1 in 100.
_LEAST_ANSWERED = 7
_RETRIEVED = (
    Need("retrieval_answered", _LEAST_ANSWERED, "values that the reference answers", "give more cases, shorter distances (--cases-per-distance, --distance), or a model that retrieves."),
    Need("retrieval_reference", 0.1, "of all values answered by the reference (guessing answers 0.01)", "give shorter distances (--distance), or a model that retrieves."),
)  # fmt: skip
#: The same for a test with another threshold: with ``n`` losses and no win its p is ``2 ** -n``.
_TESTED = replace(_RETRIEVED[0], least=lambda threshold: math.floor(-math.log2(threshold)) + 1)
_LONG_ANSWERED = (
    Need("long_context_answered", _LEAST_ANSWERED, "values that the reference answers in the worst context", "give shorter ones (--context), or a model that retrieves there."),
)  # fmt: skip

DEFAULT_GATES = (
    Gate("finite", "not_finite", "<=", 0, "One NaN or infinite logit means an overflow, or that unwritten memory was read.", _ON_TEXT),
    Gate("kl-mean", "kl_mean", "<=", 1e-6, "In float32 both compute the same function; rounding gives about 1e-10 nats, and bfloat16 weights would give 1e-4.", _ON_TEXT),
    Gate("kl-tail", "kl_p999", "<=", 1e-4, "The mean hides rare tokens; one entry too many or too few shows here first.", _ON_TEXT),
    Gate("top1", "top1_agreement", ">=", 0.999, "Greedy text must equal the reference's, except where logits tie.", _ON_TEXT),
    Gate("perplexity", "perplexity_ratio", "<=", 1.001, "0.1 % is below what a change of test text gives, and any real loss is above it.", _ON_TEXT),
    Gate("logits", "logit_error_max", "<=", 5e-3, "Float32 sums in another order differ by about 1e-5; the bar is 500 times that, and a wrong entry is above it.", _ON_TEXT),
    Gate("chunks", "chunk_error_max", "<=", 1e-3, "Deployed engines have lost digits at chunk edges inside a compression window.", _ON_TEXT),
    Gate("restore", "restore_error_max", "<=", 0, "A snapshot that is restored, and a slot that takes back one of two drafts, must give the same steps the same bits; rings and carries that stayed as they were answer from the text after it.", _ON_TEXT),
    Gate("layers", "layer_error_max", "<=", 1e-3, "Largest difference of the residual streams after a layer, over their root mean square: float32 gives about 1e-5, and the first layer above the bar is where to look.", _ON_TEXT),
    Gate("retrieval", "retrieval_loss", "<=", 0.01, "Compression puts exact values at a distance at risk; one point is the resolution of the default number of cases.", _RETRIEVED, RETRIEVAL, 1),
    Gate("retrieval-test", "retrieval_p", ">=", 0.01, "An exact paired test: fewer than 1 in 100 equally good subjects would lose as many cases.", (_TESTED, _RETRIEVED[1]), RETRIEVAL),
)  # fmt: skip

#: ``served`` rounds rows and index to few bits on purpose. Two questions have gates of their own: does the bundle compute
#: the profile (against its oracle), and what does the profile cost (against transformers).
SERVED_GATES = (
    Gate("finite", "not_finite", "<=", 0, "One NaN or infinite logit means an overflow, or that unwritten memory was read.", _ON_TEXT),
    Gate("oracle", "oracle_kl_mean", "<=", 1e-6, "A bundle computes its profile, but values on the border of two codes may round either way: that gives 1e-11 to 3e-8 nats. Leaving out the profile gives 1e-4 and more.", _ON_TEXT),
    Gate("chunks", "chunk_kl_mean", "<=", 1e-6, "Deployed engines have lost digits at chunk edges inside a compression window. Sums in another order move values across borders of codes, as above.", _ON_TEXT),
    Gate("restore", "restore_error_max", "<=", 0, "A snapshot that is restored, and a slot that takes back one of two drafts, must give the same steps the same bits; rings and carries that stayed as they were answer from the text after it.", _ON_TEXT),
    Gate("layers", "layer_error_max", "<=", 1e-3, "The median token's largest difference of the residual streams from the oracle's, over their root mean square: float32 gives about 1e-5, and the first layer above the bar is where to look.", _ON_TEXT),
    Gate("kl-mean", "kl_mean", "<=", 5e-3, "fp8 rows and an fp4 index cost 1e-4 to 1.2e-3 nats on the models that this repository has had; several times as much is damage, not rounding.", _ON_TEXT),
    Gate("top1", "top1_agreement", ">=", 0.97, "Rounding changes the likeliest token where two are nearly as likely: 0.3 to 1.6 % of the time on the model of this repository.", _ON_TEXT),
    Gate("perplexity", "perplexity_ratio", "<=", 1.01, "Quantised rows change the mean loss by less than 0.1 % on the model of this repository; 1 % would be noticed in use.", _ON_TEXT),
    Gate("topk-overlap", "topk_overlap", ">=", 0.85, "The share of the entries chosen by the reference's indexer that the subject chooses too: 92 % on the model of this repository in the worst layer. An fp4 index swaps entries near the last place; a wrong rotation or row swaps most.", _CHOICE),
    Gate("mass-recalled", "mass_recalled", ">=", 0.9, "The share of the reference's attention on its entries that falls on entries which the subject chose too, in the worst layer: 95 % on the model of this repository. That is more than the overlap, because swapped entries weigh little.", _CHOICE),
    Gate("retrieval", "retrieval_loss", "<=", 0.03, "Quantised rows put exact values at a distance at risk; three points are the smallest loss that the default number of cases can tell from none.", _RETRIEVED, RETRIEVAL, 1),
    Gate("retrieval-test", "retrieval_p", ">=", 0.01, "An exact paired test: fewer than 1 in 100 equally good subjects would lose as many cases.", (_TESTED, _RETRIEVED[1]), RETRIEVAL),
)  # fmt: skip
_ON_SWEEP = (Need("sweep_lengths", 8, "prompts of chosen lengths", "give more tokens for the sweep (--case-tokens)."),)
#: Judged if cases of behaviour were asked for.
_BEHAVIOUR = Gate("behaviour", "behaviour_p", ">=", 0.01, "An exact paired test over all cases of behaviour and of the sweep: fewer than 1 in 100 equally good subjects would lose as many. Each kind has its own line in the report.", (replace(_TESTED, metric="behaviour_answered", what="cases that the reference answers", remedy="give more cases (--cases-per-kind, --sweep-cases), or a model that answers them."),), BEHAVIOUR)  # fmt: skip
_SWEEP = Gate("sweep", "sweep_kl_max", "<=", 1e-4, "Deployed engines have lost digits for prompts of one residue mod 4 alone. Compared are the tokens of the answers, for every residue and around multiples of 128 and of the window; rounding gives about 1e-10 nats.", _ON_SWEEP, BEHAVIOUR)  # fmt: skip
_SERVED_SWEEP = replace(_SWEEP, metric="sweep_oracle_kl", default=1e-4, reason="Deployed engines have lost digits for prompts of one residue mod 4 alone. Compared with the oracle are the tokens of the answers: the median of each residue, place and distance, of which the largest counts.")  # fmt: skip
LONG_CONTEXT = "long-context"
#: Gates that do not apply to every plan.
OPTIONAL = (LONG_CONTEXT, _BEHAVIOUR.name, _SWEEP.name)
#: Judged if long contexts were measured and the reference read them too.
_LONG = Gate(LONG_CONTEXT, "long_context_loss", "<=", 0.04, "The share of the values planted in the worst context that the reference answers and the subject does not: one of 28 is the resolution, and a near tie may fall either way.", _LONG_ANSWERED, CONTEXTS, 1)  # fmt: skip
PROFILE_GATES = {
    HF: (*DEFAULT_GATES, _BEHAVIOUR, _SWEEP, _LONG),
    SERVED: (*SERVED_GATES, _BEHAVIOUR, _SERVED_SWEEP, _LONG),
}

#: In bfloat16, by gate: an error may be two times PyTorch's own, beside what it may be in float32. KL grows with the square of an
#: error, hence four times.
_YARDSTICKS = {
    "kl-mean": Yardstick("yardstick_kl_mean", 4, 0, 0.1),
    "oracle": Yardstick("yardstick_kl_mean", 4, 0, 0.1),
    "chunks": Yardstick("yardstick_kl_mean", 4, 0, 0.1),
    "kl-tail": Yardstick("yardstick_kl_p999", 4, 0, 5),
    "sweep": Yardstick("yardstick_kl_max", 4, 0, 5),
    "top1": Yardstick("yardstick_top1_agreement", 2, 1, 0.5),
    "perplexity": Yardstick("yardstick_perplexity_ratio", 2, 1, 1.2),
    "logits": Yardstick("yardstick_logit_error_max", 2, 0, math.inf),
    "topk-overlap": Yardstick("yardstick_topk_overlap", 2, 1, 0.5),
    "mass-recalled": Yardstick("yardstick_mass_recalled", 2, 1, 0.5),
}
#: What differs otherwise: bits of two ways through bfloat16 are never equal, and every layer has a limit of its own.
_IN_BFLOAT16 = {
    "chunks": Gate("chunks", "chunk_kl_mean", "<=", 1e-6, "Deployed engines have lost digits at chunk edges inside a compression window. Two ways through bfloat16 differ as two roundings do.", _ON_TEXT),
    "layers": Gate("layers", "layer_excess", "<=", 1, "The largest error of a layer alone, over its limit: the typical token's may be 1e-3 and two times that of PyTorch's bfloat16 on the same streams. The first layer above its limit is where to look.", _ON_TEXT),
    "retrieval": Gate("retrieval", "retrieval_loss", "<=", 0.03, "Rounding may decide a near tie either way; three points are the smallest loss that the default number of cases can tell from none.", _RETRIEVED, RETRIEVAL, 1),
}  # fmt: skip


def gates_for(profile: str, precision: str) -> tuple[Gate, ...]:
    """The gates of a profile in a precision of matrices: in bfloat16 thresholds come from the yardstick."""
    if precision == FLOAT32:
        return PROFILE_GATES[profile]
    gates = [_IN_BFLOAT16.get(gate.name, gate) for gate in PROFILE_GATES[profile]]
    return tuple(_in_bfloat16(gate) for gate in gates)


def _in_bfloat16(gate: Gate) -> Gate:
    yardstick = _YARDSTICKS.get(gate.name)
    if yardstick is None:
        return gate
    words = (
        f"The limit is {gate.default:g}, as in float32, and {yardstick.factor:g} times the distance of PyTorch's own bfloat16 from "
        f"float32 on the same texts ({yardstick.metric}). {gate.reason}"
    )
    return replace(gate, yardstick=yardstick, reason=words)


def resolve_gates(overrides: Mapping[str, float], profile: str = HF, precision: str = FLOAT32) -> list[Gate]:
    """The default gates of a profile in a precision, with some thresholds replaced.

    Raises:
        InputError: an unknown gate, with the nearest known one; a threshold that is not a number or is out of the gate's range.
    """
    gates = gates_for(profile, precision)
    names = [gate.name for gate in gates]
    for name in overrides:
        if name not in names:
            raise InputError(f"unknown gate {name!r}{nearest(name, names) or '.'} Gates are {', '.join(names)}.")
    return [gate.at(overrides[gate.name]) if gate.name in overrides else gate for gate in gates]


def judge(gates: list[Gate], metrics: Mapping[str, float]) -> list[Verdict]:
    """Every gate with its measured value. Gates that do not apply are left out: long contexts if the plan has none, choices
    if the model has no indexers."""
    measured = [gate.measured(metrics) for gate in gates if gate.metric in metrics]
    return [Verdict(gate, metrics[gate.metric], gate.lack(metrics)) for gate in measured]


def not_measured(gates: list[Gate], reason: str) -> list[Verdict]:
    """Verdicts of a subject that could not be executed."""
    return [Verdict(gate, None, reason) for gate in gates if gate.name not in OPTIONAL]
