"""The reference of which one layer is in memory at a time, against the whole model in transformers."""

from __future__ import annotations

import gc
import json
import weakref
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from checkpoints import small_checkpoint
from torch import Tensor
from transformers import DeepseekV4ForCausalLM
from transformers.cache_utils import DynamicCache

from foldkv.errors import CheckpointError, FoldkvError
from foldkv.export.checkpoint.reader import Checkpoint
from foldkv.progress import BYTES, Progress
from foldkv.validation import layered
from foldkv.validation.layered import LayeredReference, read_layered

pytestmark = pytest.mark.slow
TEXTS = {"long": list(range(40, 190)), "short": [7, 7, 250, 3] * 9, "one": [65]}


def whole_model(folder: Path) -> DeepseekV4ForCausalLM:
    model = DeepseekV4ForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    return model.float().eval().requires_grad_(False)


def whole_logits(model: DeepseekV4ForCausalLM, tokens: Sequence[int], chunk: int | None) -> Tensor:
    ids = torch.tensor([tokens])
    if chunk is None:
        return model(input_ids=ids, use_cache=False).logits[0]
    cache = DynamicCache(config=model.config)
    parts = [model(input_ids=part, past_key_values=cache).logits[0] for part in ids.split(chunk, dim=1)]
    return torch.cat(parts)


@pytest.fixture(scope="module")
def saved(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The trained model in other forms: as released, and as transformers saves it, with stacked experts."""
    folder = tmp_path_factory.mktemp("forms")
    whole_model(tiny_checkpoint).save_pretrained(folder / "stacked")
    found = {form: small_checkpoint(tiny_checkpoint, folder / form, form) for form in ("instruct", "base")}
    return {"plain": tiny_checkpoint, "stacked": folder / "stacked"} | found


@pytest.mark.parametrize("form", ["plain", "stacked", "instruct", "base"])
def test_layer_by_layer_gives_the_bits_of_the_whole_model(form: str, saved: dict[str, Path]) -> None:
    """With all experts at once or one at a time, with and without transformers' cache between chunks."""
    model, checkpoint = whole_model(saved[form]), Checkpoint(saved[form])
    streams: list[Tensor] = []
    hooks = [layer.register_forward_hook(lambda _, __, out: streams.append(out[0])) for layer in model.model.layers]
    for chunk, group_bytes in ((None, 1 << 30), (None, 1), (64, 1 << 30)):
        reference = LayeredReference(checkpoint, chunk=chunk, group_bytes=group_bytes)
        assert reference.experts_at_once == 1 or group_bytes > 1
        observed: list[list[Tensor]] = []
        found = read_layered(reference, TEXTS, observe=lambda _, now, to=observed: to.append(list(now)))
        for number, (name, tokens) in enumerate(TEXTS.items()):
            streams.clear()
            expected = whole_logits(model, tokens, chunk)
            assert torch.equal(reference.logits(found[name]), expected)
            # A product with one row adds up in another order.
            torch.testing.assert_close(reference.logits(found[name], slice(-1, None)), expected[-1:])
            if chunk is None:
                for layer, now in enumerate(observed):
                    assert torch.equal(now[number], streams[layer])
    for hook in hooks:
        hook.remove()


def test_one_layer_and_one_group_of_experts_are_in_memory_and_nobody_else_is_read(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference = LayeredReference(Checkpoint(tiny_checkpoint), group_bytes=1)
    alive: list[weakref.ref[Tensor]] = []
    layers: list[weakref.ref[Any]] = []
    read: list[tuple[int, int]] = []
    experts, init = LayeredReference._experts, layered._Layer.__init__

    def watched(self: LayeredReference, layer: int, start: int, end: int) -> tuple[Tensor, Tensor]:
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

    monkeypatch.setattr(LayeredReference, "_experts", watched)
    monkeypatch.setattr(layered._Layer, "__init__", made)
    read_layered(reference, {"one": [65]})
    assert len(layers) == 4
    # A token chooses two of eight experts in each layer.
    assert [layer for layer, _ in read] == [0, 0, 1, 1, 2, 2, 3, 3]


def test_a_run_that_was_interrupted_goes_on_after_the_last_layer(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference, told = LayeredReference(Checkpoint(tiny_checkpoint)), list[tuple[float, float, str]]()
    sink = SimpleNamespace(steps=lambda _, done, total, unit: told.append((done, total, unit)), line=lambda *_: None)
    whole = read_layered(reference, TEXTS, progress=Progress(sink))
    sizes = [reference.layer_bytes(layer) for layer in range(4)]
    assert told == [(sum(sizes[: n + 1]), sum(sizes), BYTES) for n in range(4)]

    def stop(layer: int, _: Sequence[Tensor]) -> None:
        if layer == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        read_layered(reference, TEXTS, folder=tmp_path, observe=stop)
    seen: list[int] = []
    again = read_layered(reference, TEXTS, folder=tmp_path, observe=lambda layer, _: seen.append(layer))
    assert seen == [1, 2, 3]
    assert all(torch.equal(again[name], whole[name]) for name in TEXTS)
    # Streams of other texts, or a file that is damaged, are not taken.
    for change in ("texts", "file"):
        seen.clear()
        texts = {"long": TEXTS["short"]} if change == "texts" else TEXTS
        if change == "file":
            (tmp_path / "streams.safetensors").write_bytes(b"damaged")
        read_layered(reference, texts, folder=tmp_path, observe=lambda layer, _: seen.append(layer))
        assert seen == [0, 1, 2, 3]
    monkeypatch.setattr(layered, "save_file", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(FoldkvError, match=r"streams\.safetensors.*No space left"):
        read_layered(reference, TEXTS, folder=tmp_path / "full")


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
