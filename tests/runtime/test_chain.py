"""The segments of a bundle in ONNX Runtime: threads that do not fight for processors, and what sessions share."""

from __future__ import annotations

import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from foldkv.export.contract.chain import STEP, Bound, Call, ChainTable, Stacked
from foldkv.export.contract.lock import Weight, WeightsLock
from foldkv.export.contract.stacks import RowBlocks, Stack
from foldkv.export.contract.step_time import STORED
from foldkv.runtime import Model, Session, chain
from foldkv.runtime.chain import ChainModel, threads_for

WAYS = ((False, "bfloat16"), (True, "float32"))


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every model count as large, so that steps take as many threads as they may."""
    monkeypatch.setattr(chain, "SMALL_BYTES", 0)


@pytest.mark.usefixtures("large")
def test_threads_without_work_take_no_processor(tiny_bundle: Path) -> None:
    with Session(tiny_bundle, context=128, threads=2) as session:
        session.prefill([list(range(64))])
        for token in range(10):
            session.decode([token])
        before = time.process_time()
        time.sleep(0.2)
        assert time.process_time() - before < 0.05


@pytest.mark.usefixtures("large")
def test_a_second_thread_does_not_double_the_processor_time_of_a_step(tiny_bundle: Path) -> None:
    """Every segment has threads of its own. If those of one wait actively while another runs, a step takes several times as long."""
    with Session(tiny_bundle, context=256, threads=1) as one, Session(tiny_bundle, context=256, threads=2) as two:
        times: dict[int, list[float]] = {1: [], 2: []}
        for token in range(100):
            for number, session in ((1, one), (2, two)):
                before = time.process_time()
                session.decode([token])
                times[number].append(time.process_time() - before)
    assert statistics.median(times[2][10:]) < 1.6 * statistics.median(times[1][10:])


def test_small_models_take_one_thread_for_a_step(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = ChainTable.read(tiny_bundle / "chain.json")
    assert threads_for(table) == 1
    made: list[tuple[bool, int]] = []
    options = chain.session_options

    def record(library: object, threads: int, *, decode: bool, gpu: bool) -> object:
        made.append((decode, threads))
        return options(library, threads, decode=decode, gpu=gpu)

    monkeypatch.setattr(chain, "session_options", record)
    with Session(tiny_bundle, context=64, threads=2) as session:
        session.prefill([[1, 2, 3]])
        session.decode([4])
    assert made == [(False, 2), (True, 1)]
    monkeypatch.setattr(chain, "SMALL_BYTES", 0)
    assert threads_for(table) >= 1


def test_sessions_of_a_model_share_its_segments_also_between_threads(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[bool] = []
    load = ChainModel._load

    def count(self: ChainModel, *, decode: bool) -> object:
        loaded.append(decode)
        return load(self, decode=decode)

    monkeypatch.setattr(ChainModel, "_load", count)
    prompts = [np.random.default_rng(seed).integers(0, 256, 40).tolist() for seed in range(4)]

    def decode(model: Model, prompt: list[int]) -> list[int]:
        with Session(model, context=64) as session:
            return list(session.generate([prompt], max_new_tokens=8, stop_tokens=[])[0])

    with Model(tiny_bundle) as model:
        with ThreadPoolExecutor(4) as pool:
            together = list(pool.map(lambda prompt: decode(model, prompt), prompts))
        assert together == [decode(model, prompt) for prompt in prompts]
    assert sorted(loaded) == [False, True]


def test_one_token_gives_the_same_in_a_step_and_in_a_chunk(tiny_bundle: Path) -> None:
    """Steps and longer chunks go through sessions of their own, over the same state."""
    tokens = np.random.default_rng(0).integers(0, 256, 60).tolist()
    with Session(tiny_bundle, context=64, chunk=7) as mixed, Session(tiny_bundle, context=64) as whole:
        rows = []
        for at, size in ((0, 7), (7, 1), (8, 14), (22, 1), (23, 1), (24, 36)):
            rows.append(mixed.prefill([tokens[at : at + size]]))
        np.testing.assert_allclose(rows[-1], whole.prefill([tokens]), atol=1e-4, rtol=0)


def test_what_a_step_takes_depends_on_the_form_that_is_run() -> None:
    """Experts that QMoE reads are not decoded, those in e4m3 are, whatever the matrices are; small models have no other forms."""
    weights = {"wq": Weight("BF16", (1000, 1000), ()), "ffn.experts.codes": Weight("I8", (4, 100), ())}
    bounds = {role: Bound("file", False, 0, "int8", one.shape) for role, one in weights.items()}
    lock = WeightsLock({}, {"layers.0": weights, "layers.1": weights})
    calls = (Call("layers.0", "moe"), Call("layers.1", "moe"))
    first = ChainTable({STEP: "s", "moe": "m"}, calls, {"layers.0": bounds, "layers.1": bounds}, chosen=10**6)
    found = {}
    for experts in ("e2m1", "e4m3"):
        packed = {"ffn.experts.w2": Stack("ffn.experts.codes", (0,), "uint8", (4, 10, 10))} if experts == "e2m1" else {}
        form = Stacked("m2", packed, ("ffn.experts.codes",) if packed else (), {"wq": RowBlocks(1000, 10)}, "m3")
        large = replace(first, stacked={"moe": form})
        found[experts] = [
            1e3 * chain._step_seconds(large, lock, large, STORED),
            *(1e3 * chain._step_seconds(large, lock, large.in_stacks(wide=wide), name) for wide, name in WAYS),
        ]
    assert found["e2m1"] == pytest.approx([2 * 3.5 + 2 * 1.8, 2 * 0.62, 2 * 0.17])
    assert found["e4m3"] == pytest.approx([2 * 3.5 + 2 * 1.8, 2 * 0.62 + 2 * 1.8, 2 * 0.17 + 2 * 1.8])
