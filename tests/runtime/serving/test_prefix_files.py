"""Prefixes on disk: whole entries or none, whatever happens to the process, the disk or the files."""

from __future__ import annotations

import json
import logging
import os
import random
import resource
import shutil
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import command
import numpy as np
import pytest
from disks import permissions_hold, small_disk
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from slot_snapshots import MEANING, equal, snapshot

from foldkv.errors import InputError, SystemFailure
from foldkv.runtime.serving import prefix_files, prefixes
from foldkv.runtime.serving.prefixes import PrefixIndex

PROMPT = (3, 1, 4, 1, 5)
ROOM = 1 << 24


def opened(
    folder: Path, *, producer: str = "this", memory_bytes: int = 0, disk_bytes: int = ROOM, meaning: Any = MEANING
) -> PrefixIndex:
    """An index that has nothing in memory unless it may, so that what it finds comes from the disk."""
    return PrefixIndex(meaning, producer=producer, memory_bytes=memory_bytes, folder=folder, disk_bytes=disk_bytes)


def keep(folder: Path, *prompts: tuple[int, ...], exact: bool = True, row: int = 8, producer: str = "this") -> None:
    with opened(folder, producer=producer) as index:
        for prompt in prompts:
            index.put(prompt, snapshot(prompt, row=row), exact=exact)
            index.flush()


def entries(folder: Path) -> list[Path]:
    return sorted(folder.glob("prefix-*"))


def holds(index: PrefixIndex, prompt: tuple[int, ...], *, exact: bool = False, row: int = 8) -> bool:
    """Whether the index has a prompt; what it gives must be the very state."""
    hit = index.find((*prompt, 0), exact=exact)
    if hit is None or hit.length < len(prompt):
        return False
    assert equal(hit.snapshot, snapshot(prompt, row=row))
    return True


def everything(folder: Path) -> dict[str, Any]:
    """What a folder has, so that a change shows."""
    found = {}
    for path in sorted([folder, *folder.rglob("*")]):
        facts = path.stat()
        found[str(path)] = (facts.st_mode, facts.st_mtime_ns, path.read_bytes() if path.is_file() else None)
    return found


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("row", [0, 1, 7])
def test_an_entry_comes_back_to_the_bit_with_every_type(tmp_path: Path, row: int, exact: bool) -> None:
    """Types of one to four bytes, tensors without rows and without columns."""
    keep(tmp_path / "kept", PROMPT, row=row, exact=exact)
    with opened(tmp_path / "kept") as index:
        assert index.stats().entries == 1 and index.stats().memory_bytes == 0
        hit = index.find([*PROMPT, 9, 9], exact=exact)
        assert hit is not None and (hit.length, hit.exact) == (len(PROMPT), exact)
        assert equal(hit.snapshot, snapshot(PROMPT, row=row))
        assert all(not rows.flags.writeable for rows in hit.snapshot.rows)
        assert (index.find([*PROMPT, 9], exact=True) is None) == (not exact)


def test_files_are_safetensors_with_what_tells_them_apart(tmp_path: Path) -> None:
    keep(tmp_path / "kept", PROMPT)
    (file,) = entries(tmp_path / "kept")
    tensors = load_file(file)
    assert tensors["tokens"].tolist() == list(PROMPT) and len(tensors) == 1 + len(snapshot(PROMPT).rows)
    with safe_open(file, framework="np") as content:
        metadata = content.metadata()
    assert (metadata["producer"], metadata["position"], metadata["exact"]) == ("this", "5", "true")
    assert json.loads(metadata["meaning"]) == vars(MEANING)


# Budgets

OFTEN = st.lists(st.integers(0, 1), min_size=1, max_size=3).map(tuple)
STEPS = st.lists(
    st.tuples(st.sampled_from(["put", "put", "find", "find", "restart"]), OFTEN, st.booleans()), max_size=24
)


@dataclass
class Model:
    """What an index with a folder must hold: tokens and whether they are exact, the least recently used first."""

    sizes: dict[tuple[tuple[int, ...], bool], int]
    most_memory: int
    most_disk: int
    memory: dict[tuple[int, ...], bool] = field(default_factory=dict)
    disk: dict[tuple[int, ...], bool] = field(default_factory=dict)

    def remember(self, tokens: tuple[int, ...], exact: bool) -> None:
        self.memory.pop(tokens, None)
        if self._bytes(tokens) <= self.most_memory:
            self.memory[tokens] = exact
        while sum(map(self._bytes, self.memory)) > self.most_memory:
            del self.memory[next(iter(self.memory))]

    @staticmethod
    def _bytes(tokens: tuple[int, ...]) -> int:
        return snapshot(tokens).bytes + 4 * len(tokens)

    def _use(self, kept: dict[tuple[int, ...], bool], tokens: tuple[int, ...]) -> None:
        if tokens in kept:
            kept[tokens] = kept.pop(tokens)

    def put(self, tokens: tuple[int, ...], exact: bool) -> None:
        before = self.disk.get(tokens)
        if tokens in self.memory and self.memory[tokens] >= exact:
            exact = self.memory[tokens]
            self._use(self.memory, tokens)
        elif exact or not before:
            self.remember(tokens, exact)
        self._use(self.disk, tokens)
        if before is None or exact > before:
            size = self.sizes[tokens, exact]
            if size <= self.most_disk:
                self.disk.pop(tokens, None)
                self.disk[tokens] = exact
                while sum(self.sizes[one] for one in self.disk.items()) > self.most_disk:
                    del self.disk[next(iter(self.disk))]

    def find(self, tokens: tuple[int, ...], exact: bool) -> tuple[int, bool] | None:
        for length in range(len(tokens) - 1, 0, -1):
            begun = tokens[:length]
            for kept in (self.memory, self.disk):
                if begun in kept and kept[begun] >= exact:
                    found = kept[begun]
                    self.remember(begun, found)
                    self._use(self.disk, begun)
                    return length, found
        return None


@pytest.fixture(scope="module")
def sizes(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[tuple[int, ...], bool], int]:
    """Bytes of the files of all tokens that steps can have."""
    found = {}
    for exact in (False, True):
        with opened(folder := tmp_path_factory.mktemp("sizes") / "kept") as index:
            before = 0
            for length in range(1, 4):
                for bits in range(1 << length):
                    tokens = tuple(int(bit) for bit in f"{bits:0{length}b}")
                    index.put(tokens, snapshot(tokens), exact=exact)
                    index.flush()
                    found[tokens, exact] = index.stats().disk_bytes - before
                    before = index.stats().disk_bytes
        assert before == sum(path.stat().st_size for path in entries(folder))
    return found


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=STEPS, memory=st.sampled_from([0, 500, 1500]), files=st.sampled_from([1.5, 3.5, 100]))
def test_what_leaves_memory_and_the_disk_was_not_used_for_longest(
    tmp_path: Path,
    sizes: dict[tuple[tuple[int, ...], bool], int],
    steps: list[tuple[str, tuple[int, ...], bool]],
    memory: int,
    files: float,
) -> None:
    """Also after the folder was closed and opened again: times of use are kept with the files."""
    folder, most = tmp_path / "kept", int(files * sizes[(0, 0, 0), True])
    shutil.rmtree(folder, ignore_errors=True)
    model = Model(sizes, memory, most)
    index = opened(folder, memory_bytes=memory, disk_bytes=most)
    try:
        for step, tokens, exact in steps:
            if step == "put":
                index.put(tokens, snapshot(tokens), exact=exact)
                index.flush()
                model.put(tokens, exact)
            elif step == "find":
                hit, wanted = index.find(tokens, exact=exact), model.find(tokens, exact)
                assert (hit and (hit.length, hit.exact)) == wanted
                assert hit is None or equal(hit.snapshot, snapshot(tokens[: hit.length]))
            else:
                index.close()
                index = opened(folder, memory_bytes=memory, disk_bytes=most)
                model.memory.clear()
            stats = index.stats()
            assert stats.entries == len(model.memory.keys() | model.disk.keys())
            assert stats.disk_bytes == sum(path.stat().st_size for path in entries(folder)) <= most
            assert stats.disk_bytes == sum(model.sizes[one] for one in model.disk.items())
    finally:
        index.close()


@pytest.mark.parametrize("memory_bytes", [0, ROOM])
def test_less_room_at_opening_deletes_what_was_not_used_for_longest(tmp_path: Path, memory_bytes: int) -> None:
    """A use in memory is one of the file, too; so is being written again."""
    folder = tmp_path / "kept"
    with opened(folder, memory_bytes=memory_bytes) as index:
        for number, exact in ((1, True), (2, False), (3, True), (4, True), (2, True)):
            index.put((number, number), snapshot((number, number)), exact=exact)
            index.flush()
        assert holds(index, (1, 1))
    half = sum(path.stat().st_size for path in entries(folder)) // 2
    with opened(folder, disk_bytes=half) as index:
        assert [holds(index, (number, number)) for number in (1, 2, 3, 4)] == [True, True, False, False]
        assert index.stats().disk_evictions == 2
    assert len(entries(folder)) == 2


def test_being_written_again_is_a_use(tmp_path: Path) -> None:
    keep(tmp_path / "one", (1, 1))
    room = 2 * entries(tmp_path / "one")[0].stat().st_size + 100
    with opened(tmp_path / "kept", disk_bytes=room) as index:
        for number, exact in ((1, False), (2, True), (1, True), (3, True)):
            index.put((number, number), snapshot((number, number)), exact=exact)
            index.flush()
        assert [holds(index, (number, number)) for number in (1, 2, 3)] == [True, False, True]


def test_what_is_larger_than_all_room_is_not_written_and_drives_nothing_out(tmp_path: Path) -> None:
    with opened(tmp_path / "kept", disk_bytes=5000) as index:
        index.put((1, 1), snapshot((1, 1)), exact=True)
        index.put((2, 2), snapshot((2, 2), row=1000), exact=True)
        index.flush()
        assert holds(index, (1, 1)) and not holds(index, (2, 2), row=1000)
        assert (index.stats().unwritten, index.stats().disk_evictions) == (1, 0)


# Exactness


def test_another_producer_has_inexact_hits_until_it_writes_its_own(tmp_path: Path) -> None:
    folder = tmp_path / "kept"
    keep(folder, PROMPT, producer="another")
    with opened(folder) as index:
        assert index.find([*PROMPT, 9], exact=True) is None
        hit = index.find([*PROMPT, 9], exact=False)
        assert hit is not None and not hit.exact
        index.put(PROMPT, snapshot(PROMPT), exact=False)  # no better than what is there
        index.flush()
    with opened(folder, producer="another") as index:
        assert holds(index, PROMPT, exact=True)
    keep(folder, PROMPT)
    with opened(folder) as index:
        assert holds(index, PROMPT, exact=True)
    assert len(entries(folder)) == 1


def test_an_exact_entry_on_disk_is_not_hidden_by_an_inexact_one_in_memory(tmp_path: Path) -> None:
    keep(tmp_path / "kept", PROMPT)
    with opened(tmp_path / "kept", memory_bytes=ROOM) as index:
        index.put(PROMPT, snapshot(PROMPT, salt=1), exact=False)
        hit = index.find([*PROMPT, 9], exact=False)
        assert hit is not None and hit.exact and equal(hit.snapshot, snapshot(PROMPT))


def test_equal_digests_on_disk_never_give_another_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Same:
        def update(self, data: Any) -> None:
            pass

        def copy(self) -> Same:
            return self

        def digest(self) -> bytes:
            return bytes(16)

    for module in (prefixes, prefix_files):
        monkeypatch.setattr(module, "new_digest", Same)
    with opened(tmp_path / "kept") as index:
        index.put((1, 1), snapshot((1, 1)), exact=True)
        index.flush()
        assert not holds(index, (2, 2)) and holds(index, (1, 1))
        assert index.stats().damaged == 0


# Damage


def damages(size: int) -> Iterator[int]:
    """Places in a file: all of its beginning, and every few bytes of the rest, to the last."""
    yield from range(8)
    yield from range(8, size, 11)
    yield size - 1


def test_a_changed_bit_anywhere_is_a_miss(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder, copy = tmp_path / "kept", tmp_path / "copy"
    keep(folder, PROMPT, row=2)
    (file,) = entries(folder)
    whole, bits = file.read_bytes(), random.Random(0)
    for place in damages(len(whole)):
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(folder, copy)
        damaged = bytearray(whole)
        damaged[place] ^= 1 << bits.randrange(8)
        (copy / file.name).write_bytes(damaged)
        caplog.clear()
        with opened(copy) as index:
            assert not holds(index, PROMPT, row=2), f"byte {place}"
            assert index.stats().damaged == 1 and index.stats().disk_bytes == 0
            assert not entries(copy) and "damaged" in caplog.text
            index.put(PROMPT, snapshot(PROMPT, row=2), exact=True)
            index.flush()
            assert holds(index, PROMPT, row=2)


@pytest.mark.parametrize("open_before", [True, False])
def test_a_cut_or_longer_file_is_a_miss(tmp_path: Path, open_before: bool) -> None:
    folder, copy = tmp_path / "kept", tmp_path / "copy"
    keep(folder, PROMPT)
    (file,) = entries(folder)
    whole = file.read_bytes()
    for content in (b"", whole[:5], whole[:8], whole[:100], whole[:-1], whole[: len(whole) // 2], whole + b"\0"):
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(folder, copy)
        if not open_before:
            (copy / file.name).write_bytes(content)
        with opened(copy) as index:
            if open_before:
                (copy / file.name).write_bytes(content)
            assert not holds(index, PROMPT)
            assert index.stats().damaged == 1 and not entries(copy)


def test_a_whole_file_under_the_name_of_another_is_a_miss(tmp_path: Path) -> None:
    folder = tmp_path / "kept"
    keep(folder, (1, 1), (2, 2))
    one, other = entries(folder)
    shutil.copyfile(one, other)
    with opened(folder) as index:
        assert index.stats().damaged == 1 and index.stats().entries == 1
        assert sorted([holds(index, (1, 1)), holds(index, (2, 2))]) == [False, True]


def test_a_shorter_entry_is_found_when_the_longest_is_damaged_or_gone(tmp_path: Path) -> None:
    folder = tmp_path / "kept"
    keep(folder, PROMPT[:2])
    (short,) = entries(folder)
    keep(folder, PROMPT[:4], PROMPT[:3])
    with opened(folder) as index:
        for file in entries(folder):
            if file != short:
                file.unlink()
        hit = index.find(PROMPT, exact=True)
        assert hit is not None and hit.length == 2
        assert (index.stats().entries, index.stats().damaged, index.stats().hits) == (1, 0, 1)


def test_a_file_that_cannot_be_read_is_a_miss_and_stays(tmp_path: Path) -> None:
    folder = tmp_path / "kept"
    keep(folder, PROMPT)
    (file,) = entries(folder)
    with opened(folder) as index, permissions_hold():
        file.chmod(0)
        assert not holds(index, PROMPT)
        file.chmod(0o600)
        assert holds(index, PROMPT)


def test_opening_reads_headers_only(tmp_path: Path) -> None:
    folder = tmp_path / "kept"
    prompts = [tuple(range(first, first + 500)) for first in range(4)]
    keep(folder, *prompts, row=100)
    assert sum(file.stat().st_size for file in entries(folder)) > 2_000_000
    with entries(folder)[0].open("r+b") as file:  # in the middle of a tensor
        file.seek(200_000)
        file.write(b"damage")

    def read_so_far() -> int:
        return int(Path("/proc/self/io").read_text().split()[1])

    before = read_so_far()
    with opened(folder) as index:
        assert read_so_far() - before < 200_000
        assert (index.stats().entries, index.stats().damaged) == (4, 0)
        assert sum(holds(index, prompt, row=100) for prompt in prompts) == 3
        assert index.stats().damaged == 1


# Other files and folders


def test_files_of_others_stay_and_what_a_killed_writer_left_goes(tmp_path: Path) -> None:
    folder = tmp_path / "kept"
    keep(folder, PROMPT)
    (file,) = entries(folder)
    others = ["notes.txt", "model.safetensors", "prefix-1.safetensors", f"{file.name}.bak", ".hidden"]
    for name in others:
        (folder / name).write_bytes(b"mine")
    (folder / f"prefix-{'0' * 32}.safetensors").mkdir()
    save_file({"x": np.zeros(3)}, folder / "valid.safetensors")
    shutil.copyfile(file, folder / "new" / file.name)
    (folder / "new" / ".tmpX1y2z3").write_bytes(b"half")
    with opened(folder) as index:
        assert index.stats().entries == 1 and holds(index, PROMPT)
    assert all((folder / name).read_bytes() == b"mine" for name in others)
    assert (folder / f"prefix-{'0' * 32}.safetensors").is_dir() and (folder / "valid.safetensors").exists()
    assert not list((folder / "new").iterdir())


def refusing(folder: Path, match: str, **options: Any) -> None:
    """Opening is refused, and changes nothing."""
    before = everything(folder)
    with pytest.raises(InputError, match=match):
        opened(folder, **options)
    assert everything(folder) == before


def test_the_folder_of_another_bundle_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "kept"
    keep(folder, PROMPT)
    (folder / "new" / "half").write_bytes(b"half")
    refusing(
        folder, "weights '0123abcd', here 'another'.*nothing was changed", meaning=replace(MEANING, weights="another")
    )
    refusing(folder, "profile 'hf', here 'served'", meaning=replace(MEANING, profile="served"))
    with opened(folder) as index:
        assert holds(index, PROMPT)


@pytest.mark.parametrize(
    ("identity", "match"),
    [
        (b"", "not that of a folder of prefixes"), (b"[]", "not that of a folder of prefixes"), (b"\xff", "not that of"),
        (b"[" * 100_000, "not that of"), (b'{"name": "web app"}', "not that of a folder of prefixes"),
        (b'{"kind": "foldkv prefixes", "format": 2}', "format 2, here 1"),
    ],
)  # fmt: skip
def test_an_identity_that_is_something_else_is_refused(tmp_path: Path, identity: bytes, match: str) -> None:
    keep(tmp_path / "kept", PROMPT)
    (tmp_path / "kept" / "index.json").write_bytes(identity)
    refusing(tmp_path / "kept", match)


def test_a_folder_with_something_else_or_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir(mode=0o755)
    (tmp_path / "home" / "letter.txt").write_text("mine")
    refusing(tmp_path / "home", "is not empty")
    refusing(tmp_path / "home" / "letter.txt", "is a file")
    with pytest.raises(SystemFailure, match="ile"):
        opened(tmp_path / "home" / "letter.txt" / "below")


def test_an_opening_that_was_killed_is_done_again(tmp_path: Path) -> None:
    """Before the identity was in its place."""
    (tmp_path / "kept" / "new").mkdir(parents=True)
    (tmp_path / "kept" / "new" / "index.json").write_text("{")
    (tmp_path / "kept" / ".lock").touch()
    keep(tmp_path / "kept", PROMPT)
    with opened(tmp_path / "kept") as index:
        assert holds(index, PROMPT)


def test_a_folder_has_one_user_at_a_time(tmp_path: Path) -> None:
    folder = tmp_path / "kept"
    code = (
        "import sys; from foldkv.runtime.bundle import StateMeaning; from foldkv.runtime.serving.prefixes import PrefixIndex\n"
        f"from pathlib import Path; PrefixIndex({MEANING!r}, producer='', memory_bytes=0, folder=Path(sys.argv[1]), disk_bytes=9)"
    )
    with opened(folder) as index:
        index.put(PROMPT, snapshot(PROMPT), exact=True)
        index.flush()
        refusing(folder, f"used by another server \\(process {os.getpid()}\\)")
        exit_code, _, text = command.run(folder, code=code)
        assert exit_code and f"process {os.getpid()}" in text
        assert holds(index, PROMPT)
    with opened(folder) as index:
        assert holds(index, PROMPT)


@contextmanager
def umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


@pytest.mark.parametrize("made", [True, False])
def test_only_the_owner_can_read(tmp_path: Path, made: bool) -> None:
    folder = tmp_path / "kept"
    with umask(0):
        if made:
            folder.mkdir(mode=0o777)
        keep(folder, PROMPT)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in [folder, *folder.rglob("*")]}
    assert modes.pop("kept") == modes.pop("new") == 0o700
    assert set(modes.values()) == {0o600} and len(modes) == 3


def test_safetensors_is_asked_for_only_with_a_folder(tmp_path: Path) -> None:
    code = (
        "import sys; from foldkv.errors import MissingDependencyError; from foldkv.runtime.serving.prefixes import PrefixIndex\n"
        f"from foldkv.runtime.bundle import StateMeaning; from pathlib import Path; meaning = {MEANING!r}\n"
        "PrefixIndex(meaning, producer='', memory_bytes=9).close()\n"
        "try: PrefixIndex(meaning, producer='', memory_bytes=9, folder=Path(sys.argv[1]), disk_bytes=9)\n"
        "except MissingDependencyError as error: print(error)"
    )
    exit_code, out, text = command.run(tmp_path / "kept", hide=["safetensors"], code=code)
    assert exit_code == 0, text
    assert "safetensors, which is not installed" in out and "in memory only" in out
    assert not (tmp_path / "kept").exists()


# Writing


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """The system refuses to write more to a file, as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_write_that_fails_is_said_once_and_nothing_else_fails(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "kept"
    with opened(folder, memory_bytes=ROOM) as index:
        index.put((9, 9), snapshot((9, 9)), exact=True)
        index.flush()
        with largest_file(20_000):
            for number in range(3):
                index.put((number,) * 500, snapshot((number,) * 500), exact=True)
                index.flush()
        assert [record.levelno for record in caplog.records] == [logging.WARNING]
        assert "cannot be written" in caplog.text and "File too large" in caplog.text
        assert holds(index, (2,) * 500) and holds(index, (9, 9))
        assert (index.stats().unwritten, index.stats().entries) == (3, 4)
        assert not list((folder / "new").iterdir()) and len(entries(folder)) == 1
        index.put((2,) * 500, snapshot((2,) * 500), exact=True)  # it is in memory, and is tried again
        index.flush()
        assert len(entries(folder)) == 2
    with opened(folder) as index:
        assert holds(index, (2,) * 500)


def test_a_full_disk_is_gone_on_without(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with small_disk(tmp_path / "disk", 400_000) as disk, opened(disk / "kept", memory_bytes=ROOM) as index:
        for number in range(20):
            index.put((number,) * 200, snapshot((number,) * 200), exact=True)
            index.flush()
        written = len(entries(disk / "kept"))
        assert 5 < written < 20 and index.stats().unwritten == 20 - written
        assert sum("No space left" in record.message for record in caplog.records) == 1
        assert all(holds(index, (number,) * 200) for number in range(20))
        assert not list((disk / "kept" / "new").iterdir())


def test_a_folder_that_is_removed_meanwhile_is_gone_on_without(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with opened(tmp_path / "kept", memory_bytes=ROOM) as index:
        index.put((1, 1), snapshot((1, 1)), exact=True)
        index.flush()
        shutil.rmtree(tmp_path / "kept")
        index.put((2, 2), snapshot((2, 2)), exact=True)
        index.flush()
        assert holds(index, (1, 1)) and holds(index, (2, 2))
        assert len(caplog.records) == 1


def test_nobody_waits_for_a_slow_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What waits is found, is not written twice, and is bounded."""
    goes_on, synced, real = threading.Event(), list[int](), os.fsync

    def slow(descriptor: int) -> None:
        goes_on.wait(60)
        synced.append(descriptor)
        real(descriptor)

    with opened(tmp_path / "kept") as index:
        monkeypatch.setattr(prefix_files.os, "fsync", slow)
        for number in range(40):
            for exact in (False, True):  # the second takes the place of the first while it waits
                index.put((number, 1), snapshot((number, 1)), exact=exact)
        kept = [number for number in range(40) if holds(index, (number, 1), exact=True)]
        assert kept == list(range(len(kept))) and 1 < len(kept) < 40
        assert index.stats().unwritten == 2 * (40 - len(kept)) and not entries(tmp_path / "kept")
        goes_on.set()
        index.flush()
        assert len(entries(tmp_path / "kept")) == len(kept)
        assert len(kept) <= len(synced) <= len(kept) + 1  # the first was being written when the better one came
    with opened(tmp_path / "kept") as index:
        assert all(holds(index, (number, 1), exact=True) for number in kept)


_KILLED = """
import os, random, signal, sys, time
from pathlib import Path
from slot_snapshots import MEANING, snapshot
from foldkv.runtime.serving.prefixes import PrefixIndex
import safetensors.numpy

prompts = [tuple(range(first, first + 200)) for first in range(6)]
for prompt in prompts:
    snapshot(prompt, row=40)
for number in range(int(sys.argv[2])):
    child = os.fork()
    if not child:
        index = PrefixIndex(MEANING, producer="this", memory_bytes=0, folder=Path(sys.argv[1]) / str(number), disk_bytes=500_000)
        while True:
            for exact in (False, True):
                for prompt in prompts:
                    index.put(prompt, snapshot(prompt, row=40), exact=exact)
                index.flush()
    while not (Path(sys.argv[1]) / str(number) / "index.json").exists():
        time.sleep(0.0005)
    time.sleep(random.Random(number).uniform(0, 0.06))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
"""


def test_a_killed_writer_leaves_whole_entries_only(tmp_path: Path) -> None:
    """At any moment, with entries that drive each other out and take each other's places."""
    support = Path(__file__).parents[2] / "support"
    rounds, whole, halves = 24, 0, 0
    code = f"import sys; sys.path.insert(0, {str(support)!r})\n{_KILLED}"
    exit_code, _, text = command.run(tmp_path, rounds, code=code)
    assert exit_code == 0, text
    for number in range(rounds):
        folder = tmp_path / str(number)
        halves += sum(path.is_file() and path.stat().st_size > 0 for path in folder.glob("new/*"))
        with opened(folder) as index:
            assert index.stats().damaged == 0
            assert not list((folder / "new").iterdir())
            found = sum(holds(index, tuple(range(first, first + 200)), row=40) for first in range(6))
            assert index.stats().entries == found == len(entries(folder)) and index.stats().damaged == 0
            whole += found
    assert whole > rounds and halves > rounds // 4  # kills that hit nothing would show nothing
