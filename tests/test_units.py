"""Numbers as people write them."""

from __future__ import annotations

from typing import Any

import pytest

from foldkv.units import count_text, read_size


@pytest.mark.parametrize(
    ("text", "count"),
    [
        (7, 7),
        ("4096", 4096),
        (" 512 KiB ", 512 << 10),
        ("4MiB", 4 << 20),
        ("1g", 1 << 30),
        ("2TB", 2 << 40),
        ("3B", 3),
        ("5kb", 5120),
    ],
)
def test_sizes_are_read_in_powers_of_1024(text: Any, count: int) -> None:
    assert read_size(text) == count


@pytest.mark.parametrize("text", ["", "0", "-1", "1.5GiB", "GiB", "4XiB", "1e3", "4 Mi B", True, None, 1.5, "9" * 20])
def test_what_is_no_size_is_refused_with_an_example(text: Any) -> None:
    with pytest.raises(ValueError, match="4MiB"):
        read_size(text)


@pytest.mark.parametrize(
    ("count", "text"), [(2_357_381, "2.36 million"), (284e9, "284 billion"), (1.573e12, "1,573 billion")]
)
def test_large_counts_are_words_and_never_powers_of_ten(count: float, text: str) -> None:
    assert count_text(count) == text
