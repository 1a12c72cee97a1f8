"""Properties of the state that hold for every model, every split and every batch (DESIGN, section 5)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from foldkv.export.checkpoint.reader import Checkpoint
from foldkv.export.contract.state import state_tensors, total_bytes
from foldkv.export.loading import decoder_from_checkpoint
from foldkv.export.model.decoder import Decoder, new_state
from foldkv.export.operators.index import visible_entries

pytestmark = pytest.mark.slow

CONTEXT, VOCAB = 64, 61
FEW = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
# Sums of a chunk and of a token are taken in another order: float32 rounding, logits of about 1.
ROUNDING = 2e-5


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Decoder:
    import importlib.util
    from pathlib import Path

    module = importlib.util.spec_from_file_location("models", Path(__file__).with_name("conftest.py"))
    assert module is not None and module.loader is not None
    models: Any = importlib.util.module_from_spec(module)
    module.loader.exec_module(models)
    folder = tmp_path_factory.mktemp("model")
    models.random_reference(8).save_pretrained(folder)
    return decoder_from_checkpoint(Checkpoint(folder))


def step(
    decoder: Decoder, chunks: list[list[int]], positions: list[int], state: list[Tensor], *, pad: int = 0
) -> tuple[list[Tensor], list[Tensor]]:
    """Feed each slot its own tokens; ``pad`` adds padding columns. Returns each slot's logits [n, V]."""
    width = max(1, max(map(len, chunks)) + pad)
    ids = torch.tensor([chunk + [7] * (width - len(chunk)) for chunk in chunks])
    logits, state = decoder(
        ids,
        torch.tensor(positions, dtype=torch.int32),
        torch.tensor([len(chunk) for chunk in chunks], dtype=torch.int32),
        torch.tensor([max(p + len(c) for p, c in zip(positions, chunks, strict=True))]),
        torch.arange(width).expand(len(chunks), -1),
        state,
    )
    return [logits[slot, : len(chunk)] for slot, chunk in enumerate(chunks)], state


def feed(
    decoder: Decoder, ids: list[int], splits: list[int], fill: float = float("nan")
) -> tuple[Tensor, list[Tensor]]:
    state, at, out = new_state(decoder.spec, CONTEXT, 1, fill=fill), 0, []
    for size in splits:
        logits, state = step(decoder, [ids[at : at + size]], [at], state)
        out.append(logits[0])
        at += size
    return torch.cat(out), state


ids_strategy = st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=40)


@FEW
@given(ids=ids_strategy, data=st.data())
def test_any_split_equals_the_whole_and_the_token_by_token_run(
    decoder: Decoder, ids: list[int], data: st.DataObject
) -> None:
    splits, rest = [], len(ids)
    while rest:
        splits.append(data.draw(st.integers(1, rest)))
        rest -= splits[-1]
    whole, _ = feed(decoder, ids, [len(ids)])
    parts, _ = feed(decoder, ids, splits)
    ones, _ = feed(decoder, ids, [1] * len(ids))
    assert torch.allclose(parts, whole, rtol=0, atol=ROUNDING)
    assert torch.allclose(ones, whole, rtol=0, atol=ROUNDING)


@FEW
@given(ids=ids_strategy, fill=st.sampled_from([0.0, float("nan"), float("inf"), -1e30]))
def test_what_unread_rows_hold_has_no_effect(decoder: Decoder, ids: list[int], fill: float) -> None:
    half = len(ids) // 2
    splits = [half, len(ids) - half] if half else [len(ids)]
    assert torch.equal(feed(decoder, ids, splits, fill)[0], feed(decoder, ids, splits, 0.5)[0])


@FEW
@given(
    first=ids_strategy,
    others=st.lists(ids_strategy, min_size=1, max_size=3),
    slot=st.integers(0, 3),
    pad=st.integers(0, 5),
)
def test_neighbours_slot_and_padding_have_no_effect(
    decoder: Decoder, first: list[int], others: list[list[int]], slot: int, pad: int
) -> None:
    alone, _ = feed(decoder, first, [len(first)])
    chunks = [*others]
    chunks.insert(min(slot, len(chunks)), first)
    state = new_state(decoder.spec, CONTEXT, len(chunks), fill=float("nan"))
    together, _ = step(decoder, chunks, [0] * len(chunks), state, pad=pad)
    assert torch.allclose(together[min(slot, len(chunks) - 1)], alone, rtol=0, atol=ROUNDING)


@FEW
@given(ids=st.lists(st.integers(0, VOCAB - 1), min_size=3, max_size=40), data=st.data())
def test_restoring_a_snapshot_gives_identical_bits(decoder: Decoder, ids: list[int], data: st.DataObject) -> None:
    cut = data.draw(st.integers(1, len(ids) - 1))
    _, state = feed(decoder, ids[:cut], [cut])
    snapshot = [value.clone() for value in state]
    runs = []
    for _ in range(2):
        current, out = [value.clone() for value in snapshot], []
        for at in range(cut, len(ids)):
            logits, current = step(decoder, [[ids[at]]], [at], current)
            out.append(logits[0])
        runs.append((torch.cat(out), current))
    assert torch.equal(runs[0][0], runs[1][0])
    assert all(
        torch.equal(a.view(torch.int32), b.view(torch.int32)) for a, b in zip(runs[0][1], runs[1][1], strict=True)
    )


@given(position=st.integers(0, 10**6), chunk=st.integers(1, 9), ratio=st.integers(1, 128))
def test_a_query_sees_the_entries_of_closed_windows_only(position: int, chunk: int, ratio: int) -> None:
    visible = visible_entries(torch.tensor([position], dtype=torch.int32), chunk, ratio)[0]
    for offset, count in enumerate(visible.tolist()):
        tokens_so_far = position + offset + 1
        assert count * ratio <= tokens_so_far < (count + 1) * ratio


@given(context=st.integers(1, 4096), batch=st.integers(1, 5))
def test_the_state_that_is_made_has_the_bytes_that_were_planned(decoder: Decoder, context: int, batch: int) -> None:
    tensors = state_tensors(decoder.spec)
    made = sum(batch * t.capacity(context) * t.width * 4 for t in tensors)
    assert total_bytes(tensors, context, batch) == made
    if context < 200:
        allocated = new_state(decoder.spec, context, batch)
        assert sum(value.nbytes for value in allocated) == made


def test_the_last_rows_of_a_full_context_are_written(decoder: Decoder) -> None:
    ids = [i % VOCAB for i in range(CONTEXT)]
    whole, state = feed(decoder, ids, [CONTEXT])
    ones, _ = feed(decoder, ids, [CONTEXT - 3, 1, 1, 1])
    assert torch.allclose(whole[-1], ones[-1], rtol=0, atol=ROUNDING)
    for tensor, value in zip(state_tensors(decoder.spec), state, strict=True):
        if tensor.group.endswith("entries"):
            assert value.isfinite().all()
