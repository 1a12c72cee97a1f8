"""Artifacts: whole or absent, checked before use, and never at the cost of a user's own files."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from foldkv.artifact import MANIFEST, confined, read_manifest, sha256_json, staged, verify_files, write_manifest
from foldkv.errors import ArtifactError, InputError

KIND = "foldkv.test"


def make(folder: Path, text: str = "old") -> Path:
    with staged(folder, kind=KIND) as work:
        (work / "data.txt").write_text(text)
        write_manifest(work, kind=KIND, content={"spec": {"text": text}})
    return folder


def siblings(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.parent.iterdir())


def test_an_artifact_is_written_read_and_replaced(tmp_path: Path) -> None:
    folder = make(tmp_path / "a")
    manifest = read_manifest(folder, kind=KIND)
    assert manifest["spec"] == {"text": "old"} and list(manifest["files"]) == ["data.txt"]
    verify_files(folder, manifest)
    make(folder, "new")
    assert (folder / "data.txt").read_text() == "new"
    assert siblings(folder) == ["a"]


def test_an_error_while_writing_leaves_the_old_artifact_and_nothing_else(tmp_path: Path) -> None:
    folder = make(tmp_path / "a")
    with pytest.raises(RuntimeError), staged(folder, kind=KIND) as work:
        (work / "data.txt").write_text("half")
        raise RuntimeError
    assert (folder / "data.txt").read_text() == "old"
    assert siblings(folder) == ["a"]


@pytest.mark.parametrize(
    "when", ["before_files", "half_written", "before_manifest", "before_rename", "between_renames"]
)
def test_a_killed_writer_leaves_old_or_nothing_and_the_next_one_succeeds(tmp_path: Path, when: str) -> None:
    folder = make(tmp_path / "a")
    script = f"""
        import os, signal
        from pathlib import Path
        import foldkv.artifact as artifact
        die = lambda: os.kill(os.getpid(), signal.SIGKILL)
        rename, calls = Path.rename, []
        def counted(self, target):
            calls.append(1)
            if {when!r} == "before_rename" or ({when!r} == "between_renames" and len(calls) == 2):
                die()
            return rename(self, target)
        Path.rename = counted
        with artifact.staged(Path({str(folder)!r}), kind={KIND!r}) as work:
            if {when!r} == "before_files": die()
            (work / "data.txt").write_text("ne" if {when!r} == "half_written" else "new")
            if {when!r} in ("half_written", "before_manifest"): die()
            artifact.write_manifest(work, kind={KIND!r}, content={{}})
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=False)
    assert done.returncode == -signal.SIGKILL
    if folder.exists():  # between the two renames there is none; the next writer restores it first
        assert (folder / "data.txt").read_text() == "old"
        verify_files(folder, read_manifest(folder, kind=KIND))
    make(folder, "rerun")
    assert (folder / "data.txt").read_text() == "rerun"
    assert siblings(folder) == ["a"]


def test_what_a_writer_retired_is_restored_when_the_next_one_fails(tmp_path: Path) -> None:
    folder = make(tmp_path / "a")
    folder.rename(tmp_path / "a.foldkv-retired-999999999-00")
    with pytest.raises(RuntimeError), staged(folder, kind=KIND):
        raise RuntimeError
    assert (folder / "data.txt").read_text() == "old"


def test_a_living_writer_is_left_alone(tmp_path: Path) -> None:
    other = tmp_path / f"a.foldkv-staging-{os.getpid()}-abcd"
    other.mkdir()
    make(tmp_path / "a")
    assert other.is_dir()


@pytest.mark.parametrize("content", ["file", "foreign", "other_kind"])
def test_a_users_own_folder_is_never_replaced(tmp_path: Path, content: str) -> None:
    target = tmp_path / "mine"
    if content == "file":
        target.write_text("keep")
    else:
        target.mkdir()
        (target / "keep.txt").write_text("keep")
        if content == "other_kind":
            (target / MANIFEST).write_text(json.dumps({"kind": "foldkv.other"}))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(InputError, match=r"mine"):
        make(target)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def edit(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest = change(manifest) or manifest
    (folder / MANIFEST).write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("damage", "finding"),
    [
        (lambda f: (f / MANIFEST).unlink(), "cannot be read"),
        (lambda f: (f / MANIFEST).write_text("{"), "is not JSON"),
        (lambda f: (f / MANIFEST).write_text("[]"), "has kind 'list'"),
        (lambda f: edit(f, lambda m: m | {"kind": "x"}), "has kind 'x'; expected 'foldkv.test'"),
        (lambda f: edit(f, lambda m: m | {"schema_version": 99}), "schema_version 99; this foldkv reads 1"),
        (lambda f: edit(f, lambda m: m | {"files": []}), "'files' is list"),
        (lambda f: edit(f, lambda m: m | {"files": {"data.txt": {}}}), "has no size"),
        (lambda f: edit(f, lambda m: m | {"files": {"../x": {"bytes": 1}}}), "leads out of the artifact"),
        (lambda f: edit(f, lambda m: m | {"files": {"/etc/passwd": {"bytes": 1}}}), "leads out of the artifact"),
        (lambda f: (f / "data.txt").unlink(), "is missing"),
        (lambda f: (f / "data.txt").write_text("longer than before"), "has 18 bytes; the manifest says 3"),
        (lambda f: (f / "data.txt").write_text("NEW"), "was changed after it was made"),
        (
            lambda f: ((f / "data.txt").unlink(), (f / "data.txt").symlink_to("/etc/hostname")),
            "link out of the artifact",
        ),
    ],
)
def test_a_damaged_artifact_is_refused_with_its_reason(
    tmp_path: Path, damage: Callable[[Path], Any], finding: str
) -> None:
    folder = make(tmp_path / "a")
    damage(folder)
    with pytest.raises(ArtifactError, match=finding):
        verify_files(folder, read_manifest(folder, kind=KIND))


@pytest.mark.parametrize("name", ["", "..", "a/../../b", "/a", "a\\b", "a\0b"])
def test_names_that_lead_out_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ArtifactError):
        confined(tmp_path, name)


def test_the_digest_of_a_value_does_not_depend_on_the_order_of_its_keys() -> None:
    assert sha256_json({"a": 1, "b": [1, 2]}) == sha256_json({"b": [1, 2], "a": 1})
    assert sha256_json({"a": 1}) != sha256_json({"a": 2})
