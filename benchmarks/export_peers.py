"""Export of DeepSeek-V4 by foldkv, by mobius-onnx and by plain ``torch.onnx.export``, each in a process of its own.

``python benchmarks/export_peers.py tests/data/deepseek-v4-flash.json -o benchmarks/results/export-peers.json --mobius PYTHON``
where PYTHON is that of an environment in which mobius-onnx is installed; without it, the results say that it is absent.
A small checkpoint (four layers of all kinds, the released ratios, random weights in bfloat16, which every tool reads) is
exported with its weights, and what came out is run in ONNX Runtime beside transformers.
The full-size model has headers only: foldkv writes its package, mobius ``--no-weights``, and torch gets the first
layers of transformers' model at real width with weights that take no memory. Failures are results: the line that names
the cause is kept.
"""

from __future__ import annotations

import json
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnx
import onnxruntime

import foldkv

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "tests" / "support")]

from moe import CONFIG

_TOKENS = 64
_SMALL = CONFIG | {"n_routed_experts": 8, "hidden_size": 256, "moe_intermediate_size": 128, "vocab_size": 512}
_TORCH = """
import json, sys, warnings
from pathlib import Path
import torch, transformers
warnings.simplefilter("ignore")
transformers.logging.set_verbosity_error()
folder, out, layers, cached = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4] == "cached"
static, experts = sys.argv[5] == "static", sys.argv[6]
given = json.loads((folder / "config.json").read_text())
if layers:
    from foldkv.export.segments import _hollow
    given.pop("quantization_config", None)
    given["num_hidden_layers"] = layers
    for key in ("compress_ratios", "layer_types"):
        if key in given:
            given[key] = given[key][:layers]
    config = transformers.DeepseekV4Config(**given, attn_implementation="eager")
    with torch.device("meta"):
        model = transformers.DeepseekV4ForCausalLM(config).float()
    config = model.config
    model = _hollow(model)
    model.config._experts_implementation = experts
else:
    model = transformers.DeepseekV4ForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", experts_implementation=experts)
class Logits(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model
    def forward(self, input_ids):
        return self.model(input_ids=input_ids, use_cache=False).logits
length = torch.export.Dim("sequence", min=2, max=4096)
if cached:
    program = torch.onnx.export(
        model.eval(), (), dynamo=True, verbose=False, optimize=False, opset_version=20,
        kwargs={"input_ids": torch.zeros(1, 8, dtype=torch.int64),
                "past_key_values": transformers.cache_utils.DynamicCache(config=model.config), "use_cache": True})
else:
    program = torch.onnx.export(
        Logits(model).eval(), (torch.zeros(1, 8, dtype=torch.int64),), dynamo=True, verbose=False, optimize=False,
        opset_version=20, dynamic_shapes=({1: length},) if not static else None)
if layers:
    for value in program.model.graph.initializers.values():
        value.const_value = None
    import onnx_ir
    Path(out).mkdir(parents=True)
    onnx_ir.save(program.model, Path(out) / "model.onnx")
else:
    Path(out).mkdir(parents=True)
    program.save(Path(out) / "model.onnx", external_data=True)
"""

_LAUNCH = """
import json, os, resource, signal, sys, threading, time
start = time.monotonic()
pid = os.fork()
if not pid:
    log = os.open(sys.argv[2], os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.execvp(sys.argv[4], sys.argv[4:])
timer = threading.Timer(int(sys.argv[3]), os.kill, [pid, signal.SIGKILL])
timer.start()
_, status, usage = os.wait4(pid, 0)
timer.cancel()
with open(sys.argv[1], "w") as file:
    json.dump({"seconds": round(time.monotonic() - start, 1), "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1),
               "peak_rss_bytes": usage.ru_maxrss * 1024, "code": os.waitstatus_to_exitcode(status)}, file)
"""
_LOGITS = """
import json, sys
import numpy as np, torch, transformers
transformers.logging.disable_progress_bar()
model = transformers.DeepseekV4ForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32, attn_implementation="eager")
with torch.no_grad():
    np.save(sys.argv[2], model.eval()(input_ids=torch.tensor(json.loads(sys.argv[3]))).logits.numpy())
"""


@click.command()
@click.argument("config", type=click.Path(path_type=Path, exists=True))
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True)
@click.option("--mobius", type=click.Path(path_type=Path), help="Python of an environment with mobius-onnx.")
@click.option("--limit", default=600, show_default=True, help="Seconds after which an export is ended.")
@click.option("--layers", default="1,2,3", show_default=True, help="Layers of real width that torch exports.")
def main(config: Path, output: Path, mobius: Path | None, limit: int, layers: str) -> None:
    """Measure and write the results as JSON."""
    from checkpoints import random_checkpoint, sparse_checkpoint

    with tempfile.TemporaryDirectory(dir=output.parent) as folder:
        work = Path(folder)
        small = random_checkpoint(_SMALL, work / "small", "plain")
        expected = _reference(small)
        rows = []

        def add(tool: str, model: str, command: list[str], out: Path, compare: bool = False) -> dict[str, Any]:
            row = {"tool": tool, "model": model} | _run(command, out, limit)
            if compare and "error" not in row:
                row |= _against(_decoder(out), expected)
            rows.append(row)
            click.echo(json.dumps(row))
            return row

        foldkv_export = [sys.executable, "-m", "foldkv", "export"]
        torch_export = [sys.executable, "-c", _TORCH]
        add("foldkv --flat", "small", [*foldkv_export, str(small), "-o", str(work / "a"), "--flat"], work / "a", True)
        for experts in ("grouped_mm", "batched_mm"):  # the first is transformers' default
            for length in ("any", "static"):
                add(
                    _torch_name(length, experts), "small",
                    [*torch_export, str(small), str(work / f"b-{experts}-{length}"), "0", "plain", length, experts],
                    work / f"b-{experts}-{length}", True,
                )  # fmt: skip
        add(
            "torch.onnx.export, 8 tokens, with its cache", "small",
            [*torch_export, str(small), str(work / "b"), "0", "cached", "static", "batched_mm"], work / "b", True,
        )  # fmt: skip
        sparse = sparse_checkpoint(config, work / "sparse")
        add(
            "foldkv", config.stem,
            [*foldkv_export, str(sparse), "-o", str(work / "c")], work / "c",
        )  # fmt: skip
        torch_rows = {
            count: add(
                f"{_torch_name('static', 'batched_mm')}, first {count} layers", config.stem,
                [*torch_export, str(sparse), str(work / f"d{count}"), str(count), "plain", "static", "batched_mm"],
                work / f"d{count}",
            )
            for count in map(int, layers.split(","))
        }  # fmt: skip
        peer = _mobius_version(mobius)
        if mobius is not None and peer is not None:
            build = [str(mobius), "-m", "mobius", "build", "--config"]
            add("mobius", "small", [*build, str(small), str(work / "e")], work / "e", True)
            headers = [*build, str(sparse), str(work / "f"), "--no-weights"]
            add("mobius --no-weights", config.stem, headers, work / "f")
    content = {
        "what": "export by three tools, each in a process of its own, start of Python included; one run",
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{platform.machine()}, {len(os.sched_getaffinity(0))} processors, shared",
        "load_average": [round(load, 1) for load in os.getloadavg()],
        "versions": {n: version(n) for n in ("torch", "transformers", "onnx", "onnx-ir", "onnxscript", "onnxruntime")}
        | {"foldkv": foldkv.__version__, "mobius-onnx": peer or "not installed: give --mobius"},
        "limit_seconds": limit,
        "extrapolated": _extrapolated(torch_rows, json.loads(config.read_text())["num_hidden_layers"]),
        "rows": rows,
    }
    output.write_text(json.dumps(content, indent=2) + "\n")


def _torch_name(length: str, experts: str) -> str:
    return f"torch.onnx.export, {'8 tokens' if length == 'static' else 'any length'}, no cache, experts as {experts}"


def _mobius_version(python: Path | None) -> str | None:
    if python is None:
        return None
    asked = "from importlib.metadata import version; print(version('mobius-onnx'))"
    run = subprocess.run([python, "-c", asked], check=False, capture_output=True, text=True)
    return run.stdout.strip() or None


def _decoder(out: Path) -> Path:
    """The decoder's graph; mobius puts it beside that of a draft head where a model has one."""
    return min(out.rglob("model.onnx"), key=lambda path: (path.parent.name != "model", len(path.parts)))


def _run(command: list[str], out: Path, limit: int) -> dict[str, Any]:
    """Seconds, peak memory and what was written; or why not."""
    with tempfile.TemporaryDirectory() as folder:
        log, usage = Path(folder) / "log", Path(folder) / "usage.json"
        # What the kernel counts as a child's peak includes the memory of the process that it was forked from: a small one.
        words = [sys.executable, "-S", "-c", _LAUNCH, str(usage), str(log), str(limit), *command]
        subprocess.run(words, check=True)
        row: dict[str, Any] = json.loads(usage.read_text())
        lines = [line.strip() for line in log.read_text().splitlines() if line.strip()]
    code = row.pop("code")
    if code == -signal.SIGKILL:
        return row | {"error": f"ended after {limit} s, or killed for memory"}
    if code:
        # torch's exporter lists the causes at the end, each with its class; the first is what was not possible.
        causes = [line for line in lines if re.match(r"<class '[\w.]+'>: ", line)][:1]
        errors = [line for line in lines if re.match(r"(\w+\.)*\w*(Error|Exception)\b", line)]
        return row | {"error": (causes or errors[-1:] or lines[-1:] or [f"exit code {code}"])[0][:300]}
    own = [path for path in out.rglob("*") if path.is_file() and path.stat().st_nlink == 1]
    model = onnx.load(_decoder(out), load_external_data=False)
    state: dict[str, int] = {}
    for value in model.graph.input:
        if len(value.type.tensor_type.shape.dim) > 2:  # ids, positions, lengths and masks have one or two
            sizes = ", ".join(d.dim_param or str(d.dim_value) for d in value.type.tensor_type.shape.dim)
            key = f"{re.sub(r'[0-9]+', 'N', value.name)} [{sizes}]"
            state[key] = state.get(key, 0) + 1
    return row | {
        "bytes_written": sum(path.stat().st_size for path in own),
        "nodes": {"graph": len(model.graph.node), "functions": sum(len(f.node) for f in model.functions)},
        "state_inputs": state,
    }


def _reference(small: Path) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Tokens, and transformers' logits for them; in another process, whose memory a child would count as its own."""
    ids = np.random.default_rng(1).integers(0, 256, (1, _TOKENS))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "logits.npy"
        subprocess.run([sys.executable, "-c", _LOGITS, str(small), str(file), json.dumps(ids.tolist())], check=True)
        return ids, np.load(file)


def _against(model: Path, expected: tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]) -> dict[str, Any]:
    """Largest difference of logits from transformers' over the tokens that the graph takes, or why it does not run."""
    ids, logits = expected
    try:
        session = onnxruntime.InferenceSession(str(model))
        fixed = {value.name: value.shape for value in session.get_inputs()}["input_ids"][1]
        count = fixed if isinstance(fixed, int) else _TOKENS
        feeds = {value.name: _feed(value, ids[:, :count]) for value in session.get_inputs()}
        found = session.run([session.get_outputs()[0].name], feeds)[0]
    except Exception as error:  # noqa: BLE001 - what a peer's graph raises is the result
        return {"run_error": str(error).splitlines()[0][:300]}
    return {
        "tokens_compared": count,
        "largest_logit_difference": float(np.abs(found - logits[:, : found.shape[1]]).max()),
        "difference_of_first_three_tokens": float(np.abs(found - logits[:, : found.shape[1]])[:, :3].max()),
    }


def _feed(value: Any, ids: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """An input for a first chunk: ids, positions and lengths by name, caches empty or zero."""
    count = ids.shape[1]
    dtype = {"tensor(int64)": np.int64, "tensor(int32)": np.int32, "tensor(float)": np.float32}[value.type]
    if value.name == "input_ids":
        return ids.astype(dtype)
    if value.name in ("position_ids", "logit_indices"):
        return np.arange(count, dtype=dtype)[None]
    if value.name in ("num_tokens", "active_context"):
        return np.array([count], dtype)
    if value.name == "attention_mask":
        return np.ones((1, count), dtype)
    rows = {"batch": 1, "batch_size": 1, "batch_dim": 1}
    sizes = [
        s if isinstance(s, int) else rows.get(s, _TOKENS if str(s).startswith("entries") else 0) for s in value.shape
    ]
    return np.zeros(sizes, dtype)


def _extrapolated(rows: dict[int, dict[str, Any]], layers: int) -> dict[str, Any]:
    done = {count: row for count, row in rows.items() if "error" not in row}
    if len(done) < 2:
        return {"note": "fewer than two exports of real width by torch.onnx.export succeeded"}
    last = max(done)
    before = max(count for count in done if count != last)
    # The first layers of the released models are cheaper: sliding windows, and two of the kinds alike.
    step = (done[last]["cpu_seconds"] - done[before]["cpu_seconds"]) / (last - before)
    return {
        "torch_export_all_layers_cpu_seconds": round(done[last]["cpu_seconds"] + step * (layers - last)),
        "note": f"{last} layers plus {layers - last} times what the last one added; an estimate, not measured",
    }


if __name__ == "__main__":
    main()
