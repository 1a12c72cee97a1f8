"""What a report says of itself: what it is for, and what it does not speak for."""

from __future__ import annotations

from typing import Any

from foldkv.validation.scope import scope

ABOUT: dict[str, Any] = {
    "target": "cpu", "backend": "onnxruntime 1.32.0", "threads": 2,
    "plan": {"seed": 7, "text_tokens": 512, "contexts": [4096, 65536]},
}  # fmt: skip


def test_only_the_cpu_promises_the_same_bits_again() -> None:
    """tests/validation/test_validate.py runs the line of a report again and compares all figures."""
    [words] = scope(ABOUT)["determinism"]
    assert "seed 7" in words and "with 2 threads give the same figures to the bit" in words
    [words] = scope(ABOUT | {"threads": None})["determinism"]
    assert "with the same number of threads" in words
    [words] = scope(ABOUT | {"matrices": "bfloat16"})["determinism"]
    assert "with 2 threads and matrices in bfloat16 give" in words
    for backend in ("onnxruntime-cuda 1.32.0", "tensorrt_rtx 1.7.1"):
        [words] = scope(ABOUT | {"backend": backend})["determinism"]
        assert "was not measured" in words


def test_limits_name_the_longest_context_that_was_measured() -> None:
    said = " ".join(scope(ABOUT)["limits"])
    assert "the target cpu" in said and "512 tokens" in said and "longer than 65,536" in said
