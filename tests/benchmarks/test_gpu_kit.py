"""The steps of the GPU kit, run on a stand-in of the device beyond the first call of CUDA."""

from __future__ import annotations

import json
import random
from pathlib import Path

import cases
import collect
import kit
import parcels
import prepare_kernels
import pytest
import step_kernels
import step_speed
import step_stability
import torch
from click.testing import CliRunner
from stand_in import StandIn

from foldkv.errors import MissingDependencyError

pytestmark = pytest.mark.slow


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
    [first] = (parcel / "expected").iterdir()
    known = cases.load_expectations(first)
    last = list(known)[-1]
    del known[last]
    digests = {name: digest for name, (digest, _) in known.items()}
    cases.save_expectations(first, {name: many for name, (_, many) in known.items()}, digests)
    with pytest.raises(RuntimeError, match=f"the parcel lacks tiny-v4 {last}: run prepare.py again"):
        step_kernels.measure(recorder, StandIn)


def test_stability(parcel: Path, tiny_only: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    some = ("FoldkvIndexSelect", "FoldkvCompress", "FoldkvDenseAttention")
    forms = step_stability.model_forms
    monkeypatch.setattr(
        step_stability, "model_forms", lambda *given: [form for form in forms(*given) if form.operator in some]
    )
    recorder = kit.Recorder(tmp_path / "stability.json", "stability", "")
    step_stability.measure(recorder, StandIn, runs=2, names=("tiny-v4",), shapes=("token",))
    assert recorder.content["reasons"] == []
    assert all(row["different"] == 0 for row in recorder.content["rows"])


def test_speed(parcel: Path, tiny_only: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_speed, "CALLS", 1)
    recorder = kit.Recorder(tmp_path / "speed.json", "speed", "")
    step_speed.measure(recorder, StandIn, contexts=(128,), batches=(2,), chunks=(3,), names=("tiny-v4",))
    assert recorder.content["reasons"] == [] and recorder.content["not_measured"] == []
    rows = recorder.content["rows"]
    assert {(row["operator"], row["rows"]) for row in rows if "rows" in row} == set(step_speed.CASES)
    [(geometry, _)] = step_speed.models(kit.ROOT)
    weights = {product.role for product in geometry.products} | {"experts"}
    assert {row["weight"] for row in rows if "weight" in row} == weights


def test_what_is_expected_survives_its_file_and_catches_a_wrong_output(tmp_path: Path) -> None:
    case = cases.make_case("FoldkvCompress", start=[43, 7], real=[3, 1], chunk=3)
    expected = case.expect()
    cases.save_expectations(tmp_path / "x.safetensors", {"one": expected}, {"one": case.digest()})
    [(name, (digest, again))] = cases.load_expectations(tmp_path / "x.safetensors").items()
    assert (name, digest) == ("one", case.digest())
    right = [value.clone() for value in case.inputs[:3]]
    for one in expected:
        if one.kind == "near":
            right[one.output][one.where] = one.values.to(right[one.output].dtype)
        elif one.kind == "bits":
            right[one.output] = one.values
    case.check(right, again)
    for output, change in ((0, lambda value: value.roll(1, 1)), (1, lambda value: value + 1)):
        wrong = list(right)
        wrong[output] = change(wrong[output])
        with pytest.raises(AssertionError):
            case.check(wrong, again)
    right[0][again[1].where] = torch.nan
    with pytest.raises(AssertionError, match="has NaN"):
        case.check(right, again)


def test_inputs_are_the_same_bits_wherever_they_are_drawn() -> None:
    draw = cases.Draw("a seed")
    assert draw.normal(4).tolist() == pytest.approx([-0.21901841, 0.32180142, 0.09445781, 0.09702143], abs=1e-7)
    values = cases.Draw("another").normal(100_000)
    assert abs(float(values.mean())) < 0.02 and abs(float(values.std()) - 1) < 0.02
    assert sorted(draw.permutation(50).tolist()) == list(range(50))


@pytest.mark.parametrize("error", [None, RuntimeError("a fault"), MissingDependencyError("no driver")])
def test_a_result_file_is_whole_whatever_a_step_raises(tmp_path: Path, error: Exception | None) -> None:
    path = tmp_path / "out" / "step.json"
    with pytest.raises(SystemExit) as ended, kit.recorded(path, "step", "what") as recorder:
        recorder.add({"a": 1})
        assert json.loads(path.read_text())["status"] == kit.RUNNING
        if error:
            raise error
    content = json.loads(path.read_text())
    status = {None: kit.PASSED, RuntimeError: kit.BROKEN, MissingDependencyError: kit.NO_GPU}[error and type(error)]
    assert content["status"] == status and content["rows"] == [{"a": 1}] and ended.value.code == (error is not None)
    assert error is None or str(error) in content["reasons"][0]


def test_a_step_that_measured_nothing_has_not_passed(tmp_path: Path) -> None:
    with pytest.raises(SystemExit), kit.recorded(tmp_path / "x.json", "step", "what"):
        pass
    assert json.loads((tmp_path / "x.json").read_text())["reasons"] == ["nothing was measured"]


def test_a_folder_comes_back_from_parcels_that_arrive_one_by_one(tmp_path: Path) -> None:
    folder, parcels_, back = (tmp_path / name for name in ("kit", "parcels", "back"))
    (folder / "engine").mkdir(parents=True)
    (folder / "kernels").mkdir()
    large = random.Random(0).randbytes(9 << 20)
    (folder / "engine" / "library").write_bytes(large)
    (folder / "kernels" / "a.json").write_text("{}")
    lines = parcels.pack(folder, parcels_, 5)
    assert len(lines) > 2
    files = sorted(parcels_.glob("*.tar"))
    assert all(path.stat().st_size <= 5 << 20 for path in files)
    for path in files:
        arriving = tmp_path / "arriving"
        arriving.mkdir(exist_ok=True)
        path.rename(arriving / path.name)
        missing = parcels.unpack(arriving, back)
        assert (back / "kernels" / "a.json").read_text() == "{}"
    assert missing == [] and (back / "engine" / "library").read_bytes() == large


def test_results_of_several_runs_are_one_file(tmp_path: Path) -> None:
    facts = {"device": "NVIDIA H9", "driver": "1", "memory": "1 GiB", "sm": 90, "date": "d", "versions": {"torch": "2"}}
    for run, step in (("first", "kernels"), ("second", "speed")):
        out = tmp_path / run
        out.mkdir()
        (out / "facts.json").write_text(json.dumps(facts))
        content = {
            "status": "passed",
            "driver": f"of the {run} run",
            "rows": [{"us": 1.23456789, "at": "/a/folder/file.py"}],
            "reasons": [],
            "seconds": 1,
        }
        (out / f"{step}.json").write_text(json.dumps(content | {"traceback": "x"}))
        done = CliRunner().invoke(collect.main, [str(out), "--into", str(tmp_path)], catch_exceptions=False)
        assert done.exit_code == 0
    whole = json.loads((tmp_path / "gpu-h9.json").read_text())
    assert set(whole["steps"]) == {"kernels", "speed"} and whole["steps"]["kernels"]["driver"] == "of the first run"
    assert whole["steps"]["kernels"]["rows"] == [{"us": 1.2346, "at": "file.py"}]
    assert "traceback" not in whole["steps"]["kernels"]
