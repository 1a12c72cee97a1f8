"""Runs on this machine: what is recorded, what an estimate makes of it, and that nothing here can fail a build."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from foldkv.export.package import read_package
from foldkv.optimize import history
from foldkv.optimize.history import (
    BUILD,
    EXPORT,
    Run,
    estimate,
    history_file,
    read_runs,
    record_builds,
    record_export,
)
from foldkv.optimize.outcome import TargetResult

MEGA = 1 << 20


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(history, "history_file", history_file)  # the real one, which conftest.py replaces
    monkeypatch.setenv("FOLDKV_CACHE", str(tmp_path / "cache"))


def run(seconds: float, weights: int = MEGA, layers: int = 4, stage: str = EXPORT) -> Run:
    return Run(stage, "", False, weights, layers, seconds)


def test_what_is_recorded_is_read_back_and_estimates_itself(tiny_graph: Path, tiny_bundle: Path) -> None:
    record_export(tiny_graph, 20.0)
    built = TargetResult("cpu", "built", tiny_bundle, 5.0)
    record_builds(tiny_graph, [built, TargetResult("a100", "failed", Path("nowhere"), 3.0, "reason")])
    runs = read_runs()
    weights = read_package(tiny_graph).lock.bytes
    assert runs == [
        Run(EXPORT, "", False, weights, 4, 20.0), Run(BUILD, "onnxruntime", False, weights, 4, 5.0)
    ]  # fmt: skip
    found = estimate(runs, EXPORT, weight_bytes=weights, layers=4)
    assert found and (found.low, found.high, found.runs) == (20.0, 20.0, 1)
    assert found.to_dict()["estimate"] is True
    other = estimate(runs, BUILD, weight_bytes=weights, layers=4, backend="tensorrt-rtx", plugins=True)
    assert other is None


def test_another_size_is_bounded_by_layers_and_by_bytes() -> None:
    found = estimate([run(10.0)], EXPORT, weight_bytes=50 * MEGA, layers=8)
    assert found and (found.low, found.high) == (20.0, 500.0)
    smaller = estimate([run(10.0)], EXPORT, weight_bytes=MEGA // 2, layers=4)
    assert smaller and (smaller.low, smaller.high) == (5.0, 10.0)
    assert estimate([run(10.0)], EXPORT, weight_bytes=100 * MEGA, layers=8) is None


@pytest.mark.parametrize(("weights", "layers"), [(0, 4), (MEGA, 0), (-1, 4)])
def test_a_package_without_weights_is_compared_with_nothing(weights: int, layers: int) -> None:
    assert estimate([run(10.0)], EXPORT, weight_bytes=weights, layers=layers) is None


def test_the_nearest_runs_count_and_one_slow_one_does_not() -> None:
    far = [run(1e6, weights=1 << 40)] * 20
    near = [run(10.0), run(11.0), run(12.0), run(11.0), run(500.0)]
    found = estimate(far + near, EXPORT, weight_bytes=MEGA, layers=4)
    assert found and found.runs == 5 and found.low == found.high == 11.0


@pytest.mark.parametrize(
    "line", ["", "not json", "[]", "null", '{"stage": "export"}', '{"seconds": NaN}', "\0\xff", json.dumps({"a": 1})]
)
def test_lines_that_are_no_run_are_left_out(tiny_graph: Path, line: str) -> None:
    record_export(tiny_graph, 2.0)
    good = history_file().read_text()
    history_file().write_text(line + "\n" + good + line, encoding="latin-1")
    assert [r.seconds for r in read_runs()] == [2.0]


@pytest.mark.parametrize("field", ["seconds", "weight_bytes", "layers"])
@pytest.mark.parametrize("value", [0, -1, "x", None, float("nan"), float("inf")])
def test_runs_without_sense_are_left_out(tiny_graph: Path, field: str, value: object) -> None:
    record_export(tiny_graph, 2.0)
    row = json.loads(history_file().read_text()) | {field: value}
    history_file().write_text(json.dumps(row) + "\n")
    assert read_runs() == []


def test_a_place_that_cannot_be_written_fails_nothing(
    tiny_graph: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FOLDKV_CACHE", str(tmp_path / "file"))
    record_export(tiny_graph, 1.0)
    record_export(tmp_path / "no such graph", 1.0)
    assert read_runs() == []
