"""What a report says beside its figures: how to make it again, what it leaves open, what changed, and what is refused."""

from __future__ import annotations

import html
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

import click
import jsonschema
import pytest
from click.testing import CliRunner

from foldkv.artifact import MANIFEST, read_manifest, verify_files
from foldkv.cli import main
from foldkv.errors import EXIT_BAD_INPUT, EXIT_ENVIRONMENT, EXIT_GATE_FAILED, EXIT_OK, ArtifactError, InputError
from foldkv.export.checkpoint.reader import Checkpoint
from foldkv.manifests import BundleManifest, read
from foldkv.optimize.build import build_bundles
from foldkv.optimize.targets import resolve_targets
from foldkv.validation.baseline import KIND, compare, read_report
from foldkv.validation.behaviour import BehaviourFigure
from foldkv.validation.binding import not_validated
from foldkv.validation.deployments import DeploymentFigure
from foldkv.validation.divergence import LayerFigure
from foldkv.validation.gates import judge, resolve_gates
from foldkv.validation.kl_table import METRICS, TABLE
from foldkv.validation.pages import format_beside, format_with_error
from foldkv.validation.report import report_html, report_junit, report_markdown
from foldkv.validation.result import ValidationResult, measurements_from_json, to_json
from foldkv.validation.room import Opened
from foldkv.validation.settings import Plan
from foldkv.validation.validate import _matrices, validate

PLAN = Plan(texts=1, text_tokens=128, distances=(16, 32), cases_per_distance=5, cases_per_kind=0, sweep_cases=0)
SCHEMA = json.loads(resources.files("foldkv.validation").joinpath("schema/report.schema.json").read_text())
TEXT = "It\u2019s a \u00abtext\u00bb \u2013 of 'some' <b>kinds</b> & \"quotes\".\n" * 6


@pytest.fixture(scope="module")
def world(tiny_bundle: Path, tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with blanks in its name that holds a bundle, its sibling, a checkpoint, a text and a report made of them."""
    folder = tmp_path_factory.mktemp("world") / "with blanks & 'quotes'"
    shutil.copytree(tiny_bundle, folder / "bundles" / "cpu")
    shutil.copytree(tiny_bundle, folder / "bundles" / "rtx9090")
    manifest = json.loads((folder / "bundles" / "rtx9090" / MANIFEST).read_text())
    manifest["target"]["name"] = "rtx9090"
    (folder / "bundles" / "rtx9090" / MANIFEST).write_text(json.dumps(manifest))
    (folder / "bundles" / "notes").mkdir()
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    (folder / "checkpoint").symlink_to(tiny_checkpoint)
    made(folder, gates={"kl-mean": 1e-3, "kl-tail": 1.5e-5})
    return folder


def made(world: Path, name: str = "report", **options: Any) -> ValidationResult:
    settings = {"plan": PLAN, "text": world / "text.txt"} | options
    return validate(world / "bundles" / "cpu", world / "checkpoint", world / name, **settings)


def content(world: Path, name: str = "report") -> dict[str, Any]:
    found: dict[str, Any] = json.loads((world / name / "report.json").read_text(encoding="utf-8"))
    return found


def stored(world: Path, **gates: float) -> ValidationResult:
    """The report there, judged by other thresholds."""
    found = measurements_from_json(content(world))
    return ValidationResult(**vars(found), verdicts=judge(resolve_gates(gates), found.metrics))


def test_the_line_that_reproduces_a_report_does(world: Path) -> None:
    before = content(world)
    line = before["provenance"]["command"]
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(["sh", "-c", line], env=environment, cwd=world, capture_output=True, text=True, check=False)  # fmt: skip
    assert done.returncode == EXIT_OK, done.stderr
    after = content(world)
    assert after["provenance"].pop("date") >= before["provenance"].pop("date")
    assert after == before, "figures, verdicts, thresholds, the text, the line itself"
    assert "all gates hold, 1 is loosened" in done.stdout and "loosened, default 1e-06" in done.stdout
    assert "not validated: rtx9090" in done.stdout


def test_every_setting_of_a_plan_is_an_option_of_the_command() -> None:
    plan = Plan(3, 2, 99, (4, 8), 7, (1024, 2048), 5, 300, 2)
    names = {option.lstrip("-").replace("-", "_") for option in plan.options() if option.startswith("--")}
    names = {{"distance": "distances", "context": "contexts"}.get(name, name) for name in names}
    assert names == set(vars(plan))
    command = main.commands["validate"]
    parent = click.Context(main, **main.context_settings)
    context = command.make_context("validate", ["b", "--reference", "r", "--report", "o", *plan.options()], parent)
    assert {name: context.params[name] for name in vars(plan)} == vars(plan)
    defaults = command.make_context("validate", ["b", "--reference", "r", "--report", "o"], parent).params
    assert {name: defaults[name] for name in vars(plan)} == vars(Plan())


def test_a_report_is_read_back_as_it_was_written(world: Path) -> None:
    jsonschema.validate(content(world), SCHEMA)
    manifest = read_manifest(world / "report", kind=KIND)
    verify_files(world / "report", manifest)
    assert {"passed", "measured", "judged", "foldkv_version"} <= set(manifest)
    result = stored(world, **{"kl-mean": 1e-3, "kl-tail": 1.5e-5})
    result.not_validated = content(world)["not_validated"]
    assert to_json(result) == content(world) == read_report(world / "report")
    # What JSON has no words for, and texts that look like it.
    result.metrics["kl_mean"], result.metrics["delta_p_rms"] = math.inf, math.nan
    result.layers = [LayerFigure(0, "sliding_attention", math.inf, math.inf, 1.0)]
    result.worst[0] |= {"kl": math.inf, "context": "inf", "reference_top": [["nan", -math.inf], ["inf", 1.5]]}
    result.by_position[0]["kl_mean"] = math.inf
    lost = BehaviourFigure("sweep", "length mod 4 = 3", 9, 258, 0.01, 8, 0, 8, 0, 2.0**-8, math.inf, math.inf, None)
    result.deployments = [
        DeploymentFigure("rows", None, math.inf, math.nan, 1.0, math.inf, 0.75, 1.5),
        DeploymentFigure("w8a8", "no weight of this checkpoint is stored in fp8 or fp4"),
    ]
    result.behaviour = [replace(lost, group=""), lost, replace(lost, kind="code", group="", reference=0, lost=0, p=1.0)]
    written = json.loads(json.dumps(to_json(result), allow_nan=False))
    jsonschema.validate(written, SCHEMA)
    assert [row["word"] for row in written["behaviour"]] == ["worse", "worse", "no statement"]
    for page in (report_html(result), report_markdown(result)):
        assert "length mod 4 = 3" in page and "9" in page and "signature of a named function" in page
        assert "the reference answers 0 of 9, no more than guessing could" in page
        assert "75.00 %" in page and "not measured: no weight of this checkpoint is stored in fp8 or fp4" in page
    again = measurements_from_json(written)
    assert math.isnan(again.deployments[0].kl_mean_error or 0) and written["not_reproduced"] == []
    again.deployments[0] = result.deployments[0] = replace(result.deployments[0], kl_mean_error=1.0)
    assert math.isnan(again.metrics.pop("delta_p_rms")) and math.isnan(result.metrics.pop("delta_p_rms"))
    assert vars(again) == {name: vars(result)[name] for name in vars(again)}


def test_marked_in_every_form_loosened_gates_and_targets_that_nobody_validated(world: Path) -> None:
    gates = {gate["name"]: gate for gate in content(world)["gates"]}
    assert (gates["kl-mean"]["changed"], gates["kl-mean"]["default"], gates["kl-mean"]["threshold"]) == (
        "loosened", 1e-6, 1e-3
    )  # fmt: skip
    assert gates["kl-tail"]["changed"] == "tightened" and gates["top1"]["changed"] is None
    assert content(world)["not_validated"] == [{"target": "rtx9090", "folder": "rtx9090", "why": "another copy"}]
    page = (world / "report" / "report.html").read_text(encoding="utf-8")
    assert "kl-mean is loosened</b> to 0.001; the default is 1.0e-06" in page and "not validated: rtx9090" in page
    brief = (world / "report" / "report.md").read_text(encoding="utf-8")
    assert (
        "| `kl-mean` | holds |" in brief
        and "(loosened, default 1.0e-06)" in brief
        and "not validated: rtx9090" in brief
    )
    junit = (world / "report" / "junit.xml").read_text(encoding="utf-8")
    assert "loosened: &lt;= 0.001, by default &lt;= 1e-06" in junit and "not validated: rtx9090" in junit


def test_a_report_speaks_for_its_engines_and_its_weights_only(
    world: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    bundle, about = world / "bundles" / "cpu", content(world)["provenance"]
    assert len({about[f"{name}_sha256"] for name in ("bundle_manifest", "engine_set", "weights_lock", "weights")}) == 4
    question = ["verify", str(bundle), "--report", str(world / "report")]
    verified = CliRunner().invoke(main, question)
    assert verified.exit_code == EXIT_OK and "is about this bundle and these weights: all gates hold" in verified.output
    # The same tensors with other values have the same lock.
    fine_tune = tmp_path / "weights"
    shutil.copytree(tiny_checkpoint, fine_tune, copy_function=shutil.copyfile)
    weights = bytearray((fine_tune / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (fine_tune / "model.safetensors").write_bytes(weights)
    refused = CliRunner().invoke(main, [*question, "--weights-from", str(fine_tune)])
    assert refused.exit_code == EXIT_BAD_INPUT and "it is about other weights. This bundle" in " ".join(
        refused.output.split()
    )
    # A bundle beside it with the same graphs and another lock, and one with other graphs.
    for name, file in (("tuned", "weights.lock.json"), ("other", "segments/csa-moe.onnx")):
        copied = tmp_path / "bundles" / name
        shutil.copytree(bundle, copied)
        manifest = json.loads((copied / MANIFEST).read_text())
        assert file in manifest["files"]
        manifest["files"][file]["sha256"] = "0" * 64
        (copied / MANIFEST).write_text(json.dumps(manifest))
    shutil.copytree(bundle, tmp_path / "bundles" / "cpu")
    found = not_validated(tmp_path / "bundles" / "cpu", read(BundleManifest, bundle))
    assert {row["folder"]: row["why"] for row in found} == {"tuned": "other weights", "other": "other graphs"}


def test_the_report_names_its_text_and_shows_characters_as_they_are(world: Path) -> None:
    found = content(world)["provenance"]
    assert found["text"] == "text.txt" and len(found["text_sha256"]) == 64
    page = (world / "report" / "report.html").read_text(encoding="utf-8")
    assert "text.txt" in page and found["text_sha256"] in page and "\\u00" not in page
    result = stored(world)
    result.worst[0] |= {"next": "it's <b>\u201cso\u201d</b>\n", "reference_top": [["'", 1.0]]}
    page = report_html(result)
    assert "&#34;it&#39;s &lt;b&gt;\u201cso\u201d&lt;/b&gt;\\n&#34;" in page and "\\u0027" not in page


def test_both_forms_for_people_have_every_line_of_llama_cpps_table(world: Path) -> None:
    metrics = content(world)["metrics"]
    assert metrics.keys() >= METRICS
    pages = [
        html.unescape((world / "report" / f"report.{form}").read_text(encoding="utf-8")) for form in ("html", "md")
    ]
    for row in (row for rows in TABLE.values() for row in rows):
        shown = format_with_error(row, metrics)
        assert ("±" in shown) == (row.error is not None)
        assert all(row.title in page and shown in page for page in pages), row.title


def test_the_page_does_not_scroll_sideways(world: Path) -> None:
    page = (world / "report" / "report.html").read_text(encoding="utf-8")
    assert 'name="viewport"' in page
    for table in re.finditer(r"<table", page):
        before = page[max(0, table.start() - 20) : table.end() + 20]
        assert '<div class="wide"><table' in before or '<table class="stack">' in before, before


def test_too_little_of_anything_does_not_pass(world: Path, tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("Hello")
    result = made(world, "short", text=short, plan=replace(PLAN, distances=(16,), cases_per_distance=2))
    words = {verdict.gate.name: verdict.word for verdict in result.verdicts}
    assert set(words.values()) == {"not informative"} and result.exit_code == EXIT_GATE_FAILED
    assert result.headline == "11 of 11 gates are not informative" and not content(world, "short")["passed"]
    page = (world / "short" / "report.html").read_text()
    assert "measured on 4 predicted tokens; it needs 32" in page and 'errors="11"' in report_junit(result)
    assert any(
        "how entries are chosen there was not measured. That needs texts of more than 67 tokens" in n
        for n in result.notes()
    )
    assert any("Not asked for" in n and "--cases-per-kind" in n and "--sweep-cases" in n for n in result.notes())
    short.write_text("H")
    with pytest.raises(InputError, match="has 1 tokens; there is nothing to predict"):
        made(world, "short", text=short)


def test_kept_figures_are_judged_again_by_other_thresholds_and_only_by_those(
    world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(world / "report", world / "kept")
    old = content(world, "kept")

    def never(*_: object) -> None:
        raise AssertionError("measured")

    monkeypatch.setattr("foldkv.validation.validate._measure", never)
    made(world, "kept", keep=True, gates={"kl-mean": 1e-3, "kl-tail": 1.5e-5})  # the line to reproduce names its folder
    again = made(world, "kept", keep=True, gates={"kl-mean": 1e-3, "kl-tail": 1.5e-5})
    assert again.source == "unchanged" and content(world, "kept")["metrics"] == old["metrics"]
    strict = made(world, "kept", keep=True, gates={"logits": 1e-12})
    assert (
        strict.source == "judged again" and not strict.passed and strict.provenance["date"] == old["provenance"]["date"]
    )
    assert content(world, "kept")["headline"] == "1 of 11 gates fails"
    assert content(world, "kept")["reproducers"] == content(world)["reproducers"]
    assert (world / "kept" / "reproducers" / "worst-case" / "segment.onnx").is_file(), "layers stay beside the figures"
    assert "--gate logits=1e-12" in content(world, "kept")["provenance"]["command"]
    # A bundle built since then is named without measuring; another plan, text or bundle is measured.
    shutil.copytree(world / "bundles" / "rtx9090", world / "bundles" / "another")
    try:
        assert len(made(world, "kept", keep=True).not_validated) == 2
    finally:
        shutil.rmtree(world / "bundles" / "another")
    threads = old["provenance"]["threads"]
    assert made(world, "kept", keep=True, threads=threads).source != "measured"
    for change in ({"plan": replace(PLAN, seed=1)}, {"text": None}, {"keep": False}, {"threads": threads + 1}):
        with pytest.raises(AssertionError, match="measured"):
            made(world, "kept", **{"keep": True, **change})


def test_a_baseline_shows_what_changed_gate_by_gate(world: Path) -> None:
    old, new = content(world), stored(world, logits=1e-12)
    found = compare("old", old, new.provenance, new.verdicts)
    rows = {row.name: row for row in found.gates}
    assert rows["kl-mean"].change == "threshold 0.001 before, 1e-06 now" and rows["kl-mean"].not_comparable is None
    assert rows["logits"].change == "holds before, fails now; threshold 0.005 before, 1e-12 now"
    assert rows["top1"].change == "" and rows["top1"].before == rows["top1"].now and not found.differences
    # A report from before figures were made in this way.
    older = old | {"provenance": {name: value for name, value in old["provenance"].items() if name != "measures"}}
    [first, *_] = compare("older", older, new.provenance, new.verdicts).gates
    assert first.change == "not comparable: another way to measure"
    # A bundle in bfloat16 has another figure for some gates, and thresholds that nobody chose.
    gates = {gate["name"]: gate for gate in old["gates"]}
    gates["chunks"] |= {"metric": "chunk_kl_mean"}
    gates["perplexity"] |= {"yardstick": {"metric": "yardstick_perplexity_ratio", "factor": 2}, "threshold": 1.5}
    others = {row.name: row for row in compare("old", old, new.provenance, new.verdicts).gates}
    assert others["chunks"].change == "not comparable: another figure, chunk_kl_mean"
    assert others["perplexity"].change == ""
    new.comparison = found
    jsonschema.validate(json.loads(json.dumps(to_json(new))), SCHEMA)
    assert "holds before, fails now" in report_html(new)


@pytest.mark.parametrize(
    ("change", "text", "retrieval"),
    [
        ({"text_sha256": "0" * 64}, "another text", None),
        ({"checkpoint_sha256": "0" * 64}, "another checkpoint", "another checkpoint"),
        ({"plan": {"text_tokens": 64}}, "other windows of the text", None),
        ({"plan": {"distances": [4]}}, None, "other values"),
        ({"plan": {"seed": 9}}, "other windows of the text", "other values"),
    ],
)
def test_what_does_not_compare_is_said_to(world: Path, change: Any, text: str | None, retrieval: str | None) -> None:
    old, new = content(world), stored(world)
    plan = old["provenance"]["plan"] | change.get("plan", {})
    old["provenance"] |= change | {"plan": plan}
    old["gates"] = [gate for gate in old["gates"] if gate["name"] != "top1"] + [old["gates"][0] | {"name": "gone"}]
    found = compare("old", old, new.provenance, new.verdicts)
    rows = {row.name: row for row in found.gates}
    assert (rows["kl-mean"].not_comparable, rows["retrieval"].not_comparable) == (text, retrieval)
    assert rows["top1"].change == "new" and rows["gone"].change == "not judged now" and len(found.differences) == 1


@pytest.mark.parametrize(
    ("name", "file", "message"),
    [
        ("absent", None, "is not a report: .* cannot be read"),
        ("r.json", "not json", "it is not JSON"),
        ("r.json", "[]", "is not a report that this version reads"),
        ("r.json", '{"schema_version": 4, "passed": true}', "is not a report that this version reads"),
        (
            "r.json",
            '{"schema_version": 3, "passed": true}',
            "is a report of version 3; this foldkv compares with .* version 4",
        ),
    ],
)
def test_a_baseline_that_is_no_report_is_refused_before_anything_is_measured(
    world: Path, tmp_path: Path, name: str, file: str | None, message: str
) -> None:
    if file is not None:
        (tmp_path / name).write_text(file)
    with pytest.raises(InputError, match=message):
        made(world, "refused", baseline=tmp_path / name)
    with pytest.raises(ArtifactError, match=r"kind 'foldkv\.bundle'"):
        made(world, "refused", baseline=world / "bundles" / "cpu")
    assert not (world / "refused").exists()


def test_a_bundle_whose_gpu_is_not_here_is_refused_with_what_is_missing(
    world: Path, tiny_graph: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("foldkv.runtime.bundle.device_capability", lambda: None)
    [built] = build_bundles(tiny_graph, tmp_path, resolve_targets(["h100"], "onnxruntime-cuda")).results
    question = [
        "validate",
        str(built.folder),
        "--reference",
        str(world / "checkpoint"),
        "--report",
        str(tmp_path / "r"),
    ]
    result = CliRunner().invoke(main, question)
    assert result.exit_code == EXIT_ENVIRONMENT and not (tmp_path / "r").exists()
    assert "for h100 cannot be executed here" in result.output and "an NVIDIA GPU with its driver" in result.output
    assert "The bundle of the target 'cpu' can be validated on every machine" in " ".join(result.output.split())
    with pytest.raises(InputError, match="devices are for bundles with engines"):
        made(world, "refused", devices=(0,))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--gate", "kl-mean=inf"], "gate kl-mean has threshold inf; expected a number of 0"),
        (["--gate", "kl-mean=nan"], "gate kl-mean has threshold nan"),
        (["--gate", "top1=-1"], "gate top1 has threshold -1.0; expected a number above 0"),
        (["--gate", "kl-mean=1", "--gate", "kl-mean=2"], "--gate kl-mean is given twice"),
        (["--gate", "kl-mean"], "expected NAME=VALUE"),
        (["--gate", "kl-men=1"], "did you mean 'kl-mean'?"),
        (["--distance", "6"], "distances are [6], expected at least one, all multiples of 4"),
        (["--texts", "0", "--seed", "-1"], "seed is -1, expected an integer of 0 or more; texts is 0"),
    ],
)
def test_options_that_cannot_be_meant_are_refused(world: Path, options: list[str], message: str) -> None:
    question = ["validate", str(world / "bundles" / "cpu"), "--reference", str(world / "checkpoint"), "--report"]
    result = CliRunner().invoke(main, [*question, str(world / "refused"), *options])
    assert result.exit_code == 2 and message in result.output and not (world / "refused").exists()


def test_a_figure_is_told_from_the_threshold_that_it_misses() -> None:
    assert format_beside(1.00103, 1.001) == "1.00103" and format_beside(1.0, 1.001) == "1"
    assert format_beside(1.00004e-6, 1e-6) == "1.00004e-06" and format_beside(0.25, 0.25) == "0.25"
    assert format_beside(math.inf, 1e-6) == "\u221e"


def test_the_line_of_a_report_survives_a_shell(world: Path) -> None:
    words = shlex.split(content(world)["provenance"]["command"])
    assert words[:3] == ["foldkv", "validate", str(world / "bundles" / "cpu")] and words[-2] == "--threads"


@pytest.mark.slow
def test_only_bundles_for_the_cpu_are_told_how_to_read_matrices(tiny_checkpoint: Path) -> None:
    """Those for a GPU refuse to be."""
    spec = Checkpoint(tiny_checkpoint).spec
    for gpu, expected in ((True, "auto"), (False, "bfloat16")):
        assert _matrices("auto", False, Opened(spec, "hf", "float32", gpu)) == expected
    assert _matrices("float32", False, Opened(spec, "hf", "float32", gpu=False)) == "float32"


def test_a_report_says_how_matrices_were_read(
    large_bundle: Path, released_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    plan = Plan(texts=1, text_tokens=72, distances=(16,), cases_per_distance=1, cases_per_kind=0, sweep_cases=0)
    reports = {}
    for matrices in ("bfloat16", "float32", "auto"):
        folder = tmp_path / matrices
        validate(
            large_bundle, released_checkpoint("instruct"), folder, plan=plan, matrices=matrices, threads=1,
            baseline=tmp_path / "bfloat16" if matrices == "float32" else None,
        )  # fmt: skip
        reports[matrices] = json.loads((folder / "report.json").read_text())
        assert 0 <= reports[matrices]["metrics"]["kl_mean"] < 1e-9 and reports[matrices]["metrics"]["topk_overlap"] == 1
    assert [reports[name]["provenance"]["matrices"] for name in reports] == ["bfloat16", "float32", "float32"]
    assert "--matrices float32" in reports["float32"]["provenance"]["command"]
    assert "--matrices float32" in reports["auto"]["provenance"]["command"], "another day less memory may be free"
    assert reports["float32"]["metrics"] == reports["auto"]["metrics"] != reports["bfloat16"]["metrics"]
    assert "matrices: bfloat16 before, float32 now" in json.dumps(reports["float32"]["comparison"])
