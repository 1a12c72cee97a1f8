"""Checkpoint: three spellings of the same weights, and damage found before weights are used."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from foldkv.errors import CheckpointError
from foldkv.export.checkpoint import Checkpoint, decoder_from_checkpoint, end_tokens, released_name


@pytest.fixture
def saved(make_reference: Any, tmp_path: Path) -> Path:
    make_reference(5).save_pretrained(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file({name: value.contiguous() for name, value in change(tensors).items()}, folder / "model.safetensors")


def weights(folder: Path) -> dict[str, Tensor]:
    return dict(decoder_from_checkpoint(Checkpoint(folder)).state_dict())


def test_three_spellings_and_shards_give_the_same_weights(saved: Path, make_reference: Any) -> None:
    expected = weights(saved)
    rewrite(saved, lambda t: {released_name(name): value for name, value in t.items()})
    released = load_file(saved / "model.safetensors")
    assert {
        "embed.weight",
        "head.weight",
        "layers.0.attn.wq_a.weight",
        "layers.1.attn.kv_norm.weight",
    } <= released.keys()
    spellings = [weights(saved)]
    rewrite(saved, lambda t: {f"model.{name}": value for name, value in t.items()})
    spellings.append(weights(saved))
    module = make_reference(5)
    save_file({n: v.contiguous() for n, v in module.state_dict().items()}, saved / "model.safetensors")
    assert "model.layers.0.self_attn.q_a_proj.weight" in load_file(saved / "model.safetensors")
    spellings.append(weights(saved))
    for other in spellings:
        assert other.keys() == expected.keys()
        assert all(torch.equal(other[name], value) for name, value in expected.items())
    (saved / "model.safetensors").unlink()
    names = sorted(released)
    half = len(names) // 2
    shards = {"a.safetensors": names[:half], "b.safetensors": names[half:]}
    for file, part in shards.items():
        save_file({name: released[name] for name in part}, saved / file)
    table = {name: file for file, part in shards.items() for name in part}
    (saved / "model.safetensors.index.json").write_text(json.dumps({"weight_map": table}))
    assert all(torch.equal(weights(saved)[name], value) for name, value in expected.items())
    (saved / "b.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"shard b\.safetensors is missing"):
        Checkpoint(saved)


def test_the_draft_head_is_ignored(saved: Path) -> None:
    rewrite(saved, lambda t: t | {"mtp.0.norm.weight": torch.ones(3)})
    assert not any(name.startswith("mtp") for name in weights(saved))


def test_missing_unexpected_and_misshapen_tensors_are_listed_together(saved: Path) -> None:
    def damage(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        tensors = {released_name(name): value for name, value in tensors.items()}
        del tensors["layers.0.attn.wq_a.weight"]
        del tensors["layers.1.ffn.experts.2.w3.weight"]
        tensors["layers.9.extra"] = torch.ones(2)
        tensors["norm.weight"] = torch.ones(5)
        tensors["head.weight"] = tensors["head.weight"].to(torch.float8_e4m3fn)
        return tensors

    rewrite(saved, damage)
    with pytest.raises(CheckpointError) as caught:
        decoder_from_checkpoint(Checkpoint(saved))
    text = str(caught.value)
    for finding in (
        "(5 found)",
        "missing tensor layers.0.attn.wq_a.weight [12, 24]",
        "missing tensor layers.1.ffn.experts.2.w3.weight [16, 24]",
        "unexpected tensor layers.9.extra [2]",
        "tensor norm.weight has shape [5]; expected [24]",
        "tensor head.weight has dtype F8_E4M3",
    ):
        assert finding in text


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_numbers_are_refused(saved: Path, value: float) -> None:
    def damage(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        name = next(n for n in tensors if n.endswith("wq_b.weight"))
        tensors[name].view(-1)[3] = value
        return tensors

    rewrite(saved, damage)
    with pytest.raises(CheckpointError, match=r"wq_b\.weight holds NaN or infinite"):
        decoder_from_checkpoint(Checkpoint(saved))


def test_a_hash_table_that_names_no_expert_is_refused(saved: Path) -> None:
    def damage(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        name = next(n for n in tensors if n.endswith("tid2eid"))
        tensors[name][0, 0] = 99
        return tensors

    rewrite(saved, damage)
    with pytest.raises(CheckpointError, match=r"tid2eid names experts outside 0\.\.4"):
        decoder_from_checkpoint(Checkpoint(saved))


@pytest.mark.parametrize(
    ("damage", "finding"),
    [
        (lambda f: (f / "model.safetensors").write_bytes(b"nonsense"), "cannot be read"),
        (
            lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-100]),
            "cannot be read",
        ),
        (lambda f: (f / "model.safetensors").unlink(), "Only safetensors"),
        (lambda f: (f / "config.json").unlink(), "config.json cannot be read"),
        (lambda f: (f / "config.json").write_text("{"), "is not JSON"),
        (lambda f: (f / "config.json").write_text("[]"), "holds a JSON list"),
        (lambda f: (f / "model.safetensors.index.json").write_text("{}"), "no 'weight_map'"),
        (
            lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../../x.safetensors"}}'),
            "leads out of the artifact",
        ),
    ],
)
def test_a_damaged_folder_is_refused_with_its_reason(saved: Path, damage: Callable[[Path], Any], finding: str) -> None:
    damage(saved)
    with pytest.raises(CheckpointError, match=finding):
        decoder_from_checkpoint(Checkpoint(saved))


def test_a_path_that_is_no_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is not a folder"):
        Checkpoint(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("value", "ids"), [(None, (257,)), (257, (257,)), ([257, 3], (257, 3)), (5, (257, 5)), ([9, 3, 9], (257, 9, 3))]
)
def test_ids_of_both_files_end_a_text(tiny_checkpoint: Path, tmp_path: Path, value: Any, ids: tuple[int, ...]) -> None:
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint")
    assert end_tokens(Checkpoint(folder)) == (257,)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": value, "temperature": 1.0}))
    assert end_tokens(Checkpoint(folder)) == ids


@pytest.mark.parametrize("value", ["x", [1.5], [True], -1, 1 << 40])
def test_ids_that_are_no_tokens_are_refused(tiny_checkpoint: Path, tmp_path: Path, value: Any) -> None:
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
    with pytest.raises(CheckpointError, match=r"generation_config.json: eos_token_id is .*; expected a token id below"):
        end_tokens(Checkpoint(folder))
