"""A validation whose reference is computed a layer at a time gives the report of one whose reference is in memory."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from mappings import in_files

from foldkv.export.checkpoint.reader import Checkpoint
from foldkv.validation import jobs, measure, room
from foldkv.validation.jobs import Job, in_batches
from foldkv.validation.layered import LayeredReference
from foldkv.validation.layered_runner import LayeredRunner
from foldkv.validation.layered_subject import LayeredSubject
from foldkv.validation.runners import TransformersRunner
from foldkv.validation.settings import Plan
from foldkv.validation.validate import validate

pytestmark = pytest.mark.slow
SMALL = Plan(texts=1, text_tokens=40, distances=(16,), cases_per_distance=1, cases_per_kind=0, sweep_cases=1)
PLAN = Plan(
    texts=2, text_tokens=130, distances=(32,), cases_per_distance=3, contexts=(560,), cases_per_kind=0, case_tokens=64
)


def figures(bundle: Path, checkpoint: Path, report: Path, **options: Any) -> tuple[dict[str, Any], str]:
    result = validate(bundle, checkpoint, report, plan=PLAN, threads=1, **options)
    # A head that is applied to the last tokens alone rounds otherwise: KL at answers is equal up to that, all else to the bit.
    assert (
        result.behaviour and max(result.metrics.pop("sweep_kl_max"), *(row.kl_max for row in result.behaviour)) < 1e-9
    )
    found = {
        name: getattr(result, name) for name in ("metrics", "retrieval", "layers", "selection", "worst", "long_context")
    }
    found["behaviour"] = [replace(row, kl_median=0, kl_max=0) for row in result.behaviour]
    return found, result.provenance["reference"]


def test_the_report_is_that_of_the_whole_reference(
    tiny_bundle: Path, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, name = figures(tiny_bundle, tiny_checkpoint, tmp_path / "whole")
    assert "layer by layer" not in name
    passes = []
    layers = LayeredReference.layers

    def counted(self: LayeredReference, jobs: Any, streams: Any, *, first: int = 0) -> Any:
        passes.append((len(jobs), first))
        return layers(self, jobs, streams, first=first)

    def killed(self: LayeredReference, jobs: Any, streams: Any, *, first: int = 0) -> Any:
        for number, one in enumerate(counted(self, jobs, streams, first=first)):
            yield one
            if number == 1:
                raise KeyboardInterrupt

    by_the_bundle = []
    of_the_bundle = LayeredSubject.layers

    def counted_too(self: LayeredSubject, jobs: Any, streams: Any, *, first: int = 0) -> Any:
        by_the_bundle.append((len(jobs), first))
        return of_the_bundle(self, jobs, streams, first=first)

    # A machine in whose memory the model does not fit, on which the first run is interrupted.
    monkeypatch.setattr(LayeredSubject, "layers", counted_too)
    monkeypatch.setattr(room, "machine_memory", lambda: 4 << 20)
    monkeypatch.setattr(LayeredReference, "layers", killed)
    scratch = tmp_path / "layered.foldkv-reference"
    (scratch / "of another run").mkdir(parents=True)
    with pytest.raises(KeyboardInterrupt):
        figures(tiny_bundle, tiny_checkpoint, tmp_path / "layered")
    assert (scratch / "run.json").is_file() and not (scratch / "of another run").exists()
    assert [path.name for path in tmp_path.iterdir() if "layered" in path.name] == ["layered.foldkv-reference"]
    monkeypatch.setattr(LayeredReference, "layers", counted)
    compare_layers = measure._layers

    def in_files_only(sides: Any, tokens: Any, look: Any, reading: Any) -> Any:
        layers, alone = compare_layers(sides, tokens, look, reading)
        assert len(look.streams) == len(reading.streams) == len(alone) == 4
        assert all(in_files(one, tmp_path) for one in (*look.streams, *reading.streams, *alone))
        assert all(in_files(one, tmp_path) for one in (look.logits, reading.logits))
        assert all(in_files(one.mass, tmp_path) for one in reading.selections.values() if one.mass.size)
        return layers, alone

    monkeypatch.setattr(measure, "_layers", in_files_only)
    layered, name = figures(tiny_bundle, tiny_checkpoint, tmp_path / "layered")
    assert name.endswith("float32, layer by layer") and layered == whole
    # Two texts, three values, eight lengths of the sweep and the first text's layers alone in one pass, which goes on; the long context in one of its own.
    assert passes == [(14, 0), (14, 2), (1, 0)]
    # The bundle: both texts whole and in odd pieces, the values and the lengths; what its indexers choose; and the long context. The
    # second run finds the first two as they were after the last layer.
    assert by_the_bundle == [(15, 0), (2, 0), (15, 4), (2, 4), (1, 0)]
    assert not (tmp_path / "layered.foldkv-reference").exists()


def test_the_oracle_of_served_bundles_goes_a_layer_at_a_time_too(
    served_bundles: dict[str, Path], tiny_checkpoint: Path, tmp_path: Path
) -> None:
    bundle, found = served_bundles["dense"], []
    for way in (False, True):
        result = validate(bundle, tiny_checkpoint, tmp_path / str(way), plan=SMALL, threads=1, layered=way)
        found.append(result)
        assert ("layer by layer" in result.provenance["layers_against"]) is way
    whole, layered = found
    for name in ("layers", "selection", "deployments", "retrieval"):
        assert getattr(whole, name) == getattr(layered, name)
    # A product of the last rows alone adds up in another order.
    assert whole.metrics == pytest.approx(layered.metrics, rel=1e-4, abs=1e-9) and whole.metrics["oracle_kl_max"] < 1e-6
    assert [(row.reference, row.subject) for row in whole.behaviour] == [
        (row.reference, row.subject) for row in layered.behaviour
    ]


def test_a_question_that_was_not_announced_is_answered_too(tiny_checkpoint: Path) -> None:
    runner, whole = LayeredRunner(Checkpoint(tiny_checkpoint)), TransformersRunner(tiny_checkpoint)
    assert (runner.logits([1, 2, 3]) == whole.logits([1, 2, 3])).all()
    assert (runner.tail_logits([1, 2, 3], [4, 5]) == whole.tail_logits([1, 2, 3], [4, 5])).all()


def test_a_pass_takes_as_many_tokens_as_memory_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "TOKENS_AT_ONCE", 10)
    sizes = [
        [len(job.tokens) for job in batch] for batch in in_batches([Job([0] * size) for size in (4, 6, 1, 12, 3, 7)])
    ]
    assert sizes == [[4, 6], [1], [12], [3, 7]]
