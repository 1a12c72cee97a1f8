"""The oracle of which one layer is in memory at a time gives the bits of the one in memory."""

from __future__ import annotations

import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import small_checkpoint

from foldkv.export.checkpoint.reader import Checkpoint
from foldkv.validation.deployments import BOTH, ROWS, W8A8
from foldkv.validation.jobs import Job
from foldkv.validation.layer_weights import LayerWeights
from foldkv.validation.layered import read_layered
from foldkv.validation.layered_oracle import LayeredOracle, LayeredOracleRunner
from foldkv.validation.runners import OracleRunner

pytestmark = pytest.mark.slow
TEXTS = [list(range(40, 190)), [7, 7, 250, 3] * 9, [65]]


@pytest.mark.parametrize("form", ["plain", "instruct"])
def test_layer_by_layer_gives_the_bits_of_the_whole_oracle(
    form: str, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_checkpoint if form == "plain" else small_checkpoint(tiny_checkpoint, tmp_path / form, form)
    whole, checkpoint = OracleRunner(folder), Checkpoint(folder)
    runner = LayeredOracleRunner(checkpoint, folder=tmp_path / "kept")
    assert runner.deployments == whole.deployments == ((ROWS,) if form == "plain" else (ROWS, W8A8, BOTH))
    expected = [whole.read(tokens, streams=True) for tokens in TEXTS]
    random = np.random.default_rng(3)
    given = [one + random.standard_normal(one.shape).astype(np.float32) / 50 for one in expected[0].streams]
    keys = {1: torch.from_numpy(random.standard_normal((len(TEXTS[0]) // 4, 32)).astype(np.float32))}
    runner.prepare(
        [
            *(Job(tokens, keep_streams=True) for tokens in TEXTS),
            *(Job(TEXTS[0], deployment=name) for name in runner.deployments),
            Job(TEXTS[0], given=given, keys=keys),
            Job(TEXTS[0], given=given, keep_streams=True),
        ]
    )
    monkeypatch.setattr(LayeredOracle, "layers", None)  # nothing is left to be computed
    for tokens, one in zip(TEXTS, expected, strict=True):
        found = runner.read(tokens, streams=True)
        assert np.array_equal(found.logits, one.logits) and len(found.streams) == len(one.streams) == 4
        assert all(map(np.array_equal, found.streams, one.streams))
    for name in runner.deployments:
        other = runner.read(TEXTS[0], deployment=name).logits
        assert np.array_equal(other, whole.read(TEXTS[0], deployment=name).logits)
        assert not np.array_equal(other, expected[0].logits)
    assert all(map(np.array_equal, runner.alone(TEXTS[0], given).streams, whole.alone(TEXTS[0], given).streams))
    alone, apart = runner.alone(TEXTS[0], given, keys), whole.alone(TEXTS[0], given, keys)
    assert alone.chosen.keys() == apart.chosen.keys() == {1, 3}
    assert all(np.array_equal(alone.chosen[layer], apart.chosen[layer]) for layer in (1, 3))


def test_groups_of_experts_change_no_bit_and_one_is_in_memory(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, alive = LayerWeights.experts, list[weakref.ref[torch.Tensor]]()

    def alone(self: LayerWeights, layer: int, start: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        assert all(one() is None for one in alive), "a group of experts is read beside another"
        found = read(self, layer, start, end)
        alive[:] = map(weakref.ref, found)
        return found

    monkeypatch.setattr(LayerWeights, "experts", alone)
    checkpoint = Checkpoint(tiny_checkpoint)
    one_by_one, together = LayeredOracle(checkpoint, group_bytes=1), LayeredOracle(checkpoint)
    assert one_by_one.weights.experts_at_once == 1 < together.weights.experts_at_once
    for tokens in TEXTS[1:]:
        [first], [second] = (read_layered(side, [Job(tokens)]) for side in (one_by_one, together))
        assert alive and torch.equal(first, second)
