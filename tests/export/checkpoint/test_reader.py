"""Checkpoint: three spellings of the same weights, and damage found before weights are used."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import small_checkpoint
from safetensors.torch import load_file, save_file
from torch import Tensor

from foldkv.config import ExportConfig, PipelineConfig
from foldkv.errors import CheckpointError
from foldkv.export.checkpoint.config_reader import spec_from_file
from foldkv.export.checkpoint.names import released_name
from foldkv.export.checkpoint.reader import INDEX, Checkpoint, end_tokens
from foldkv.export.loading import decoder_from_checkpoint
from foldkv.export.package import export_checkpoint
from foldkv.export.roles import lock_of, sources_of
from foldkv.export.stitch import read_parts
from foldkv.export.tensor_table import check_tensors
from foldkv.manifests import GraphManifest, read
from foldkv.pipeline import export_changes, preview


@pytest.fixture
def saved(make_reference: Any, tmp_path: Path) -> Path:
    make_reference(5).save_pretrained(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file({name: value.contiguous() for name, value in change(tensors).items()}, folder / "model.safetensors")


def weights(folder: Path) -> dict[str, Tensor]:
    return dict(decoder_from_checkpoint(Checkpoint(folder)).state_dict())


@pytest.mark.slow
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
    with pytest.raises(CheckpointError, match=r"wq_b\.weight contains NaN or infinite"):
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
        (lambda f: (f / "model.safetensors").unlink(), "neither model.safetensors nor"),
        (lambda f: (f / "config.json").unlink(), "config.json cannot be read"),
        (lambda f: (f / "config.json").write_text("{"), "is not JSON"),
        (lambda f: (f / "config.json").write_text("[]"), "contains a JSON list"),
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


def named_as_elsewhere(name: str) -> str:
    """A released name as tools write it that give V4's single experts the names of other models."""
    parts = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
    kinds = {"weight": "weight", "scale": "weight_scale_inv"}
    return "model." + re.sub(
        r"\.ffn\.experts\.(\d+)\.(w[123])\.(weight|scale)$",
        lambda match: f".mlp.experts.{match[1]}.{parts[match[2]]}.{kinds[match[3]]}",
        name,
    )


@pytest.mark.parametrize("form", ["plain", "instruct", "base"])
def test_single_experts_under_names_of_other_models_are_the_same_experts(
    tiny_checkpoint: Path, tmp_path: Path, form: str
) -> None:
    released = small_checkpoint(tiny_checkpoint, tmp_path / "released", form)
    renamed = tmp_path / "renamed"
    shutil.copytree(released, renamed)
    table: dict[str, str] = {}
    for file in renamed.glob("*.safetensors"):
        tensors = {named_as_elsewhere(name): value for name, value in load_file(file).items()}
        save_file(tensors, file)
        table |= dict.fromkeys(tensors, file.name)
    assert "model.layers.1.mlp.experts.0.gate_proj.weight" in table
    (renamed / INDEX).write_text(json.dumps({"weight_map": table}))
    expected = weights(released)
    found = weights(renamed)
    assert found.keys() == expected.keys() and all(torch.equal(found[name], value) for name, value in expected.items())
    # The names are a mapping only: a segment takes the same inputs, from the same bytes.
    ours, theirs = (sources_of(Checkpoint(folder)) for folder in (renamed, released))
    assert {o: {r: s.signature for r, s in roles.items()} for o, roles in ours.items()} == {
        o: {r: s.signature for r, s in roles.items()} for o, roles in theirs.items()
    }
    assert bytes_of(renamed) == bytes_of(released)


def bytes_of(folder: Path) -> dict[tuple[str, str], bytes]:
    """The bytes that the lock of a checkpoint points to."""
    checkpoint = Checkpoint(folder)
    lock = lock_of(checkpoint, sources_of(checkpoint))
    files = lock.find([folder])
    return {(owner, role): bytes(read_parts(weight, files)) for owner, role, weight in lock}


def sharded(checkpoint: Path, out: Path) -> Path:
    """A checkpoint with a shard per layer, the draft head in two more: one of its own, one beside the embedding."""
    small_checkpoint(checkpoint, out, "plain")
    table = json.loads((out / INDEX).read_text())["weight_map"]
    with_embedding = out / table["embed.weight"]
    save_file(load_file(with_embedding) | {"mtp.0.norm.weight": torch.ones(3)}, with_embedding)
    table["mtp.0.norm.weight"] = with_embedding.name
    save_file({"mtp.0.head.weight": torch.ones(3)}, out / "mtp.safetensors")
    table["mtp.0.head.weight"] = "mtp.safetensors"
    (out / INDEX).write_text(json.dumps({"weight_map": table}))
    return out


def test_the_draft_head_may_be_absent_or_unindexed(tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = sharded(tiny_checkpoint, tmp_path / "sharded")
    table = json.loads((folder / INDEX).read_text())["weight_map"]
    whole = Checkpoint(folder)
    check_tensors(whole)
    (folder / "mtp.safetensors").unlink()  # a file that holds nothing else
    assert Checkpoint(folder).identity() == whole.identity() and Checkpoint(folder).digest() == whole.digest()
    for change in ({"mtp.1.norm.weight": table["embed.weight"]}, {"model.mtp.0.x": "gone.safetensors"}):
        (folder / INDEX).write_text(json.dumps({"weight_map": table | change}))
        check_tensors(Checkpoint(folder))
    (folder / INDEX).write_text(json.dumps({"weight_map": {k: v for k, v in table.items() if "mtp" not in k}}))
    assert weights(folder).keys() == {name for name in weights(folder) if not name.startswith("mtp")}
    (folder / INDEX).write_text(json.dumps({"weight_map": {k: v for k, v in table.items() if k != "norm.weight"}}))
    with pytest.raises(CheckpointError, match=r"tensor norm\.weight in .* is not in the index"):
        Checkpoint(folder)


def test_links_of_the_hugging_face_cache_are_followed_and_stray_files_ignored(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    plain = sharded(tiny_checkpoint, tmp_path / "plain")
    blobs, snapshot = tmp_path / "models--x--y" / "blobs", tmp_path / "models--x--y" / "snapshots" / "0123abcd"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(plain.iterdir())):
        shutil.copy(file, blobs / f"{number:040x}")
        (snapshot / file.name).symlink_to(Path("../../blobs") / f"{number:040x}")
    for stray in ("pytorch_model.bin", "old.safetensors", "README.md", "V4.gguf"):
        (snapshot / stray).write_bytes(b"stray")
    (snapshot / "inference").mkdir()
    (tmp_path / "link").symlink_to(snapshot, target_is_directory=True)
    expected = weights(plain)
    for folder in (snapshot, tmp_path / "link"):
        assert Checkpoint(folder).digest() == Checkpoint(plain).digest()
        assert all(torch.equal(value, expected[name]) for name, value in weights(folder).items())
    assert bytes_of(snapshot) == bytes_of(plain)
    missing = next(snapshot.glob("model-00002*"))
    missing.resolve().unlink()
    with pytest.raises(CheckpointError, match=rf"shard {missing.name} is a link to .*blobs.*, which is missing"):
        Checkpoint(snapshot)


def test_a_pointer_of_git_lfs_is_named(saved: Path) -> None:
    (saved / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(CheckpointError, match="Git LFS pointer"):
        Checkpoint(saved)


@pytest.mark.slow
def test_a_package_records_which_keys_were_allowed_and_its_config_needs_no_permission(
    make_reference: Any, tmp_path: Path
) -> None:
    folder = tmp_path / "checkpoint"
    make_reference(5, layer_types=["sliding_attention"], num_hash_layers=0, n_routed_experts=2).save_pretrained(folder)
    expected = spec_from_file(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"my_router": 1, "unsloth_fixed": True}))
    with pytest.raises(CheckpointError, match="unknown key 'my_router'"):
        Checkpoint(folder)
    graph = export_checkpoint(folder, tmp_path / "graph", allow_unknown_keys=["my_router", "absent"])
    made = read(GraphManifest, graph)
    assert made.inputs.checkpoint.allowed_unknown_keys == ("my_router",)
    assert json.loads((graph / "config.json").read_text()) == config
    assert spec_from_file(graph / "config.json") == expected
    pipeline = PipelineConfig(version=1, checkpoint=str(folder), output=str(tmp_path))
    with pytest.raises(CheckpointError, match="unknown key 'my_router'"):
        preview(pipeline)
    allowing = pipeline.model_copy(update={"export": ExportConfig(allow_unknown_keys=["my_router"])})
    source = Checkpoint(folder, allow_unknown_keys=["my_router"])
    assert not export_changes(allowing, source, graph, made)


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
