"""Planted values lie where they should, once, and are asked for with their true answers."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path

import jsonschema
import numpy as np
import pytest

from foldkv.errors import InputError
from foldkv.validation.long_context import (
    DEPTHS,
    PER_DEPTH,
    ContextFigure,
    answered,
    largest_loss,
    planted_stream,
)
from foldkv.validation.settings import Plan
from foldkv.validation.validate import validate

SHORT = {
    "texts": 1,
    "text_tokens": 64,
    "distances": (64,),
    "cases_per_distance": 4,
    "cases_per_kind": 0,
    "sweep_cases": 0,
}


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


def test_the_report_shows_every_depth_beside_the_reference_and_judges_the_loss(
    tiny_bundle: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    result = validate(tiny_bundle, tiny_checkpoint, tmp_path / "report", plan=Plan(contexts=(1024, 1024), **SHORT))
    first, again = result.long_context
    assert first == again and first.subject == first.reference and first.subject > 14
    assert first.kl_mean is not None and first.kl_mean < 1e-9
    [verdict] = [verdict for verdict in result.verdicts if verdict.gate.name == "long-context"]
    assert verdict.passed and verdict.value == 0
    content = json.loads((tmp_path / "report" / "report.json").read_text())
    schema = resources.files("foldkv.validation").joinpath("schema/report.schema.json").read_text()
    jsonschema.validate(content, json.loads(schema))
    assert [row["depth"] for row in content["long_context"][0]["depths"]] == list(DEPTHS)
    page = (tmp_path / "report" / "report.html").read_text()
    assert "Long contexts" in page and f"{first.subject} of {first.cases}" in page
    assert "--context 1024 --context 1024" in result.provenance["command"]


def test_the_loss_is_that_of_the_worst_context_that_the_reference_read() -> None:
    figures = [ContextFigure(1 << 20, 28, 0, None, None, []), ContextFigure(1024, 28, 21, 28, 0.1, [])]
    assert largest_loss(figures) == 0.25 and largest_loss(figures[:1]) is None


@pytest.mark.parametrize(
    ("contexts", "gates", "message"),
    [
        ((100,), {}, "too short to plant"),
        ((2 << 20,), {}, "takes at most 1048576"),
        ((1 << 20,), {"long-context": 0.0}, "reads contexts of up to 65536"),
    ],
)
def test_contexts_that_cannot_be_measured_are_refused_before_anything_is_loaded(
    contexts: tuple[int, ...], gates: dict[str, float], message: str, tiny_bundle: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:  # fmt: skip
    with pytest.raises(InputError, match=message):
        validate(tiny_bundle, tiny_checkpoint, tmp_path / "report", gates=gates, plan=Plan(contexts=contexts, **SHORT))
    assert not (tmp_path / "report").exists()
