"""Large files at a second place: the same bytes, holes stay holes, and an interrupted copy goes on."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from foldkv.errors import FoldkvError
from foldkv.export import files
from foldkv.export.files import place_file


@pytest.fixture(params=["links", "copies"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "copies":

        def refuse(*_: object) -> None:
            raise OSError(18, "Invalid cross-device link")

        monkeypatch.setattr(os, "link", refuse)
        monkeypatch.setattr(files, "_reflink", refuse)
    return str(request.param)


def sparse(path: Path) -> bytes:
    """A file of 8 MiB: data, a hole, data, a hole at the end."""
    with path.open("wb") as file:
        file.write(b"head" * 1000)
        file.seek(5 << 20)
        file.write(b"middle" * 1000)
        file.truncate(8 << 20)
    return path.read_bytes()


def test_a_file_has_the_same_bytes_and_as_many_blocks_at_its_second_place(tmp_path: Path, way: str) -> None:
    content = sparse(tmp_path / "source")
    (tmp_path / "link").symlink_to("source")
    done = [0]
    found = place_file(tmp_path / "link", tmp_path / "a" / "b", advance=lambda n: done.__setitem__(0, done[0] + n))
    target = tmp_path / "a" / "b"
    assert found == "copy" if way == "copies" else found in ("reflink", "hard link")
    assert target.read_bytes() == content and not target.is_symlink() and done[0] == len(content)
    assert target.stat().st_blocks <= (tmp_path / "source").stat().st_blocks + 64
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["b"]
    place_file(tmp_path / "source", target)  # again, over what is there
    assert target.read_bytes() == content


def test_an_interrupted_copy_goes_on_unless_its_source_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_reflink", lambda *_: (_ for _ in ()).throw(OSError(18, "no")))
    monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError(18, "no")))
    monkeypatch.setattr(files, "_CHUNK", 1 << 16)
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_bytes(os.urandom(1 << 20))
    done = 0

    def stop(size: int) -> None:
        nonlocal done
        done += size
        if done > 1 << 19:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        place_file(source, target, advance=stop)
    part = tmp_path / "target.part"
    assert not target.exists() and part.stat().st_size >= 1 << 19
    assert json.loads((tmp_path / "target.part.json").read_text())[2] == 1 << 20
    sizes: list[int] = []
    place_file(source, target, advance=sizes.append)
    assert sizes[0] >= 1 << 19 and sum(sizes) == 1 << 20 and target.read_bytes() == source.read_bytes()
    target.unlink()
    done = 0
    with pytest.raises(KeyboardInterrupt):
        place_file(source, target, advance=stop)
    source.write_bytes(os.urandom(1 << 20))  # other content of the same size: nothing of the old copy is kept
    place_file(source, target)
    assert target.read_bytes() == source.read_bytes()


def test_what_cannot_be_read_or_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(FoldkvError, match="nothing") as caught:
        place_file(tmp_path / "nothing", tmp_path / "out" / "b")
    assert caught.value.exit_code == 2
    (tmp_path / "file").write_bytes(b"x")
    with pytest.raises(FoldkvError, match=r"Not a directory|File exists"):
        place_file(tmp_path / "file", tmp_path / "file" / "b")
