"""The command line on whole inputs."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

import foldkv
from foldkv.artifact import write_manifest
from foldkv.cli import main

DATA = Path(__file__).parent / "data"


def run(*arguments: object) -> Result:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result


def test_what_is_plainly_wrong_is_said_before_pytorch_is_loaded(tmp_path: Path, tiny_graph: Path) -> None:
    """Loading it takes seconds, on a busy machine many."""
    absent = tmp_path / "absent"
    commands = [
        ["export", absent, "-o", tmp_path / "out"],
        ["inject", tiny_graph, "-o", tmp_path / "out", "--target", "b20"],
        ["build", tiny_graph, "-o", tmp_path / "out", "--target", "b20"],
        ["build", absent, "-o", tmp_path / "out", "--target", "cpu"],
        ["validate", absent, "--reference", absent, "--report", tmp_path / "out"],
        ["run", absent],
    ]
    code = (
        "import json, sys; from click.testing import CliRunner; from foldkv.cli import main\n"
        "done = [CliRunner().invoke(main, words) for words in json.loads(sys.argv[1])]\n"
        "print(json.dumps([one.stderr for one in done] + ['torch' in sys.modules]))"
    )
    words = json.dumps([[str(word) for word in command] for command in commands])
    out = subprocess.run([sys.executable, "-c", code, words], capture_output=True, text=True, check=True).stdout
    *said, loaded = json.loads(out)
    assert all(one.startswith("error: ") and ("absent" in one or "did you mean 'b200'?" in one) for one in said), said
    assert not loaded


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


FLASH = DATA / "deepseek-v4-flash.json"


def test_plan_with_targets_says_the_same_as_table_and_as_json() -> None:
    question = (
        "plan",
        FLASH,
        "--context",
        "1M",
        "--target",
        "b200",
        "--target",
        "rtx4090",
        "--chunk",
        1,
        "--layout",
        "fp8",
    )
    facts = json.loads(run(*question, "--json").output)
    b200, ada = facts["targets"]
    assert (facts["context"], facts["chunk"], b200["target"], ada["sm"]) == (1 << 20, 1, "b200", 89)
    assert list(b200["weights"]) == ["bf16", "fp8", "fp4"] and list(ada["weights"]) == ["bf16", "fp8", "fp4"]
    assert b200["fits"] == {"bf16": False, "fp8": False, "fp4": True} and b200["gpus"]["fp4"] == 1
    total = b200["caches"]["total"] + b200["activations"]["total"] + b200["weights"]["bf16"]
    assert b200["over"]["bf16"] == total - (180 << 30) and b200["activations"]["estimate"]
    assert facts["export_seconds"] is None and b200["build_seconds"] is None

    text = run(*question).output
    line = next(line for line in text.splitlines() if line.startswith("rtx4090"))
    over, gpus = ada["over"]["fp8"], ada["gpus"]["fp8"]
    assert f"{over / 2**30:.2f} GiB over, {gpus} GPUs" in line and "not kept" not in line
    assert text.count("no comparable runs yet") == 2 and "estimates" in text and "share the layers" in text
    assert "not on this machine" in next(line for line in text.splitlines() if line.startswith("build b200"))
    dealt = run("plan", FLASH, "--target", "l40s", "--layout", "fp8+fp4", "--context", "64k", "--devices", 4).output
    assert "l40s x 4, fp8+fp4 rows, fp4 weights: 48.00 GiB each" in dealt
    assert re.search(r"^0 +embedding, layers 0 to 10 ", dealt, re.MULTILINE) and re.search(
        r"^3 .*, head ", dealt, re.MULTILINE
    )


@pytest.mark.slow
def test_plan_estimates_times_from_the_runs_of_this_machine(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, quick_checkpoint: Path
) -> None:
    monkeypatch.setattr("foldkv.optimize.history.history_file", lambda: tmp_path / "history.jsonl")
    assert "no comparable runs yet" in run("plan", quick_checkpoint, "--target", "cpu").output
    made = json.loads(run("export", quick_checkpoint, "-o", tmp_path / "graph", "--json").stdout)
    assert made["graph"] == str(tmp_path / "graph") and made["weights"]["bytes"] > 1e6 > made["bytes"]
    [built] = json.loads(run("build", tmp_path / "graph", "-o", tmp_path, "--target", "cpu", "--json").stdout)[
        "bundles"
    ]
    assert (built["status"], built["folder"], built["exit_code"]) == ("built", str(tmp_path / "cpu"), 0)
    again = run("build", tmp_path / "graph", "-o", tmp_path, "--target", "cpu").stderr
    assert "cpu: unchanged" in again
    found = json.loads(run("plan", quick_checkpoint, "--target", "cpu", "--json").output)
    for estimate in (found["export_seconds"], found["targets"][0]["build_seconds"]):
        assert estimate["estimate"] and estimate["runs"] == 1 and 0 < estimate["low"] <= estimate["high"] < 600
    lines = run("plan", quick_checkpoint, "--target", "cpu").output.splitlines()
    assert sum("(estimate from 1 run on this machine)" in line for line in lines) == 2
    far = run("plan", FLASH, "--target", "cpu").output  # a hundred thousand times as large: nothing is said
    assert "no comparable runs yet" in next(line for line in far.splitlines() if line.startswith("export"))


@pytest.mark.parametrize("options", [(), ("--target", "h200", "--json")])
def test_plan_draws_beside_its_answer(tmp_path: Path, tiny_checkpoint: Path, options: tuple[str, ...]) -> None:
    path = tmp_path / "plot.html"
    result = run("plan", tiny_checkpoint, "--plot", path, "--layout", "fp8", *options)
    assert "tiny-v4" in path.read_text() and ("h200" in path.read_text()) == bool(options)
    if options:
        assert json.loads(result.stdout)["plot"] == str(path)
    else:
        assert f"plot: {path}" in result.stdout


def test_inspect_knows_every_kind_of_artifact(tiny_checkpoint: Path, tiny_graph: Path, tiny_bundle: Path) -> None:
    for path, kind in ((tiny_checkpoint, "checkpoint"), (tiny_graph, "foldkv.graph"), (tiny_bundle, "foldkv.bundle")):
        assert json.loads(run("inspect", path, "--json").output)["kind"] == kind
        assert f"kind: {kind}" in run("inspect", path).output


@pytest.mark.slow
def test_targets_and_doctor_speak_json() -> None:
    targets = {row["name"]: row for row in json.loads(run("targets", "--json").output)}
    assert targets["a100"]["sm"] == 80 and targets["h100"]["backends"] == ["tensorrt", "onnxruntime-cuda"]
    assert "rtx5090" in run("targets").output
    assert json.loads(run("doctor", "--json").output)["can"]


def with_template(bundle: Path, out: Path) -> Path:
    """A copy of a bundle whose tokenizer puts <bos> before every text."""
    shutil.copytree(bundle, out)
    tokenizer = Tokenizer.from_file(str(out / "tokenizer.json"))
    tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 256)])
    tokenizer.save(str(out / "tokenizer.json"))
    manifest = json.loads((out / "manifest.json").read_text())
    rest = {key: value for key, value in manifest.items() if key not in ("schema_version", "kind", "files")}
    write_manifest(out, kind="foldkv.bundle", content=rest)
    return out


def test_generate_prints_the_text_and_nothing_else(tiny_bundle: Path) -> None:
    facts = json.loads(run("generate", tiny_bundle, "def f(", "-n", 8, "--json").output)
    assert len(facts["tokens"]) == 8 and facts["state_bytes"] > 0 and facts["prompt_tokens"] == 6
    assert facts["finish_reason"] == "length" and facts["stop_reason"] is None
    assert run("generate", tiny_bundle, "def f(", "-n", 8, "--threads", 1).stdout == facts["text"] + "\n"


def test_generate_with_a_seed_is_repeatable_and_stops(tiny_bundle: Path) -> None:
    options = ("-n", 24, "--temperature", 1, "--seed", 3)
    first = run("generate", tiny_bundle, "def f(", *options).stdout
    assert first == run("generate", tiny_bundle, "def f(", *options).stdout
    assert first != run("generate", tiny_bundle, "def f(", *options[:-1], 4).stdout
    stopped = run("generate", tiny_bundle, "def f(", *options, "--stop", first[5]).stdout
    assert stopped == first[: first.index(first[5])] + "\n"
    facts = json.loads(run("generate", tiny_bundle, "def f(", *options, "--stop", first[5:7], "--json").output)
    assert (facts["finish_reason"], facts["stop_reason"]) == ("stop", first[5:7])
    assert facts["text"] == first[: first.index(first[5:7])]


def test_generate_feeds_the_tokenizers_special_tokens_or_the_raw_text(tiny_bundle: Path, tmp_path: Path) -> None:
    bundle = with_template(tiny_bundle, tmp_path / "bundle")
    for option, count in (("--add-special-tokens", 4), ("--no-add-special-tokens", 3)):
        facts = json.loads(run("generate", bundle, "def", "-n", 1, option, "--json").output)
        assert facts["prompt_tokens"] == count
    assert json.loads(run("generate", bundle, "", "-n", 1, "--json").output)["prompt_tokens"] == 1


def test_packed_rows_need_plugins_and_a_known_layout(tiny_graph: Path, tmp_path: Path) -> None:
    build = ["build", str(tiny_graph), "-o", str(tmp_path / "out"), "--target", "a100"]
    for options, message in (
        (["--layout", "fp8", "--plugins", "off"], "Build with --plugins on"),
        (["--layout", "fp9"], "expected one of dense, fp8, fp8+fp4"),
        (["--layout", "nvfp4+fp4"], "is not supported by any target; expected one of dense, fp8, fp8+fp4."),
    ):
        result = CliRunner().invoke(main, [*build, *options])
        assert result.exit_code == 2 and message in result.output, result.output
    assert not list(tmp_path.rglob("manifest.json"))


def test_a_key_that_nobody_knows_is_refused_or_allowed_by_name(tiny_checkpoint: Path, tmp_path: Path) -> None:
    config = json.loads((tiny_checkpoint / "config.json").read_text()) | {"my_router": 1}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").symlink_to(tiny_checkpoint.resolve() / "model.safetensors")
    for command in (["plan", "--context", "4k"], ["targets", "--coverage"], ["inspect"]):
        result = CliRunner().invoke(main, [*command, str(tmp_path)])
        assert result.exit_code == 2 and "--allow-unknown-key my_router" in result.output, result.output
        allowed = [command[0], "--allow-unknown-key", "my_router", *command[1:], str(tmp_path), "--json"]
        result = CliRunner().invoke(main, allowed)
        assert result.exit_code == 0 and json.loads(result.stdout), result.output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--chunk", "64"], "--chunk changes nothing without --target"),
        (["--plugins", "on", "--max-context"], "--plugins, --max-context change nothing without --target"),
        (["--profile", "served"], "--profile changes nothing without --target"),
        (["--batch", "1000000000000"], "batch is 1,000,000,000,000; expected 1 to 65,535"),
        (["--target", "cpu", "--batch", "1000000000000"], "expected 1 to 65,535"),
        (["--target", "cpu", "--context", "1k", "--chunk", "2k"], "more than the context of 1,024 tokens"),
        (["--target", "cpu", "--layout", "fp8+fp4"], "Export with --profile served"),
    ],
)
def test_plan_refuses_what_changes_nothing_or_cannot_be(options: list[str], message: str) -> None:
    result = CliRunner().invoke(main, ["plan", str(FLASH), *options])
    assert result.exit_code == 2 and message in result.output, result.output


def test_plan_says_what_it_clamps_and_offers_what_targets_keep() -> None:
    facts = json.loads(run("plan", FLASH, "--context", "2M", "--json").stdout)
    assert (facts["context"], facts["context_asked"]) == (1 << 20, 2 << 20)
    assert [plan["layout"] for plan in facts["plans"]] == ["float32", "bf16", "fp8", "fp8+fp4"]
    assert "context_asked" not in json.loads(run("plan", FLASH, "--json").stdout)
    assert "No target keeps nvfp4+fp4" in run("plan", FLASH, "--layout", "nvfp4+fp4").stdout


def test_plan_marks_what_build_writes_and_finds_the_largest_context(tiny_checkpoint: Path) -> None:
    question = ("plan", FLASH, "--target", "b300", "--target", "h100", "--max-context")
    text = run(*question).stdout
    assert "fits *" in next(line for line in text.splitlines() if line.startswith("b300"))
    assert "1,048,576" in text.partition("largest context that fits")[2] and "not on this machine" in text
    facts = json.loads(run(*question, "--json").stdout)
    assert facts["stored"] == "fp4" and facts["targets"][0]["max_context"]["fp4"] == 1 << 20
    assert facts["graph"] < 10_000_000 and not any(row["builds_here"] for row in facts["targets"])
    # With the weights there, their headers say how they are stored.
    tiny = json.loads(run("plan", tiny_checkpoint, "--target", "cpu", "--json").stdout)
    assert tiny["stored"] == "bf16"  # config.json says float32
    assert tiny["targets"][0]["built_in"] == "float32"
