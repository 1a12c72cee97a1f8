"""Seconds, peak memory and sizes of exporting full-size checkpoints without touching their weights.

``python benchmarks/export.py tests/data/deepseek-v4-flash.json tests/data/deepseek-v4-pro.json -o
benchmarks/results/export-full.json``. The checkpoints are sparse files with true headers, names, dtypes and shapes
(tests/support/checkpoints.py). Every export is a process of its own, start of Python included. The peer is plain
``torch.onnx.export`` of one layer of the same model (all weights zeros without memory), times the number of layers.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import onnx

import foldkv

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))

_ONE_LAYER = """
import sys, time
from pathlib import Path
from foldkv.export.checkpoint.config_reader import spec_from_file
from foldkv.export.layer_traces import trace_attention, trace_experts
spec = spec_from_file(Path(sys.argv[1]))
trace_attention(spec, spec.num_layers - 1, "hf")
start, cpu = time.monotonic(), time.process_time()
trace_attention(spec, spec.num_layers - 2, "hf")
trace_experts(spec, spec.num_layers - 2)
print(time.monotonic() - start, time.process_time() - cpu)
"""


@click.command()
@click.argument("configs", type=click.Path(path_type=Path, exists=True), nargs=-1, required=True)
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True)
@click.option("--form", type=click.Choice(["instruct", "base"]), default="instruct", show_default=True)
def main(configs: tuple[Path, ...], output: Path, form: str) -> None:
    """Measure and write the results as JSON."""
    from checkpoints import sparse_checkpoint

    rows = []
    for config in configs:
        with tempfile.TemporaryDirectory(dir=output.parent) as folder:
            checkpoint = sparse_checkpoint(config, Path(folder) / "checkpoint", form)
            rows.append({"model": config.stem} | _export(checkpoint, Path(folder) / "graph") | _peer(config))
            click.echo(json.dumps(rows[-1], indent=2))
    content = {
        "what": "foldkv export of sparse full-size checkpoints, one process each, nothing in the cache of traces; one run",
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{platform.machine()}, {len(os.sched_getaffinity(0))} processors, shared",
        "load_average": [round(load, 1) for load in os.getloadavg()],
        "versions": {name: version(name) for name in ("torch", "onnx", "onnx-ir", "onnxscript")}
        | {"foldkv": foldkv.__version__},
        "form": form,
        "not_measured": [
            "real weights: none can be had here; headers, names, dtypes and shapes are the released ones",
            "mobius-onnx: see benchmarks/export_peers.py",
            "an idle machine: wall seconds include waiting for a processor; cpu_seconds do not",
        ],
        "rows": rows,
    }
    output.write_text(json.dumps(content, indent=2) + "\n")


def _export(checkpoint: Path, out: Path) -> dict[str, Any]:
    start = time.monotonic()
    command = [sys.executable, "-m", "foldkv", "export", str(checkpoint), "-o", str(out)]
    empty = os.environ | {"FOLDKV_CACHE": str(out.with_name("cache"))}
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL, env=empty)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.monotonic() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise click.ClickException(f"export failed with {process.returncode}")
    models = {path.stem: onnx.load(path) for path in (out / "segments").iterdir()}
    manifest = json.loads((out / "manifest.json").read_text())
    own = [path for path in out.rglob("*") if path.is_file()]
    return {
        "seconds": round(seconds, 1),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1),
        "peak_rss_bytes": usage.ru_maxrss * 1024,
        "checkpoint_bytes": sum(path.stat().st_size for path in checkpoint.glob("*.safetensors")),
        "checkpoint_tensors": len(json.loads((checkpoint / "model.safetensors.index.json").read_text())["weight_map"]),
        "weight_bytes_copied": 0,  # the package has no file of weights
        "package_bytes_written": sum(path.stat().st_size for path in own),
        "segment_bytes": sum(path.stat().st_size for path in (out / "segments").iterdir()),
        "lock_bytes": (out / "weights.lock.json").stat().st_size,
        "nodes": {name: len(model.graph.node) for name, model in models.items()},
        "weight_inputs": {name: len(row["weights"]) for name, row in manifest["segments"].items()},
        "layers": dict(Counter(manifest["layers"])),
    }


def _peer(config: Path) -> dict[str, Any]:
    run = subprocess.run(
        [sys.executable, "-c", _ONE_LAYER, str(config)], capture_output=True, text=True, check=True
    )  # fmt: skip
    seconds, cpu = map(float, run.stdout.split()[-2:])
    layers = json.loads(config.read_text())["num_hidden_layers"]
    return {
        "torch_export_one_layer_seconds": round(seconds, 1),
        "torch_export_one_layer_cpu_seconds": round(cpu, 1),
        "torch_export_all_layers_cpu_seconds_estimated": round(cpu * layers),
    }


if __name__ == "__main__":
    main()
