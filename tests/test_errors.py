"""Suggestions for names: for near misses only, and inside a sentence."""

from __future__ import annotations

import pytest

from foldkv.errors import InputError, nearest
from foldkv.optimize.targets import resolve_targets


@pytest.mark.parametrize(
    ("name", "known", "hint"),
    [
        ("hiden_size", ["hidden_size", "head_dim"], " (did you mean 'hidden_size'?)"),
        ("h201", ["a100", "h200"], " (did you mean 'h200'?)"),
        ("B200", ["h200", "b200"], " (did you mean 'b200'?)"),
        ("unsloth_version", ["transformers_version", "hidden_size"], ""),
        ("my_router", ["hidden_size", "rms_norm_eps"], ""),
        ("", ["x"], ""),
    ],
)
def test_a_near_miss_is_offered_and_a_far_one_is_not(name: str, known: list[str], hint: str) -> None:
    assert nearest(name, known) == hint


def test_a_suggestion_ends_its_sentence_once() -> None:
    with pytest.raises(InputError) as caught:
        resolve_targets(["h201", "cpu", "nothing-like-it"])
    text = str(caught.value)
    assert text.startswith("unknown target 'h201' (did you mean 'h200'?), 'nothing-like-it'. Targets are ")
    assert "?." not in text
