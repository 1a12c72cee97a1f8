"""One layer with every size of V4-Flash, but fewer experts, against transformers' layer with the same weights."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import random_checkpoint

from foldkv.export.checkpoint.reader import Checkpoint
from foldkv.export.contract.chain import CHAIN, ChainTable
from foldkv.export.package import export_checkpoint
from foldkv.optimize.build import build_bundles
from foldkv.runtime.bundle import load_bundle
from foldkv.runtime.chain import ChainModel
from foldkv.runtime.chain_executor import ChainExecutor
from foldkv.validation.jobs import Job
from foldkv.validation.layered import LayeredReference, edges_of, read_layered

CONFIG = Path(__file__).parent / "data" / "deepseek-v4-flash.json"
#: A prompt in chunks, the second of which attends to entries of the first; then single tokens. Most of the test's time is tracing.
PROMPT, CHUNK, DECODED = 22, 16, 2


@pytest.mark.slow
def test_a_layer_of_full_width_computes_what_transformers_computes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through the second form, matrices in blocks of rows, and the third, matrices in float32; with experts as stacks, all from files."""
    monkeypatch.setenv("FOLDKV_CACHE", str(tmp_path / "cache"))
    config = json.loads(CONFIG.read_text()) | {
        "num_hidden_layers": 1, "compress_ratios": [4], "num_hash_layers": 0, "vocab_size": 128, "num_nextn_predict_layers": 0,
        "n_routed_experts": 8,
    }  # fmt: skip
    config.pop("quantization_config", None)
    checkpoint = random_checkpoint(config, tmp_path / "checkpoint", "instruct")
    graph = export_checkpoint(checkpoint, tmp_path / "graph")
    [built] = build_bundles(graph, tmp_path / "bundles", ["cpu"]).results
    assert built.reason == "" and (built.folder / "placed.bin").stat().st_size < 16 << 20
    form = ChainTable.read(built.folder / CHAIN).stacked["csa-moe"]
    assert len(form.blocks) == 14 and len(form.stacks) == 4 + 9, "all products; experts and e4m3 matrices"
    tokens = np.random.default_rng(7).integers(0, 128, PROMPT + DECODED).tolist()
    found = list[Any]()
    read_layered(
        LayeredReference(Checkpoint(checkpoint)), [Job(tokens, edges=edges_of(CHUNK, len(tokens)))],
        observe=lambda layer, streams: found.append(streams[0].numpy()),
    )  # fmt: skip
    [expected] = found
    for matrices in ("bfloat16", "float32"):
        ours = _streams(built.folder, tokens, matrices)
        apart = np.abs(ours - expected).max(axis=(1, 2)) / np.sqrt(np.mean(np.square(expected, dtype=np.float64)))
        assert apart.max() < 3e-5, (matrices, apart[:PROMPT].max(), apart[PROMPT:].max())


def _streams(bundle: Path, tokens: list[int], matrices: str) -> Any:
    """The streams [n, N, C] after the layer."""
    found: list[Any] = []
    model = ChainModel(load_bundle(bundle), matrices=matrices)
    assert model.matrices == matrices and f"matrices in {matrices}" in model.way
    executor = ChainExecutor(model, len(tokens), 1)
    edges = [*range(0, PROMPT, CHUNK), *range(PROMPT, len(tokens) + 1)]
    for at, end in itertools.pairwise(edges):
        executor.run(
            np.array([tokens[at:end]], np.int64), np.array([at]), np.array([end - at]), end, np.zeros((1, 1), np.int64),
            observe=lambda seen: found.append(seen.streams[0].copy()) if seen.layer is not None else None,
        )  # fmt: skip
    executor.close()
    model.close()
    return np.concatenate(found)
