"""The weights lock: what is written is read, damage is refused, and files are found by what they are."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from foldkv.errors import ArtifactError, InputError
from foldkv.export.contract.lock import LockedFile, Part, Weight, WeightsLock, weight_folders

SHA = "0" * 64
FILES = {"a.safetensors": LockedFile(4096, 64, SHA), "sub/b.safetensors": LockedFile(1 << 40, 128, SHA, "1" * 64)}


@st.composite
def weights(draw: st.DrawFn) -> Weight:
    """A byte tensor whose parts lie anywhere in the files."""
    count = draw(st.integers(1, 12))
    sizes = draw(st.lists(st.integers(0, 300), min_size=count, max_size=count))
    parts = []
    for size in sizes:
        name = draw(st.sampled_from(sorted(FILES)))
        parts.append(Part(name, draw(st.integers(0, FILES[name].bytes - size)), size))
    return Weight("U8", (sum(sizes),), tuple(parts))


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(st.sampled_from(["attn.wq_a.weight", "ffn.experts.codes", "x"]), weights(), min_size=1))
def test_what_is_written_is_read(tmp_path_factory: pytest.TempPathFactory, roles: dict[str, Weight]) -> None:
    path = tmp_path_factory.mktemp("lock") / "weights.lock.json"
    lock = WeightsLock(FILES, {"embed": roles, "layers.12": roles}, {"repository": "a/b", "revision": "c"})
    lock.write(path)
    assert WeightsLock.read(path) == lock
    assert lock.bytes == 2 * sum(weight.bytes for weight in roles.values()) and not lock.verified


def test_the_parts_of_many_experts_take_few_bytes(tmp_path: Path) -> None:
    parts = tuple(Part("sub/b.safetensors", 1 << 39 | at * 7_340_032, (9, 5, 4)[at % 3] << 10) for at in range(1152))
    weight = Weight("I8", (384, 18 << 10), parts)
    path = tmp_path / "weights.lock.json"
    WeightsLock(FILES, {f"layers.{layer}": {"codes": weight} for layer in range(61)}).write(path)
    assert path.stat().st_size < 61 * 1152 * 14 + 20_000
    assert WeightsLock.read(path).weights["layers.60"]["codes"] == weight


def _edit(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))

    return apply


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda p: p.unlink(), "cannot be read"),
    "not JSON": (lambda p: p.write_text("{"), "cannot be read as JSON"),
    "a list": (lambda p: p.write_text("[]"), "version None"),
    "newer": (_edit(lambda c: c.update(version=2)), "version 2; this foldkv reads 1"),
    "no files": (_edit(lambda c: c.pop("files")), "is damaged"),
    "a path out": (_edit(lambda c: c["files"].update({"../x": c["files"].pop("a.safetensors")})), "leads out"),
    "an absolute path": (_edit(lambda c: c["files"].update({"/x": c["files"].pop("a.safetensors")})), "leads out"),
    "beyond the file": (_edit(lambda c: c["weights"]["embed"]["x"].update(offset=[4090])), "which has 4096"),
    "negative offset": (_edit(lambda c: c["weights"]["embed"]["x"].update(offset=[-1])), "reads bytes -1"),
    "another size": (_edit(lambda c: c["weights"]["embed"]["x"].update(bytes=[8])), "parts of 8 bytes"),
    "another shape": (_edit(lambda c: c["weights"]["embed"]["x"].update(shape=[3])), "takes 12"),
    "unknown dtype": (_edit(lambda c: c["weights"]["embed"]["x"].update(dtype="F9")), "'F9'"),
    "no such file": (_edit(lambda c: c["weights"]["embed"]["x"].update(file=7)), "is damaged"),
    "a text for a number": (_edit(lambda c: c["weights"]["embed"]["x"].update(offset=["x"])), "is damaged"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_refused_with_its_place(tmp_path: Path, name: str) -> None:
    path = tmp_path / "weights.lock.json"
    WeightsLock(FILES, {"embed": {"x": Weight("F32", (4,), (Part("a.safetensors", 64, 16),))}}).write(path)
    change, finding = DAMAGE[name]
    change(path)
    with pytest.raises(ArtifactError, match=r"Export the checkpoint again") as caught:
        WeightsLock.read(path)
    assert finding in str(caught.value)


def stored(folder: Path, name: str, head: bytes, size: int) -> LockedFile:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(head + bytes(size - len(head)))
    return LockedFile(size, len(head), hashlib.sha256(head).hexdigest())


def test_files_are_found_in_the_first_folder_that_has_them_and_by_their_headers(tmp_path: Path) -> None:
    right, other = tmp_path / "right", tmp_path / "other"
    lock = WeightsLock({"m.safetensors": stored(right, "m.safetensors", b"header", 100)}, {}, {"repository": "a/b"})
    assert lock.find([tmp_path / "nothing", right]) == {"m.safetensors": right / "m.safetensors"}
    link = tmp_path / "link"
    link.symlink_to(right, target_is_directory=True)
    assert lock.find([link])["m.safetensors"].samefile(right / "m.safetensors")
    stored(other, "m.safetensors", b"HEADER", 100)
    assert lock.find([other, right])["m.safetensors"] == right / "m.safetensors"
    for folder, finding in ((other, "has other tensors"), (tmp_path / "nothing", "m.safetensors (100 bytes")):
        with pytest.raises(InputError, match="weights are missing") as caught:
            lock.find([folder])
        text = str(caught.value)
        assert finding in text and "Fetch a/b" in text and "--weights-from or FOLDKV_WEIGHTS" in text
    (right / "m.safetensors").write_bytes(b"header")
    with pytest.raises(InputError, match="has 6 bytes, expected 100"):
        lock.find([right])


def test_weights_are_looked_for_where_the_user_says_then_in_the_artifact_then_where_they_were(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FOLDKV_WEIGHTS", raising=False)
    assert weight_folders(tmp_path, None, "/was") == [tmp_path / "weights", Path("/was")]
    monkeypatch.setenv("FOLDKV_WEIGHTS", "/one:/two")
    assert weight_folders(tmp_path, None, None) == [Path("/one"), Path("/two"), tmp_path / "weights"]
    assert weight_folders(tmp_path, Path("/given"), "/was") == [Path("/given")]
