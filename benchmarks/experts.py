"""Decode of one routed-experts layer at the width of V4-Flash with 8, 64 and 256 experts, six chosen, on the CPU.

``python benchmarks/experts.py -o benchmarks/results/experts-cpu.json``. Weights are packed e2m1 in a sparse file that ONNX
Runtime maps: all zero, which changes neither the work nor what is read. Every count is a process of its own; turns are
taken in rounds, and the figure is the median of all. Resident memory is read after the steps.
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

import click
import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper

import foldkv
from foldkv.export.operators.packed import Matrix, routed_experts
from foldkv.export.operators.registry import DOMAIN, ONNX_OPSET

_HIDDEN, _INNER, _CHOSEN, _STEPS = 4096, 2048, 6, 6


def one_layer(folder: Path, experts: int) -> Path:
    """A graph of one node with its weights in a sparse file beside it."""
    matrices, codes, scales = {}, 0, 0
    for part, (rows, columns) in {"w1": (_INNER, _HIDDEN), "w2": (_HIDDEN, _INNER), "w3": (_INNER, _HIDDEN)}.items():
        matrices[part] = Matrix(codes, scales, (rows, columns), (rows, columns // 32))
        codes, scales = codes + rows * columns // 2, scales + rows * columns // 32
    with (folder / "weights.bin").open("wb") as file:
        file.truncate(experts * (codes + scales))
    initializers = []
    for name, offset, width in (("codes", 0, codes), ("scales", experts * codes, scales)):
        tensor = TensorProto(name=name, data_type=TensorProto.INT8, dims=[experts, width])
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in (("location", "weights.bin"), ("offset", offset), ("length", experts * width)):
            tensor.external_data.add(key=key, value=str(value))
        initializers.append(tensor)
    initializers.append(helper.make_tensor("slots", TensorProto.INT64, [experts], range(experts)))
    inputs = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT, ["tokens", _HIDDEN]),
        helper.make_tensor_value_info("chosen", TensorProto.INT64, ["tokens", _CHOSEN]),
        helper.make_tensor_value_info("weights", TensorProto.FLOAT, ["tokens", _CHOSEN]),
    ]
    function = routed_experts("fp4", matrices)
    names = ["x", "chosen", "weights", "codes", "scales", "slots"]
    node = helper.make_node(function.name, names, ["y"], domain=DOMAIN, limit=10.0)
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["tokens", _HIDDEN])
    graph = helper.make_graph([node], "experts", inputs, [output], initializers)
    opsets = [helper.make_opsetid("", ONNX_OPSET), helper.make_opsetid(DOMAIN, 1)]
    model = helper.make_model(graph, opset_imports=opsets, functions=[function], ir_version=10)
    onnx.save(model, folder / "model.onnx")
    return folder / "model.onnx"


def measure(experts: int) -> dict[str, float]:
    """Seconds of a step, of the session's start, and resident bytes after the steps, in this process."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.monotonic()
        session = onnxruntime.InferenceSession(str(one_layer(Path(folder), experts)))
        opened = time.monotonic() - start
        random, seconds = np.random.default_rng(0), []
        for _ in range(_STEPS):
            feeds = {
                "x": random.normal(size=(1, _HIDDEN)).astype(np.float32),
                "chosen": random.permutation(experts)[None, :_CHOSEN].astype(np.int64),
                "weights": np.full((1, _CHOSEN), 1 / _CHOSEN, np.float32),
            }
            start = time.monotonic()
            session.run(None, feeds)
            seconds.append(time.monotonic() - start)
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    return {"step": statistics.median(seconds[2:]), "open": opened, "rss": pages * os.sysconf("SC_PAGE_SIZE")}


@click.command()
@click.option("-o", "--output", type=click.Path(path_type=Path))
@click.option("--counts", default="8,64,256", show_default=True)
@click.option("--rounds", default=3, show_default=True)
@click.option("--one", type=int, help="Measure this count here and print it.")
def main(output: Path | None, counts: str, rounds: int, one: int | None) -> None:
    """Measure and write the results as JSON."""
    if one is not None:
        click.echo(json.dumps(measure(one)))
        return
    assert output is not None
    measured: dict[int, list[dict[str, float]]] = {}
    for _ in range(rounds):
        for count in map(int, counts.split(",")):
            run = subprocess.run(
                [sys.executable, __file__, "--one", str(count)], capture_output=True, text=True, check=True
            )
            measured.setdefault(count, []).append(json.loads(run.stdout.splitlines()[-1]))
    rows = [
        {
            "experts": count,
            "weight_bytes": count * 3 * _HIDDEN * _INNER * 17 // 32,
            "step_seconds": round(statistics.median(run["step"] for run in runs), 4),
            "open_seconds": round(statistics.median(run["open"] for run in runs), 3),
            "resident_bytes": int(statistics.median(run["rss"] for run in runs)),
        }
        for count, runs in measured.items()
    ]
    for row in rows:
        row["step_over_fewest"] = round(row["step_seconds"] / rows[0]["step_seconds"], 2)
    content = {
        "what": "one decode token through one layer of packed e2m1 experts at the width of V4-Flash, six chosen; medians",
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{platform.machine()}, {len(os.sched_getaffinity(0))} processors, shared",
        "versions": {"onnxruntime": version("onnxruntime"), "foldkv": foldkv.__version__},
        "rounds": rounds,
        "rows": rows,
    }
    output.write_text(json.dumps(content, indent=2) + "\n")
    click.echo(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
