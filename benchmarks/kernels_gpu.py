"""The plugins' kernels on a GPU: time per decode step and layer beside the floor and beside peers.

``python benchmarks/kernels_gpu.py -o benchmarks/results/kernels-DEVICE.json`` on a machine with a GPU, torch with CUDA and
Triton. Shapes are those of V4-Flash and V4-Pro. The floor of a kernel is the larger of the bytes that it must move over
the measured copy bandwidth and the operations that it must do over the measured bfloat16 matrix rate; the share is floor
over time. Times are medians over replays of a CUDA graph of 20 calls; inputs that fit into the L2 cache are read from there
after the first, so that a share above one is possible for small ones.

The peer is the same step in torch (gather, matmul, softmax), in bfloat16. FlashMLA's decode for V4 rows is not measured here.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import click
import torch
from torch import Tensor

import foldkv
from foldkv.export.layouts import DENSE, FP8_DS_MLA, INDEX_FP4, INDEX_FP8, row_bytes
from foldkv.plugins.compile import compile_kernels
from foldkv.plugins.cuda import KernelImage, Launcher
from foldkv.plugins.launch import plan
from foldkv.plugins.spec import PLUGINS, STATE

WINDOW, WIDTH, ROTARY, INDEX_HEADS, INDEX_WIDTH = 128, 512, 64, 64, 128
_TYPES = {"float32": torch.float32, "int32": torch.int32, "int64": torch.int64}


class Model(NamedTuple):
    """What differs between the released models."""

    heads: int
    topk: int


MODELS = {"flash": Model(64, 512), "pro": Model(128, 1024)}


class Call(NamedTuple):
    """An operator with its inputs on the GPU, and the bytes and operations that no implementation can avoid."""

    operator: str
    inputs: list[Tensor]
    attributes: dict[str, Any]
    rows: str
    bytes: float
    operations: float


@click.command()
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True)
@click.option("--contexts", default="65536,262144,1048576", show_default=True)
@click.option("--batches", default="1,4,16,64", show_default=True)
@click.option(
    "--seconds", default=480.0, show_default=True, help="Stop measuring after that long; what is missing is said."
)
def main(output: Path, contexts: str, batches: str, seconds: float) -> None:
    """Measure and write the results as JSON."""
    end = time.monotonic() + seconds
    major, minor = torch.cuda.get_device_capability()
    sm = 10 * major + minor
    bandwidth, rate = copy_bandwidth(), matmul_rate()
    content: dict[str, Any] = {
        "what": "one layer's operator in a decode step (one token per sequence); microseconds are medians",
        "date": time.strftime("%Y-%m-%d"),
        "device": torch.cuda.get_device_name(), "sm": sm, "driver": driver_version(),
        "versions": {"foldkv": foldkv.__version__, "torch": torch.__version__, "triton": version("triton")},
        "copy_gb_s": bandwidth / 1e9, "bf16_tflop_s": rate / 1e12, "rows": [], "not_measured": [],
    }  # fmt: skip
    for name, model in MODELS.items():
        for context in (int(size) for size in contexts.split(",")):
            for batch in (int(size) for size in batches.split(",")):
                for operator, rows in CASES:
                    case = {"model": name, "context": context, "batch": batch, "operator": operator, "rows": rows}
                    if time.monotonic() > end:
                        content["not_measured"].append(case | {"why": "out of time"})
                        continue
                    try:
                        row = case | measure(make(operator, rows, model, context, batch), sm, bandwidth, rate)
                    except torch.OutOfMemoryError:
                        content["not_measured"].append(case | {"why": "out of memory"})
                        torch.cuda.empty_cache()
                        continue
                    content["rows"].append(row)
                    click.echo(json.dumps(row))
    output.write_text(json.dumps(content, indent=2) + "\n")


CASES = (
    ("FoldkvIndexScores", DENSE), ("FoldkvIndexScores", INDEX_FP8), ("FoldkvIndexScores", INDEX_FP4),
    ("FoldkvIndexSelect", DENSE), ("FoldkvSparseAttention", DENSE), ("FoldkvSparseAttention", FP8_DS_MLA),
    ("FoldkvDenseAttention", DENSE), ("FoldkvDenseAttention", FP8_DS_MLA),
)  # fmt: skip


def make(operator: str, rows: str, model: Model, context: int, batch: int) -> Call:
    """Random inputs at the end of a full context."""
    torch.manual_seed(0)
    positions = torch.full((batch,), context - 1, dtype=torch.int32, device="cuda")
    one = torch.ones(batch, dtype=torch.int32, device="cuda")
    limit = torch.tensor([context], device="cuda")
    entries = context // 4
    if operator == "FoldkvIndexScores":
        size = row_bytes(rows, INDEX_WIDTH, 0)
        q = torch.randn(batch, 1, INDEX_HEADS, INDEX_WIDTH, device="cuda")
        weights = torch.rand(batch, 1, INDEX_HEADS, device="cuda")
        moved = batch * (entries * (size + 4) + q[0].numel() * 4)
        done = 2.0 * batch * entries * INDEX_HEADS * INDEX_WIDTH
        inputs = [q, weights, state(batch, entries, INDEX_WIDTH, size, rows), positions, limit]
        return Call(operator, inputs, {"ratio": 4}, rows, moved, done)
    if operator == "FoldkvIndexSelect":
        scores = torch.randn(batch, 1, entries, device="cuda")
        return Call(operator, [scores, positions], {"ratio": 4, "topk": model.topk}, rows, 4.0 * scores.numel(), 0.0)
    q = torch.randn(batch, 1, model.heads, WIDTH, device="cuda")
    size = row_bytes(rows, WIDTH, ROTARY)
    ring = state(batch, WINDOW + 1, WIDTH, size, rows)
    sinks = torch.randn(model.heads, device="cuda")
    inv_freq = 160000.0 ** (-torch.arange(ROTARY // 2, device="cuda") / (ROTARY // 2))
    tail = [sinks, inv_freq, positions, one]
    if operator == "FoldkvSparseAttention":
        chosen = torch.stack([torch.randperm(entries, device="cuda")[: model.topk] for _ in range(batch)])
        keys = WINDOW + model.topk
        inputs = [q, ring, state(batch, entries, WIDTH, size, rows), chosen[:, None].int(), *tail]
        attributes: dict[str, Any] = {}
    else:
        keys = WINDOW + context // 128
        inputs = [q, ring, state(batch, context // 128, WIDTH, size, rows), *tail, limit]
        attributes = {"ratio": 128}
    moved = batch * (keys * size + 2 * q[0].numel() * 4)
    return Call(operator, inputs, attributes, rows, moved, 4.0 * batch * model.heads * WIDTH * keys)


def state(batch: int, count: int, width: int, size: int, rows: str) -> Tensor:
    """Rows of the state: random values, or zero bytes, which every packed format reads as zeros."""
    if rows == DENSE:
        return torch.randn(batch, count, width, device="cuda", dtype=torch.bfloat16)
    return torch.zeros(batch, count, size, device="cuda", dtype=torch.int8)


def measure(call: Call, sm: int, bandwidth: float, rate: float) -> dict[str, Any]:
    """Time of our kernels, the floor, and the peers that can be run."""
    run, launches = ours(call, sm)
    floor = max(call.bytes / bandwidth, call.operations / rate)
    taken = replay(run)
    row: dict[str, Any] = {
        "us": taken * 1e6, "floor_us": floor * 1e6, "share_of_floor": floor / taken, "launches": launches,
        "bound": "memory" if call.bytes / bandwidth > call.operations / rate else "compute",
    }  # fmt: skip
    if call.rows == DENSE:
        try:
            row["torch_us"] = replay(lambda: torch_step(call)) * 1e6
        except torch.OutOfMemoryError:
            row["torch_us"] = None
            torch.cuda.empty_cache()
    return row


def ours(call: Call, sm: int) -> tuple[Callable[[], None], int]:
    """A function that launches the operator's kernels on the current stream, and how many it launches."""
    spec = PLUGINS[call.operator]
    sizes = spec.dimensions([tuple(tensor.shape) for tensor in call.inputs], rows=call.rows) | call.attributes
    steps = plan(call.operator, sizes, call.attributes, sm=sm, dtype="bfloat16", rows=call.rows, rotary=ROTARY)
    compiled = compile_kernels([(one.kernel, sm) for one in steps.launches])
    launcher = Launcher(KernelImage(one.kernel.name, one.entry, one.threads, one.shared, one.cubin) for one in compiled)
    outputs = []
    for index, tensor in enumerate(spec.outputs):
        if index in spec.aliases:
            outputs.append(call.inputs[spec.aliases[index]])
            continue
        shape = [sizes[str(dim)] for dim in tensor.dims]
        kind = torch.bfloat16 if tensor.dtype == STATE else _TYPES[tensor.dtype]
        outputs.append(torch.empty(shape, dtype=kind, device="cuda"))
    workspace = torch.empty(max(steps.workspace, 1), dtype=torch.uint8, device="cuda")
    addresses = [tensor.data_ptr() for tensor in call.inputs], [tensor.data_ptr() for tensor in outputs]

    def launch() -> None:
        stream = torch.cuda.current_stream().cuda_stream
        launcher.launch(steps, *addresses, workspace=workspace.data_ptr(), stream=stream)

    launch.keep = outputs  # type: ignore[attr-defined]  # the buffers live as long as the function
    return launch, len(steps.launches)


def torch_step(call: Call) -> Tensor:
    """The operator's step in torch, in bfloat16, as one would write it without a kernel."""
    values = call.inputs
    if call.operator == "FoldkvIndexScores":
        q, weights, entries = values[:3]
        dots = torch.matmul(entries, q[:, 0].bfloat16().transpose(1, 2)).relu()
        return torch.matmul(dots, weights[:, 0, :, None].bfloat16())
    if call.operator == "FoldkvIndexSelect":
        return values[0].topk(call.attributes["topk"], dim=-1).indices
    q, ring, entries = values[:3]
    if call.operator == "FoldkvSparseAttention":
        index = values[3][:, 0, :, None].long().expand(-1, -1, entries.shape[-1])
        entries = entries.gather(1, index)
    keys = torch.cat((ring[:, 1:], entries), dim=1)
    logits = torch.matmul(q[:, 0].bfloat16(), keys.transpose(1, 2)) * WIDTH**-0.5
    return torch.matmul(logits.softmax(dim=-1), keys)


def replay(run: Callable[[], Any], repeats: int = 20, rounds: int = 9) -> float:
    """Seconds of one call: the median over rounds of a CUDA graph that holds ``repeats`` calls."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            run()
    graph.replay()
    return timed(graph.replay, rounds) / repeats


def timed(run: Callable[[], Any], rounds: int) -> float:
    """Median seconds of ``run`` on the GPU, with the L2 cache filled with something else before each."""
    other = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    taken = []
    for _ in range(rounds):
        other.zero_()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        taken.append(start.elapsed_time(end) / 1e3)
    return statistics.median(taken)


def copy_bandwidth() -> float:
    """Bytes per second, read and written, of a large copy."""
    source = torch.empty(4 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / timed(lambda: target.copy_(source), 9)


def matmul_rate() -> float:
    """Operations per second of a large bfloat16 product."""
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    return 2 * 8192**3 / timed(lambda: a @ a, 9)


def driver_version() -> str:
    """The driver's version, as nvidia-smi prints it, or "" where it cannot be asked."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


if __name__ == "__main__":
    main()
