"""Seconds and peak memory of every stage of the main job, each in a process of its own.

``python benchmarks/stages.py examples/tiny-v4 -o benchmarks/results/stages-cpu.json``. Peak memory is the
largest resident set of the stage's process or of a child that it waited for, as the kernel counts it.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click

import foldkv


@click.command()
@click.argument("checkpoint", type=click.Path(path_type=Path, exists=True))
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True)
@click.option("--targets", default="cpu,a100,rtx4090,rtx5090", show_default=True)
@click.option("--plugins", default="off", show_default=True, help="How GPU targets are built: on or off.")
@click.option("--rounds", default=3, show_default=True, help="Medians are taken over this many rounds.")
def main(checkpoint: Path, output: Path, targets: str, plugins: str, rounds: int) -> None:
    """Measure and write the results as JSON."""
    measured: dict[str, list[tuple[float, int]]] = {}
    sizes: dict[str, int] = {}
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as folder:
            work = Path(folder)
            stages = {"export": ["export", str(checkpoint), "-o", str(work / "graph")]}
            for target in targets.split(","):
                form = "off" if target == "cpu" else plugins
                build = ["build", str(work / "graph"), "-o", str(work), "--target", target, "--plugins", form]
                stages[f"build {target}"] = build
            bundle = str(work / "cpu")
            stages["validate cpu"] = [
                "validate", bundle, "--reference", str(checkpoint), "--report", str(work / "report")
            ]  # fmt: skip
            for name, words in stages.items():
                measured.setdefault(name, []).append(_run(words))
                click.echo(f"{name}: {measured[name][-1][0]:.1f} s, {measured[name][-1][1] / 2**20:.0f} MiB")
            for made in ("graph", *targets.split(",")):
                sizes[made] = sum(path.stat().st_size for path in (work / made).rglob("*") if path.is_file())
    rows: list[dict[str, Any]] = [
        {
            "stage": name,
            "seconds": round(statistics.median(seconds for seconds, _ in runs), 2),
            "peak_rss_bytes": int(statistics.median(peak for _, peak in runs)),
        }
        for name, runs in measured.items()
    ]
    content = {
        "what": "each stage of the main job in its own process, start of Python included; medians",
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{platform.machine()}, {len(os.sched_getaffinity(0))} processors, shared",
        "versions": {name: version(name) for name in ("torch", "onnx", "onnxscript", "onnxruntime", "tensorrt-rtx")}
        | {"foldkv": foldkv.__version__},
        "rounds": rounds,
        "weight_bytes": (checkpoint / "model.safetensors").stat().st_size,
        "artifact_bytes": sizes,
        "rows": rows,
    }
    output.write_text(json.dumps(content, indent=2) + "\n")


def _run(words: list[str]) -> tuple[float, int]:
    start = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-m", "foldkv", *words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.monotonic() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise click.ClickException(f"foldkv {' '.join(words)} ended with {process.returncode}; run it to see why.")
    return seconds, usage.ru_maxrss * 1024


if __name__ == "__main__":
    main()
