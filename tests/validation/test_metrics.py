"""Metrics against independent implementations and their own definitions."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from foldkv.errors import InputError
from foldkv.validation.gates import DEFAULT_GATES, Verdict, judge, resolve_gates
from foldkv.validation.kl_table import METRICS
from foldkv.validation.metrics import (
    DELTA_QUANTILES,
    KL_QUANTILES,
    compare_logits,
    mcnemar,
    standard_error,
    summary,
    wilson,
)


def random_logits(seed: int, noise: float = 0.0) -> np.ndarray:
    base = np.random.default_rng(0).normal(size=(40, 17)) * 3
    return (base + noise * np.random.default_rng(seed).normal(size=base.shape)).astype(np.float32)


def test_kl_and_losses_equal_torch() -> None:
    reference, subject = random_logits(0), random_logits(1, 0.3)
    targets = np.arange(40) % 17
    figures = compare_logits(reference, subject, targets)
    ref, sub = (torch.from_numpy(x).double().log_softmax(-1) for x in (reference, subject))
    expected = torch.nn.functional.kl_div(sub, ref, log_target=True, reduction="none").sum(-1)
    np.testing.assert_allclose(figures.kl, expected.numpy(), atol=1e-12)
    loss = torch.nn.functional.nll_loss(sub, torch.from_numpy(targets), reduction="none")
    np.testing.assert_allclose(figures.loss_subject, loss.numpy(), atol=1e-12)
    assert figures.same_top.mean() < 1
    result = summary(figures)
    assert result["perplexity_ratio"] == pytest.approx(
        float(np.exp(loss.mean().item()) / np.exp(figures.loss_reference.mean()))
    )


def test_llama_cpps_table_is_that_of_its_own_formulas() -> None:
    """Sums, sums of squares and covariances over tokens, as its perplexity tool accumulates them."""
    reference, subject, targets = random_logits(0), random_logits(1, 0.3), np.arange(40) % 17
    found, count = summary(compare_logits(reference, subject, targets)), 40
    p, q = (torch.from_numpy(x).double().softmax(-1).numpy() for x in (reference, subject))
    rows = np.arange(count)

    def mean_and_error(values: np.ndarray) -> tuple[float, float]:
        mean, square = values.sum() / count, (values**2).sum() / count
        return mean, math.sqrt((square - mean**2) / (count - 1))

    kl = (p * np.log(p / q)).sum(-1)
    base, other = -np.log(p[rows, targets]), -np.log(q[rows, targets])
    delta = q[rows, targets] - p[rows, targets]
    (base_mean, base_error), (other_mean, other_error) = mean_and_error(base), mean_and_error(other)
    covariance = ((base * other).sum() / count - base_mean * other_mean) / (count - 1)
    ratio = math.sqrt(base_error**2 + other_error**2 - 2 * covariance)
    ppl, ppl_base = math.exp(other_mean), math.exp(base_mean)
    square, square_error = mean_and_error(delta**2)
    same = float((p.argmax(-1) == q.argmax(-1)).mean())
    expected = {
        "kl_mean": mean_and_error(kl)[0], "kl_mean_error": mean_and_error(kl)[1], "kl_max": kl.max(), "kl_min": kl.min(),
        "perplexity_subject": ppl, "perplexity_subject_error": ppl * other_error,
        "perplexity_reference": ppl_base, "perplexity_reference_error": ppl_base * base_error,
        "loss_correlation": covariance / (base_error * other_error),
        "log_perplexity_ratio": other_mean - base_mean, "log_perplexity_ratio_error": ratio,
        "perplexity_ratio": ppl / ppl_base, "perplexity_ratio_error": ppl / ppl_base * ratio,
        "perplexity_difference": ppl - ppl_base,
        "perplexity_difference_error": math.sqrt(
            (ppl * other_error) ** 2 + (ppl_base * base_error) ** 2 - 2 * ppl * ppl_base * covariance
        ),
        "delta_p_mean": mean_and_error(delta)[0], "delta_p_mean_error": mean_and_error(delta)[1],
        "delta_p_max": delta.max(), "delta_p_min": delta.min(),
        "delta_p_rms": math.sqrt(square), "delta_p_rms_error": 0.5 / math.sqrt(square) * square_error,
        "top1_agreement": same, "top1_agreement_error": math.sqrt(same * (1 - same) / (count - 1)),
    }  # fmt: skip
    for values, names in ((kl, KL_QUANTILES), (delta, DELTA_QUANTILES)):
        ordered = sorted(values)
        expected |= {name: ordered[math.ceil(share * (count - 1))] for name, share in names.items()}
    assert expected.keys() == METRICS
    for name, value in expected.items():
        assert found[name] == pytest.approx(float(value), rel=1e-9, abs=1e-12), name


def test_a_single_token_and_infinite_losses_have_no_standard_error() -> None:
    assert math.isnan(standard_error(np.array([1.0]))) and math.isnan(standard_error(np.array([1.0, np.inf])))
    assert standard_error(np.array([1.0, 3.0])) == pytest.approx(1.0)


def test_equal_logits_have_no_error() -> None:
    result = summary(compare_logits(random_logits(0), random_logits(0), np.zeros(40, int)))
    assert result["kl_max"] == 0 and result["top1_agreement"] == 1 and result["perplexity_ratio"] == 1


def test_adding_a_constant_to_all_logits_of_a_token_is_no_divergence() -> None:
    figures = compare_logits(random_logits(0), random_logits(0) + 5, np.zeros(40, int))
    assert figures.kl.max() < 1e-6 and figures.logit_error.min() > 4


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_subject_that_is_not_finite_never_looks_good(value: float) -> None:
    subject = random_logits(0)
    subject[3, 2] = value
    result = summary(compare_logits(random_logits(0), subject, np.zeros(40, int)))
    assert result["kl_mean"] == np.inf and result["logit_error_max"] == np.inf and result["top1_agreement"] < 1
    assert not Verdict(next(g for g in DEFAULT_GATES if g.name == "kl-mean"), result["kl_mean"]).passed


@pytest.mark.parametrize(
    ("lost", "won", "expected"), [(0, 0, 1.0), (1, 0, 0.5), (5, 0, 1 / 32), (1, 1, 0.75), (0, 4, 1.0)]
)
def test_mcnemar_is_the_one_sided_sign_test(lost: int, won: int, expected: float) -> None:
    reference = np.array([True] * lost + [False] * won + [True] * 3)
    subject = np.array([False] * lost + [True] * won + [True] * 3)
    assert mcnemar(reference, subject) == pytest.approx(expected)


def test_wilson_intervals_have_the_known_values() -> None:
    assert wilson(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-3)
    assert wilson(5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-3)
    assert wilson(0, 0) == (0.0, 1.0)


def test_gates_are_overridden_by_name_and_unknown_ones_refused() -> None:
    gates = {gate.name: gate for gate in resolve_gates({"kl-mean": 0.5})}
    assert gates["kl-mean"].threshold == 0.5 and gates["top1"].threshold == 0.999
    with pytest.raises(InputError, match=r"unknown gate 'kl-men' \(did you mean 'kl-mean'\?\)"):
        resolve_gates({"kl-men": 1})
    with pytest.raises(InputError, match=r"unknown gate 'zzz'\. Gates are"):
        resolve_gates({"zzz": 1})


@pytest.mark.parametrize(
    ("gate", "value"),
    [
        *((gate, value) for gate in ("kl-mean", "top1", "retrieval") for value in (math.nan, math.inf, -math.inf, -1e-9, True, "1")),
        ("top1", 0), ("top1", 1.001), ("retrieval", 1), ("long-context", 1), ("retrieval-test", 0),
    ],
)  # fmt: skip
def test_a_threshold_that_never_fails_or_never_holds_is_refused(gate: str, value: object) -> None:
    with pytest.raises(InputError, match=f"gate {gate} has threshold .*; expected a number"):
        resolve_gates({gate: value})  # type: ignore[dict-item]


def test_changed_thresholds_are_told_apart() -> None:
    given = {"kl-mean": 1e-5, "kl-tail": 1e-5, "top1": 0.9, "retrieval-test": 0.05, "logits": 5e-3}
    changed = {gate.name: gate.changed for gate in resolve_gates(given) if gate.name in given}
    assert changed == {
        "kl-mean": "loosened", "kl-tail": "tightened", "top1": "loosened", "retrieval-test": "tightened", "logits": None
    }  # fmt: skip


ENOUGH = {
    "tokens": 32.0, "text_windows": 2.0, "queries_with_choice": 32.0, "retrieval_answered": 7.0, "retrieval_reference": 0.1,
    "long_context_answered": 7.0, "behaviour_answered": 7.0, "sweep_lengths": 8.0,
}  # fmt: skip


@pytest.mark.parametrize("profile", ["hf", "served"])
@pytest.mark.parametrize("scarce", ENOUGH)
def test_a_gate_that_measured_too_little_says_so_and_does_not_pass(profile: str, scarce: str) -> None:
    gates = resolve_gates({}, profile)
    values = ENOUGH | {gate.metric: gate.threshold for gate in gates}
    assert all(verdict.word == "holds" for verdict in judge(gates, values))
    verdicts = judge(gates, values | {scarce: 0.99 * ENOUGH[scarce]})
    silent = {v.gate.name for v in verdicts if v.word == "not informative"}
    assert silent == {gate.name for gate in gates if any(need.metric == scarce for need in gate.needs)}
    assert all(
        not v.passed and f"it needs {ENOUGH[scarce]:g}" in str(v.lack) for v in verdicts if v.gate.name in silent
    )
    # What is found wrong on little evidence is wrong.
    assert judge(gates, values | {scarce: 0, "not_finite": 1})[0].word == "fails"


def test_the_exact_test_needs_as_many_answers_as_it_takes_to_fail() -> None:
    for threshold, needed in ((0.01, 7), (0.05, 5), (0.5, 2)):
        [gate] = [gate for gate in resolve_gates({"retrieval-test": threshold}) if gate.name == "retrieval-test"]
        assert gate.needs[0].least_for(threshold) == needed
        lost = np.ones(needed, bool)
        assert mcnemar(lost, ~lost) < threshold <= mcnemar(lost[1:], ~lost[1:])


def test_nan_passes_no_gate() -> None:
    metrics = {gate.metric: float("nan") for gate in DEFAULT_GATES}
    assert not any(verdict.passed for verdict in judge(list(DEFAULT_GATES), metrics))
