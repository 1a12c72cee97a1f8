"""The exported model against transformers, in float32: logits and caches, however the tokens arrive.

Weights are random with every parameter away from its neutral value. The index heads are many: ReLU makes
exact ties at zero with few, and ties at the edge of the top-k are decided differently by each library.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DeepseekV4ForCausalLM, DynamicCache

from foldkv.export.checkpoint.reader import Checkpoint
from foldkv.export.contract.state import state_tensors
from foldkv.export.loading import decoder_from_checkpoint
from foldkv.export.model.decoder import Decoder, new_state

pytestmark = pytest.mark.slow

TOLERANCE = 1e-4  # largest logit difference; logits have a standard deviation of about 1
CONTEXT = 96


@pytest.fixture(scope="module")
def pair(reference_checkpoint: tuple[DeepseekV4ForCausalLM, Path]) -> tuple[DeepseekV4ForCausalLM, Decoder]:
    model, folder = reference_checkpoint
    return model, decoder_from_checkpoint(Checkpoint(folder))


def tokens(count: int, batch: int = 1, seed: int = 0) -> Tensor:
    return torch.randint(0, 61, (batch, count), generator=torch.Generator().manual_seed(seed))


def run(
    decoder: Decoder, ids: Tensor, splits: Sequence[int], state: list[Tensor] | None = None
) -> tuple[Tensor, list[Tensor]]:
    """Feed ids [B, n] in chunks of the given sizes to a state whose unread rows hold NaN."""
    batch = ids.shape[0]
    state = new_state(decoder.spec, CONTEXT, batch, fill=float("nan")) if state is None else state
    start, logits = 0, []
    for size in splits:
        part, state = decoder(
            ids[:, start : start + size],
            torch.full((batch,), start, dtype=torch.int32),
            torch.full((batch,), size, dtype=torch.int32),
            torch.tensor([start + size]),
            torch.arange(size).expand(batch, -1),
            state,
        )
        logits.append(part)
        start += size
    assert start == ids.shape[1]
    return torch.cat(logits, dim=1), state


def close(actual: Tensor, expected: Tensor) -> None:
    assert actual.shape == expected.shape
    assert torch.isfinite(actual).all()
    assert torch.allclose(actual, expected, rtol=0, atol=TOLERANCE)


def test_thetas_inside_rope_parameters_are_those_that_the_model_turns_by(make_reference: Any, tmp_path: Path) -> None:
    own = {"partial_rotary_factor": 0.5}
    reference = make_reference(
        7,
        partial_rotary_factor=None,
        rope_parameters={
            "main": own | {"rope_type": "default", "rope_theta": 50.0},
            "compress": own | {"rope_theta": 700.0, "attention_factor": 1.0, "rope_type": "yarn", "factor": 4,
                               "original_max_position_embeddings": 64},
        },
    )  # fmt: skip
    reference.save_pretrained(tmp_path)
    decoder = decoder_from_checkpoint(Checkpoint(tmp_path))
    ids = tokens(40, batch=2)
    expected = reference(ids, use_cache=False).logits
    close(run(decoder, ids, [17, 23])[0], expected)
    for block in decoder.layers:  # the comparison sees the thetas
        block.attn.inv_freq = block.attn.inv_freq.flip(0)
    assert not torch.allclose(run(decoder, ids, [17, 23])[0], expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 7, 8, 9, 31, 66])
def test_prefill_gives_the_logits_of_transformers(pair: tuple[DeepseekV4ForCausalLM, Decoder], length: int) -> None:
    reference, decoder = pair
    ids = tokens(length, batch=2)
    close(run(decoder, ids, [length])[0], reference(ids, use_cache=False).logits)


def test_decode_token_by_token_gives_the_logits_of_transformers(pair: tuple[DeepseekV4ForCausalLM, Decoder]) -> None:
    reference, decoder = pair
    ids = tokens(50, seed=1)
    cache = DynamicCache(config=reference.config)
    expected = torch.cat([reference(ids[:, i : i + 1], past_key_values=cache).logits for i in range(50)], dim=1)
    close(run(decoder, ids, [1] * 50)[0], expected)


def test_chunks_split_at_every_offset_of_three_windows(pair: tuple[DeepseekV4ForCausalLM, Decoder]) -> None:
    reference, decoder = pair
    length = 3 * reference.config.sliding_window + 3
    ids = tokens(length, seed=2)
    expected = reference(ids, use_cache=False).logits
    for split in range(1, length):
        close(run(decoder, ids, [split, length - split])[0], expected)


def test_prefill_then_decode_continues_transformers_own_cache(pair: tuple[DeepseekV4ForCausalLM, Decoder]) -> None:
    reference, decoder = pair
    ids = tokens(40, seed=3)
    cache = DynamicCache(config=reference.config)
    expected = [reference(ids[:, :29], past_key_values=cache).logits]
    expected += [reference(ids[:, i : i + 1], past_key_values=cache).logits for i in range(29, 40)]
    close(run(decoder, ids, [29] + [1] * 11)[0], torch.cat(expected, dim=1))


def test_the_caches_are_those_of_transformers(pair: tuple[DeepseekV4ForCausalLM, Decoder]) -> None:
    reference, decoder = pair
    length = 47  # a prime, so that every window of more than one token is open
    ids = tokens(length, seed=4)
    cache = DynamicCache(config=reference.config)
    reference(ids, past_key_values=cache)
    _, state = run(decoder, ids, [7, 1, length - 8])
    compared = 0
    for tensor, value in zip(state_tensors(decoder.spec), state, strict=True):
        layer = cache.layers[tensor.layer]
        if tensor.group == "window":
            kept = min(tensor.capacity(CONTEXT), length) - 1  # transformers keeps one row less
            slots = torch.arange(length - kept, length) % tensor.capacity(CONTEXT)
            close(value[:, slots], layer.keys[:, 0, layer.keys.shape[2] - kept :])
        elif tensor.group.endswith("entries"):
            theirs = layer.compressed_kv["indexer" if tensor.group.startswith("index") else "compressor"]
            count = length // (tensor.ratio or 1)
            assert theirs.shape[1] == count
            close(value[:, :count], theirs)
            assert value[:, count:].isnan().all(), "rows of windows that have not closed are written"
        elif tensor.group.endswith("carry_kv"):
            theirs = layer.buffer_kv["indexer" if tensor.group.startswith("index") else "compressor"]
            ratio = decoder.spec.ratios[tensor.layer]
            slots = torch.arange(length // ratio * ratio, length) % tensor.capacity(CONTEXT)
            close(value[:, slots], theirs)
        elif tensor.group == "carry":
            ratio = decoder.spec.ratios[tensor.layer]
            compressor = decoder.layers[tensor.layer].attn.compressor
            score = layer.buffer_gate["compressor"] + compressor.ape[: length % ratio]
            weight = torch.exp(score - score.amax(dim=1, keepdim=True))
            rows = (score.amax(dim=1), weight.sum(dim=1), (weight * layer.buffer_kv["compressor"]).sum(dim=1))
            close(value, torch.stack(rows, dim=1))
        else:
            continue
        compared += 1
    assert compared >= decoder.spec.num_layers


def test_a_batch_at_different_positions_gives_each_sequence_its_own_logits(
    pair: tuple[DeepseekV4ForCausalLM, Decoder],
) -> None:
    reference, decoder = pair
    starts, steps = [0, 5, 18, 31], [9, 4, 1, 0]
    ids = [tokens(start + step, seed=10 + i)[0] for i, (start, step) in enumerate(zip(starts, steps, strict=True))]
    state = new_state(decoder.spec, CONTEXT, 4, fill=float("nan"))
    for slot, start in enumerate(starts):
        if start:
            _, own = run(decoder, ids[slot][None, :start], [start])
            for target, value in zip(state, own, strict=True):
                target[slot] = value[0]
    chunk = torch.zeros(4, max(steps), dtype=torch.int64)
    for slot, (start, step) in enumerate(zip(starts, steps, strict=True)):
        chunk[slot, :step] = ids[slot][start:]
    before = [value.clone() for value in state]
    logits, after = decoder(
        chunk, torch.tensor(starts, dtype=torch.int32), torch.tensor(steps, dtype=torch.int32), torch.tensor([CONTEXT]),
        torch.arange(max(steps)).expand(4, -1), state,
    )  # fmt: skip
    for slot, (start, step) in enumerate(zip(starts, steps, strict=True)):
        if step:
            close(logits[slot, :step], reference(ids[slot][None], use_cache=False).logits[0, start:])
    for old, new in zip(before, after, strict=True):  # no tokens: not a bit of the state changes
        assert torch.equal(old[3].view(torch.int32), new[3].view(torch.int32))
