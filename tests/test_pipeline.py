"""Pipelines: resumed by hash, and whole or absent after every kill."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from foldkv.artifact import read_manifest, verify_files
from foldkv.config import load_config
from foldkv.pipeline import run_pipeline

PIPELINE = """
version = 1
checkpoint = "checkpoint"
output = "out"
[build]
targets = ["cpu"]
[validate]
texts = 1
text_tokens = 64
distances = [64]
cases_per_distance = 10
"""
ARTIFACTS = {"graph": "foldkv.graph", "bundles/cpu": "foldkv.bundle", "report": "foldkv.report"}


@pytest.fixture
def pipeline(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    (tmp_path / "checkpoint").mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        shutil.copyfile(tiny_checkpoint / name, tmp_path / "checkpoint" / name)
    path = tmp_path / "pipeline.toml"
    path.write_text(PIPELINE)
    return path


def stages(pipeline: Path) -> dict[str, bool]:
    """Stage -> whether it was skipped."""
    result = run_pipeline(load_config(pipeline))
    assert result.exit_code == 0 and result.passed
    return {name: stage["skipped"] for name, stage in result.stages.items()}


def whole(out: Path, name: str) -> bool:
    """Whether the artifact is there; if a folder is there, it must be whole."""
    if not (out / name).exists():
        return False
    verify_files(out / name, read_manifest(out / name, kind=ARTIFACTS[name]))
    return True


def test_what_is_unchanged_is_skipped_and_what_is_changed_is_not(pipeline: Path) -> None:
    out = pipeline.parent / "out"
    assert stages(pipeline) == {"export": False, "build": False, "validate": False}
    assert stages(pipeline) == {"export": True, "build": True, "validate": True}
    # A setting of the last stage leaves the earlier ones alone.
    pipeline.write_text(PIPELINE.replace("cases_per_distance = 10", "cases_per_distance = 11"))
    assert stages(pipeline) == {"export": True, "build": True, "validate": False}
    # Another threshold judges the figures that are there.
    measured = json.loads((out / "report" / "report.json").read_text())
    pipeline.write_text(pipeline.read_text() + "gates = { kl-mean = 1e-3 }\n")
    assert stages(pipeline) == {"export": True, "build": True, "validate": False}
    judged = json.loads((out / "report" / "report.json").read_text())
    assert judged["provenance"]["date"] == measured["provenance"]["date"] and judged["metrics"] == measured["metrics"]
    assert judged["headline"] == "all gates hold, 1 is loosened"
    # Damage is repaired, from the stage on that it is in.
    model = out / "bundles" / "cpu" / "weights.bin"
    content = bytearray(model.read_bytes())
    content[100] ^= 1
    model.write_bytes(content)
    assert not stages(pipeline)["build"]
    # A changed checkpoint changes everything.
    config = pipeline.parent / "checkpoint" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"routed_scaling_factor": 1.25}))
    assert stages(pipeline) == {"export": False, "build": False, "validate": False}
    assert all(whole(out, name) for name in ARTIFACTS)


def test_a_kill_at_any_point_leaves_whole_artifacts_and_the_rerun_goes_on(pipeline: Path) -> None:
    """Each run is killed as soon as it says that it began a step; the next run resumes behind the last whole stage."""
    out = pipeline.parent / "out"
    done: set[str] = set()
    for step, finished in [
        ("export: reading", set()),
        ("export: tracing", set()),
        ("export: writing", set()),
        ("build: cpu: optimizing", {"graph"}),
        ("build: cpu: loading", {"graph"}),
        ("validate: loading", {"graph", "bundles/cpu"}),
        ("validate: text 1", {"graph", "bundles/cpu"}),
        ("validate: retrieval", {"graph", "bundles/cpu"}),
    ]:
        command = [sys.executable, "-m", "foldkv", "run", str(pipeline)]
        with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as child:
            assert child.stderr is not None
            lines = []
            for line in child.stderr:
                lines.append(line)
                if line.startswith(step):
                    os.kill(child.pid, signal.SIGKILL)
                    break
            else:
                pytest.fail(f"never came to {step!r}: {''.join(lines)}")
        # A kill may come after the step it was meant for: what was whole stays whole, and nothing is half there.
        found = {name for name in ARTIFACTS if whole(out, name)}
        assert finished | done <= found
        done = found
    assert stages(pipeline)["export"]
    assert all(whole(out, name) for name in ARTIFACTS)
    left = [path for path in out.rglob("*") if ".foldkv-" in path.name]
    assert not left


def test_a_kill_during_an_engine_build_takes_the_child_along_and_leaves_nothing_half_written(pipeline: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="engines need TensorRT-RTX")
    pipeline.write_text(PIPELINE.replace('["cpu"]', '["rtx4090", "cpu"]'))
    out = pipeline.parent / "out"
    command = [sys.executable, "-m", "foldkv", "run", str(pipeline)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as child:
        assert child.stderr is not None
        for line in child.stderr:
            if line.startswith("build: rtx4090: building"):
                (worker,) = (int(pid) for pid in Path(f"/proc/{child.pid}/task").glob("*/children") for pid in
                             pid.read_text().split())  # fmt: skip
                os.kill(child.pid, signal.SIGKILL)
                break
        else:
            pytest.fail("the engine build never began")
    assert not (out / "bundles" / "rtx4090").exists()
    deadline = time.monotonic() + 10
    while Path(f"/proc/{worker}").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not Path(f"/proc/{worker}").exists(), "the child went on building for nobody"
    result = run_pipeline(load_config(pipeline))
    assert result.exit_code == 0 and result.stages["export"]["skipped"]
    verify_files(out / "bundles" / "rtx4090", read_manifest(out / "bundles" / "rtx4090", kind="foldkv.bundle"))
    assert not [path for path in out.rglob("*") if ".foldkv-" in path.name]


def test_a_target_that_fails_does_not_stop_the_others(pipeline: Path) -> None:
    pipeline.write_text(PIPELINE.replace('["cpu"]', '["h100", "cpu"]'))
    result = run_pipeline(load_config(pipeline))
    status = {bundle.target: bundle.status for bundle in result.bundles}
    assert status == {"h100": "failed", "cpu": "built"}
    assert result.exit_code == 3 and result.passed
    assert whole(pipeline.parent / "out", "report")
