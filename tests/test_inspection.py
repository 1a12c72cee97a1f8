"""What `inspect` says of every kind of artifact: complete as facts, readable as text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from foldkv.errors import ArtifactError, InputError
from foldkv.export.checkpoint.reader import Checkpoint
from foldkv.inspection import inspect_artifact
from foldkv.manifests import ReportManifest, write
from foldkv.runtime.session import Session
from foldkv.tables import describe


def plain(facts: dict[str, Any]) -> str:
    """The text, after checking that no Python value is printed as such and that the facts are JSON."""
    assert json.loads(json.dumps(facts)) == facts
    text = describe(facts)
    assert not any(mark in text for mark in ("{", "}", "[", "]", "'", "None", "True", "False"))
    return text


def test_a_bundle_says_what_a_session_takes(tiny_bundle: Path) -> None:
    facts = inspect_artifact(tiny_bundle)
    for context, size in facts["state"]["sequence_bytes"].items():
        if int(context) <= 65536:
            with Session(tiny_bundle, context=int(context)) as session:
                assert session.state_bytes == size
    text = plain(facts)
    assert "layout: dense" in text and "batch: 1, 1, 64" in text and "file: chain.json" in text and "MiB" in text
    assert facts["state"]["groups"]["entries"] == {"tensors": 3, "dtype": "float32", "width": 64}


def test_a_graph_package_says_its_segments_and_how_its_weights_are_stored(
    tiny_graph: Path, tiny_checkpoint: Path
) -> None:
    facts = inspect_artifact(tiny_graph)
    assert {name: row["layers"] for name, row in facts["segments"].items() if row["layers"]} == {
        "sliding-hash": 1, "csa-moe": 2, "hca-moe": 1,
    }  # fmt: skip
    stored = facts["weights"]["stored"]
    assert sum(stored.values()) == sum(header.bytes for header in Checkpoint(tiny_checkpoint).headers.values())
    assert "BF16:" in plain(facts) and "FoldkvCompress: 4" in plain(facts)


def test_a_checkpoint_says_its_geometry_and_how_its_tensors_are_stored(tiny_checkpoint: Path) -> None:
    facts = inspect_artifact(tiny_checkpoint)
    assert facts["geometry"]["layers"]["compressed_sparse_attention, ratio 4"] == 2
    assert sum(row["tensors"] for row in facts["stored"].values()) == facts["tensors"]
    total = sum(row["bytes"] for row in facts["stored"].values())
    assert total == sum(header.bytes for header in Checkpoint(tiny_checkpoint).headers.values())
    assert "head_dim: 64" in plain(facts)


def report(folder: Path, content: Any) -> Path:
    folder.mkdir()
    (folder / "report.json").write_text(json.dumps(content))
    write(folder, ReportManifest(foldkv_version="0.1.0", passed=False, key="", measured="m", judged="j"))
    return folder


def test_a_report_says_its_gates_and_figures_and_what_was_measured(tmp_path: Path) -> None:
    gate = {"name": "kl-mean", "metric": "kl_mean", "comparison": "<=", "threshold": 1e-6, "reason": "because"}
    content = {
        "gates": [gate | {"value": 2.5e-6, "passed": False}, gate | {"name": "logits", "value": "inf", "passed": False}],
        "metrics": {"kl_mean": 2.5e-6}, "provenance": {"target": "cpu", "state_bytes": 2048, "plan": {"texts": 6}},
    }  # fmt: skip
    facts = inspect_artifact(report(tmp_path / "report", content))
    assert [row["value"] for row in facts["gates"]] == [2.5e-6, "inf"] and facts["metrics"] == content["metrics"]
    text = plain(facts)
    assert any(line.split()[:5] == ["kl-mean", "kl_mean", "<=", "1e-06", "2.5e-06"] for line in text.splitlines())
    assert "target: cpu" in text and "state_bytes: 2.00 KiB" in text and "passed: no" in text


@pytest.mark.parametrize("content", [[], {}, {"gates": 3, "metrics": {}, "provenance": {}}, {"gates": [1]}])
def test_a_report_of_another_form_is_one_error(tmp_path: Path, content: Any) -> None:
    with pytest.raises(ArtifactError, match=r"report\.json is not a report that this version reads"):
        inspect_artifact(report(tmp_path / "report", content))


def test_what_is_no_artifact_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="neither an artifact"):
        inspect_artifact(tmp_path)
