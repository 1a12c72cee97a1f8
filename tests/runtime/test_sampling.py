"""Sampling against the distribution that it is asked for."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from foldkv.errors import FoldkvError, InputError
from foldkv.runtime.sampling import GREEDY, Sampler, Sampling, distribution, token_logprob

LOGITS = np.array([2.0, 1.0, 0.0, -1.0, 0.5, -3.0], np.float32)


def draws(sampling: Sampling, count: int, request: int = 0) -> list[int]:
    sampler = Sampler(sampling, request)
    return [sampler(LOGITS) for _ in range(count)]


@given(st.lists(st.floats(-50, 50, width=32), min_size=1, max_size=40))
def test_greedy_takes_the_first_of_the_largest(values: list[float]) -> None:
    logits = np.array(values, np.float32)
    assert Sampler(GREEDY, 0)(logits) == int(np.argmax(logits))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies_are_those_of_the_softmax(temperature: float) -> None:
    """Within five standard deviations of the binomial count of every token."""
    count = 4000
    seen = np.bincount(draws(Sampling(temperature=temperature, seed=3), count), minlength=6)
    p = np.exp(LOGITS.astype(float) / temperature)
    p /= p.sum()
    assert (np.abs(seen - count * p) < 5 * np.sqrt(count * p * (1 - p)) + 1).all()


def test_top_k_and_top_p_keep_the_likeliest() -> None:
    assert set(draws(Sampling(temperature=1.5, top_k=2, seed=1), 300)) == {0, 1}
    p = np.sort(np.exp(LOGITS) / np.exp(LOGITS).sum())[::-1].cumsum()
    assert p[0] < 0.6 < p[1]
    assert set(draws(Sampling(temperature=1.0, top_p=0.6, seed=1), 300)) == {0, 1}
    assert set(draws(Sampling(temperature=1.0, top_p=1e-6, seed=1), 50)) == {0}


def test_a_seed_and_a_request_fix_the_draws() -> None:
    hot = Sampling(temperature=1.0, seed=5)
    assert draws(hot, 50) == draws(hot, 50)
    assert draws(hot, 50) != draws(hot, 50, request=1)
    assert draws(hot, 50) != draws(Sampling(temperature=1.0, seed=6), 50)


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": -1.0}, {"temperature": float("nan")}, {"temperature": float("inf")}, {"temperature": True},
        {"temperature": "1"}, {"temperature": None}, {"temperature": np.float32("nan")}, {"top_k": 0}, {"top_k": True}, {"top_k": 2.0},
        {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.5}, {"top_p": float("nan")}, {"top_p": True}, {"top_p": None}, {"seed": -1},
        {"seed": 1.0}, {"seed": False}, {"seed": None}, {"min_p": -0.1}, {"min_p": 1.1}, {"min_p": None}, {"presence_penalty": 2.1},
        {"frequency_penalty": float("nan")}, {"frequency_penalty": -3}, {"repetition_penalty": 0}, {"repetition_penalty": float("inf")},
        {"repetition_penalty": 1e-50}, {"repetition_penalty": 1e39}, {"logit_bias": {1: 1e39}}, {"temperature": 10**400},
        {"logit_bias": {"1": 1.0}}, {"logit_bias": {1: float("inf")}}, {"logit_bias": {-1: 1.0}}, {"logit_bias": [1]}, {"logit_bias": {1: True}},
    ],
)  # fmt: skip
def test_a_value_out_of_range_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=f"{next(iter(options))} must be"):
        Sampling(**options)


def test_numbers_of_numpy_are_numbers() -> None:
    assert draws(Sampling(temperature=np.float32(0.5), top_p=np.float64(0.5)), 5) == draws(
        Sampling(temperature=0.5, top_p=0.5), 5
    )


def test_logits_that_are_no_numbers_are_an_error() -> None:
    with pytest.raises(FoldkvError):
        Sampler(Sampling(temperature=1.0), 0)(np.full(6, np.nan, np.float32))


def test_min_p_keeps_what_is_probable_enough_beside_the_likeliest() -> None:
    p = np.exp(LOGITS.astype(float) / 1.5)
    for least in (0.01, 0.2, 0.5, 1.0):
        tokens, probabilities = distribution(LOGITS, Sampling(temperature=1.5, min_p=least))
        assert set(tokens) == set(np.flatnonzero(p >= least * p.max()))
        np.testing.assert_allclose(probabilities, p[tokens] / p[tokens].sum())


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_settings_make_infinite_are_told_as_such(temperature: float) -> None:
    """Each value is fine alone: 3e38 is finite in float32, and 3e38 / 0.01 is not."""
    sampler = Sampler(Sampling(temperature=temperature, repetition_penalty=0.01, logit_bias={1: 3e38}), prompt=[1])
    with pytest.raises(InputError, match="logit_bias and repetition_penalty"):
        sampler(LOGITS)
    only = np.arange(len(LOGITS)) == 2
    with pytest.raises(InputError, match="finite logit"):
        Sampler(Sampling(temperature=temperature))(np.where(only, np.float32(-np.inf), LOGITS), only)


@given(
    st.lists(st.integers(0, 5), max_size=4),
    st.floats(-2, 2, width=16),
    st.floats(-2, 2, width=16),
    st.sampled_from([0.5, 1.0, 1.5]),
    st.dictionaries(st.integers(0, 5), st.floats(-5, 5, width=16), max_size=3),
)
def test_penalties_and_bias_change_logits_as_the_formulas_say(
    prompt: list[int], presence: float, frequency: float, repetition: float, bias: dict[int, float]
) -> None:
    sampler = Sampler(
        Sampling(
            presence_penalty=presence, frequency_penalty=frequency, repetition_penalty=repetition, logit_bias=bias
        ),
        prompt=prompt,
    )
    answer: list[int] = []
    for _ in range(6):
        expected = []
        for token, logit in enumerate(LOGITS.tolist()):
            value = logit + bias.get(token, 0.0)
            if token in prompt or token in answer:
                value = value / repetition if value > 0 else value * repetition
            expected.append(value - frequency * answer.count(token) - (presence if token in answer else 0.0))
        before = LOGITS.copy()
        chosen = sampler(LOGITS)
        assert expected[chosen] >= max(expected) - 1e-5
        assert np.array_equal(before, LOGITS), "the model's logits are not changed"
        answer.append(chosen)


def test_only_what_is_allowed_is_drawn() -> None:
    allowed = np.array([False, False, True, True, False, False])
    hot = Sampler(Sampling(temperature=5.0))
    assert {hot(LOGITS, allowed) for _ in range(100)} == {2, 3}
    assert Sampler(GREEDY)(LOGITS, allowed) == 2
    with pytest.raises(InputError, match="no token may come next"):
        Sampler(GREEDY)(LOGITS, np.zeros(6, bool))
    with pytest.raises(InputError, match="logit_bias has the token 6"):
        Sampler(Sampling(logit_bias={6: 1.0}))(LOGITS)


def test_logprobs_are_those_of_the_softmax() -> None:
    p = np.exp(LOGITS.astype(float)) / np.exp(LOGITS.astype(float)).sum()
    found = token_logprob(LOGITS, 3, 2)
    assert found.token == 3 and [token for token, _ in found.top] == [0, 1]
    np.testing.assert_allclose([found.logprob, *(value for _, value in found.top)], np.log(p[[3, 0, 1]]))
    assert token_logprob(LOGITS, 0, 0).top == ()
