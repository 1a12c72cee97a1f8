"""The steps of the GPU kit, run on a stand-in of the device beyond the first call of CUDA."""

from __future__ import annotations

from pathlib import Path

import cases
import kit
import prepare_kernels
import pytest
import step_kernels
import step_speed
import step_stability
from stand_in import StandIn


@pytest.fixture
def parcel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FOLDKV_GPU_KIT", str(tmp_path / "kit"))
    return tmp_path / "kit"


@pytest.fixture
def tiny_only(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = [pair for pair in cases.models(kit.ROOT) if pair[0].name == "tiny-v4"]
    for module in (prepare_kernels, step_kernels, step_stability, step_speed):
        monkeypatch.setattr(module, "models", lambda root: iter(tiny))


def test_kernels(parcel: Path, tiny_only: None, tmp_path: Path) -> None:
    kernels = prepare_kernels.prepare(parcel, lambda line: None, sm=90)
    recorder = kit.Recorder(tmp_path / "kernels.json", "kernels", "")
    step_kernels.measure(recorder, StandIn, only="token")
    assert recorder.content["reasons"] == []
    assert {row["operator"] for row in recorder.content["rows"]} == set(cases.PLUGINS)
    assert len(kernels) > len(cases.PLUGINS)


def test_stability(parcel: Path, tiny_only: None, tmp_path: Path) -> None:
    recorder = kit.Recorder(tmp_path / "stability.json", "stability", "")
    step_stability.measure(recorder, StandIn, runs=2, names=("tiny-v4",), shapes=("token",))
    assert recorder.content["reasons"] == []
    assert all(row["different"] == 0 for row in recorder.content["rows"])


def test_speed(parcel: Path, tiny_only: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_speed, "CALLS", 1)
    recorder = kit.Recorder(tmp_path / "speed.json", "speed", "")
    step_speed.measure(recorder, StandIn, contexts=(128,), batches=(2,), chunks=(3,), names=("tiny-v4",))
    assert recorder.content["reasons"] == [] and recorder.content["not_measured"] == []
    assert {(row["operator"], row["rows"]) for row in recorder.content["rows"]} == set(step_speed.CASES)
