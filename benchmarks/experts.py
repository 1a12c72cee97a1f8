"""One routed-experts layer at the width of V4-Flash with 8, 64 and 256 experts, six chosen, on the CPU.

``python benchmarks/experts.py -o benchmarks/results/experts-cpu.json``. Weights are packed e2m1 in a file that ONNX Runtime
maps. They are random bytes, because look-ups of equal bytes are several times as fast. Measured are a decode step and a
chunk of tokens, whose experts are decoded once each. Every count is a process of its own; turns are taken in rounds, and the
figure is the median of all. Peak memory counts the pages of the file that were read. ``benchmarks/moe.py`` measures models.
"""

from __future__ import annotations

import json
import os
import platform
import re
import resource
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

_HIDDEN, _INNER, _CHOSEN, _STEPS, _CHUNK = 4096, 2048, 6, 8, 128


def one_layer(folder: Path, experts: int) -> Path:
    """A graph of one node with its weights in a file beside it."""
    matrices, codes, scales = {}, 0, 0
    for part, (rows, columns) in {"w1": (_INNER, _HIDDEN), "w2": (_HIDDEN, _INNER), "w3": (_INNER, _HIDDEN)}.items():
        matrices[part] = Matrix(codes, scales, (rows, columns), (rows, columns // 32))
        codes, scales = codes + rows * columns // 2, scales + rows * columns // 32
    random = np.random.default_rng(0)
    with (folder / "weights.bin").open("wb") as file:
        for _ in range(experts):
            file.write(random.bytes(codes))
        for _ in range(experts):
            file.write(random.integers(112, 120, scales, dtype=np.uint8).tobytes())
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
    """Seconds of a step, of a chunk and of the session's start, and peak memory of this process."""
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
        model = one_layer(Path(folder), experts)
        start = time.monotonic()
        session = onnxruntime.InferenceSession(str(model))
        opened = time.monotonic() - start
        random = np.random.default_rng(0)
        seconds: dict[int, list[float]] = {1: [], _CHUNK: []}
        for tokens in [1] * _STEPS + [_CHUNK] * 2:
            chosen = np.stack([random.permutation(experts)[:_CHOSEN] for _ in range(tokens)]).astype(np.int64)
            feeds = {
                "x": random.normal(size=(tokens, _HIDDEN)).astype(np.float32),
                "chosen": chosen,
                "weights": np.full(chosen.shape, 1 / _CHOSEN, np.float32),
            }
            start = time.monotonic()
            session.run(None, feeds)
            seconds[tokens].append(time.monotonic() - start)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        pages = re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())
        assert pages is not None
    return {
        "step": statistics.median(seconds[1][2:]), "chunk": min(seconds[_CHUNK]), "open": opened, "peak": peak,
        "own": int(pages[1]) * 1024,
    }  # fmt: skip


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
            "chunk_seconds": round(statistics.median(run["chunk"] for run in runs), 3),
            "open_seconds": round(statistics.median(run["open"] for run in runs), 3),
            "peak_rss_bytes": int(statistics.median(run["peak"] for run in runs)),
            "anonymous_bytes": int(statistics.median(run["own"] for run in runs)),
        }
        for count, runs in measured.items()
    ]
    for row in rows:
        row["step_over_fewest"] = round(row["step_seconds"] / rows[0]["step_seconds"], 2)
    content = {
        "what": f"one decode token, and a chunk of {_CHUNK}, through one layer of packed e2m1 experts at the width of V4-Flash, "
        "six chosen; medians",
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
