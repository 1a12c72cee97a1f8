"""Bundles for GPUs from full-size checkpoints on a small machine: seconds, memory, disk, and what a GPU must hold and read.

``python benchmarks/real_size.py tests/data/deepseek-v4-flash.json tests/data/deepseek-v4-pro.json -o
benchmarks/results/real-size.json``. The checkpoints are sparse files with true headers (tests/support/checkpoints.py); they are
removed before the builds, which do not need them. Every command is a process of its own, start of Python included. Cold: no
plan, kernel or trace is in the cache. Warm: the same again, into another folder.
"""

from __future__ import annotations

import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click

import foldkv
from foldkv.export.checkpoint.config_reader import spec_from_file
from foldkv.export.contract.engine_set import ENGINES, EngineTable
from foldkv.export.package import Package
from foldkv.manifests import BundleManifest, read
from foldkv.optimize.floor import weight_floor

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))

TARGETS = ("a100", "l40s", "rtx4090", "rtx5090", "rtxpro6000", "dgx-spark")
LAYOUTS = ("dense", "fp8+fp4")
#: Tokens in the state of the step whose bytes are counted.
CONTEXT = 1 << 16


@click.command()
@click.argument("configs", type=click.Path(path_type=Path, exists=True), nargs=-1, required=True)
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True)
def main(configs: tuple[Path, ...], output: Path) -> None:
    """Measure and write the results as JSON."""
    from checkpoints import sparse_checkpoint

    from foldkv.export.package import read_package

    rows = []
    with tempfile.TemporaryDirectory(dir=output.parent) as folder:
        work = Path(folder)
        for config in configs:
            checkpoint = sparse_checkpoint(config, work / "checkpoint")
            graph = work / f"graph-{config.stem}"
            export = _timed(work, "export", checkpoint, "-o", graph)
            shutil.rmtree(checkpoint)
            row: dict[str, Any] = {"model": config.stem, "export": export, "graph_bytes": _bytes(graph)}
            for layout in LAYOUTS:
                words = [word for target in TARGETS for word in ("--target", target)]
                for run in ("cold", "warm"):
                    out = work / f"{run}-{layout}"
                    row[f"{run}, {layout}"] = _timed(work, "build", graph, "-o", out, *words, "--layout", layout)
                package = read_package(graph)
                row[layout] = {target: _facts(work / f"cold-{layout}" / target, package) for target in TARGETS}
                row["weight_floor_bytes"] = weight_floor(spec_from_file(config), "fp4")
                for run in ("cold", "warm"):
                    shutil.rmtree(work / f"{run}-{layout}")
            rows.append(row)
            click.echo(json.dumps({key: value for key, value in row.items() if key not in LAYOUTS}))
    content = {
        "what": "bundles for six GPUs from sparse full-size checkpoints, which are gone when they are built; one run",
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{platform.machine()}, {len(os.sched_getaffinity(0))} processors, shared",
        "versions": {name: version(name) for name in ("tensorrt-rtx", "triton", "torch", "onnx")}
        | {"foldkv": foldkv.__version__},
        "rows": rows,
    }
    output.write_text(json.dumps(content, indent=2) + "\n")


def _timed(work: Path, *words: object) -> dict[str, float]:
    """Seconds of a command, and peak memory in bytes of the largest of its processes."""
    environment = os.environ | {"FOLDKV_CACHE": str(work / "cache")}
    start = time.monotonic()
    command = [sys.executable, "-m", "foldkv", *map(str, words)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise click.ClickException(done.stderr)
    seconds = time.monotonic() - start
    return {"seconds": seconds, "largest_child_so_far": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024}


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _facts(bundle: Path, package: Package) -> dict[str, Any]:
    """Sizes of a bundle, the largest build of a plan, what is done with its weights, and what a decode step moves."""
    from step_traffic import traffic

    steps = {
        name: traffic(bundle, package, name, CONTEXT) for name in dict.fromkeys(name for _, name in package.calls())
    }
    calls = [steps[name] for _, name in package.calls()]
    manifest, table = read(BundleManifest, bundle), EngineTable.read(bundle / ENGINES)
    return {
        "bytes": _bytes(bundle),
        "peak_rss_bytes": manifest.build.peak_rss_bytes,
        "weight_bytes": table.weight_bytes,
        "weights": manifest.weights,
        "plugin_layers": manifest.engine.plugin_layers,
        "step": {
            "launches": sum(sum(one.launches.values()) for one in calls),
            "bytes": sum(one.bytes for one in calls),
            "floor": sum(one.floor for one in calls),
        },
        "segments": {
            name: {
                "calls": calls.count(steps[name]),
                "layers": one.layers,
                "plugins": sum(one.plugins.values()),
                "plan_bytes": one.header["bytes"],
                "capture": one.capture,
                "launches": dict(steps[name].launches),
                "weights": steps[name].weights,
                "state": steps[name].state,
                "activations": steps[name].activations,
                "floor": steps[name].floor,
                "rewritten": steps[name].widest[0],
            }
            for name, one in (manifest.engine.segments or {}).items()
            if name in steps
        },
    }


if __name__ == "__main__":
    main()
