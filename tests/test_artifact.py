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

import numpy as np
import pytest
from disks import hub_cache, local_download, permissions_hold, small_disk

from foldkv.artifact import (
    MANIFEST,
    check_destination,
    confined,
    free_bytes,
    only_writer,
    read_manifest,
    sha256_json,
    staged,
    verify_files,
    write_manifest,
    write_whole,
)
from foldkv.errors import ArtifactError, InputError, SystemFailure

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
            lambda f: (
                (f / "data.txt").unlink(),
                (f.parent / "x").write_text("neu"),
                (f / "data.txt").symlink_to("../x"),
            ),
            "data.txt has sha256 .*; the manifest says",
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


@pytest.mark.parametrize("name", ["", "..", "a/../../b", "/a", "a\\b", "a\0b", "a\udcff"])
def test_names_that_lead_out_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ArtifactError):
        confined(tmp_path, name)


def test_the_digest_of_a_value_does_not_depend_on_the_order_of_its_keys() -> None:
    assert sha256_json({"a": 1, "b": [1, 2]}) == sha256_json({"b": [1, 2], "a": 1})
    assert sha256_json({"a": 1}) != sha256_json({"a": 2})


# Artifacts as they lie on disk


def test_an_artifact_in_the_hugging_face_cache_is_read(tmp_path: Path) -> None:
    snapshot = hub_cache(make(tmp_path / "a"), tmp_path / "models--x--y")
    assert (snapshot / "data.txt").is_symlink()
    verify_files(snapshot, read_manifest(snapshot, kind=KIND))
    with pytest.raises(ArtifactError, match=f"repository of the Hugging Face cache: give its snapshot {snapshot}"):
        read_manifest(tmp_path / "models--x--y", kind=KIND)
    (snapshot / "data.txt").resolve().unlink()
    with pytest.raises(ArtifactError, match=r"data\.txt is a link to .*blobs.*, which is missing"):
        read_manifest(snapshot, kind=KIND)


def test_files_that_nobody_listed_are_no_error(tmp_path: Path) -> None:
    folder = make(tmp_path / "a")
    local_download(folder)
    verify_files(folder, read_manifest(folder, kind=KIND))


def test_a_users_own_files_outlive_the_artifact_that_they_lie_in(tmp_path: Path) -> None:
    folder = make(tmp_path / "a")
    (folder / "README.md").write_text("mine")
    (folder / "notes").mkdir()
    (folder / "notes" / "today").write_text("mine too")
    make(folder, "new")
    assert (folder / "README.md").read_text() == "mine" and (folder / "notes" / "today").read_text() == "mine too"
    assert (folder / "data.txt").read_text() == "new" and "README.md" not in read_manifest(folder, kind=KIND)["files"]
    assert siblings(folder) == ["a"]


def test_a_folder_with_litter_only_is_empty(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / ".DS_Store").write_bytes(b"x")
    assert (make(tmp_path / "a") / "data.txt").read_text() == "old"


@pytest.mark.parametrize("there", ["artifact", "empty", "nothing"])
def test_an_output_that_is_a_link_is_written_through(tmp_path: Path, there: str) -> None:
    target, link = tmp_path / "disk" / "a", tmp_path / "here" / "a"
    target.parent.mkdir()
    link.parent.mkdir()
    if there == "artifact":
        make(target)
    elif there == "empty":
        target.mkdir()
    link.symlink_to("../disk/a", target_is_directory=True)
    check_destination(link, kind=KIND)
    with only_writer(link):
        make(link, "new")
    assert link.is_symlink() and (target / "data.txt").read_text() == "new" and not target.is_symlink()
    assert siblings(link) == ["a"] and siblings(target) == [".a.lock", "a"]
    with pytest.raises(RuntimeError), staged(link, kind=KIND):
        raise RuntimeError
    assert (link / "data.txt").read_text() == "new" and siblings(target) == [".a.lock", "a"]


def test_folders_above_an_output_may_be_links_to_nothing_yet(tmp_path: Path) -> None:
    (tmp_path / "out").symlink_to("big/out")
    make(tmp_path / "out" / "graph")
    assert (tmp_path / "out").is_symlink() and (tmp_path / "big" / "out" / "graph" / "data.txt").is_file()


def test_links_in_a_circle_are_named(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    for go in (lambda: make(tmp_path / "a"), lambda: check_destination(tmp_path / "a", kind=KIND)):
        with pytest.raises(SystemFailure, match=r"/a: Too many levels.*The links lead in a circle"):
            go()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


@pytest.mark.parametrize("name", ["line\nbreak", "a*[b]?", "x" * 255, "é" * 127, " ", "-o"])
def test_odd_names_are_only_names(tmp_path: Path, name: str) -> None:
    (tmp_path / "a.foldkv-retired-1-00").mkdir()  # of another artifact, which a name taken as a pattern would find
    folder = make(tmp_path / name)
    for mark in ("staging", "retired"):
        (tmp_path / f"{name[:60]}.foldkv-{mark}-999999999-00").mkdir()
    with only_writer(folder):
        make(folder, "new")
    verify_files(folder, read_manifest(folder, kind=KIND))
    assert (folder / "data.txt").read_text() == "new" and (tmp_path / "a.foldkv-retired-1-00").is_dir()
    if len(name) < 60:
        assert not list(tmp_path.glob("*-999999999-00"))


def test_a_name_that_is_too_long_for_the_disk_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemFailure, match=r"File name too long\. Choose a shorter name") as caught:
        make(tmp_path / ("x" * 256))
    assert caught.value.facts()["reason"] == "ENAMETOOLONG" and not list(tmp_path.iterdir())


def test_a_path_that_is_not_utf8_is_refused_and_shown_as_text(tmp_path: Path) -> None:
    folder = make(tmp_path / "a")
    odd = Path(os.fsdecode(os.fsencode(tmp_path) + b"/a\xffb"))
    for go in (lambda: make(odd), lambda: check_destination(odd, kind=KIND), lambda: only_writer(odd).__enter__()):
        with pytest.raises(InputError, match=r"a\\xffb: the path has bytes that are not UTF-8"):
            go()
    assert siblings(folder) == ["a"]
    folder.rename(odd)
    with pytest.raises(InputError, match=r"a\\xffb: the path has bytes that are not UTF-8") as caught:
        read_manifest(odd, kind=KIND)
    str(caught.value).encode()


def test_a_full_disk_leaves_the_old_artifact(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 1 << 20) as disk:
        folder = make(disk / "a")
        with pytest.raises(SystemFailure, match=r"disk/a.*: No space left on device\. Free some room") as caught:
            make(folder, "x" * (2 << 20))
        assert caught.value.facts()["reason"] == "ENOSPC"
        verify_files(folder, read_manifest(folder, kind=KIND))
        assert (folder / "data.txt").read_text() == "old" and siblings(folder) == ["a"]
        (tmp_path / "link").symlink_to("disk/new/out")  # to nothing yet; the room is where it leads to
        assert 0 < free_bytes(tmp_path / "link") <= 1 << 20


def test_what_numpy_cannot_write_is_a_full_disk(tmp_path: Path) -> None:
    with (
        small_disk(tmp_path / "disk", 1 << 20) as disk,
        pytest.raises(SystemFailure, match=r"disk/a: No space left on device, or a quota .* requested and") as caught,
        staged(disk / "a", kind=KIND) as work,
        (work / "weights.bin").open("wb") as file,
    ):
        np.zeros(1 << 19, np.float32).tofile(file)
    assert caught.value.facts()["reason"] == "ENOSPC"


def test_a_forbidden_folder_or_file_is_named(tmp_path: Path) -> None:
    folder = make(tmp_path / "a")
    (tmp_path / "closed").mkdir(mode=0o500)
    (folder / "data.txt").chmod(0)
    with permissions_hold():
        with pytest.raises(SystemFailure, match=r"closed/b: Permission denied"):
            make(tmp_path / "closed" / "b")
        with pytest.raises(SystemFailure, match=r"a/data\.txt: Permission denied"):
            verify_files(folder, read_manifest(folder, kind=KIND))
        (folder / MANIFEST).chmod(0)
        with pytest.raises(ArtifactError, match=r"manifest\.json cannot be read \(Permission denied\)"):
            read_manifest(folder, kind=KIND)


def test_a_file_is_the_old_one_or_the_new_one_and_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "real.svg").write_text("old")
    (tmp_path / "link.svg").symlink_to("real.svg")
    write_whole(tmp_path / "link.svg", "new")
    assert (tmp_path / "link.svg").is_symlink() and (tmp_path / "real.svg").read_text() == "new"
    with small_disk(tmp_path / "disk", 1 << 16) as disk:
        (disk / "a.svg").write_text("old")
        with pytest.raises(SystemFailure, match=r"a\.svg: No space left on device"):
            write_whole(disk / "a.svg", "x" * (1 << 17))
        assert (disk / "a.svg").read_text() == "old" and len(list(disk.iterdir())) == 1
    (tmp_path / "full.svg").symlink_to("/dev/full")
    with pytest.raises(SystemFailure, match=r"full\.svg: No space left on device"):
        write_whole(tmp_path / "full.svg", "x" * 10**6)
