"""The layers' step of the GPU kit, over the stand-ins that execute engines: from headers of weight files to rows of times."""

from __future__ import annotations

import json
import struct
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import device
import kit
import layer_kernels
import numpy as np
import pytest
import step_speed
import torch
from cases import Geometry
from click.testing import CliRunner
from engine import library
from executable import STATELESS, executable_bundle, micro_config, use
from gpus import HostDriver
from layer_kernels import layer_calls
from stand_in import StandIn

from foldkv.errors import InputError
from foldkv.export.checkpoint.config_reader import spec_from_config
from foldkv.export.contract.state import state_tensors
from foldkv.manifests import BundleManifest, read
from foldkv.plugins.plans import Kernel

pytestmark = pytest.mark.slow
pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
checks: Any = pytest.importorskip("checks")
layer_times: Any = pytest.importorskip("layer_times")
prepare_layers: Any = pytest.importorskip("prepare_layers")
random_weights: Any = pytest.importorskip("random_weights")
step_engine: Any = pytest.importorskip("step_engine")
step_layers: Any = pytest.importorskip("step_layers")

KINDS = {"sliding-moe": "sliding_attention", "csa-moe": "compressed_sparse_attention",
         "hca-moe": "heavily_compressed_attention"}  # fmt: skip
SIZES = layer_times.Sizes(
    contexts=(64,), batches=(2,), prefilled=16, compared=1, enqueued=1, captured=2, chunk=16, chunks=1
)
QUICK = ("FoldkvHcPost",)
#: Bytes per second of a copy: small, so that floors have digits.
BANDWIDTH = 2e9


@dataclass(frozen=True)
class Made:
    """What ``prepare_layers`` writes, of a narrow model, and the kernels that its engines launch."""

    parcel: Path
    config: dict[str, Any]
    kernels: Mapping[str | bytes, Kernel]


@pytest.fixture(scope="module")
def made(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("layers")
    short = micro_config(tiny_checkpoint) | {"mlp_layer_types": ["moe"] * 3}
    types = ["sliding_attention"] + ["compressed_sparse_attention", "heavily_compressed_attention"] * 3
    whole = short | {"num_hidden_layers": 7, "layer_types": types, "mlp_layer_types": ["moe"] * 7}
    package = prepare_layers.export_without_weights(short, folder)
    bundle, kernels = executable_bundle(package, folder / "built")
    prepare_layers.write_case(folder / "micro", "micro", whole, short, folder / "checkpoint", bundle, SIZES)
    (folder / "parcel" / "layers").mkdir(parents=True)
    kit.archive(folder / "micro", folder / "parcel" / "layers" / "micro.tar.xz")
    return Made(folder / "parcel", whole, kernels)


@pytest.fixture
def gpu(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> HostDriver:
    """A GPU over which the step runs, with its checks in this process."""
    monkeypatch.setenv("FOLDKV_GPU_KIT", str(made.parcel))
    monkeypatch.setenv("FOLDKV_GPU_RTX", str(tmp_path / "unpacked"))
    monkeypatch.setenv("FOLDKV_GPU_WEIGHTS", str(tmp_path / "weights"))
    driver = HostDriver(kernels=made.kernels)
    driver.by_definition = STATELESS
    use(monkeypatch, driver)
    # What is the library's own: its package, and a process for every check, which would end with a crash of native code.
    monkeypatch.setattr(step_layers, "unpacked", dict)
    monkeypatch.setattr(step_layers, "open_library", lambda notes: (library(driver), None))
    monkeypatch.setattr(step_layers, "layers_run", in_this_process(tmp_path))
    monkeypatch.setattr(kit, "device_count", lambda: 1)
    # What needs torch's CUDA: the same files, drawn on the CPU; and of a layer's kernels one, which is quick in the interpreter.
    spec = spec_from_config(made.config)
    monkeypatch.setattr(device, "gpu", lambda: StandIn(80))
    monkeypatch.setattr(step_speed, "copy_bandwidth", lambda device: BANDWIDTH)
    monkeypatch.setattr(step_speed, "models", lambda root: iter([(Geometry.of_model("micro", spec), spec)]))
    monkeypatch.setattr(
        layer_kernels, "layer_calls", lambda *given: [one for one in layer_calls(*given) if one.operator in QUICK]
    )
    return driver


def in_this_process(tmp_path: Path) -> Any:
    """Runs a check as a child process does."""

    def run(name: str, limit: float) -> Any:
        folder = tmp_path / name.replace(":", "-")
        folder.mkdir()
        checks.perform(name, folder, step_layers.CHECKS)
        return checks.outcome(name, folder)

    return run


def measured(tmp_path: Path) -> dict[str, Any]:
    """The step's result."""
    done = CliRunner().invoke(step_layers.main, ["-o", str(tmp_path / "layers.json"), "--budget", "1000"])
    content: dict[str, Any] = json.loads((tmp_path / "layers.json").read_text())
    assert done.exit_code == (content["status"] != kit.PASSED), done.output
    assert content["status"] == (kit.FAILED if content["reasons"] else kit.PASSED)
    return content


def stored_bytes(folder: Path, part: str) -> dict[str, int]:
    """Bytes of every tensor of the file whose tensors have ``part`` in their names."""
    for header in (folder / "headers").iterdir():
        table = json.loads(header.read_bytes()[8:])
        if any(part in name for name in table):
            return {
                name: row["data_offsets"][1] - row["data_offsets"][0]
                for name, row in table.items()
                if name != "__metadata__"
            }
    raise AssertionError(part)


def test_rows_have_every_layers_time_beside_its_floor(made: Made, gpu: HostDriver, tmp_path: Path) -> None:
    content = measured(tmp_path)
    assert content["reasons"] == []
    rows = {row.get("step") or row["check"]: row for row in content["rows"]}
    assert list(rows) == [
        "plans:micro", "weights:micro", "decode", "chunk", "layers:micro", "kernels", "kernels:micro"
    ]  # fmt: skip
    assert rows["layers:micro"]["runs_through"] == ["Session", "EngineModel", "EnginePart"]
    assert rows["layers:micro"]["chain"] == ["embed", "layers.0", "layers.1", "layers.2", "head"]

    decode = rows["decode"]
    assert decode["captured"] and decode["same_bits"] and decode["finite"]
    assert gpu.calls.count("cuGraphLaunch") == SIZES.compared + SIZES.captured
    assert (decode["context"], decode["batch"], decode["held"]) == (64, 2, 48)
    segments = decode["segments"]
    assert {name: one["kind"] for name, one in segments.items() if one["kind"]} == KINDS
    assert {name: one["in_model"] for name, one in segments.items()} == {
        "step": 1, "embed": 1, "sliding-moe": 1, "csa-moe": 3, "hca-moe": 3, "head": 1
    }  # fmt: skip
    assert all(one["ms"] > 0 and one["enqueued_ms"] > 0 for one in segments.values())
    assert sum(one["ms"] for one in segments.values()) < 2 * decode["wall_ms"]
    # Weights: the file of a layer but for the experts that nobody chose. Two tokens choose two of four experts each.
    for layer, name in enumerate(KINDS):
        stored = stored_bytes(step_layers.material("micro"), f"layers.{layer}.")
        experts = sum(size for tensor, size in stored.items() if ".experts." in tensor and "shared" not in tensor)
        assert experts > 0
        assert segments[name]["floor_bytes"]["weights"] == pytest.approx(sum(stored.values()) - experts / 4, abs=2)
    # State: what the planner says of all layers. Dense rows are bfloat16, and carries float32.
    spec = spec_from_config(made.config)
    kept = {"entries": 2, "index_entries": 2, "window": 2}
    rows_read = 0
    for tensor in state_tensors(spec):
        csa = tensor.group == "entries" and spec.layer_types[tensor.layer] == KINDS["csa-moe"]
        count = tensor.capacity(min(48, 4 * spec.index_topk) if csa else 48)
        rows_read += count * tensor.width * kept.get(tensor.group, 4)
    assert sum(one["in_model"] * one["floor_bytes"]["state"] for one in segments.values()) == 2 * rows_read
    for key in ("ms", "floor_ms"):
        whole = sum(one["in_model"] * one[key] for one in segments.values())
        assert decode["extrapolated"][key] == pytest.approx(whole)
    assert segments["head"]["floor_ms"] == pytest.approx(
        sum(segments["head"]["floor_bytes"].values()) / BANDWIDTH * 1e3
    )
    assert decode["extrapolated"]["layers"] == rows["chunk"]["extrapolated"]["layers"] == 7
    assert rows["chunk"]["chunk"] == 16 and not rows["chunk"]["captured"]
    assert rows["chunk"]["segments"].keys() == segments.keys()
    kernels = rows["kernels"]["segments"]
    assert kernels.keys() == KINDS.keys()
    for name, one in kernels.items():
        assert one["calls"] == {"FoldkvHcPost": 2} and one["launches"] == 2
        assert one["floor_bytes"]["weights"] == segments[name]["floor_bytes"]["weights"] and one["ms"] > 0
    assert rows["kernels"]["extrapolated"]["layers"] == 7
    # Everything was given back, and the weights are gone from the disk.
    assert gpu.blocks == {} and set(gpu.opened.values()) == {0}
    assert not step_layers.weights_folder("micro").exists()


def test_a_model_that_a_gpu_cannot_hold_is_not_measured_there(made: Made, gpu: HostDriver, tmp_path: Path) -> None:
    gpu.limit = 400_000
    content = measured(tmp_path)
    assert content["reasons"] == []
    rows = {row["check"]: row for row in content["rows"] if "check" in row}
    for check in ("weights:micro", "layers:micro"):
        [row] = rows[check]["not_measured"]
        assert row["model"] == "micro" and row["why"].endswith("bytes; the GPU has 400000")
    assert not any("context" in row for row in content["rows"] if row.get("step") == "decode")


def test_a_row_says_where_it_broke_off(
    made: Made, gpu: HostDriver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*given: Any) -> None:
        raise RuntimeError("an illegal address")

    monkeypatch.setattr(layer_times.Session, "forward", stop)
    content = measured(tmp_path)
    [reason] = content["reasons"]
    assert reason == "layers:micro: while context 64, batch 2: prefilling: RuntimeError: an illegal address"
    [row] = [row for row in content["rows"] if row.get("check") == "layers:micro"]
    assert row["failure"] == reason and "traceback" in row
    assert gpu.blocks == {} and not step_layers.weights_folder("micro").exists()


def test_where_engines_do_not_load_no_weights_are_made(
    made: Made, gpu: HostDriver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trt = library(gpu)
    monkeypatch.setattr(trt.Runtime, "deserialize_cuda_engine", lambda self, plan: None)
    monkeypatch.setattr(step_layers, "open_library", lambda notes: (trt, None))
    content = measured(tmp_path)
    assert [row["check"] for row in content["rows"] if "check" in row] == ["plans:micro", "kernels:micro"]
    row = content["rows"][0]
    assert row["check"] == "plans:micro" and row["stage"] == "loading kernels and engines"
    assert "cannot be deserialised here" in row["failure"]
    assert not step_layers.weights_folder("micro").exists()


def test_what_was_measured_before_a_failure_is_kept(tmp_path: Path) -> None:
    recorder = kit.Recorder(tmp_path / "layers.json", "layers", "")

    def run(name: str, limit: float) -> tuple[dict[str, Any], str]:
        failed = name == "layers:a"
        rows = [{"step": "decode", "context": 8192}] if name.startswith("layers") else []
        return {"check": name, "rows": rows}, "layers:a: ended by SIGSEGV while timing" if failed else ""

    step_layers.measure(recorder, ["a", "b"], run, budget=1000)
    assert [row.get("check", row.get("step")) for row in recorder.content["rows"]] == [
        "plans:a", "weights:a", "decode", "layers:a", "kernels:a",
        "plans:b", "weights:b", "decode", "layers:b", "kernels:b",
    ]  # fmt: skip
    assert recorder.content["reasons"] == ["layers:a: ended by SIGSEGV while timing"]
    step_layers.measure(recorder, ["c"], run, budget=5)
    assert [row["left_out"] for row in recorder.content["rows"][-4:]] == ["no time was left"] * 4


def test_a_layers_kernels_are_those_of_its_engine(made: Made) -> None:
    bundle = made.parcel.parent / "micro" / "bundle"
    segments, spec = read(BundleManifest, bundle).engine.segments, spec_from_config(made.config)
    assert segments is not None
    for name, kind in KINDS.items():
        calls = layer_calls(StandIn(80), Geometry.of_model("micro", spec), spec, kind, "dense", 64, 1)
        assert Counter(call.operator for call in calls) == segments[name].plugins


def test_random_weights_are_finite_and_as_the_header_says(tmp_path: Path) -> None:
    shapes = {
        "a.w.weight": ("F8_E4M3", (256, 512), 1), "a.w.scale": ("F8_E8M0", (2, 4), 1),
        "a.experts.0.w1.weight": ("I8", (64, 256), 1), "a.experts.0.w1.scale": ("F8_E8M0", (64, 16), 1),
        "a.norm.weight": ("BF16", (512,), 2), "a.head.weight": ("BF16", (256, 1024), 2), "a.hc": ("F32", (24, 64), 4),
    }  # fmt: skip
    table: dict[str, Any] = {"__metadata__": {}}
    at = 0
    for name, (dtype, shape, item) in shapes.items():
        size = int(np.prod(shape)) * item
        table[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(table).encode()
    header = struct.pack("<Q", len(text)) + text
    path = tmp_path / "x.safetensors"
    assert random_weights.write_weights(path, header, device="cpu") == len(header) + at == path.stat().st_size
    assert random_weights.header_of(path) == header
    first = path.read_bytes()
    random_weights.write_weights(path, header, device="cpu")
    assert path.read_bytes() == first, "the same seed"
    random_weights.write_weights(path, header, device="cpu", seed=1)
    assert path.read_bytes() != first

    from safetensors.torch import load_file

    from foldkv.export.checkpoint.formats import FP4, FP4_GROUP, FP8, FP8_BLOCK, Format
    from foldkv.export.checkpoint.values import dequantised

    found = load_file(path)
    e4m3 = dequantised(found["a.w.weight"], found["a.w.scale"], Format(FP8, FP8_BLOCK))
    e2m1 = dequantised(found["a.experts.0.w1.weight"], found["a.experts.0.w1.scale"], Format(FP4, (1, FP4_GROUP)))
    assert found["a.w.weight"].view(torch.uint8).unique().numel() == 254, "all codes but those of NaN"
    for matrix in (e4m3, e2m1, found["a.head.weight"].float()):
        out = torch.randn(64, matrix.shape[1]) @ matrix.T
        assert matrix.isfinite().all() and 0.5 < float(out.std()) < 2.5
    assert float((found["a.norm.weight"].float() - 1).abs().max()) < 0.6
    table["a.hc"]["dtype"] = "F64"
    text = json.dumps(table).encode()
    with pytest.raises(InputError, match=r"a\.hc is F64; random weights can be made in F8_E4M3"):
        random_weights.write_weights(path, struct.pack("<Q", len(text)) + text, device="cpu")


def test_the_parcel_must_have_layers_made_with_these_kernels(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FOLDKV_GPU_RTX", str(tmp_path / "unpacked"))
    monkeypatch.setenv("FOLDKV_GPU_KIT", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="has no engines of layers; the parcel is not complete"):
        step_layers.unpack_models()
    monkeypatch.setenv("FOLDKV_GPU_KIT", str(made.parcel))
    assert step_layers.unpack_models() == ["micro"] and step_layers.read_case("micro")["model"] == "micro"
    monkeypatch.setattr(step_engine, "sources", lambda: "others")
    with pytest.raises(RuntimeError, match="made with other kernels than are here"):
        step_layers.unpack_models()


def test_models_are_cut_to_one_layer_of_each_kind_and_keep_their_widths() -> None:
    for name, kinds in (("v4-flash", [0, 4, 128]), ("v4-pro", [4, 128])):
        config = prepare_layers.released_config(name)
        short = prepare_layers.cut(config)
        assert short["compress_ratios"] == kinds
        whole, cut = spec_from_config(config), spec_from_config(short)
        assert cut.num_layers == len(kinds) and not any(cut.hash_layers)
        changed = {key for key in config if config[key] != short[key]}
        assert changed <= {"num_hidden_layers", "compress_ratios", "num_hash_layers", "num_nextn_predict_layers"}
        assert set(cut.layer_types) == set(whole.layer_types)
        sizes, every = layer_times.Sizes(), layer_times.unit(cut)
        assert every == 128 and sizes.prefilled % every == 0 and sizes.captured % every == 0
        assert [sizes.held(context, every) for context in sizes.contexts] == [1_047_808, 7424]
