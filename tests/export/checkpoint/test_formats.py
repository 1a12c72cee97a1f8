"""Quantised weights: bytes to values against ml_dtypes and transformers, and damage found before values are used."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from checkpoints import small_checkpoint, to_fp4, to_fp8
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import DeepseekV4ForCausalLM
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from whole import first_chunk, logits, whole_model

from foldkv.errors import CheckpointError
from foldkv.export.checkpoint.formats import format_of
from foldkv.export.checkpoint.names import released_name
from foldkv.export.checkpoint.reader import Checkpoint
from foldkv.export.checkpoint.values import byte_pairs, byte_values, dequantised, scale_values
from foldkv.export.loading import decoder_from_checkpoint

ALL_BYTES = torch.arange(256, dtype=torch.uint8)


def bits(value: Tensor | np.ndarray) -> np.ndarray:
    return np.asarray(value, dtype=np.float32).view(np.uint32)


def test_every_byte_has_the_value_of_ml_dtypes() -> None:
    codes = np.arange(256, dtype=np.uint8)
    e4m3 = codes.view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    e8m0 = codes.view(ml_dtypes.float8_e8m0fnu).astype(np.float32)
    e2m1 = np.stack([codes & 15, codes >> 4], axis=-1).view(ml_dtypes.float4_e2m1fn).astype(np.float32)
    assert np.array_equal(bits(byte_values(torch.float8_e4m3fn))[~np.isnan(e4m3)], bits(e4m3)[~np.isnan(e4m3)])
    assert np.array_equal(byte_values(torch.float8_e4m3fn).isnan().numpy(), np.isnan(e4m3))
    for scale in (ALL_BYTES, ALL_BYTES.view(torch.float8_e8m0fnu)):
        assert np.array_equal(bits(scale_values(scale))[:255], bits(e8m0)[:255])
        assert bool(scale_values(scale)[255].isnan())
    assert np.array_equal(bits(byte_pairs()), bits(e2m1))


@settings(max_examples=60, deadline=None)
@given(rows=st.integers(1, 5), columns=st.integers(1, 4), block=st.sampled_from([(128, 128), (32, 32), (1, 7)]),
       seed=st.integers(0, 99))  # fmt: skip
def test_e4m3_blocks_are_element_times_scale_bit_for_bit(
    rows: int, columns: int, block: tuple[int, int], seed: int
) -> None:
    random = np.random.default_rng(seed)
    shape = (rows * 37, columns * 41)
    codes = random.integers(0, 256, shape, dtype=np.uint8)
    codes[(codes & 0x7F) == 0x7F] = 0x42
    found = format_of("F8_E4M3", block)
    assert found is not None
    scale = random.integers(60, 180, found.scale_shape(shape), dtype=np.uint8)
    expected = codes.view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    for i in range(shape[0]):
        expected[i] *= np.repeat(np.exp2(scale[i // block[0]].astype(np.float32) - 127), block[1])[: shape[1]]
    weight = torch.from_numpy(codes).view(torch.float8_e4m3fn)
    assert np.array_equal(bits(dequantised(weight, torch.from_numpy(scale), found)), bits(expected))


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(1, 9), groups=st.integers(1, 5), seed=st.integers(0, 99))
def test_packed_e2m1_is_element_times_scale_bit_for_bit(rows: int, groups: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    packed = random.integers(0, 256, (rows, groups * 16), dtype=np.uint8)
    scale = random.integers(0, 255, (rows, groups), dtype=np.uint8)
    codes = np.stack([packed & 15, packed >> 4], axis=-1).reshape(rows, -1)
    expected = codes.view(ml_dtypes.float4_e2m1fn).astype(np.float32)
    with np.errstate(over="ignore"):
        expected = expected * np.repeat(scale.view(ml_dtypes.float8_e8m0fnu).astype(np.float32), 32, axis=1)
    found = format_of("I8")
    assert found is not None
    for weight in (torch.from_numpy(packed), torch.from_numpy(packed).view(torch.int8)):
        assert np.array_equal(bits(dequantised(weight, torch.from_numpy(scale), found)), bits(expected))


def test_values_are_those_of_transformers_bit_for_bit() -> None:
    generator = torch.Generator().manual_seed(3)
    theirs = Fp8Dequantize(None)
    for quantise, dtype in ((to_fp8, "F8_E4M3"), (to_fp4, "I8")):
        weight, scale = quantise(torch.randn(256, 384, generator=generator))
        found = format_of(dtype)
        assert found is not None
        expected = theirs._dequantize_one(weight, scale, torch.float32)
        assert np.array_equal(bits(dequantised(weight, scale, found)), bits(expected))
        narrow = dequantised(weight, scale, found).to(torch.bfloat16)
        assert torch.equal(narrow, theirs._dequantize_one(weight, scale))


@pytest.fixture(scope="module", params=["instruct", "base"])
def released(request: pytest.FixtureRequest, released_checkpoint: Callable[[str], Path]) -> Path:
    return released_checkpoint(request.param)


def test_a_released_checkpoint_has_the_values_that_transformers_reads(released: Path) -> None:
    decoder = dict(decoder_from_checkpoint(Checkpoint(released)).state_dict())
    theirs = DeepseekV4ForCausalLM.from_pretrained(released, dtype=torch.float32, attn_implementation="eager")
    compared = 0
    for name, value in theirs.state_dict().items():
        own = decoder.get(released_name(name))
        if own is not None:
            assert torch.equal(own, value.to(own.dtype)), name
            compared += 1
    assert compared == len(decoder)


@pytest.fixture
def spoiled(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    return small_checkpoint(tiny_checkpoint, tmp_path / "released", shards=1)


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    file = next(folder.glob("*.safetensors"))
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    table = dict.fromkeys(tensors, file.name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": table}))


def refusal(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        decoder_from_checkpoint(Checkpoint(folder))
    return str(caught.value)


def test_wrong_scales_are_listed_together(spoiled: Path) -> None:
    def damage(tensors: dict[str, Tensor]) -> None:
        tensors["layers.0.attn.wq_a.scale"] = tensors["layers.0.attn.wq_a.scale"].repeat(2, 1)
        tensors["layers.1.ffn.experts.3.w2.scale"] = tensors["layers.1.ffn.experts.3.w2.scale"][:, :1].contiguous()
        tensors["layers.2.attn.wkv.scale"] = torch.ones(1, 1, dtype=torch.bfloat16)
        tensors["layers.0.ffn.experts.0.w1.weight"] = tensors["layers.0.ffn.experts.0.w1.weight"][:, :5].contiguous()
        del tensors["layers.1.attn.wo_b.scale"]
        tensors["norm.scale"] = torch.ones(1)

    rewrite(spoiled, damage)
    text = refusal(spoiled)
    for finding in (
        "(6 found)",
        "scale layers.0.attn.wq_a.scale has shape [2, 1]; expected [1, 1]: one per 128 x 128 of [64, 128]",
        "scale layers.1.ffn.experts.3.w2.scale has shape [128, 1]; expected [128, 4]: one per 1 x 32",
        "scale layers.2.attn.wkv.scale has dtype BF16",
        "tensor layers.0.ffn.experts.0.w1.weight has shape [128, 5]; expected [128, 64] for fp4 (I8)",
        "layers.1.attn.wo_b.weight has dtype F8_E4M3 but no scale; missing tensor layers.1.attn.wo_b.scale",
        "unexpected tensor norm.scale",
    ):
        assert finding in text


def test_scales_and_weights_that_are_not_numbers_are_listed_together(spoiled: Path) -> None:
    def damage(tensors: dict[str, Tensor]) -> None:
        tensors["layers.0.attn.wq_a.scale"].view(torch.uint8)[0, 0] = 255
        tensors["layers.3.ffn.experts.7.w3.scale"].view(torch.uint8)[5, 1] = 255
        tensors["layers.1.attn.wkv.weight"].view(torch.uint8)[0, 0] = 0x7F

    rewrite(spoiled, damage)
    text = refusal(spoiled)
    assert "(3 found)" in text
    assert "scale layers.0.attn.wq_a.scale contains NaN" in text
    assert "scale layers.3.ffn.experts.7.w3.scale contains NaN" in text
    assert "tensor layers.1.attn.wkv.weight contains NaN" in text


def test_an_index_that_disagrees_with_its_shards_is_refused_with_every_difference(
    released: Path, tmp_path: Path
) -> None:
    import shutil

    folder = shutil.copytree(released, tmp_path / "copy")
    path = folder / "model.safetensors.index.json"
    table = json.loads(path.read_text())["weight_map"]
    first, last = min(table.values()), max(table.values())
    moved = next(name for name, file in table.items() if file == first)
    unlisted = next(name for name, file in table.items() if file == last)
    del table[unlisted]
    path.write_text(json.dumps({"weight_map": table | {moved: last, "ghost.weight": first}}))
    text = refusal(folder)
    assert "(3 found)" in text
    assert f"tensor {moved} should be in {last}; it is in {first}" in text
    assert f"tensor ghost.weight is not in {first}" in text
    assert f"tensor {unlisted} in {last} is not in the index" in text


def test_the_block_size_is_checked(spoiled: Path) -> None:
    config = json.loads((spoiled / "config.json").read_text())
    config["quantization_config"]["weight_block_size"] = [128, "x"]
    (spoiled / "config.json").write_text(json.dumps(config))
    assert "weight_block_size is [128, 'x']" in refusal(spoiled)


def test_a_released_checkpoint_exports_to_a_graph_that_gives_the_logits_of_transformers(
    released: Path, released_graph: Callable[[str], Path], tmp_path: Path
) -> None:
    graph = released_graph(released.name.removeprefix("released-"))
    theirs = DeepseekV4ForCausalLM.from_pretrained(released, dtype=torch.float32, attn_implementation="eager")
    ids = np.random.default_rng(1).integers(0, 256, (1, 90))
    found = logits(whole_model(graph, tmp_path / "whole"), first_chunk(graph, ids, 128))
    with torch.no_grad():  # what transformers dequantised is bfloat16, and exact in it
        expected = theirs.float()(torch.from_numpy(ids), use_cache=False).logits.numpy()
    np.testing.assert_allclose(found, expected, atol=2e-4, rtol=0)
