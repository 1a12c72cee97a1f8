"""Planted values lie where they should, once, and are asked for with their true answers."""

from __future__ import annotations

import numpy as np
import pytest

from foldkv.errors import InputError
from foldkv.validation.long_context import DEPTHS, PER_DEPTH, answered, planted_stream


@pytest.mark.parametrize("context", [1024, 4096, 65536])
def test_a_planted_key_occurs_once_at_its_depth_with_the_value_that_is_asked_for(context: int) -> None:
    stream = planted_stream(context)
    assert len(stream.text) + len(stream.tail) <= context
    records = stream.text.split(";")[:-1]
    assert len(stream.questions) == len(DEPTHS) * PER_DEPTH
    for planted in stream.questions:
        [at] = [number for number, record in enumerate(records) if record[0] == planted.key]
        assert records[at] == planted.key + planted.value
        assert abs(at / len(records) - planted.depth) <= 2 * PER_DEPTH / len(records) + 1e-9
    assert stream == planted_stream(context) != planted_stream(context, seed=1)


def test_an_answer_counts_only_if_both_digits_are_the_likeliest_and_all_is_finite() -> None:
    stream = planted_stream(1024)
    tail = list(stream.tail.encode())
    logits = np.zeros((len(tail), 256), np.float32)
    for at in range(len(tail) - 1):
        logits[at, tail[at + 1]] = 1
    assert all(answered(stream, tail, logits))
    logits[1, 0] = 2  # the second digit of the first question
    logits[4, 1] = np.inf
    assert answered(stream, tail, logits) == [False, False, *[True] * (len(stream.questions) - 2)]


def test_too_short_a_context_and_too_many_values_are_refused() -> None:
    with pytest.raises(InputError, match="too short to plant 28 values; give at least 560"):
        planted_stream(400)
    with pytest.raises(InputError, match="there are 52 keys"):
        planted_stream(65536, per_depth=20)
