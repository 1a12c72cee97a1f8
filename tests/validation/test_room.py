"""What a validation takes of memory and disk is known before it begins."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib import resources
from pathlib import Path

import pytest

from foldkv.backends import FLOAT32
from foldkv.errors import InputError
from foldkv.export.checkpoint.config_reader import spec_from_config
from foldkv.export.contract.profiles import HF, SERVED
from foldkv.export.memory import parameter_count
from foldkv.runtime.wide import BFLOAT16
from foldkv.validation import room
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
    check_layered(SIDES, LONG, 500, scratch)
    with pytest.raises(
        InputError, match=r"of memory with texts and cases of up to 9,000 tokens, and 20\.00 GiB"
    ) as found:
        check_layered(SIDES, plan, 500, scratch)
    most = int(str(found.value).split("at most ")[1].split(" ")[0].replace(",", ""))
    check_layered(SIDES, replace(plan, text_tokens=most), 500, scratch)
    with pytest.raises(InputError, match=f"at most {most:,} tokens"):
        check_layered(SIDES, replace(plan, text_tokens=most + 1), 500, scratch)
    with pytest.raises(InputError, match="for each of 3 processes"):
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
    # What an earlier run has kept there is room for this one.
    scratch.mkdir()
    (scratch / "layer-1.safetensors").touch()
    monkeypatch.setattr(room, "bytes_below", lambda folder: 100 * GIB * folder.is_dir())
    check_layered(SIDES, LONG, 500, scratch)
