"""What a validation takes of memory and disk is known before it begins."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib import resources
from pathlib import Path

import pytest

from foldkv.backends import FLOAT32
from foldkv.errors import InputError, SystemFailure
from foldkv.export.checkpoint.config_reader import spec_from_config
from foldkv.export.contract.profiles import HF, SERVED
from foldkv.export.memory import parameter_count
from foldkv.runtime.wide import BFLOAT16
from foldkv.validation import layered_files, room
from foldkv.validation.layered_files import begin_run, bytes_below
from foldkv.validation.room import WHOLE_SHARE, Opened, check_layered, layered_disk, layered_memory
from foldkv.validation.settings import Plan

GIB = 1 << 30
FLASH = spec_from_config(
    json.loads(resources.files("foldkv.export").joinpath("configs/deepseek-v4-flash.json").read_text())
)
SIDES = Opened(FLASH, HF, FLOAT32, gpu=False)
#: A text in which the gates on choices are informative: some queries have more entries than places.
LONG = Plan(texts=1, text_tokens=2_400)


def twice_as_deep(opened: Opened) -> Opened:
    spec = opened.spec
    deeper = replace(
        spec, num_layers=2 * spec.num_layers, layer_types=2 * spec.layer_types, ratios=2 * spec.ratios,
        hash_layers=2 * spec.hash_layers,
    )  # fmt: skip
    return replace(opened, spec=deeper)


@pytest.mark.parametrize("sides", [SIDES, Opened(FLASH, SERVED, BFLOAT16, gpu=True)])
def test_a_whole_v4_flash_fits_into_24_gib_and_memory_does_not_grow_with_its_layers(sides: Opened) -> None:
    tokens = LONG.longest()
    assert tokens // 4 > FLASH.index_topk
    assert 8 * GIB < layered_memory(sides, tokens) < 20 * GIB
    assert layered_memory(twice_as_deep(sides), tokens) == layered_memory(sides, tokens)
    assert layered_memory(sides, 2 * tokens) > 1.5 * layered_memory(sides, tokens)
    # On the disk every layer's streams: 64 KiB a token, of three sides or more.
    streams = 3 * FLASH.num_layers * tokens * 64 * 1024
    assert streams < layered_disk(sides, LONG, 0) < 3 * streams
    assert layered_disk(twice_as_deep(sides), LONG, 0) > 1.4 * layered_disk(sides, LONG, 0)


@pytest.mark.parametrize(
    ("profile", "precision", "workers", "each"),
    [
        (HF, FLOAT32, 0, 4),
        (SERVED, FLOAT32, 0, 8),
        (HF, BFLOAT16, 0, 6),
        (SERVED, BFLOAT16, 0, 10),
        (SERVED, BFLOAT16, 3, 40),
    ],
)
@pytest.mark.parametrize("smaller", ["machine_memory", "available_memory"])
def test_references_are_whole_where_all_of_their_copies_fit_into_what_is_free(
    profile: str, precision: str, workers: int, each: int, smaller: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sides = Opened(FLASH, profile, precision, gpu=False, workers=workers)
    for name in ("machine_memory", "available_memory"):
        monkeypatch.setattr(room, name, lambda: 1 << 60)
    assert sides.fits_whole(more=4)
    fitting = int(each * parameter_count(FLASH) / WHOLE_SHARE) + 2
    monkeypatch.setattr(room, smaller, lambda: fitting)
    assert sides.fits_whole() and not sides.fits_whole(more=4)
    monkeypatch.setattr(room, smaller, lambda: fitting - 10)
    assert not sides.fits_whole()
    monkeypatch.setattr(room, "machine_memory", lambda: fitting)
    monkeypatch.setattr(room, "available_memory", lambda: 0)
    assert sides.fits_whole(), "a system that does not say what is free"


def test_what_does_not_fit_is_refused_with_what_would(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scratch, plan = tmp_path / "report.foldkv-reference", replace(LONG, text_tokens=9_000)
    monkeypatch.setattr(room, "available_memory", lambda: 20 * GIB)
    monkeypatch.setattr(room, "free_disk", lambda _: 200 * GIB)
    monkeypatch.setattr(room, "in_memory", lambda _: None)
    check_layered(SIDES, LONG, 500, scratch)
    with pytest.raises(
        InputError, match=r"of memory with texts and cases of up to 9,000 tokens, and 20\.00 GiB"
    ) as found:
        check_layered(SIDES, plan, 500, scratch)
    most = int(str(found.value).split("at most ")[1].split(" ")[0].replace(",", ""))
    check_layered(SIDES, replace(plan, text_tokens=most), 500, scratch)
    with pytest.raises(InputError, match=f"at most {most:,} tokens"):
        check_layered(SIDES, replace(plan, text_tokens=most + 1), 500, scratch)
    with pytest.raises(InputError, match="in 3 processes together, and"):
        check_layered(replace(SIDES, workers=2), LONG, 500, scratch)
    monkeypatch.setattr(room, "available_memory", lambda: 2 * GIB)
    with pytest.raises(InputError, match=r"free\. Give a machine with more memory"):
        check_layered(SIDES, LONG, 500, scratch)
    monkeypatch.setattr(room, "available_memory", lambda: 0)  # the system does not say
    monkeypatch.setattr(room, "free_disk", lambda _: 10 * GIB)
    with pytest.raises(
        InputError, match=r"report\.foldkv-reference until it ends, and 10\.00 GiB are free\. Give texts of at"
    ):
        check_layered(SIDES, LONG, 500, scratch)
    # What is there is this run's, or is removed when it begins.
    monkeypatch.setattr(room, "bytes_below", lambda folder: 100 * GIB * (folder == scratch))
    check_layered(SIDES, LONG, 500, scratch)


def test_a_long_context_is_kept_by_each_side_that_goes_through_it_a_layer_at_a_time() -> None:
    stream = 4 * FLASH.hc_mult * FLASH.hidden_size

    def tokens(*contexts: int, sides: Opened = SIDES) -> float:
        with_them, without = (layered_disk(sides, replace(LONG, contexts=those), 0) for those in (contexts, ()))
        return (with_them - without) / stream

    questions = 7 * 4 * 4
    # Both sides keep it; and beyond a pass's 8,192 tokens two more of it are there while a file is replaced.
    assert tokens(4_000) == 2 * (4_000 + questions)
    assert tokens(20_000) == 4 * (20_000 + questions) - 2 * 8_192
    assert tokens(4_000, 20_000) == tokens(4_000) + tokens(20_000)
    # The bundle reads what is longer in a session, and one for a GPU reads all there; the reference does not read the longest.
    assert tokens(40_000) == 3 * (40_000 + questions) - 2 * 8_192
    assert tokens(4_000, sides=replace(SIDES, gpu=True)) == 4_000 + questions
    assert tokens(100_000) == 0


def test_contexts_that_are_too_long_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = replace(LONG, contexts=(65_536, 600, 50_000))
    monkeypatch.setattr(room, "in_memory", lambda _: None)
    monkeypatch.setattr(room, "free_disk", lambda _: 200 * GIB)
    monkeypatch.setattr(room, "available_memory", lambda: 20 * GIB)
    with pytest.raises(
        InputError, match=r"contexts of up to 65,536, and.* Leave out --context 50000 --context 65536, or give a m"
    ):
        check_layered(SIDES, plan, 0, tmp_path)
    check_layered(SIDES, replace(plan, contexts=(600,)), 0, tmp_path)
    with pytest.raises(
        InputError, match=r"Leave out --context 50000 --context 65536 and give texts and cases of at most \d"
    ):
        check_layered(SIDES, replace(plan, text_tokens=9_000), 0, tmp_path)
    monkeypatch.setattr(room, "available_memory", lambda: 0)
    monkeypatch.setattr(room, "free_disk", lambda _: 10 * GIB)
    with pytest.raises(
        InputError, match=r"are free\. Leave out --context 65536 and give texts of at most \d.*, or a --r"
    ):
        check_layered(SIDES, replace(plan, contexts=(600, 65_536), text_tokens=3_000), 0, tmp_path)


def test_a_folder_in_memory_takes_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mounts, scratch = tmp_path / "mounts", tmp_path / "a disk" / "report"
    monkeypatch.setattr(layered_files, "_MOUNTS", mounts)
    monkeypatch.setattr(room, "free_disk", lambda _: 200 * GIB)
    monkeypatch.setattr(room, "available_memory", lambda: 30 * GIB)
    above, point = (
        f"/dev/root / ext4 rw 0 0\ntmpfs {tmp_path} tmpfs rw 0 0\n",
        str(scratch.parent).replace(" ", "\\040"),
    )
    mounts.write_text(above)
    assert layered_files.in_memory(scratch) == "tmpfs" and layered_files.in_memory(Path("/")) is None
    with pytest.raises(
        InputError, match=r"memory and writes .* in memory too \(tmpfs\), so it takes .*Name a --report folder on"
    ):
        check_layered(SIDES, LONG, 0, scratch)
    # What this run has there is memory that it has taken already.
    monkeypatch.setattr(room, "bytes_below", lambda folder: 30 * GIB)
    check_layered(SIDES, LONG, 0, scratch)
    monkeypatch.setattr(room, "bytes_below", lambda folder: 0)
    for kind, found in (("ramfs", "ramfs"), ("ext4", None)):
        mounts.write_text(f"none {point} {kind} rw 0 0\n{above}")
        assert layered_files.in_memory(scratch) == found
    check_layered(SIDES, LONG, 0, scratch)
    mounts.unlink()
    assert layered_files.in_memory(scratch) is None
    check_layered(SIDES, LONG, 0, scratch)


def test_a_run_goes_on_with_its_own_files_and_removes_those_of_another(tmp_path: Path) -> None:
    scratch = tmp_path / "made" / "report.foldkv-reference"

    def kept() -> list[str]:
        return sorted(one.name for one in scratch.iterdir())

    begin_run(scratch, "one")
    (scratch / "of a pass").mkdir()
    (scratch / "of a pass" / "now.safetensors").write_text("streams")
    (scratch / "to elsewhere").symlink_to(tmp_path)
    begin_run(scratch, "one")
    assert kept() == ["of a pass", "run.json", "to elsewhere"] and bytes_below(scratch) > len("streams")
    begin_run(scratch, "another")
    assert kept() == ["run.json"] and tmp_path.is_dir()
    (scratch / "run.json").write_bytes(b"\xff damaged")
    (scratch / "file").touch()
    begin_run(scratch, "another")
    assert kept() == ["run.json"]
    (tmp_path / "file").touch()
    with pytest.raises(SystemFailure, match="file"):
        begin_run(tmp_path / "file", "one")
