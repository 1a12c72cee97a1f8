"""Engines per kind of layer: lowered segments compute what the package says, plans hold no weight, and are built once."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from checkpoints import random_checkpoint
from lowered import lowered_logits
from whole import first_chunk, logits, whole_model

from foldkv.export.contract.engine_set import DEQUANTISED, ENGINES, STORED, WORDS, EngineTable
from foldkv.export.package import export_checkpoint, read_package
from foldkv.manifests import BundleManifest, read
from foldkv.optimize.build import build_bundles
from foldkv.optimize.recipe import Shapes

pytestmark = pytest.mark.slow
IDS = np.random.default_rng(1).integers(0, 256, (1, 70))
SMALL = Shapes(batch=(1, 1, 2), chunk=(1, 1, 16), context=(64, 256, 1024))


@pytest.mark.parametrize("form", ["instruct", "base"])
def test_lowered_segments_with_loaded_weights_compute_what_the_package_computes(
    form: str, released_graph: Callable[[str], Path], tmp_path: Path
) -> None:
    graph = released_graph(form)
    feeds = first_chunk(graph, IDS, 80)
    want = logits(whole_model(graph, tmp_path / "whole"), feeds)
    have = lowered_logits(graph, tmp_path / "float32", feeds, precision="float32")
    np.testing.assert_allclose(have, want, atol=1e-4 * np.abs(want).max(), rtol=0)
    low = lowered_logits(graph, tmp_path / "bfloat16", feeds, precision="bfloat16")
    error = np.sqrt(np.mean(np.square(low - want)) / np.mean(np.square(want)))
    assert 1e-4 < error < 0.05  # bfloat16 has 8 bits; four layers of products add up


def test_engines_are_built_without_weights_and_once_for_all_models_of_a_kind(
    quick_checkpoint: Path, tmp_path: Path
) -> None:
    config = json.loads((quick_checkpoint / "config.json").read_text())
    digests = []
    for seed in (0, 1):
        checkpoint = random_checkpoint(config, tmp_path / f"checkpoint-{seed}", "plain", seed)
        graph = export_checkpoint(checkpoint, tmp_path / f"graph-{seed}")
        shutil.rmtree(checkpoint)
        out, cache = tmp_path / f"out-{seed}", tmp_path / "cache"
        report = build_bundles(graph, out, ["l40s", "rtx4090"], shapes=SMALL, cache=cache)
        assert [result.reason for result in report.results] == ["", ""]
        manifests = [read(BundleManifest, result.folder) for result in report.results]
        reused = [[one.reused for one in (m.engine.segments or {}).values()] for m in manifests]
        # The targets have one compute capability: of each plan, one of them built it and the other took it.
        assert all(one != other for one, other in zip(*reused, strict=True)) if seed == 0 else all(map(all, reused))
        digests += [{n: f.sha256 for n, f in m.files.items() if n.endswith(".plan")} for m in manifests]
    assert len(digests[0]) == 4 and digests[0] == digests[1] == digests[2] == digests[3]


def test_a_damaged_plan_in_the_cache_is_built_again(quick_checkpoint: Path, tmp_path: Path) -> None:
    graph, cache = export_checkpoint(quick_checkpoint, tmp_path / "graph"), tmp_path / "cache"
    [first] = build_bundles(graph, tmp_path / "one", ["a100"], shapes=SMALL, cache=cache).results
    [damaged, *_] = sorted((cache / "engines").glob("*.plan"))
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")
    [second] = build_bundles(graph, tmp_path / "two", ["a100"], shapes=SMALL, cache=cache).results
    facts = read(BundleManifest, second.folder).engine.segments or {}
    assert sum(one.reused for one in facts.values()) == len(facts) - 1
    assert not any(one.reused for one in (read(BundleManifest, first.folder).engine.segments or {}).values())
    # The plan that was built anew may differ in bytes; the others are the same.
    plans = [
        {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in (r.folder / "engines").iterdir()}
        for r in (first, second)
    ]
    assert sum(plans[0][name] != plans[1][name] for name in plans[0]) <= 1


def test_the_table_says_how_every_weight_of_the_lock_is_taken(
    released_graph: Callable[[str], Path], tmp_path: Path
) -> None:
    graph = released_graph("instruct")
    [result] = build_bundles(graph, tmp_path, ["l40s"], plugins=False, shapes=SMALL).results
    assert result.reason == ""
    table, package = EngineTable.read(result.folder / ENGINES), read_package(graph)
    forms = {name: {role: taken.form for role, taken in roles.items()} for name, roles in table.weights.items()}
    for owner, name in package.calls():
        weights = package.lock.weights[owner]
        scales = {taken.scale for taken in table.weights[name].values() if taken.form == DEQUANTISED}
        assert set(weights) == set(table.weights[name]) | scales and not scales & set(table.weights[name])
        for role, weight in weights.items():
            if weight.dtype == "F8_E4M3":
                assert forms[name][role] == DEQUANTISED
            elif role.startswith("ffn.experts"):
                assert forms[name][role] == WORDS and table.weights[name][role].bytes >= weight.bytes
            elif weight.dtype == "F32":
                assert role in scales or forms[name][role] == STORED
