"""What activations take, measured, beside the planner's estimate.

ONNX Runtime: the peak of resident memory while one chunk runs, over what was resident after a chunk of one token, in a
process of its own. TensorRT-RTX: the regions of device memory that an engine's plan lists for its largest shapes; the largest
sum of one subgraph; also of a model with wide experts, which are gathered a few tokens at a time. No GPU is needed.
`python benchmarks/activations.py`
"""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import numpy as np
from moe import CONFIG

import foldkv
from foldkv.export.checkpoint.config_reader import spec_from_file
from foldkv.export.memory import BLOCK_ROOM, activations
from foldkv.export.package import export_checkpoint
from foldkv.optimize.build import build_bundles
from foldkv.optimize.engine_set import PLANS
from foldkv.optimize.recipe import Shapes

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "activations.json"
#: (batch, chunk, context): where the experts, the window's logits, or blocks of the indexer take most.
POINTS = (
    (1, 64, 1024), (1, 256, 1024), (1, 1024, 4096), (4, 512, 16384), (1, 64, 65536), (1, 2048, 65536), (1, 256, 1 << 20),
)  # fmt: skip
_REGION = re.compile(rb"name=devmem_topdown_(\d+) size=(\d+) ")


def chunk_bytes(bundle: Path, batch: int, chunk: int, context: int) -> int:
    """Bytes that ONNX Runtime takes for one chunk at the end of a context. For a process that does nothing else."""
    from foldkv.runtime import Model
    from foldkv.runtime.buffers import StateBuffers

    buffers, executor = Model(bundle, threads=1).open(context, batch)
    assert isinstance(buffers, StateBuffers)
    for array in buffers.arrays.values():
        array += 0  # untouched pages would be counted to the chunk

    def run(length: int, start: int) -> None:
        lengths, starts = np.full(batch, length), np.full(batch, start)
        tokens, last = np.zeros((batch, length), np.int64), np.full((batch, 1), length - 1)
        executor.run(tokens, starts, lengths, start + length, last, trim=True)

    run(1, 0)
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # restart the peak
    run(chunk, context - chunk)
    return _status("VmHWM") - before


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(key))


def region_bytes(plan: bytes) -> int:
    """The largest sum of regions of one subgraph in a TensorRT-RTX plan, for any profile; each list starts with number 0."""
    sums: list[int] = []
    for number, size in _REGION.findall(plan):
        if number == b"0" or not sums:
            sums.append(0)
        sums[-1] += int(size)
    return max(sums)


def _point(measured: int, planned: int, **facts: Any) -> dict[str, Any]:
    row = {**facts, "measured": measured, "planned": planned, "ratio": round(measured / planned, 3)}
    click.echo(json.dumps(row))
    return row


@click.command()
@click.option("--checkpoint", type=click.Path(path_type=Path), default=ROOT / "examples" / "tiny-v4", show_default=True)
@click.option("--output", type=click.Path(path_type=Path), default=RESULTS, show_default=True)
@click.option("--measure", nargs=4, type=str, help="BUNDLE BATCH CHUNK CONTEXT: print what one chunk takes, and end.")
def main(checkpoint: Path, output: Path, measure: tuple[str, ...] | None) -> None:
    """Measure and write the results as JSON."""
    if measure:
        click.echo(chunk_bytes(Path(measure[0]), *map(int, measure[1:])))
        return
    from checkpoints import random_checkpoint  # moe.py puts tests/support on the path

    spec = spec_from_file(checkpoint)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        graph = export_checkpoint(checkpoint, work / "graph")
        build_bundles(graph, work, ["cpu"])
        for batch, chunk, context in POINTS:
            words = [sys.executable, __file__, "--measure", str(work / "cpu"), *map(str, (batch, chunk, context))]
            measured = int(subprocess.run(words, check=True, capture_output=True, text=True).stdout)
            planned = activations(spec, context=context, batch=batch, chunk=chunk, room=BLOCK_ROOM).total(reuse=False)
            rows.append(_point(measured, planned, backend="onnxruntime", batch=batch, chunk=chunk, context=context))
        wide = {**CONFIG, "n_routed_experts": 16}
        graphs = {
            "tiny-v4": graph,
            "wide": export_checkpoint(random_checkpoint(wide, work / "wide"), work / "wide-graph"),
        }
        specs = {"tiny-v4": spec, "wide": spec_from_file(work / "wide")}
        for (name, package), plugins in itertools.product(graphs.items(), (False, True)):
            out = work / f"{name}-{plugins}"
            build_bundles(package, out, ["a100"], plugins=plugins, shapes=Shapes())
            measured = max(region_bytes(plan.read_bytes()) for plan in (out / "a100" / PLANS).glob("*-*.plan"))
            largest = {key: sizes[2] for key, sizes in vars(Shapes()).items()}
            # Chunks of one sequence, and decode steps of all.
            steps = [largest | {"batch": 1}, largest | {"chunk": 1}]
            planned = max(
                activations(specs[name], **sizes, plugins=plugins, weight_item=2).total(reuse=True) for sizes in steps
            )
            rows.append(_point(measured, planned, backend="tensorrt-rtx", model=name, plugins=plugins, **largest))
    content = {
        "what": "bytes of activations of a chunk: measured, and as `foldkv plan` estimates them",
        "date": time.strftime("%Y-%m-%d"),
        "models": {"tiny-v4": "examples/tiny-v4", "wide": wide},
        "versions": {name: version(name) for name in ("onnxruntime", "tensorrt-rtx")} | {"foldkv": foldkv.__version__},
        "rows": rows,
    }
    output.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
