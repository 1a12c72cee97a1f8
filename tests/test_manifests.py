"""What is written of an artifact is what is read of it; whatever is wrong with a manifest is in one error."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from record_values import any_record

from foldkv.artifact import SCHEMA_VERSION, read_manifest
from foldkv.errors import MOST_FINDINGS, ArtifactError
from foldkv.export.checkpoint.reader import Checkpoint, model_facts
from foldkv.inspection import _SHOWN
from foldkv.manifests import (
    KINDS,
    BundleManifest,
    GraphManifest,
    ReportManifest,
    parse,
    read,
    read_any,
    reason_to_replace,
    write,
)
from foldkv.records import to_json
from foldkv.runtime.bundle import load_bundle

KINDS_OF = pytest.mark.parametrize("kind", KINDS.values(), ids=list(KINDS))


@KINDS_OF
@given(seed=st.integers(0, 1 << 32))
def test_a_manifest_comes_back_from_its_json(kind: Any, seed: int) -> None:
    manifest = any_record(kind, seed)
    assert parse(kind, json.loads(json.dumps(to_json(manifest)))) == manifest


@KINDS_OF
@given(seed=st.integers(0, 1 << 32), data=st.data())
def test_every_damaged_key_is_in_one_error(kind: Any, seed: int, data: st.DataObject) -> None:
    """Any number of keys, gone or of another type."""
    table = to_json(any_record(kind, seed))
    damaged, expected = dict(table), []
    for key in data.draw(st.sets(st.sampled_from(list(table)), min_size=1)):
        if key not in ABSENT and data.draw(st.booleans()):
            del damaged[key]
            expected.append(f"{key} is missing; expected ")
        else:
            damaged[key] = {1, 2}  # no JSON value, so of no declared type
            expected.append(f"{key} is {{1, 2}}; expected ")
    with pytest.raises(ArtifactError) as error:
        parse(kind, damaged, where="HERE")
    text = str(error.value)
    listed = sum(finding in text for finding in expected)
    assert listed == text.count("; expected ") == min(len(expected), MOST_FINDINGS)
    assert ("and 1 more" in text) == (len(expected) == MOST_FINDINGS + 1)
    assert text.startswith("HERE does not describe a ") and kind.AGAIN in text


#: Keys that are left out where there is nothing to say.
ABSENT = {"linked", "injection", "precision_islands", "weights"}


@pytest.mark.parametrize(
    ("path", "value", "finding"),
    [
        ("model/vocab_size", 0, "model.vocab_size is 0; expected an integer of 1 or more"),
        ("model/vocab_size", True, "model.vocab_size is True; expected an integer"),
        ("model/eos_token_ids/0", "x", "model.eos_token_ids[0] is 'x'; expected an integer of 0 or more"),
        ("shapes/batch", [1, 4], "shapes.batch is [1, 4]; expected a list of 3"),
        (
            "backend",
            "abacus",
            "backend is 'abacus'; expected one of onnxruntime, tensorrt-rtx, tensorrt, onnxruntime-cuda",
        ),
        ("engine/file", "", "engine.file is ''; expected a text that is not empty"),
        ("build/seconds", float("nan"), "build.seconds is nan; expected a number"),
        ("plugins", "none", "plugins is 'none'; expected a list"),
        ("inputs/checkpoint", None, "inputs.checkpoint is None; expected a table"),
        ("model/bos_token_id", None, ""),
    ],
)
def test_a_value_that_cannot_be_is_named_with_what_was_expected(
    tiny_bundle: Path, path: str, value: Any, finding: str
) -> None:
    content: Any = read_manifest(tiny_bundle, kind="foldkv.bundle")
    *parents, last = path.split("/")
    place = content
    for part in parents:
        place = place[part]
    place[int(last) if last.isdigit() else last] = value
    if not finding:
        assert parse(BundleManifest, content)
        return
    with pytest.raises(ArtifactError) as error:
        parse(BundleManifest, content)
    assert finding in str(error.value)


def test_every_key_on_disk_is_declared_and_every_declared_key_is_on_disk(tiny_graph: Path, tiny_bundle: Path) -> None:
    """Bundles with engines: tests/optimize/test_build.py. Linked files: tests/export/test_flat.py."""
    for folder in (tiny_graph, tiny_bundle):
        table = json.loads((folder / "manifest.json").read_text())
        manifest = read_any(folder, verify=True)
        assert {"schema_version": SCHEMA_VERSION, "kind": manifest.KIND, **to_json(manifest)} == table


def test_what_export_writes_of_the_model_is_what_the_runtime_reads(
    tiny_checkpoint: Path, tiny_graph: Path, tiny_bundle: Path
) -> None:
    facts = model_facts(Checkpoint(tiny_checkpoint))
    assert load_bundle(tiny_bundle).model == facts == read(GraphManifest, tiny_graph).model
    assert facts.eos_token_ids


def test_what_is_written_has_the_hashes_of_its_files(tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text("{}")
    (tmp_path / "large.bin").write_bytes(bytes(100))
    manifest = ReportManifest(foldkv_version="0", passed=True, key="k", measured="m", judged="j")
    written = write(tmp_path, manifest, heads={"large.bin": 10})
    assert written == read(ReportManifest, tmp_path, verify=True) == read_any(tmp_path)
    assert written.sizes == {"report.json": 2, "large.bin": 100} and written.linked_files["large.bin"].head_bytes == 10


def test_an_artifact_of_another_version_or_a_damaged_one_is_made_again(tmp_path: Path) -> None:
    from foldkv import __version__

    assert reason_to_replace(ReportManifest, tmp_path)[0].endswith("does not exist")
    manifest = ReportManifest(foldkv_version="0", passed=True, key="k", measured="m", judged="j")
    write(tmp_path, manifest)
    reason, found = reason_to_replace(ReportManifest, tmp_path)
    assert found is None and "made by foldkv 0" in reason
    table = json.loads((tmp_path / "manifest.json").read_text()) | {"foldkv_version": __version__}
    (tmp_path / "manifest.json").write_text(json.dumps(table))
    assert reason_to_replace(ReportManifest, tmp_path)[0] == ""
    (tmp_path / "manifest.json").write_text(json.dumps(table | {"passed": "yes"}))
    reason, found = reason_to_replace(ReportManifest, tmp_path)
    assert found is None and "damaged: " in reason and "passed is 'yes'" in reason


def test_what_inspect_shows_is_declared() -> None:
    assert set(_SHOWN) <= {one.name for kind in KINDS.values() for one in dataclasses.fields(kind)}


@KINDS_OF
def test_the_documentation_explains_every_key(kind: Any) -> None:
    text = (Path(__file__).parents[1] / "docs" / "artifacts.md").read_text()
    assert [one.name for one in dataclasses.fields(kind) if f"`{one.name}`" not in text] == []
