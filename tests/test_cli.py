"""The command line on whole inputs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

import foldkv
from foldkv.cli import main

DATA = Path(__file__).parent / "data"


def run(*arguments: object) -> Result:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result


def test_help_and_version_need_no_heavy_package() -> None:
    code = (
        "import sys\nfrom click.testing import CliRunner\nfrom foldkv.cli import main\n"
        "print(CliRunner().invoke(main, ['--help']).output)\n"
        "print([n for n in ('torch', 'onnx', 'transformers', 'onnxruntime', 'numpy') if n in sys.modules])"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.strip().splitlines()[-1] == "[]"
    assert all(name in output for name in main.commands)
    assert foldkv.__version__ in run("--version").output


@pytest.mark.parametrize(("model", "share"), [("flash", "7.31 %"), ("pro", "10.47 %")])
def test_plan_gives_the_published_shares(model: str, share: str) -> None:
    assert share in run("plan", DATA / f"deepseek-v4-{model}.json", "--context", "1M").output
    facts = json.loads(run("plan", DATA / f"deepseek-v4-{model}.json", "--json").output)
    plans = {plan["layout"]: plan for plan in facts["plans"]}
    assert facts["parameters"] > 2e11
    for plan in plans.values():
        assert plan["total_with_weights"] == plan["weights"] + sum(plan["groups"].values())
    # The released V4-Flash has 148.66 GiB on disk, a draft layer of 3.6 GB among them.
    if model == "flash":
        assert plans["fp8"]["weights"] == pytest.approx(148.66 * 2**30 - 3.6e9, rel=0.01)


def test_inspect_knows_every_kind_of_artifact(tiny_checkpoint: Path, tiny_graph: Path, tiny_bundle: Path) -> None:
    for path, kind in ((tiny_checkpoint, "checkpoint"), (tiny_graph, "foldkv.graph"), (tiny_bundle, "foldkv.bundle")):
        assert json.loads(run("inspect", path, "--json").output)["kind"] == kind
        assert f"kind: {kind}" in run("inspect", path).output


def test_targets_and_doctor_speak_json() -> None:
    targets = {row["name"]: row for row in json.loads(run("targets", "--json").output)}
    assert targets["a100"]["sm"] == 80 and targets["h100"]["backends"] == ["tensorrt"]
    assert "rtx5090" in run("targets").output
    assert json.loads(run("doctor", "--json").output)["can"]
    assert "onnxruntime" in run("doctor").output


def test_generate_prints_the_text_and_nothing_else(tiny_bundle: Path) -> None:
    facts = json.loads(run("generate", tiny_bundle, "def f(", "-n", 8, "--json").output)
    assert len(facts["tokens"]) == 8 and facts["state_bytes"] > 0 and facts["prompt_tokens"] == 6
    assert run("generate", tiny_bundle, "def f(", "-n", 8).stdout == facts["text"] + "\n"


def test_generate_with_a_seed_is_repeatable_and_stops(tiny_bundle: Path) -> None:
    options = ("-n", 24, "--temperature", 1, "--seed", 3)
    first = run("generate", tiny_bundle, "def f(", *options).stdout
    assert first == run("generate", tiny_bundle, "def f(", *options).stdout
    assert first != run("generate", tiny_bundle, "def f(", *options[:-1], 4).stdout
    stopped = run("generate", tiny_bundle, "def f(", *options, "--stop", first[5]).stdout
    assert first.startswith(stopped.rstrip("\n")) and len(stopped) < len(first)


def test_packed_rows_need_plugins_and_a_known_layout(tiny_graph: Path, tmp_path: Path) -> None:
    build = ["build", str(tiny_graph), "-o", str(tmp_path / "out"), "--target", "a100"]
    for options, message in (
        (["--layout", "fp8"], "Build with --plugins on"),
        (["--layout", "fp9", "--plugins", "on"], "expected one of dense, fp8, fp8+fp4"),
        (["--layout", "nvfp4+fp4", "--plugins", "on"], "does not read rows in nvfp4"),
    ):
        result = CliRunner().invoke(main, [*build, *options])
        assert result.exit_code == 2 and message in result.output, result.output
    assert not list(tmp_path.rglob("manifest.json"))
