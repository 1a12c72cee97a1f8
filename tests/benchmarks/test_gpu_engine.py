"""The engine step of the GPU kit, as far as it goes without one: plans, what they must compute, and that errors are found."""

from __future__ import annotations

import hashlib
import json
import lzma
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from engine import library
from gpus import HostDriver

from foldkv.errors import BuildError
from foldkv.optimize.plan_file import check_plan
from foldkv.plugins.cuda import device_count
from foldkv.runtime.engine_model import library_logger

pytestmark = pytest.mark.slow

pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
prepare_engine: Any = pytest.importorskip("prepare_engine")
step_engine: Any = pytest.importorskip("step_engine")


@pytest.fixture(scope="module")
def probes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("probes")
    for make in prepare_engine.PROBES:
        prepare_engine.write_probe(make(), folder, others=(80,) if make is prepare_engine.product_probe else ())
    return folder


def test_a_plan_that_names_no_capability_is_told_from_one_that_does(probes: Path) -> None:
    plan, named = ((probes / "product" / f"{name}.plan").read_bytes() for name in ("default", "sm80"))
    header = check_plan(plan, sm=None)
    assert header["forward_compatible"] and {80, 86, 89, 120} <= set(header["sm"])
    assert check_plan(named, sm=80)["forward_compatible"] is False
    with pytest.raises(BuildError, match="expected 80"):
        check_plan(plan, sm=80)
    with pytest.raises(BuildError, match="expected a forward-compatible one"):
        check_plan(named, sm=None)


def test_a_probe_with_plugins_carries_its_kernels_and_what_it_must_compute(probes: Path) -> None:
    folder = probes / "plugin"
    case, data = json.loads((folder / "case.json").read_text()), np.load(folder / "data.npz")
    assert case["plugins"] == 2 and case["kernels"]["sm"] == 90
    for row in case["kernels"]["files"]:
        assert hashlib.sha256((folder / row["file"]).read_bytes()).hexdigest() == row["sha256"]
    plan = (folder / "default.plan").read_bytes()
    assert b"FoldkvWindowUpdate" in plan and case["kernels"]["library"].encode() in plan

    def given(name: str) -> Any:
        array = data[f"in:{name}"]
        return step_engine.widened(array) if name in case["low"] else array

    # Positions 45 to 47 go to slots 13 to 15 of the ring of 32.
    window = given("past.window").copy()
    window[0, 13:16] = given("x")[0] @ given("kv_weight")
    np.testing.assert_allclose(data["out:present.window"], window, rtol=1e-5, atol=1e-6)
    assert data["out:out"].shape == (1, 3, 4, 64) and np.isfinite(data["out:out"]).all()


def test_only_outputs_within_their_limits_pass() -> None:
    expected, limits = {"y": np.array([[1.0, -4.0]], np.float32)}, {"y": 0.01}
    row, failure = step_engine.compare({"y": expected["y"] + 0.03}, expected, limits)
    assert not failure and 0.007 < row["y"]["error"] < 0.008
    for wrong in (expected["y"] + 0.05, expected["y"] * np.nan, expected["y"][0], None):
        _, failure = step_engine.compare({} if wrong is None else {"y": wrong}, expected, limits)
        assert failure.startswith("y ")
    values = np.array([1.5, -3.0e-3, np.inf], np.float32)
    assert step_engine.widened((values.view(np.uint32) >> 16).astype(np.uint16))[[0, 2]].tolist() == [1.5, np.inf]


def test_a_probe_is_bound_run_and_compared(probes: Path, tmp_path: Path) -> None:
    """Over stand-ins: the plan is the path of the graph in float32."""
    model = prepare_engine.product_probe().build(onnx.TensorProto.FLOAT)
    onnx.save(model, tmp_path / "probe.onnx")
    case = json.loads((probes / "product" / "case.json").read_text()) | {"low": []}
    data = dict(np.load(probes / "product" / "data.npz"))
    data["in:weight"] = step_engine.widened(data["in:weight"])
    np.savez(tmp_path / "data.npz", **data)
    driver = HostDriver()
    trt, notes = library(driver), step_engine.Notes(tmp_path)
    runtime = trt.Runtime(library_logger(trt))

    def run(plan: str) -> str:
        result: str = step_engine.run_probe(notes, trt, runtime, driver, plan.encode(), tmp_path, case)
        return result

    assert run(str(tmp_path / "probe.onnx")) == ""
    kept = json.loads((tmp_path / "notes.json").read_text())
    assert kept["stage"] == "comparing" and kept["outputs"].keys() == {"gated", "wide"}
    assert ["x", "tensor(float)", "(-1, 256)", "0"] in kept["tensors"]
    np.savez(tmp_path / "data.npz", **data | {"out:wide": data["out:wide"] + 0.1})
    assert run(str(tmp_path / "probe.onnx")).startswith("wide is off by")
    with pytest.raises(RuntimeError, match="the plan was refused: no plan of any version"):
        run("no plan")


class Counter:
    """A session whose logits follow from the tokens that each slot holds; ``error`` is added to them."""

    def __init__(self, error: float = 0.0, *, forgets: bool = False) -> None:
        self.held: list[list[int]] = [[], []]
        self.error, self.forgets = error, forgets

    def prefill(self, prompts: list[list[int]]) -> Any:
        for held, prompt in zip(self.held, prompts, strict=True):
            held += prompt
        return np.stack([np.sin(np.arange(1, 8) * (1 + sum(held) % 50)) for held in self.held]) * (1 + self.error)

    def decode(self, tokens: list[int]) -> Any:
        return self.prefill([[token] for token in tokens])

    def reset(self) -> None:
        self.held = [[], []]

    def snapshot(self) -> Any:
        return _Held(self.held)

    def restore(self, snapshot: Any) -> None:
        if not self.forgets:
            self.held = [list(held) for held in snapshot.held]


class _Held:
    bytes = 8

    def __init__(self, held: list[list[int]]) -> None:
        self.held = [list(row) for row in held]


def test_a_session_must_give_the_expected_logits_and_go_back_exactly(tmp_path: Path) -> None:
    prompts, following = [[1, 2, 3], [4]], [[5, 6, 0, 1], [2, 2, 3, 1]]
    session = Counter()
    logits = [
        session.prefill(prompts),
        *(session.decode(list(step)) for step in list(zip(*following, strict=True))[:-1]),
    ]
    session.reset()
    tokens = [session.prefill(prompts).argmax(-1)]
    tokens += [session.decode(tokens[-1].tolist()).argmax(-1) for _ in range(1)]
    case = {
        "prompts": prompts, "following": following, "yardstick": {"of": "a test", "kl_mean": 1e-4, "logit_rms": 1e-2},
    }  # fmt: skip

    def follow(session: Counter) -> tuple[str, Any]:
        failure = step_engine.follow(step_engine.Notes(tmp_path), session, case, np.stack(logits), np.stack(tokens))
        return failure, json.loads((tmp_path / "notes.json").read_text())

    failure, notes = follow(Counter())
    assert failure == "" and notes["tokens_alike"] == notes["tokens"] == 4 and notes["alike_until"] == [2, 2]
    assert notes["restored_same_bits"] and notes["figures"]["kl_mean"] == 0 and len(notes["logit_error_by_step"]) == 4
    failure, _ = follow(Counter(0.3))
    assert "kl_mean is" in failure and "logit_rms is" in failure
    failure, notes = follow(Counter(forgets=True))
    assert failure.startswith("after a snapshot") and not notes["restored_same_bits"]


def test_the_library_must_be_whole(tmp_path: Path) -> None:
    source, target, content = tmp_path / "engine", tmp_path / "unpacked", bytes(range(256)) * 100
    (tmp_path / "site" / "tensorrt_rtx_libs").mkdir(parents=True)
    source.mkdir()
    for name in ("material.tar.xz", "python.tar.xz"):
        with tarfile.open(source / name, "w:xz") as archive:
            archive.add(tmp_path / "site", arcname=".")
    assert step_engine.unpack(source, target)["missing"] == ["library.xz", "library.json"]
    (source / "library.xz").write_bytes(lzma.compress(content))
    facts = {"bytes": len(content), "sha256": "0" * 64}
    (source / "library.json").write_text(json.dumps(facts))
    with pytest.raises(RuntimeError, match="is not the one that was packed"):
        step_engine.unpack(source, target)
    (source / "library.json").write_text(json.dumps(facts | {"sha256": hashlib.sha256(content).hexdigest()}))
    assert step_engine.unpack(source, target)["missing"] == []
    libraries = target / "site" / "tensorrt_rtx_libs"
    assert (libraries / "libtensorrt_rtx.so").read_bytes() == content
    assert step_engine.unpack(source, target) == {"missing": []}


def test_a_check_ends_with_its_process_or_its_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FOLDKV_GPU_RTX", str(tmp_path))
    row, failure = step_engine.engine_check("import", 0.01)
    assert failure == "import: ended by the time limit of 0 s while starting" and row["code"] < 0
    row, failure = step_engine.engine_check("import", 120)
    assert failure == "" and row["version"] == row["distribution"] and row["stage"] == "opening the GPU"
    assert ("no_gpu" in row) == (device_count() == 0)
    row, failure = step_engine.engine_check("probe:absent:default", 120)
    assert "while reading the probe: FileNotFoundError" in failure and "traceback" in row
