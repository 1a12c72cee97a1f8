"""A whole V4-Flash validated on a small machine: does memory hold it, how long does it take, does the bundle compute what PyTorch computes?

``python benchmarks/half_real_validate.py export/configs/deepseek-v4-flash.json --work FOLDER -o benchmarks/results/half-real-validate.json``.
The checkpoint is half real as in half_real.py, but the marked experts have values in the checkpoint, too, so both sides read the same weights.
Reference and bundle go through the model a layer at a time (``foldkv validate --layered``), because neither fits into memory. The tokenizer is that of
examples/tiny-v4: bytes. Weights are random, so the texts mean nothing to the model; what is compared is what both compute.

Needs 22 GiB of disk for a checkpoint with holes, and 0.54 GiB twice for each marked expert of a layer.
"""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
from half_real_files import lay_out, make, stacks_of

import foldkv

_TOKENIZER = Path(__file__).parent.parent / "examples" / "tiny-v4" / "tokenizer.json"

_METRICS = (
    "tokens", "kl_mean", "kl_max", "top1_agreement", "logit_error_max", "chunk_error_max", "restore_error_max", "layer_error_max",
    "layer_own_max",
)  # fmt: skip


@click.command()
@click.argument("config", type=click.Path(path_type=Path, exists=True))
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True)
@click.option(
    "--work", type=click.Path(path_type=Path), required=True, help="Folder for all files, which are kept there."
)
@click.option("--marked", default=8, show_default=True, help="Experts of a layer that have values.")
@click.option("--tokens", default=272, show_default=True, help="Of the one text.")
def main(config: Path, output: Path, work: Path, marked: int, tokens: int) -> None:
    """Measure and write the results as JSON."""
    work = work.resolve()
    os.environ["FOLDKV_CACHE"] = str(work / "cache")
    made = make(config, work, marked, _TOKENIZER)
    bundle, checkpoint = work / "bundles" / "cpu", work / "checkpoint"
    stacks = lay_out(stacks_of(bundle), marked, drawn=False)
    words = [
        "validate", bundle, "--reference", checkpoint, "--report", work / "report", "--texts", "1", "--text-tokens", tokens,
        "--distance", "16", "--cases-per-distance", "1", "--cases-per-kind", "0", "--sweep-cases", "0", "--layered", "--json",
    ]  # fmt: skip
    load, start = os.getloadavg()[0], time.monotonic()
    with (work / "validate.json").open("w") as out, (work / "validate.log").open("w") as log:
        process = subprocess.Popen([sys.executable, "-m", "foldkv", *map(str, words)], stdout=out, stderr=log)
        peak = _peak(process)
    report = json.loads((work / "validate.json").read_text())
    content = {
        "what": "a whole V4-Flash, half real, validated a layer at a time: one text, one value to retrieve",
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{platform.machine()}, {len(os.sched_getaffinity(0))} processors, shared",
        "versions": {name: version(name) for name in ("onnxruntime", "torch", "transformers")} | {"foldkv": foldkv.__version__},
        "model": config.stem,
        **made,
        "marked": marked,
        "stacks": stacks,
        "tokens": tokens,
        "load": [load, os.getloadavg()[0]],
        "seconds": round(time.monotonic() - start, 1),
        "exit_code": process.returncode,
        "phases": phases((work / "validate.log").read_text().splitlines()),
        **peak,
        "metrics": {name: report["metrics"][name] for name in _METRICS},
        "gates": {one["name"]: one["verdict"] for one in report["gates"]},
    }  # fmt: skip
    output.write_text(json.dumps(content, indent=2) + "\n")


def phases(lines: list[str]) -> list[dict[str, Any]]:
    """What a run was doing, and the second in which it began, from what it said."""
    found = []
    for line in lines:
        match = re.match(r"\[(?:(\d+):)?(\d+):(\d+)\] (.*)", line)
        if match and not re.match(r"[\d.]+ (\w+ )?of ", match[4]):
            hours, minutes, seconds = (int(part or 0) for part in match.groups()[:3])
            found.append({"second": 3600 * hours + 60 * minutes + seconds, "what": match[4]})
    return found


def _peak(process: subprocess.Popen[bytes]) -> dict[str, Any]:
    """The largest anonymous memory of a process until it ends, seen ten times a second; and the bytes that it read."""
    peak, read = 0, 0
    while process.poll() is None:
        try:
            status = Path(f"/proc/{process.pid}/status").read_text()
            counters = Path(f"/proc/{process.pid}/io").read_text()
        except OSError:
            break
        lines = dict(line.split(":", 1) for line in status.splitlines())
        if "RssAnon" in lines:
            peak = max(peak, 1024 * int(lines["RssAnon"].split()[0]))
        found = dict(line.split(": ") for line in counters.splitlines())
        read = max(read, int(found.get("read_bytes", 0)))
        time.sleep(0.1)
    process.wait()
    return {"anonymous_peak": peak, "read_bytes": read}


if __name__ == "__main__":
    main()
