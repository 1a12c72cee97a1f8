"""Bad inputs through the command line: one clear error, the right exit code, nothing written, nothing lost."""

from __future__ import annotations

import json
import os
import shutil
import struct
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import random_checkpoint
from click.testing import CliRunner
from disks import hub_cache, permissions_hold, small_disk
from safetensors.torch import load_file, save_file

from foldkv.cli import main


@dataclass(frozen=True)
class World:
    """Whole inputs to spoil, and a folder to spoil them in."""

    checkpoint: Path
    graph: Path
    bundle: Path
    tmp: Path

    @property
    def out(self) -> str:
        return str(self.tmp / "out")

    def copy(self, source: Path) -> Path:
        shutil.copytree(source, self.tmp / "input", ignore=shutil.ignore_patterns("*.py", "*.log", "__pycache__"))
        return self.tmp / "input"


Row = tuple[Callable[[World], list[str]], int, str]
ROWS: dict[str, Row] = {}


def row(name: str, make: Callable[[World], list[str]], code: int, message: str) -> None:
    assert name not in ROWS
    ROWS[name] = (make, code, message)


# Checkpoints, through export


def checkpoint(spoil: Callable[[Path], object]) -> Callable[[World], list[str]]:
    def make(world: World) -> list[str]:
        folder = world.copy(world.checkpoint)
        spoil(folder)
        return ["export", str(folder), "-o", world.out]

    return make


def config(change: Callable[[dict[str, Any]], object]) -> Callable[[World], list[str]]:
    def spoil(folder: Path) -> None:
        content = json.loads((folder / "config.json").read_text())
        change(content)
        (folder / "config.json").write_text(json.dumps(content))

    return checkpoint(spoil)


def tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[World], list[str]]:
    def spoil(folder: Path) -> None:
        table = load_file(folder / "model.safetensors")
        change(table)
        save_file(table, folder / "model.safetensors")

    return checkpoint(spoil)


def unknown_dtype(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes().replace(b'"dtype":"BF16"', b'"dtype":"BF17"', 1))


def weights(content: bytes | int) -> Callable[[World], list[str]]:
    def spoil(folder: Path) -> None:
        path = folder / "model.safetensors"
        path.write_bytes(path.read_bytes()[:content] if isinstance(content, int) else content)

    return checkpoint(spoil)


def index(table: Any) -> Callable[[World], list[str]]:
    def spoil(folder: Path) -> None:
        (folder / "model.safetensors.index.json").write_text(table if isinstance(table, str) else json.dumps(table))

    return checkpoint(spoil)


row("checkpoint: no folder", lambda w: ["export", str(w.tmp / "none"), "-o", w.out], 2, "none")
row("checkpoint: empty folder", lambda w: ["export", str(w.tmp), "-o", w.out], 2, "config.json")
row("checkpoint: a file", lambda w: ["export", str(w.checkpoint / "config.json"), "-o", w.out], 2, "config.json")
row("config: missing", checkpoint(lambda f: (f / "config.json").unlink()), 2, "config.json")
row("config: not JSON", checkpoint(lambda f: (f / "config.json").write_text("{,")), 2, "JSON")
row("config: a list", checkpoint(lambda f: (f / "config.json").write_text("[1]")), 2, "config.json")
row("config: not UTF-8", checkpoint(lambda f: (f / "config.json").write_bytes(b"\xff\xfe\x00")), 2, "config.json")
row("config: another model", config(lambda c: c.update(model_type="llama")), 2, "llama")
row("config: no hidden_size", config(lambda c: c.pop("hidden_size")), 2, "hidden_size")
row("config: text for a number", config(lambda c: c.update(hidden_size="many")), 2, "hidden_size")
row("config: negative window", config(lambda c: c.update(sliding_window=-1)), 2, "sliding_window")
row("config: unknown layer type", config(lambda c: c["layer_types"].__setitem__(1, "dense")), 2, "dense")
row("config: too few layer types", config(lambda c: c["layer_types"].pop()), 2, "has 3 layers; expected 4")
row("config: top-k of no experts", config(lambda c: c.update(num_experts_per_tok=99)), 2, "num_experts_per_tok")
row("weights: missing", checkpoint(lambda f: (f / "model.safetensors").unlink()), 2, "safetensors")
row("weights: empty", weights(b""), 2, "model.safetensors")
row("weights: header cut", weights(100), 2, "model.safetensors")
row("weights: data cut", weights(-1000), 2, "model.safetensors")
row("weights: header is garbage", weights(struct.pack("<Q", 8) + b"nonsense"), 2, "model.safetensors")
row("weights: header of 2**60 bytes", weights(struct.pack("<Q", 1 << 60) + b"{}"), 2, "model.safetensors")
row("weights: unknown dtype", checkpoint(unknown_dtype), 2, "BF17")
row("tensors: one missing", tensors(lambda t: t.pop("norm.weight")), 2, "norm.weight")
row("tensors: one unexpected", tensors(lambda t: t.update(surplus=torch.zeros(3))), 2, "surplus")
row("tensors: wrong shape", tensors(lambda t: t.update({"norm.weight": torch.zeros(2, 64)})), 2, "norm.weight")
row(
    "tensors: quantised without a scale",
    tensors(lambda t: t.update({"head.weight": t["head.weight"].to(torch.float8_e4m3fn)})),
    2,
    "head.weight has dtype F8_E4M3 but no scale",
)
row("index: not JSON", index("{"), 2, "index.json")
row("index: names a missing shard", index({"weight_map": {"norm.weight": "none.safetensors"}}), 2, "none.safetensors")
row("index: leads out of the folder", index({"weight_map": {"norm.weight": "../x.safetensors"}}), 2, "../x.safetensors")
row("export: unknown profile", lambda w: ["export", str(w.checkpoint), "-o", w.out, "--profile", "x"], 2, "profile 'x'")


# Graph packages, through build


def graph(spoil: Callable[[Path], object], *, target: str = "cpu") -> Callable[[World], list[str]]:
    def make(world: World) -> list[str]:
        folder = world.copy(world.graph)
        spoil(folder)
        return ["build", str(folder), "-o", world.out, "--target", target]

    return make


def manifest(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        content = json.loads((folder / "manifest.json").read_text())
        change(content)
        (folder / "manifest.json").write_text(json.dumps(content))

    return spoil


def flip(name: str) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        content = bytearray((folder / name).read_bytes())
        content[len(content) // 2] ^= 1
        (folder / name).write_bytes(content)

    return spoil


row("graph: no folder", lambda w: ["build", str(w.tmp / "none"), "-o", w.out, "--target", "cpu"], 2, "manifest.json")
row("graph: a bundle instead", lambda w: ["build", str(w.bundle), "-o", w.out, "--target", "cpu"], 2, "foldkv.bundle")
row(
    "graph: a checkpoint instead", lambda w: ["build", str(w.checkpoint), "-o", w.out, "--target", "cpu"], 2, "manifest"
)
row("graph: manifest not JSON", graph(lambda f: (f / "manifest.json").write_text("{")), 2, "not JSON")
row("graph: newer schema", graph(manifest(lambda m: m.update(schema_version=9))), 2, "schema_version 9")
row("graph: no segment", graph(lambda f: (f / "segments/head.onnx").unlink()), 2, "head.onnx is missing")
row("graph: flipped bit in a segment", graph(flip("segments/csa-moe.onnx")), 2, "changed after it was made")
row("graph: flipped bit in the lock", graph(flip("weights.lock.json")), 2, "weights.lock.json")
row("graph: lock cut", graph(lambda f: (f / "weights.lock.json").write_bytes(b"x")), 2, "has 1 bytes")
row("graph: older form", graph(manifest(lambda m: m.pop("segments"))), 2, "older form")
row(
    "graph: two layers swapped",
    graph(manifest(lambda m: m["layers"].reverse())),
    2,
    "takes other weights than the lock",
)
row(
    "graph: a file outside",
    graph(manifest(lambda m: m["files"].update({"/etc/hostname": {"bytes": 1, "sha256": "0"}}))),
    2,
    "leads out of the artifact",
)
row(
    "build: unknown target",
    lambda w: ["build", str(w.graph), "-o", w.out, "--target", "a1000"],
    2,
    "did you mean 'a100'",
)
row("build: no target", lambda w: ["build", str(w.graph), "-o", w.out], 2, "--target")
row(
    "build: packed rows without plugins",
    lambda w: ["build", str(w.graph), "-o", w.out, "--target", "a100", "--plugins", "off", "--layout", "fp8"],
    2,
    "--plugins on",
)
row("build: no jobs", lambda w: ["build", str(w.graph), "-o", w.out, "--target", "cpu", "--jobs", "0"], 2, "--jobs")
row(
    "build: no such layout",
    lambda w: ["build", str(w.graph), "-o", w.out, "--target", "a100", "--plugins", "on", "--layout", "fp7"],
    2,
    "expected one of dense, fp8, fp8+fp4",
)
row(
    "build: a target of TensorRT 11",
    lambda w: ["build", str(w.graph), "-o", w.out, "--target", "h100"],
    3,
    "foldkv build GRAPH --target h100",
)
row(
    "inject: rows that no kernel reads",
    lambda w: ["inject", str(w.graph), "-o", w.out, "--target", "a100", "--layout", "nvfp4+fp4"],
    2,
    "is not supported by any target",
)
row("targets: coverage of nothing", lambda w: ["targets", "--coverage", "nowhere"], 2, "nowhere")
row("inject: no GPU", lambda w: ["inject", str(w.graph), "-o", w.out, "--target", "cpu"], 2, "is not a GPU")
row("inject: unknown target", lambda w: ["inject", str(w.graph), "-o", w.out, "--target", "rtx509"], 2, "rtx5090")


# Bundles, through generate, inspect and validate


def bundle(spoil: Callable[[Path], object]) -> Callable[[World], list[str]]:
    def make(world: World) -> list[str]:
        folder = world.copy(world.bundle)
        spoil(folder)
        return ["generate", str(folder), "text", "-n", "2"]

    return make


def generate(*options: str, text: str = "text") -> Callable[[World], list[str]]:
    return lambda world: ["generate", str(world.bundle), text, *options]


row("bundle: no folder", lambda w: ["generate", str(w.tmp / "none"), "x"], 2, "manifest.json")
row("bundle: a graph instead", lambda w: ["generate", str(w.graph), "x"], 2, "foldkv.graph")
row("bundle: segment cut", bundle(lambda f: (f / "segments/head.onnx").write_bytes(b"")), 2, "has 0 bytes")
row("bundle: flipped bit", bundle(flip("placed.bin")), 2, "changed after it was made")
row(
    "bundle: its link leads nowhere",
    bundle(lambda f: (f / "placed.bin").rename(f / "w") and (f / "placed.bin").symlink_to("../w")),
    2,
    "is a link to ../w, which is missing",
)
row("generate: empty text", generate(text=""), 2, "empty")
row("generate: no tokens wanted", generate("-n", "0"), 2, "-n")
row("generate: context is text", generate("--context", "long"), 2, "is not a number of tokens")
row("generate: context of 0", generate("--context", "0"), 2, "is not a number of tokens")
row("generate: context too small", generate("--context", "8", "-n", "32"), 2, "context of 8")
row("generate: context beyond the model", generate("--context", "4M"), 2, "1048576")
row("generate: temperature", generate("--temperature", "-1"), 2, "temperature")
row("generate: top-p", generate("--top-p", "2"), 2, "top_p")
row("generate: top-k", generate("--top-k", "0"), 2, "top_k")
row("generate: seed", generate("--seed", "-4"), 2, "seed")
row("generate: temperature is infinite", generate("--temperature", "inf"), 2, "temperature must be a finite number")
row("generate: temperature is no number", generate("--temperature", "nan"), 2, "temperature must be a finite number")
row("generate: empty stop string", generate("--stop", ""), 2, "a stop string is empty")
row("generate: no threads", generate("--threads", "0"), 2, "threads")
row("inspect: nothing there", lambda w: ["inspect", str(w.tmp / "none")], 2, "does not exist")
row("inspect: a folder of something else", lambda w: ["inspect", str(w.tmp)], 2, "neither an artifact")


def validate(*options: str) -> Callable[[World], list[str]]:
    return lambda w: ["validate", str(w.bundle), "--reference", str(w.checkpoint), "--report", w.out, *options]


row("validate: unknown gate", validate("--gate", "kl-men=1"), 2, "did you mean 'kl-mean'")
row("validate: no text", validate("--text", "none.txt"), 2, "cannot be read")
row("validate: text is a program", validate("--text", sys.executable), 2, "is not UTF-8")


def empty_text(world: World) -> list[str]:
    (world.tmp / "empty.txt").write_text(" \n")
    return [*validate("--text", str(world.tmp / "empty.txt"))(world)]


row("validate: empty text", empty_text, 2, "is empty")
row("validate: gate is text", validate("--gate", "kl-mean=low"), 2, "NAME=VALUE")
row("validate: gate is NaN", validate("--gate", "kl-mean=nan"), 2, "expected a number")
row(
    "validate: no reference",
    lambda w: ["validate", str(w.bundle), "--reference", str(w.tmp / "none"), "--report", w.out],
    2,
    "none",
)


# Pipeline files


def pipeline(text: str) -> Callable[[World], list[str]]:
    def make(world: World) -> list[str]:
        path = world.tmp / "pipeline.toml"
        path.write_text(text.replace("CHECKPOINT", str(world.checkpoint)))
        return ["run", str(path)]

    return make


HEAD = 'version = 1\ncheckpoint = "CHECKPOINT"\noutput = "out"\n'
row("pipeline: no file", lambda w: ["run", str(w.tmp / "none.toml")], 2, "cannot be read")
row("pipeline: not TOML", pipeline("version ="), 2, "is not TOML")
row("pipeline: empty", pipeline(""), 2, "missing key 'version'")
row("pipeline: newer version", pipeline(HEAD.replace("1", "2", 1)), 2, "version is 2")
row("pipeline: unknown key", pipeline(HEAD + 'chekpoint = "x"\n'), 2, "did you mean 'checkpoint'")
row("pipeline: unknown key in a table", pipeline(HEAD + '[build]\ntarget = ["cpu"]\n'), 2, "did you mean 'targets'")
row("pipeline: a number for a text", pipeline(HEAD.replace('"out"', "7")), 2, "output is 7")
row("pipeline: weights of an older version", pipeline(HEAD + '[export]\nweights = "repack"\n'), 2, "weights")
row("pipeline: unknown target", pipeline(HEAD + '[build]\ntargets = ["a10O"]\n'), 2, "unknown target 'a10O'")
row("pipeline: no targets", pipeline(HEAD + "[build]\ntargets = []\n"), 2, "build.targets")
row("pipeline: unknown gate", pipeline(HEAD + "[validate]\ngates = { top = 1.0 }\n"), 2, "unknown gate 'top'")
row("pipeline: endless gate", pipeline(HEAD + "[validate]\ngates = { top1 = inf }\n"), 2, "gate top1 has threshold inf")
row("pipeline: a gate twice", pipeline(HEAD + "[validate.gates]\ntop1 = 1\ntop1 = 1\n"), 2, "is not TOML")
row("pipeline: no baseline", pipeline(HEAD + '[validate]\nbaseline = "none"\n'), 2, "is not a report")
row("pipeline: its own baseline", pipeline(HEAD + '[validate]\nbaseline = "out/report"\n'), 2, "is not a report")
row("pipeline: target not built", pipeline(HEAD + '[validate]\ntargets = ["a100"]\n'), 2, "build.targets does not list")
row("pipeline: no text", pipeline(HEAD + '[validate]\ntext = "none.txt"\n'), 2, "cannot be read")
row("pipeline: odd distances", pipeline(HEAD + "[validate]\ndistances = [7]\n"), 2, "multiples of 4")
row("pipeline: shapes of two", pipeline(HEAD + "[build.shapes]\nbatch = [1, 2]\n"), 2, "build.shapes.batch")
row("pipeline: shapes fall", pipeline(HEAD + "[build.shapes]\nbatch = [4, 2, 1]\n"), 2, "batch")
row("pipeline: no checkpoint", pipeline(HEAD.replace("CHECKPOINT", "none")), 2, "none")


# Plans and places

row("plan: unknown layout", lambda w: ["plan", str(w.checkpoint), "--layout", "fp3"], 2, "fp3")
row(
    "plan: context of nothing", lambda w: ["plan", str(w.checkpoint), "--context", "-4"], 2, "is not a number of tokens"
)
row(
    "plan: a bundle instead", lambda w: ["plan", str(w.bundle)], 2, "is a foldkv.bundle artifact; expected a checkpoint"
)
row("bundle: a checkpoint instead", lambda w: ["generate", str(w.checkpoint), "x"], 2, "It is a checkpoint")
row(
    "trends: a page of another kind",
    lambda w: ["trends", str(w.tmp), "-o", w.out + ".pdf"],
    2,
    "written as .html",
)
row("plan: unknown target", lambda w: ["plan", str(w.checkpoint), "--target", "h10"], 2, "did you mean 'h100'")
row(
    "plan: layout of no target",
    lambda w: ["plan", str(w.checkpoint), "--target", "a10", "--layout", "bf16"],
    2,
    "dense",
)
row("plan: plot of no kind", lambda w: ["plan", str(w.checkpoint), "--plot", str(w.tmp / "plot.png")], 2, ".svg")
row(
    "plan: plot in no folder",
    lambda w: ["plan", str(w.checkpoint), "--plot", f"{w.out}/no/p.svg"],
    2,
    "cannot be written",
)
row("plan: batch of nothing", lambda w: ["plan", str(w.checkpoint), "--batch", "0"], 2, "--batch")
row("unknown command", lambda w: ["exprot"], 2, "exprot")


def in_the_way(what: Callable[[Path], object]) -> Callable[[World], list[str]]:
    def make(world: World) -> list[str]:
        what(world.tmp / "kept")
        return ["export", str(world.checkpoint), "-o", str(world.tmp / "kept")]

    return make


def foreign(path: Path) -> None:
    path.mkdir()
    (path / "diary.txt").write_text("mine")


row("output: a file", in_the_way(lambda path: path.write_text("mine")), 2, "is a file")
row("output: a folder of someone's own", in_the_way(foreign), 2, "nothing was changed")
row(
    "output: below a file",
    lambda w: ["export", str(w.checkpoint), "-o", str(w.checkpoint / "config.json" / "x")],
    2,
    "config.json",
)


# Paths with bytes that are not UTF-8, and repositories of the Hugging Face cache

ODD = os.fsdecode(b"a\xffb")
NOT_UTF8 = r"a\xffb: the path has bytes that are not UTF-8"


def odd(
    *before: str, source: str = "", after: Callable[[World], list[str]] = lambda w: []
) -> Callable[[World], list[str]]:
    """A command with a path that is not UTF-8: one of the whole inputs, or a place that does not exist."""

    def make(world: World) -> list[str]:
        path = world.tmp / ODD
        if source:
            path.symlink_to(getattr(world, source))
        return [*before, str(path), *after(world)]

    return make


row("odd path: checkpoint", odd("export", source="checkpoint", after=lambda w: ["-o", w.out]), 2, NOT_UTF8)
row("odd path: no checkpoint", odd("export", after=lambda w: ["-o", w.out]), 2, NOT_UTF8)
row("odd path: package", odd("export", "-o", after=lambda w: [str(w.checkpoint)]), 2, NOT_UTF8)
row("odd path: graph", odd("build", source="graph", after=lambda w: ["-o", w.out, "--target", "cpu"]), 2, NOT_UTF8)
row(
    "odd path: bundles",
    odd("build", "-o", after=lambda w: [str(w.graph), "--target", "cpu"]),
    2,
    r"a\xffb/cpu: the path has bytes",
)
row("odd path: injected", odd("inject", "-o", after=lambda w: [str(w.graph), "--target", "a100"]), 2, NOT_UTF8)
row("odd path: bundle", odd("generate", source="bundle", after=lambda w: ["x"]), 2, NOT_UTF8)
row("odd path: report", lambda w: [*validate()(w)[:-1], str(w.tmp / ODD)], 2, NOT_UTF8)
row("odd path: text", lambda w: [*validate()(w), "--text", str(w.tmp / ODD)], 2, NOT_UTF8)
row("odd path: baseline", lambda w: [*validate()(w), "--baseline", str(w.tmp / ODD)], 2, NOT_UTF8)
row("odd path: inspect", odd("inspect", source="bundle"), 2, NOT_UTF8)
row("odd path: plan", odd("plan", source="checkpoint"), 2, NOT_UTF8)
row("odd path: plan as JSON", odd("plan", "--json", source="checkpoint"), 2, r"a\\xffb: the path has")
row("odd path: plot", lambda w: ["plan", str(w.checkpoint), "--plot", str(w.tmp / f"{ODD}.svg")], 2, "not UTF-8")
row("index: a name that is not UTF-8", index({"weight_map": {"norm.weight": "\udcff.safetensors"}}), 2, "leads out")


def repository(*before: str) -> Callable[[World], list[str]]:
    """A command with a repository folder of the cache, as a user may take it for the model."""

    def make(world: World) -> list[str]:
        source = world.bundle if "generate" in before else world.checkpoint
        hub_cache(source, world.tmp / "models--x--y")
        return [*before, str(world.tmp / "models--x--y"), *(["x"] if "generate" in before else [])]

    return make


for command in ("plan", "inspect", "generate"):
    row(f"cache: a repository instead of its snapshot, {command}", repository(command), 2, "give its snapshot /")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(("make", "code", "message"), ROWS.values(), ids=list(ROWS))
def test_a_bad_input_is_one_clear_error_and_writes_nothing(
    tiny_checkpoint: Path, tiny_graph: Path, tiny_bundle: Path, tmp_path: Path,
    make: Callable[[World], list[str]], code: int, message: str,
) -> None:  # fmt: skip
    arguments = make(World(tiny_checkpoint, tiny_graph, tiny_bundle, tmp_path))
    before = contents(tmp_path)
    result = CliRunner().invoke(main, arguments)
    assert message in result.output
    assert result.exit_code == code
    assert result.output.lower().count("error:") <= 1 and "Traceback" not in result.output
    after = {path: content for path, content in contents(tmp_path).items() if not path.endswith(".lock")}
    assert after == before


@pytest.mark.parametrize(
    "name",
    ["config: negative window", "tensors: one missing", "weights: data cut", "graph: flipped bit in a segment"],
)
def test_an_older_artifact_outlives_a_bad_input(
    tiny_checkpoint: Path, tiny_graph: Path, tiny_bundle: Path, tmp_path: Path, name: str
) -> None:
    arguments = ROWS[name][0](World(tiny_checkpoint, tiny_graph, tiny_bundle, tmp_path))
    shutil.copytree(tiny_graph if arguments[0] == "export" else tiny_bundle.parent, tmp_path / "out")
    before = contents(tmp_path / "out")
    assert CliRunner().invoke(main, arguments).exit_code == 2
    assert contents(tmp_path / "out") == before


# What the system refuses


def unreadable(name: str, command: str) -> Callable[[World], list[str]]:
    def make(world: World) -> list[str]:
        folder = world.copy({"export": world.checkpoint, "build": world.graph, "generate": world.bundle}[command])
        if name == "model.safetensors.index.json":
            table = dict.fromkeys(load_file(folder / "model.safetensors"), "model.safetensors")
            (folder / name).write_text(json.dumps({"weight_map": table}))
        if name == "generation_config.json":
            (folder / name).write_text("{}")
        (folder / name).chmod(0)
        after = {"export": ["-o", world.out], "build": ["-o", world.out, "--target", "cpu"], "generate": ["text"]}
        return [command, str(folder), *after[command]]

    return make


UNREADABLE = {
    f"{command}: {name}": unreadable(name, command)
    for command, names in {
        "export": ("config.json", "model.safetensors", "model.safetensors.index.json", "tokenizer.json",
                   "generation_config.json"),
        "build": ("manifest.json", "segments/head.onnx", "weights.lock.json"),
        "generate": ("manifest.json", "placed.bin", "tokenizer.json"),
    }.items()
    for name in names
}  # fmt: skip


@pytest.mark.parametrize("name", UNREADABLE)
def test_a_file_that_cannot_be_read_is_named_with_the_reason(
    tiny_checkpoint: Path, tiny_graph: Path, tiny_bundle: Path, tmp_path: Path, name: str
) -> None:
    arguments = UNREADABLE[name](World(tiny_checkpoint, tiny_graph, tiny_bundle, tmp_path))
    before = contents(tmp_path)
    with permissions_hold():
        result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 2, result.output
    assert name.split(": ")[1] in result.output and "Permission denied" in result.output
    assert contents(tmp_path) == before


def test_export_to_a_full_disk_is_exit_2_and_leaves_what_was_there(tiny_checkpoint: Path, tmp_path: Path) -> None:
    config = json.loads((tiny_checkpoint / "config.json").read_text())
    config |= {"num_hidden_layers": 1, "layer_types": ["sliding_attention"], "mlp_layer_types": ["moe"]}
    source = random_checkpoint(config, tmp_path / "checkpoint", "plain")
    with small_disk(tmp_path / "disk", 1 << 15) as disk:
        (disk / "kept").write_text("mine")
        result = CliRunner().invoke(main, ["export", str(source), "-o", str(disk / "out"), "--json"])
        assert result.exit_code == 2, result.output
        error = json.loads(result.stdout)["error"]
        assert (error["path"], error["reason"]) == (str(disk / "out"), "ENOSPC")
        assert [path.name for path in disk.iterdir() if path.suffix != ".lock"] == ["kept"]


def test_build_on_a_full_disk_is_exit_2_and_leaves_what_was_there(tiny_graph: Path, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 1 << 20) as disk:
        (disk / "kept").write_text("mine")
        arguments = ["build", str(tiny_graph), "-o", str(disk / "out"), "--target", "cpu"]
        result = CliRunner().invoke(main, arguments)
        assert result.exit_code == 2, result.output
        assert "cpu: failed" in result.stdout and f"{disk / 'out' / 'cpu'}" in result.stdout
        assert "No space left on device" in result.stdout
        left = [path for path in disk.rglob("*") if path.is_file() and not path.name.endswith(".lock")]
        assert [path.name for path in left] == ["kept"]
