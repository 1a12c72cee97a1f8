"""Pipelines: resumed by hash, and whole or absent after every kill."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from processes import descendants, running

from foldkv.artifact import read_manifest, verify_files
from foldkv.cli import main
from foldkv.config import load_config
from foldkv.errors import (
    EXIT_ENVIRONMENT,
    EXIT_GATE_FAILED,
    ArtifactError,
    FoldkvError,
    InputError,
    MissingDependencyError,
)
from foldkv.export.locate import files_identity
from foldkv.optimize.history import record_builds, record_export
from foldkv.optimize.outcome import TargetResult
from foldkv.pipeline import STAGES, preview, run_pipeline
from foldkv.run_text import result_lines

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
cases_per_kind = 0
sweep_cases = 0
"""
ARTIFACTS = {"graph": "foldkv.graph", "bundles/cpu": "foldkv.bundle", "report": "foldkv.report"}


def pipeline_of(checkpoint: Path, folder: Path) -> Path:
    """A pipeline file of a copy of a checkpoint."""
    (folder / "checkpoint").mkdir()
    for file in (*checkpoint.glob("*.json"), *checkpoint.glob("*.safetensors")):
        shutil.copyfile(file, folder / "checkpoint" / file.name)
    (folder / "pipeline.toml").write_text(PIPELINE)
    return folder / "pipeline.toml"


@pytest.fixture
def pipeline(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    return pipeline_of(tiny_checkpoint, tmp_path)


@pytest.fixture
def quick_pipeline(quick_checkpoint: Path, tmp_path: Path) -> Path:
    """Of a model with random weights, for what a run leaves behind; its gates fail."""
    return pipeline_of(quick_checkpoint, tmp_path)


def place(graph: Path, pipeline: Path) -> None:
    """Put the package of the pipeline's checkpoint where the run would make it, as if it had been exported there."""
    checkpoint, target = pipeline.parent / "checkpoint", pipeline.parent / "out" / "graph"
    shutil.copytree(graph, target)
    manifest = json.loads((target / "manifest.json").read_text())
    files = files_identity({"model.safetensors": checkpoint / "model.safetensors"})
    manifest["inputs"]["checkpoint"] |= {"path": str(checkpoint), "files": files}
    (target / "manifest.json").write_text(json.dumps(manifest))


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


def test_what_is_unchanged_is_skipped_and_what_is_changed_is_not(pipeline: Path, tiny_graph: Path) -> None:
    out = pipeline.parent / "out"
    place(tiny_graph, pipeline)
    assert stages(pipeline) == {"export": True, "build": False, "validate": False}
    assert stages(pipeline) == {"export": True, "build": True, "validate": True}
    # A setting of the last stage leaves the earlier ones alone.
    pipeline.write_text(PIPELINE.replace("text_tokens = 64", "text_tokens = 65"))
    assert stages(pipeline) == {"export": True, "build": True, "validate": False}
    # Another threshold judges the figures that are there.
    measured = json.loads((out / "report" / "report.json").read_text())
    pipeline.write_text(pipeline.read_text() + "gates = { kl-mean = 1e-3 }\n")
    assert stages(pipeline) == {"export": True, "build": True, "validate": False}
    judged = json.loads((out / "report" / "report.json").read_text())
    assert judged["provenance"]["date"] == measured["provenance"]["date"] and judged["metrics"] == measured["metrics"]
    assert judged["headline"] == "all gates hold, 1 is loosened"
    # Damage is repaired, from the stage on that it is in.
    model = out / "bundles" / "cpu" / "placed.bin"
    content = bytearray(model.read_bytes())
    content[100] ^= 1
    model.write_bytes(content)
    assert not stages(pipeline)["build"]
    # A changed checkpoint changes everything; this key changes no graph, so nothing is traced again.
    config = pipeline.parent / "checkpoint" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"bos_token_id": 1}))
    assert stages(pipeline) == {"export": False, "build": False, "validate": False}
    assert all(whole(out, name) for name in ARTIFACTS)


@pytest.mark.slow
def test_a_kill_at_any_point_leaves_whole_artifacts_and_the_rerun_goes_on(quick_pipeline: Path) -> None:
    """Each run is killed as soon as it says that it began a step; the next run resumes behind the last whole stage."""
    pipeline, out = quick_pipeline, quick_pipeline.parent / "out"
    done: set[str] = set()
    for step, finished in [
        ("export: tracing", set()),
        ("build: cpu: optimizing", {"graph"}),
        ("validate: text 1", {"graph", "bundles/cpu"}),
        ("validate: retrieval", {"graph", "bundles/cpu"}),
    ]:
        command = [sys.executable, "-m", "foldkv", "run", str(pipeline)]
        with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as child:
            assert child.stderr is not None
            lines = []
            for line in child.stderr:
                lines.append(line)
                if f"] {step}" in line:
                    os.kill(child.pid, signal.SIGKILL)
                    break
            else:
                pytest.fail(f"never came to {step!r}: {''.join(lines)}")
        # A kill may come after the step it was meant for: what was whole stays whole, and nothing is half there.
        found = {name for name in ARTIFACTS if whole(out, name)}
        assert finished | done <= found
        done = found
    result = run_pipeline(load_config(pipeline))
    assert result.stages["export"]["skipped"] and result.exit_code == EXIT_GATE_FAILED
    assert all(whole(out, name) for name in ARTIFACTS)
    left = [path for path in out.rglob("*") if ".foldkv-" in path.name]
    assert not left


@pytest.mark.slow
def test_a_kill_during_an_engine_build_takes_the_child_along_and_leaves_nothing_half_written(
    quick_pipeline: Path,
) -> None:
    pytest.importorskip("tensorrt_rtx", reason="engines need TensorRT-RTX")
    pipeline = quick_pipeline
    text = PIPELINE.replace('["cpu"]', '["rtx4090", "cpu"]\nplugins = "off"\ncache = "plans"')
    pipeline.write_text(f"{text}enabled = false\n")
    out = pipeline.parent / "out"
    command = [sys.executable, "-m", "foldkv", "run", str(pipeline)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as child:
        assert child.stderr is not None
        for line in child.stderr:
            if "] build: rtx4090: " in line and ": building" in line:
                while not (workers := descendants(child.pid)):  # between the builds of two segments there is none
                    assert child.poll() is None
                os.kill(child.pid, signal.SIGKILL)
                break
        else:
            pytest.fail("the engine build never began")
    assert not (out / "bundles" / "rtx4090").exists()
    deadline = time.monotonic() + 10
    while any(map(running, workers)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(map(running, workers)), "children went on building for nobody"
    result = run_pipeline(load_config(pipeline))
    assert result.exit_code == 0 and result.stages["export"]["skipped"]
    verify_files(out / "bundles" / "rtx4090", read_manifest(out / "bundles" / "rtx4090", kind="foldkv.bundle"))
    assert not [path for path in out.rglob("*") if ".foldkv-" in path.name]


def refused(pipeline: Path, text: str, error: type[FoldkvError], finding: str) -> None:
    """The run and its preview are refused alike, before anything is written."""
    pipeline.write_text(text)
    for go in (run_pipeline, preview):
        with pytest.raises(error, match=finding) as caught:
            go(load_config(pipeline))
        assert caught.value.exit_code == (3 if error is MissingDependencyError else 2)
    assert not (pipeline.parent / "out").exists()


def test_a_backend_for_the_gpus_of_a_pipeline(pipeline: Path) -> None:
    pipeline.write_text(PIPELINE.replace('["cpu"]', '["cpu", "h100"]\nbackend = "onnxruntime-cuda"'))
    steps = [step for step in preview(load_config(pipeline)) if step.stage == "build"]
    assert [step.target for step in steps] == ["cpu", "h100"] and all(step.reason for step in steps)
    pipeline.write_text(pipeline.read_text().replace("[validate]", '[validate]\ntargets = ["h100", "cpu"]'))
    steps = [(step.target, step.folder.name) for step in preview(load_config(pipeline)) if step.stage == "validate"]
    assert steps == [("h100", "h100"), ("cpu", "cpu")]


def test_targets_that_cannot_be_built_here_are_all_named_before_export(pipeline: Path) -> None:
    refused(pipeline, PIPELINE.replace('["cpu"]', '["h100", "cpu"]'), MissingDependencyError, "h100.*TensorRT 11")
    three = PIPELINE.replace('["cpu"]', '["h100", "cpu", "b300"]')
    refused(pipeline, three, MissingDependencyError, r"(?s)2 found.*h100: .*b300: ")


@pytest.mark.parametrize(
    ("old", "new", "finding"),
    [
        ('["cpu"]', '["a1000"]', "unknown target 'a1000'"),
        ('["cpu"]', '["cpu"]\nbackend = "cuda"', "build.backend: backend 'cuda' is not known"),
        ('["cpu"]', '["cpu"]\nbackend = "onnxruntime-cuda"', "cpu is built by onnxruntime"),
        ('["cpu"]', '["rtx4090"]', "validate.targets has 'cpu', which build.targets does not list"),
        ("[validate]", '[validate]\ntargets = ["h100"]', "'h100', which build.targets does not list"),
        ("[validate]", '[validate]\ntargets = ["cpu", "cpu"]', "validate.targets has 'cpu' twice"),
        ("[validate]", "[validate]\ndevices = [0, 1]", "validate.devices are for engines"),
        ("[validate]", "[validate]\ndevices = [-1]", r"validate.devices.0 is -1"),
        ("[validate]", '[validate]\ntarget = "cpu"', r"unknown key 'validate.target' \(did you mean 'targets'"),
        ("[validate]", "[validate]\ncontexts = [\"2M\"]", "2097152 tokens was asked for; the model of .* takes at most 1048576"),
        ("[validate]", "[validate]\ncontexts = [64]", "64"),
        ("[validate]", "[validate]\ngates = { kl-maen = 1 }", r"unknown gate 'kl-maen' \(did you mean 'kl-mean'"),
        ("[validate]", "[validate]\ngates = { long-context = 0 }", "none of those is measured"),
        ("[validate]", '[validate]\ntext = "none.txt"', "none.txt cannot be read"),
        ("[build]", '[build]\nlayout = "fp8"', "cpu: layout fp8 is not supported"),
        ("[build]", '[build]\nshapes = { batch = [1, 1, 1000000] }', "batch is 1,000,000; expected 1 to 65,535"),
        ('output = "out"', 'output = "pipeline.toml/out"', "pipeline.toml/out/.*Not a directory"),
        ('output = "out"', 'output = "/proc/out"', "/proc/out/.*No such file"),
    ],
)  # fmt: skip
def test_what_cannot_succeed_is_refused_before_the_first_stage(
    pipeline: Path, old: str, new: str, finding: str
) -> None:
    refused(pipeline, PIPELINE.replace(old, new, 1), InputError, finding)


@pytest.mark.slow
def test_every_target_gets_a_report_and_one_whose_gpu_is_not_here_says_so(
    pipeline: Path, tiny_graph: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("foldkv.runtime.bundle.device_capability", lambda: None)
    place(tiny_graph, pipeline)
    text = PIPELINE.replace('["cpu"]', '["h100", "cpu"]\nbackend = "onnxruntime-cuda"')
    pipeline.write_text(text.replace("[validate]", '[validate]\ntargets = ["h100", "cpu"]'))
    result = run_pipeline(load_config(pipeline))
    assert result.exit_code == EXIT_ENVIRONMENT and result.passed is False and result.not_validated == ["h100"]
    there, here = result.reports["h100"], result.reports["cpu"]
    assert there.content["headline"].startswith("not executed here: ") and here.content["headline"] == "all gates hold"
    assert here.folder == pipeline.parent / "out" / "reports" / "cpu" and (there.folder / "junit.xml").is_file()
    lines = "\n".join(result_lines(result))
    assert "NOT PASSED: not executed here" in lines and "PASSED: all gates hold" in lines
    # What was measured is not measured again; what was not executed is tried again.
    reasons = {step.target: step.reason for step in preview(load_config(pipeline)) if step.stage == "validate"}
    assert reasons["cpu"] == "" and reasons["h100"].startswith(
        "its bundle could not be executed then; it will say that it was not executed here (exit code 3): this machine lacks "
    )
    assert run_pipeline(load_config(pipeline)).exit_code == EXIT_ENVIRONMENT


def test_what_later_stages_need_is_looked_for_first(pipeline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "transformers" else find(name))
    refused(pipeline, PIPELINE, MissingDependencyError, r"transformers.*pip install 'foldkv\[export\]'")
    monkeypatch.undo()
    (pipeline.parent / "checkpoint" / "tokenizer.json").unlink()
    refused(pipeline, PIPELINE, InputError, "has no tokenizer.json, which validate needs")


def test_a_folder_of_someone_else_is_refused_before_the_first_stage(pipeline: Path) -> None:
    mine = pipeline.parent / "out" / "report" / "thesis.txt"
    mine.parent.mkdir(parents=True)
    mine.write_text("years of work")
    with pytest.raises(InputError, match=r"report is not empty and is not a foldkv\.report"):
        run_pipeline(load_config(pipeline))
    assert [path for path in (pipeline.parent / "out").rglob("*") if path.is_file()] == [mine]


def test_token_counts_are_read_as_the_command_line_reads_them(pipeline: Path) -> None:
    pipeline.write_text(
        PIPELINE.replace("[64]", '["1k", 64]')
        + 'contexts = ["64k", 4096]\n[build.shapes]\ncontext = [256, "4k", "1M"]\nchunk = [1, 1, "256"]\n'
    )
    config = load_config(pipeline)
    assert config.validation.contexts == [1 << 16, 4096] and config.validation.distances == [1024, 64]
    assert config.build.shapes.context == [256, 4096, 1 << 20] and config.build.shapes.chunk == [1, 1, 256]
    for bad in ('"64kb"', '"k"', "0", "-4", "1.5", "true", '""', '"\u0664"'):
        pipeline.write_text(PIPELINE + f"contexts = [{bad}]\n")
        with pytest.raises(InputError, match=r"validate\.contexts\.0: .* is not a number of tokens; expected"):
            load_config(pipeline)


# What a run would do, and why. One set of artifacts serves all questions: a preview writes nothing.


@pytest.fixture(scope="module")
def finished(tiny_checkpoint: Path, tiny_graph: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    path = pipeline_of(tiny_checkpoint, folder)
    place(tiny_graph, path)
    assert run_pipeline(load_config(path)).passed
    return folder


def reasons(folder: Path, text: str = PIPELINE, **options: Any) -> dict[str, str]:
    """Stage -> why it would run; a preview leaves every file as it is, and adds none."""

    def files() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in (folder / "out").rglob("*") if path.is_file()}

    (folder / "pipeline.toml").write_text(text)
    before = files()
    steps = preview(load_config(folder / "pipeline.toml"), **options)
    assert files() == before
    return {step.stage: step.reason for step in steps}


MADE_ANEW = {"build": "the graph package is rebuilt", "validate": "the bundle is rebuilt"}


def test_a_first_run_is_previewed_with_estimates(pipeline: Path, tiny_graph: Path, tiny_bundle: Path) -> None:
    record_export(tiny_graph, 3.0)
    record_builds(tiny_graph, [TargetResult("cpu", "built", tiny_bundle, 5.0)])
    steps = preview(load_config(pipeline))
    assert [(step.stage, step.target, bool(step.reason)) for step in steps] == [
        ("export", "", True), ("build", "cpu", True), ("validate", "cpu", True)
    ]  # fmt: skip
    assert "does not exist" in steps[0].reason and not (pipeline.parent / "out").exists()
    for step, folder in zip(steps, (tiny_graph, tiny_bundle), strict=False):
        files = read_manifest(folder, kind=f"foldkv.{'graph' if step.stage == 'export' else 'bundle'}")["files"]
        assert step.bytes == pytest.approx(sum(facts["bytes"] for facts in files.values()), rel=0.1)
        assert step.seconds and step.seconds.low > 0 and step.to_dict()["seconds"]["estimate"]


def test_nothing_would_be_done_twice_unless_forced(finished: Path) -> None:
    assert reasons(finished) == {"export": "", "build": "", "validate": ""}
    assert reasons(finished, force=True) == {"export": "--force"} | MADE_ANEW
    assert reasons(finished, force=True, only="validate") == {"validate": "--force"}


def test_a_changed_setting_of_export_is_the_reason(finished: Path) -> None:
    found = reasons(finished, PIPELINE + '[export]\nprofile = "served"\n')
    assert found == MADE_ANEW | {"export": "export.profile was hf, is served"}


def test_changed_settings_of_build_and_validate_are_the_reasons(finished: Path) -> None:
    shapes = PIPELINE + "[build.shapes]\nbatch = [1, 2, 8]\n"
    found = reasons(finished, shapes)
    assert found["export"] == "" and found["build"] == "shapes.batch was [1, 1, 64], is [1, 2, 8]"
    found = reasons(finished, PIPELINE + "gates = { kl-mean = 1e-5 }\nseed = 3\n")
    assert found["build"] == "" and "validate.seed was 0, is 3" in found["validate"]
    assert "validate.gates.kl-mean was the default, is 1e-05" in found["validate"]
    assert reasons(finished, PIPELINE + "threads = 3\n")["validate"] == "validate.threads changed"


def test_a_changed_checkpoint_is_the_reason(finished: Path) -> None:
    folder = finished / "checkpoint"
    cases: list[tuple[str, Any, str]] = [
        ("config.json", lambda b: json.dumps(json.loads(b) | {"routed_scaling_factor": 1.25}).encode(), "config.json: routed_scaling_factor"),
        ("model.safetensors", lambda b: b[:-1] + bytes([b[-1] ^ 1]), "were written again or replaced"),
        ("tokenizer.json", lambda b: b + b" ", "the tokenizer, the chat encoding or the generation_config.json"),
        ("generation_config.json", lambda _: b'{"eos_token_id": [7]}', "generation_config.json"),
    ]  # fmt: skip
    for name, change, reason in cases:
        before = (folder / name).read_bytes() if (folder / name).exists() else None
        stamps = (folder / name).stat() if before is not None else None
        (folder / name).write_bytes(change(before or b""))
        found = reasons(finished)
        assert reason in found["export"], name
        assert found | {"export": ""} == MADE_ANEW | {"export": ""}
        if before is None:
            (folder / name).unlink()
        else:
            (folder / name).write_bytes(before)
            assert stamps is not None
            os.utime(folder / name, ns=(stamps.st_atime_ns, stamps.st_mtime_ns))
    assert set(reasons(finished).values()) == {""}


def test_another_foldkv_or_tool_is_the_reason(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("foldkv.manifests.__version__", "9.9")
    found = reasons(finished)
    assert found["export"] == "it was made by foldkv 0.1.0; this is 9.9"
    monkeypatch.undo()
    monkeypatch.setattr("foldkv.export.package.tool_versions", lambda: {"torch": "9.9"})
    assert reasons(finished)["export"].endswith(", is 9.9") and "torch was" in reasons(finished)["export"]
    monkeypatch.undo()
    monkeypatch.setattr("foldkv.optimize.choices.version_of", lambda _: "9.9")
    found = reasons(finished)
    assert found["export"] == "" and "backend_version was" in found["build"]
    monkeypatch.undo()
    monkeypatch.setattr("foldkv.validation.baseline.MEASURES", 99)
    assert reasons(finished) == {"export": "", "build": "", "validate": "this foldkv measures otherwise"}


def test_a_damaged_artifact_is_the_reason_and_the_stage_before_it_is_left(finished: Path) -> None:
    out = finished / "out"
    for name, stage in (("graph", "export"), ("bundles/cpu", "build"), ("report", "validate")):
        file = next(path for path in sorted((out / name).iterdir()) if path.name != "manifest.json")
        content = file.read_bytes()
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        found = reasons(finished)
        file.write_bytes(content)
        assert found[stage].startswith("damaged: ") and file.name in found[stage]
        order = list(found)
        assert not any(found[earlier] for earlier in order[: order.index(stage)])
        assert all(found.values()) == (stage == "export")


def test_only_a_stage_runs_and_what_it_reads_must_be_current(finished: Path) -> None:
    assert reasons(finished, only="build") == {"build": ""}
    served = PIPELINE + '[export]\nprofile = "served"\n'
    for only in ("build", "validate"):
        for go in (run_pipeline, preview):
            (finished / "pipeline.toml").write_text(served)
            with pytest.raises(ArtifactError, match=r"graph, which is not current: export\.profile was hf, is served"):
                go(load_config(finished / "pipeline.toml"), only=only)
    (finished / "pipeline.toml").write_text(PIPELINE + "[build.shapes]\nbatch = [1, 2, 8]\n")
    with pytest.raises(ArtifactError, match=r"cpu, which is not current: shapes\.batch .* --only build first"):
        run_pipeline(load_config(finished / "pipeline.toml"), only="validate")
    (finished / "pipeline.toml").write_text(PIPELINE)
    for only in STAGES:
        result = run_pipeline(load_config(finished / "pipeline.toml"), only=only)
        assert result.stages[only]["skipped"] and list(result.stages) == [only] and result.exit_code == 0
    with pytest.raises(InputError, match=r"validate\.enabled is false"):
        (finished / "pipeline.toml").write_text(PIPELINE + "enabled = false\n")
        run_pipeline(load_config(finished / "pipeline.toml"), only="validate")


def test_only_a_stage_of_nothing_says_what_is_missing(pipeline: Path) -> None:
    with pytest.raises(ArtifactError, match=r"graph does not exist.*Run without --only, or --only export first"):
        run_pipeline(load_config(pipeline), only="build")


def test_the_command_shows_what_would_be_done(finished: Path) -> None:
    path = finished / "pipeline.toml"
    path.write_text(PIPELINE + "[build.shapes]\nbatch = [1, 2, 8]\n")
    result = CliRunner().invoke(main, ["run", str(path), "--dry-run"])
    assert result.exit_code == 0, result.output
    rows = {line.split("  ")[0]: line for line in result.output.splitlines()}
    assert "unchanged" in rows["export"] and "shapes.batch was [1, 1, 64], is [1, 2, 8]" in rows["build cpu"]
    assert "the bundle is rebuilt" in rows["validate cpu"] and "free there: " in result.output
    facts = json.loads(CliRunner().invoke(main, ["run", str(path), "--dry-run", "--json"]).stdout)
    assert [step["runs"] for step in facts["steps"]] == [False, True, True]
    assert facts["bytes"] == facts["steps"][1]["bytes"] < facts["free_bytes"]


def test_force_runs_a_stage_that_is_unchanged(finished: Path) -> None:
    (finished / "pipeline.toml").write_text(PIPELINE)
    before = (finished / "out" / "bundles" / "cpu" / "manifest.json").stat().st_mtime_ns
    result = run_pipeline(load_config(finished / "pipeline.toml"), only="build", force=True)
    assert not result.stages["build"]["skipped"]
    assert (finished / "out" / "bundles" / "cpu" / "manifest.json").stat().st_mtime_ns > before
