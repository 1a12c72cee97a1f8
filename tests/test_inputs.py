"""Files as they lie on disk: every way to change one is noticed, without reading it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from disks import hub_cache

from foldkv.inputs import OpenedFiles, file_identity


def write_in_place(path: Path) -> None:
    with path.open("r+b") as file:
        file.write(b"NEW")


def write_and_set_the_time_back(path: Path) -> None:
    times = path.stat()
    path.write_bytes(b"new")
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def replace_with_its_times(path: Path) -> None:
    shutil.copy2(path, path.with_name("other"))
    path.with_name("other").replace(path)


CHANGES: dict[str, Callable[[Path], None]] = {
    "written in place": write_in_place,
    "written with its old time": write_and_set_the_time_back,
    "replaced by a copy with its times": replace_with_its_times,
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "w.safetensors"
    path.write_bytes(b"old")
    os.utime(path, ns=(10**18, 10**18))  # the clock of a file system is coarse
    return path


@pytest.mark.parametrize("change", CHANGES.values(), ids=list(CHANGES))
def test_a_file_that_was_saved_again_is_another_one(file: Path, change: Callable[[Path], None]) -> None:
    before = file_identity(file)
    assert file_identity(file) == before and before.facts() == file_identity(file).facts()
    change(file)
    assert file.stat().st_size == before.bytes
    assert file_identity(file).facts() != before.facts()


def test_hard_links_count_as_a_change_only_where_nobody_makes_them(file: Path) -> None:
    before = file_identity(file)
    os.link(file, file.with_name("link"))
    now = file_identity(file)
    assert now.facts() != before.facts() and now.facts(links_change=True) == before.facts(links_change=True)
    write_in_place(file)
    assert file_identity(file).facts(links_change=True) != before.facts(links_change=True)


def test_a_blob_is_known_by_its_name_until_it_is_written_again(file: Path, tmp_path: Path) -> None:
    first, second = (hub_cache(file.parent, tmp_path / f"models--x--{name}") / file.name for name in "yz")
    assert file_identity(first).facts() == file_identity(second).facts() == {"blob": first.resolve().name, "bytes": 3}
    assert not file_identity(first.resolve()).blob and not file_identity(file).blob
    os.utime(first, ns=(10**19 // 2, 10**19 // 2))  # through the link, as an editor writes
    assert file_identity(first).facts() != file_identity(second).facts()


def test_what_happens_to_opened_files_is_told(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(file.parent)
    opened = OpenedFiles([Path(file.name)])
    monkeypatch.chdir("/")
    assert opened.changes() == ()
    os.link(file, file.with_name("backup"))
    file.chmod(0o600)
    assert opened.changes() == ()  # nothing was written
    write_in_place(file)
    assert opened.changes() == (f"{file} was written again",)
    replace_with_its_times(file)
    assert opened.changes() == (f"{file} was replaced",)
    file.unlink()
    assert opened.changes() == (f"{file} is gone (No such file or directory)",)
