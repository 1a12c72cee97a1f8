"""Sampling against the distribution that it is asked for."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from foldkv.errors import FoldkvError, InputError
from foldkv.runtime.sampling import GREEDY, Sampler, Sampling

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
        {"seed": 1.0}, {"seed": False}, {"seed": None},
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
