"""Metrics against independent implementations and their own definitions."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from foldkv.errors import InputError
from foldkv.validation.gates import DEFAULT_GATES, Verdict, judge, resolve_gates
from foldkv.validation.metrics import compare_logits, mcnemar, summary, wilson


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
    with pytest.raises(InputError, match="expected a number"):
        resolve_gates({"kl-mean": float("nan")})


def test_nan_passes_no_gate() -> None:
    metrics = {gate.metric: float("nan") for gate in DEFAULT_GATES}
    assert not any(verdict.passed for verdict in judge(list(DEFAULT_GATES), metrics))
