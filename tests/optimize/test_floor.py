"""The bytes that a decode step must read, against the tensors of released checkpoints and against rows counted by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
from checkpoints import released_tensors
from hypothesis import given
from hypothesis import strategies as st

from foldkv.export.checkpoint.config_reader import spec_from_file
from foldkv.export.contract.geometry import CSA, HCA, ModelSpec
from foldkv.optimize.fit import plan_target
from foldkv.optimize.floor import state_floor, stored_read, weight_floor, weights_moved_without_plugins
from foldkv.optimize.targets import load_targets

DATA = Path(__file__).parents[1] / "data"
FLASH, PRO = (spec_from_file(DATA / f"deepseek-v4-{name}.json") for name in ("flash", "pro"))


@pytest.mark.parametrize("model", [FLASH, PRO], ids=["flash", "pro"])
def test_a_step_reads_every_tensor_once_and_the_chosen_experts(model: ModelSpec) -> None:
    share = model.experts_per_token / model.num_experts
    total = 0.0
    for name, size in released_tensors(model):
        if name.startswith(("embed.", "mtp.")) or name.endswith("tid2eid"):  # a row each
            continue
        total += size * (share if ".experts." in name else 1)
    assert 0.99 * total < weight_floor(model, "fp4") <= total


def test_tokens_of_one_step_share_weights_and_some_of_the_experts() -> None:
    """Six of 256 experts a token: two tokens have 6 * 6 / 256 in common on average, and 256 tokens leave out half an expert."""
    size = 256 * 1000
    chosen = [stored_read(FLASH, "ffn.experts.codes", size, tokens) for tokens in (1, 2, 256)]
    assert chosen[:2] == [6000, round(12_000 - 36 / 256 * 1000)] and 255_000 < chosen[2] < size
    assert stored_read(FLASH, "attn.wq_a.weight", size, 8) == size
    assert stored_read(FLASH, "embed.weight", FLASH.vocab_size * 8192, 3) == 3 * 8192


def test_a_step_reads_the_rows_that_attention_and_indexer_look_at() -> None:
    context = 1 << 20
    csa, hca = FLASH.layer_types.count(CSA), FLASH.layer_types.count(HCA)
    window = FLASH.num_layers * 128 * 584
    rows = csa * (512 * 584 + context // 4 * 68) + hca * context // 128 * 584
    carries = csa * 2 * 8 * (1024 + 256) * 4 + hca * 3 * 512 * 4
    assert state_floor(FLASH, "fp8+fp4", context, "bfloat16") == window + rows + carries


@given(st.integers(1, 1 << 20), st.integers(1, 1 << 20))
def test_a_longer_context_never_reads_less(one: int, other: int) -> None:
    low, high = sorted((one, other))
    assert state_floor(FLASH, "dense", low, "bfloat16") <= state_floor(FLASH, "dense", high, "bfloat16")


def test_the_plan_says_how_many_tokens_memory_allows() -> None:
    target = load_targets()["rtx5090"]
    planned = plan_target(FLASH, target, context=4096, layout="fp8+fp4", stored="fp4")
    assert planned.floor == weight_floor(FLASH, "fp4") + state_floor(FLASH, "fp8+fp4", 4096, "bfloat16")
    assert target.bandwidth_gb_s is not None and planned.best_tokens == target.bandwidth_gb_s * 1e9 / planned.floor
    assert planned.to_dict()["best_tokens_per_second"] == planned.best_tokens
    assert plan_target(FLASH, load_targets()["cpu"], context=4096, stored="fp4").best_tokens is None


@pytest.mark.parametrize(("format_", "times"), [("fp4", (4, 5)), ("fp8", (4, 5)), ("bf16", (1.9, 2.1))])
def test_without_plugins_a_step_moves_several_times_the_bytes(format_: str, times: tuple[float, float]) -> None:
    low, high = times
    assert low < weights_moved_without_plugins(FLASH, format_) / weight_floor(FLASH, format_) < high
    target = load_targets()["rtx5090"]
    on, off = (plan_target(FLASH, target, context=4096, stored=format_, plugins=plugins) for plugins in (True, False))
    assert off.floor - on.floor == weights_moved_without_plugins(FLASH, format_) - weight_floor(FLASH, format_)
