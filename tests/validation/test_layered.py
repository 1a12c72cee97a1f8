"""The reference of which one layer is in memory at a time, against the whole model in transformers."""

from __future__ import annotations

import gc
import json
import weakref
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import small_checkpoint
from mappings import in_files
from torch import Tensor
from transformers import DeepseekV4ForCausalLM

from foldkv.errors import CheckpointError, FoldkvError
from foldkv.export.checkpoint.reader import Checkpoint
from foldkv.progress import BYTES, Progress
from foldkv.validation import layered, layered_files
from foldkv.validation.jobs import Job
from foldkv.validation.layered import LayeredReference, edges_of, read_layered
from foldkv.validation.runners import TransformersRunner
from foldkv.validation.selection import Selection

pytestmark = pytest.mark.slow
TEXTS = [list(range(40, 190)), [7, 7, 250, 3] * 9, [65]]


def whole_model(folder: Path) -> DeepseekV4ForCausalLM:
    model = DeepseekV4ForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    return model.float().eval().requires_grad_(False)


@pytest.fixture(scope="module")
def saved(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The trained model in other forms: as released, and as transformers saves it, with stacked experts."""
    folder = tmp_path_factory.mktemp("forms")
    whole_model(tiny_checkpoint).save_pretrained(folder / "stacked")
    found = {form: small_checkpoint(tiny_checkpoint, folder / form, form) for form in ("instruct", "base")}
    return {"plain": tiny_checkpoint, "stacked": folder / "stacked"} | found


@pytest.mark.parametrize("form", ["plain", "stacked", "instruct", "base"])
def test_layer_by_layer_gives_the_bits_of_the_whole_model(form: str, saved: dict[str, Path]) -> None:
    """With all experts at once or one at a time: logits, streams, and the indexers' choices with their weights."""
    whole, checkpoint = TransformersRunner(saved[form]), Checkpoint(saved[form])
    expected = [whole.read(tokens, {}, streams=True) for tokens in TEXTS]
    for group_bytes in (1 << 30, 1):
        reference = LayeredReference(checkpoint, group_bytes=group_bytes)
        assert reference.weights.experts_at_once == 1 or group_bytes > 1
        jobs = [Job(tokens, chosen={}, keep_streams=True) for tokens in TEXTS]
        found = read_layered(reference, jobs)
        for one, streams, job in zip(expected, found, jobs, strict=True):
            assert np.array_equal(reference.logits(streams).numpy(), one.logits)
            # A product with one row adds up in another order.
            last = reference.logits(streams, slice(-1, None)).numpy()
            np.testing.assert_allclose(last, one.logits[-1:], rtol=1e-5, atol=1e-5)
            assert len(job.streams) == len(one.streams) == 4
            assert all(map(np.array_equal, job.streams, one.streams))
            same_selections(job.selections, one.selections)


@pytest.mark.parametrize("form", ["plain", "instruct"])
def test_in_bfloat16_too(form: str, saved: dict[str, Path]) -> None:
    whole = TransformersRunner(saved[form], precision="bfloat16")
    reference = LayeredReference(Checkpoint(saved[form]), precision="bfloat16", group_bytes=1)
    jobs = [Job(tokens, chosen={}, keep_streams=True) for tokens in TEXTS[:2]]
    given = [one + np.float32(0.25) for one in whole.read(TEXTS[1], {}, streams=True).streams]
    alone = Job(TEXTS[1], given=given, keep_streams=True)
    for tokens, streams, job in zip(TEXTS, read_layered(reference, [*jobs, alone]), jobs, strict=False):
        one = whole.read(tokens, {}, streams=True)
        assert streams.dtype == torch.bfloat16 and np.array_equal(reference.logits(streams).numpy(), one.logits)
        assert all(map(np.array_equal, job.streams, one.streams))
        same_selections(job.selections, one.selections)
    assert all(map(np.array_equal, alone.streams, whole.alone(TEXTS[1], given).streams))


def same_selections(found: dict[int, Selection], expected: dict[int, Selection]) -> None:
    assert found.keys() == expected.keys() == {1, 3}
    for layer, one in expected.items():
        for name in ("chosen", "mass", "tied"):
            np.testing.assert_array_equal(getattr(found[layer], name), getattr(one, name))


def test_chunks_go_through_transformers_cache_as_in_the_whole_model(tiny_checkpoint: Path) -> None:
    whole, reference = TransformersRunner(tiny_checkpoint), LayeredReference(Checkpoint(tiny_checkpoint))
    tokens, tail = TEXTS[0], TEXTS[1]
    expected = whole.tail_logits(tokens, tail, chunk=64)
    job = Job([*tokens, *tail], edges=[*edges_of(64, len(tokens)), len(tokens)])
    [streams] = read_layered(reference, [job])
    np.testing.assert_array_equal(reference.logits(streams, slice(len(tokens), None)).numpy(), expected)


def test_ties_are_settled_for_a_subject_and_layers_take_its_streams_as_in_the_whole_model(
    tiny_checkpoint: Path,
) -> None:
    whole, reference = TransformersRunner(tiny_checkpoint), LayeredReference(Checkpoint(tiny_checkpoint))
    tokens, random = TEXTS[0], np.random.default_rng(3)
    own = whole.read(tokens, {}, streams=True)
    preferred = {layer: random.permuted(one.chosen, axis=1) for layer, one in own.selections.items()}
    preferred[3] = np.where(preferred[3] == 5, 6, preferred[3])
    given = [streams + random.standard_normal(streams.shape).astype(np.float32) / 50 for streams in own.streams]
    keys = {1: torch.from_numpy(random.standard_normal((len(tokens) // 4, 32)).astype(np.float32))}
    settled, alone = whole.read(tokens, preferred), whole.alone(tokens, given, keys)
    jobs = [Job(tokens, chosen=preferred), Job(tokens, given=given, keys=keys, keep_streams=True)]
    streams, _ = read_layered(reference, jobs)
    np.testing.assert_array_equal(reference.logits(streams).numpy(), settled.logits)
    same_selections(jobs[0].selections, settled.selections)
    assert all(map(np.array_equal, jobs[1].streams, alone.streams))
    assert jobs[1].entries.keys() == alone.chosen.keys()
    for layer, entries in alone.chosen.items():
        np.testing.assert_array_equal(jobs[1].entries[layer], entries[0] if entries.ndim == 3 else entries)


def test_one_layer_and_one_group_of_experts_are_in_memory_and_nobody_else_is_read(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference = LayeredReference(Checkpoint(tiny_checkpoint), group_bytes=1)
    alive: list[weakref.ref[Tensor]] = []
    layers: list[weakref.ref[Any]] = []
    read: list[tuple[int, int]] = []
    experts, init = LayeredReference.experts, layered._Layer.__init__

    def watched(self: LayeredReference, layer: int, start: int, end: int) -> list[Tensor]:
        gc.collect()
        assert not [one for one in alive if one() is not None], "the group before this one is still held"
        found = experts(self, layer, start, end)
        assert sum(one.nbytes for one in found) == 3 * 128 * 128 * 4
        alive[:] = [weakref.ref(one) for one in found]
        read.append((layer, start))
        return found

    def made(self: Any, *arguments: Any) -> None:
        gc.collect()
        assert not [one for one in layers if one() is not None], "the layer before this one is still held"
        init(self, *arguments)
        layers.append(weakref.ref(self._layer))

    monkeypatch.setattr(LayeredReference, "experts", watched)
    monkeypatch.setattr(layered._Layer, "__init__", made)
    read_layered(reference, [Job([65])])
    assert len(layers) == 4
    # A token chooses two of eight experts in each layer.
    assert [layer for layer, _ in read] == [0, 0, 1, 1, 2, 2, 3, 3]


def test_a_run_that_was_interrupted_goes_on_after_the_last_layer(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference, told = LayeredReference(Checkpoint(tiny_checkpoint)), list[tuple[float, float, str]]()
    sink = SimpleNamespace(steps=lambda _, done, total, unit: told.append((done, total, unit)), line=lambda *_: None)

    def jobs() -> list[Job]:
        return [Job(tokens, chosen={}, keep_streams=True) for tokens in TEXTS]

    uninterrupted = jobs()
    whole = read_layered(reference, uninterrupted, progress=Progress(sink))
    sizes = [reference.layer_bytes(layer) for layer in range(4)]
    assert told == [(sum(sizes[: n + 1]), sum(sizes), BYTES) for n in range(4)]

    def stop(layer: int, _: Sequence[Tensor]) -> None:
        if layer == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        read_layered(reference, jobs(), folder=tmp_path, observe=stop)
    seen: list[int] = []
    again = jobs()
    found = read_layered(reference, again, folder=tmp_path, observe=lambda layer, _: seen.append(layer))
    assert seen == [1, 2, 3]
    assert all(map(torch.equal, found, whole))
    for one, other in zip(again, uninterrupted, strict=True):
        assert all(map(np.array_equal, one.streams, other.streams)) and len(one.streams) == 4
        same_selections(one.selections, other.selections)
        # What layers have added is in files: memory does not hold more of a text for more layers.
        kept = [getattr(choice, name) for choice in one.selections.values() for name in ("chosen", "mass", "tied")]
        assert len(kept) == 6 and all(in_files(value, tmp_path) for value in (*one.streams, *kept) if value.size)
    assert all(in_files(one, tmp_path) for one in found)
    # A layer's streams are written once.
    [folder] = tmp_path.iterdir()
    assert sorted(file.name for file in folder.iterdir()) == [
        *(f"layer-{n}.safetensors" for n in range(4)),
        "now.safetensors",
    ]
    sizes = [(folder / f"layer-{n}.safetensors").stat().st_size for n in range(4)]
    assert max(sizes) < 1.5 * min(sizes)
    # What is of other jobs, and a file that is damaged, are not taken.
    for change in ("jobs", "now", "layer-1"):
        seen.clear()
        if change != "jobs":
            (folder / f"{change}.safetensors").write_bytes(b"damaged")
        changed = jobs() if change != "jobs" else [Job(tokens, edges=[1]) for tokens in TEXTS[:2]]
        read_layered(reference, changed, folder=tmp_path, observe=lambda layer, _: seen.append(layer))
        assert seen == [0, 1, 2, 3]
    # Nor is what other packages computed.
    seen.clear()
    monkeypatch.setattr(layered, "computing", lambda: ["another torch"])
    read_layered(reference, jobs(), folder=tmp_path, observe=lambda layer, _: seen.append(layer))
    assert seen == [0, 1, 2, 3]
    full = "No space left on device"
    monkeypatch.setattr(layered_files, "save_file", lambda *_: (_ for _ in ()).throw(OSError(28, full)))
    with pytest.raises(FoldkvError, match=f"safetensors.*{full}"):
        read_layered(reference, jobs(), folder=tmp_path / "full")


def test_a_checkpoint_that_lacks_a_tensor_is_refused_before_anything_is_read(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    config = json.loads((tiny_checkpoint / "config.json").read_text())
    config["num_hidden_layers"], config["layer_types"] = 5, [*config["layer_types"], "sliding_attention"]
    config["mlp_layer_types"].append("moe")
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").symlink_to(tiny_checkpoint / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"missing tensor layers\.4\."):
        LayeredReference(Checkpoint(tmp_path))
