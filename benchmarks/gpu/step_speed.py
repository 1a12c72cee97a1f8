"""The kernels' time per decode step and layer beside the floor and beside torch.

``python benchmarks/gpu/step_speed.py -o OUT/speed.json``. Shapes are those of V4-Flash and V4-Pro at the end of a full context.
The floor of a call is the larger of the bytes that it must move over the measured copy bandwidth and the operations that it
must do over the measured bfloat16 matrix rate; the share is floor over time. A time is the median over replays of a CUDA
graph of 20 calls. The calls read several copies of their inputs in turn, as layers do, so small ones do not come from
the L2 cache. The peer is the same step in torch (gather, matmul, softmax, topk), in bfloat16, replayed alike; of a product, with the weight
in bfloat16.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import click
import kit
import torch
from cases import Geometry, models
from device import Device, gpu
from torch import Tensor

from foldkv.export.contract.geometry import ModelSpec
from foldkv.export.contract.operators import PACKED_EXPERTS, STATE
from foldkv.export.contract.products import Product
from foldkv.export.contract.profiles import HF, PROFILES
from foldkv.export.contract.rows import DENSE, FP8_DS_MLA, INDEX_FP4, INDEX_FP8, row_format_named
from foldkv.export.contract.weights import BFLOAT16, E4M3, EXPONENT, WEIGHT_FORMAT
from foldkv.export.operators.row_formats import pack
from foldkv.plugins.declarations import PLUGINS
from foldkv.plugins.launch import plan
from foldkv.plugins.launch_sublayers import SUBLAYER_PLANS
from foldkv.plugins.model import RELEASED_EXPERTS, operator_calls, product_call
from foldkv.plugins.plans import Plan

WHAT = "one layer's operator in a decode step (chunk 1) or for the last chunk of a prompt; microseconds are medians"
_TYPES = {"float32": torch.float32, "int32": torch.int32, "int64": torch.int64}
#: Calls in a graph, replays, the bytes over which they are spread (more than twice the largest L2 cache), and at most held.
CALLS, ROUNDS, SPREAD, MEMORY = 20, 7, 192 << 20, 24 << 30
#: Operators and row formats, those that matter most first.
CASES = (
    ("FoldkvIndexScores", DENSE), ("FoldkvIndexSelect", DENSE), ("FoldkvSparseAttention", DENSE),
    ("FoldkvDenseAttention", DENSE), ("FoldkvIndexScores", INDEX_FP4), ("FoldkvSparseAttention", FP8_DS_MLA),
    ("FoldkvDenseAttention", FP8_DS_MLA), ("FoldkvIndexScores", INDEX_FP8), ("FoldkvCompress", DENSE),
    ("FoldkvCompressOnline", DENSE), ("FoldkvWindowUpdate", DENSE), ("FoldkvWindowAttention", DENSE),
    ("FoldkvCompress", FP8_DS_MLA), ("FoldkvCompressOnline", FP8_DS_MLA), ("FoldkvWindowUpdate", FP8_DS_MLA),
    ("FoldkvWindowAttention", FP8_DS_MLA), ("FoldkvCompressFp8", DENSE), ("FoldkvCompressOnlineFp8", DENSE),
    ("FoldkvCompressFp4", INDEX_FP4), *((operator, DENSE) for operator in SUBLAYER_PLANS),
)  # fmt: skip
#: Forms of the routed experts: as released, and in e4m3.
EXPERTS = (RELEASED_EXPERTS, PACKED_EXPERTS[E4M3, EXPONENT])
#: What is measured where: the corners first, so a time limit cuts what is between.
CONTEXTS, BATCHES, CHUNKS = (1 << 20, 1 << 16, 1 << 18), (1, 64, 16, 4), (256,)


class Call(NamedTuple):
    """An operator with its inputs on the device, and the bytes and operations that no implementation can avoid."""

    operator: str
    inputs: list[Tensor]
    attributes: dict[str, Any]
    row_format: str
    rope_dim: int
    bytes: float
    operations: float


@click.command()
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True)
@click.option(
    "--seconds", default=120.0, show_default=True, help="Stop after this many seconds; the result says what is missing."
)
def main(output: Path, seconds: float) -> None:
    """Run the step."""
    with kit.recorded(output, "speed", WHAT) as recorder:
        measure(recorder, gpu, seconds=seconds)


def measure(
    recorder: kit.Recorder, open_device: Callable[[], Device], *, seconds: float = 120.0,
    contexts: Sequence[int] = CONTEXTS, batches: Sequence[int] = BATCHES,
    chunks: Sequence[int] = CHUNKS, names: tuple[str, ...] = ("v4-flash", "v4-pro"),
) -> None:  # fmt: skip
    """One row per operator, row format, model, context and batch, and one per product or form of experts, model and batch."""
    end = time.monotonic() + seconds
    chosen = [pair for pair in models(kit.ROOT) if pair[0].name in names]
    device = open_device()
    bandwidth, rate = copy_bandwidth(device), matmul_rate(device)
    recorder.fact(copy_gb_s=bandwidth / 1e9, bf16_tflop_s=rate / 1e12, not_measured=[])

    def add(case: dict[str, Any], make_call: Callable[[], Call]) -> None:
        if time.monotonic() > end:
            recorder.content["not_measured"].append(case | {"why": "out of time"})
            return
        try:
            found = one(device, make_call(), bandwidth, rate)
        except torch.OutOfMemoryError:
            recorder.content["not_measured"].append(case | {"why": "out of memory"})
            torch.cuda.empty_cache()
            return
        except RuntimeError as error:
            recorder.add(case, failure=f"{case}: {str(error)[:300]}")
            if "illegal" in str(error).lower():
                raise
            return
        recorder.add(case | found)

    places = [(context, batch, 1) for context in contexts for batch in batches]
    for context, batch, chunk in [*places, *((context, 1, chunk) for context in contexts for chunk in chunks)]:
        for operator, rows in CASES:
            for geometry, spec in chosen:
                if operator not in {one.operator for profile in PROFILES for one in operator_calls(spec, profile)}:
                    continue  # V4-Pro has no layer with a window alone
                if operator in SUBLAYER_PLANS and context != contexts[0]:
                    continue  # it reads nothing of the context
                case = {"model": geometry.name, "context": context, "batch": batch, "chunk": chunk, "operator": operator,
                        "rows": rows}  # fmt: skip
                add(case, lambda: make(device, operator, rows, geometry, context, batch, chunk))  # noqa: B023 - called at once
    for batch, chunk in [*((batch, 1) for batch in batches), *((1, chunk) for chunk in chunks)]:
        for geometry, _ in chosen:
            for product in geometry.products:
                case = {"model": geometry.name, "batch": batch, "chunk": chunk, "operator": "FoldkvBlockLinear",
                        "weight": product.role}  # fmt: skip
                add(case, lambda: make_product(device, product, batch * chunk))  # noqa: B023 - called at once
        for geometry, spec in chosen:
            for form in EXPERTS:
                case = {"model": geometry.name, "batch": batch, "chunk": chunk, "operator": form, "weight": "experts"}
                add(case, lambda: make_experts(device, spec, form, batch * chunk))  # noqa: B023 - called at once


def make(device: Device, operator: str, rows: str, of: Geometry, context: int, batch: int, chunk: int = 1) -> Call:
    """Random inputs at the end of a full context: the last ``chunk`` tokens of each sequence."""
    torch.manual_seed(0)
    where = device.torch_device
    positions = torch.full((batch,), context - chunk, dtype=torch.int32, device=where)
    ones = torch.full((batch,), chunk, dtype=torch.int32, device=where)
    limit = torch.tensor([context], device=where)
    entries = context // of.ratio

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device=where)

    def call(inputs: list[Tensor], attributes: dict[str, Any], moved: float, done: float = 0.0) -> Call:
        return Call(operator, inputs, attributes, rows, of.rope_dim, moved, done)

    inv_freq = 160000.0 ** (-torch.arange(of.rope_dim // 2, device=where) / (of.rope_dim // 2))
    size = row_format_named(rows).row_bytes(of.width, of.rope_dim) if rows in (DENSE, FP8_DS_MLA) else 0
    if operator == "FoldkvIndexScores":
        size = row_format_named(rows).row_bytes(of.index_width, 0)
        q = normal(batch, chunk, of.index_heads, of.index_width)
        weights = torch.rand(batch, chunk, of.index_heads, device=where)
        inputs = [q, weights, state(device, batch, entries, of.index_width, 0, rows), positions, limit]
        moved = batch * (entries * (size + 4 * chunk) + q[0].numel() * 4)
        done = 2.0 * batch * chunk * entries * of.index_heads * of.index_width
        return call(inputs, {"ratio": of.ratio}, moved, done)
    if operator == "FoldkvIndexSelect":
        scores = normal(batch, chunk, entries)
        return call([scores, positions], {"ratio": of.ratio, "topk": of.topk}, 4.0 * scores.numel())
    if operator == "FoldkvWindowUpdate":
        held = state(device, batch, of.window, of.width, of.rope_dim, rows)
        inputs = [held, normal(batch, chunk, of.width), positions, ones]
        return call(inputs, {}, batch * (2 * of.window + chunk) * size)
    if operator.startswith("FoldkvCompress"):
        online, mixed = "Online" in operator, operator.endswith("Fp4")
        indexed = rows in (INDEX_FP4, INDEX_FP8)
        ratio, width = of.online_ratio if online else of.ratio, of.index_width if indexed else of.width
        columns = width if online else 2 * width
        carries = [normal(batch, 3, width).abs()] if online else [normal(batch, 2 * ratio, columns) for _ in range(2)]
        fresh = [normal(batch, chunk, columns) for _ in range(2)]
        held = state(device, batch, context // ratio, width, of.rope_dim, rows)
        inputs = [held, *carries, *fresh, normal(ratio, columns), normal(width), inv_freq, positions, ones]
        inputs += [normal(width, width)] * mixed  # as dear as a Hadamard matrix
        attributes: dict[str, Any] = {"rope_dim": of.rope_dim} if operator.endswith("Fp8") else {}
        # The last token closes a window: what is open is read, entries and the tokens' rows are written.
        size = row_format_named(rows).row_bytes(width, 0 if indexed else of.rope_dim)
        moved = 4.0 * batch * (sum(carry[0].numel() for carry in carries) + 4 * chunk * columns)
        return call(inputs, attributes | {"ratio": ratio, "eps": 1e-6}, moved + batch * size * max(1, chunk // ratio))
    if operator in SUBLAYER_PLANS:
        return _around_sublayer(operator, of, batch, chunk, call, normal)
    q, sinks = normal(batch, chunk, of.heads, of.width), normal(of.heads)
    ring = state(device, batch, of.window + chunk, of.width, of.rope_dim, rows)
    tail = [sinks, inv_freq, positions, ones]
    if operator == "FoldkvSparseAttention":
        picked = [torch.randperm(entries, device=where)[: of.topk] for _ in range(batch * chunk)]
        chosen = torch.stack(picked).reshape(batch, chunk, of.topk).int()
        keys = of.window + of.topk
        inputs = [q, ring, state(device, batch, entries, of.width, of.rope_dim, rows), chosen, *tail]
        attributes = {}
    elif operator == "FoldkvWindowAttention":
        keys, inputs, attributes = of.window, [q, ring, *tail], {}
    else:
        keys = of.window + context // of.online_ratio
        inputs = [q, ring, state(device, batch, context // of.online_ratio, of.width, of.rope_dim, rows), *tail, limit]
        attributes = {"ratio": of.online_ratio}
    # Tokens of a chunk share the window and, in dense attention, the entries; each has chosen its own.
    read = of.window + chunk - 1 + (chunk * of.topk if operator == "FoldkvSparseAttention" else keys - of.window)
    moved = batch * (read * size + 2 * q[0].numel() * 4)
    return call(inputs, attributes, moved, 4.0 * batch * chunk * of.heads * of.width * keys)


def _around_sublayer(
    operator: str, of: Geometry, batch: int, chunk: int, call: Callable[..., Call], normal: Callable[..., Tensor]
) -> Call:
    """Hyper-connections and routing: streams and matrices are read once, the gate as stored in bfloat16."""
    count, width, tokens = of.streams, of.experts.hidden, batch * chunk
    streams = normal(batch, chunk, count, width)
    if operator == "FoldkvHcPre":
        rows, channels = (2 + count) * count, count * width
        fn = normal(rows, channels) * channels**-0.5
        attributes = {"norm_eps": 1e-6, "iterations": 20, "eps": 1e-6}
        moved = 4.0 * (streams.numel() + fn.numel() + tokens * width)
        return call([streams, fn, normal(rows), normal(3)], attributes, moved)
    if operator == "FoldkvHcPost":
        inputs = [streams, normal(batch, chunk, width), normal(batch, chunk, count), normal(batch, chunk, count, count)]
        return call(inputs, {}, 4.0 * (2 * streams.numel() + tokens * width))
    x, weight = normal(tokens, width), normal(of.gates, width).bfloat16()
    attributes = {"scaling": 1.5, WEIGHT_FORMAT: BFLOAT16}
    if operator == "FoldkvRoute":
        moved = 4.0 * x.numel() + 2.0 * weight.numel()
        return call([x, weight, normal(of.gates)], {"topk": of.experts.chosen, **attributes}, moved)
    table = torch.stack([torch.randperm(of.gates)[: of.experts.chosen] for _ in range(1024)]).to(x.device)
    ids = torch.randint(0, 1024, (tokens,), device=x.device)
    moved = 4.0 * x.numel() + 2.0 * width * min(tokens * of.experts.chosen, of.gates)
    return call([x, weight, table, ids], attributes, moved)


def make_product(device: Device, product: Product, tokens: int) -> Call:
    """A product with random codes, which are not NaN, and scales of one."""
    torch.manual_seed(0)
    where, (operator, _, sizes, attributes) = device.torch_device, product_call(product)
    shape = (product.rows, product.columns)
    if attributes[WEIGHT_FORMAT] == BFLOAT16:
        weight, scale = torch.randn(shape, device=where, dtype=torch.bfloat16), torch.ones(1, 1, device=where)
    else:
        weight = torch.randint(-128, 127, shape, device=where, dtype=torch.int8).bitwise_and(-2)
        scale = torch.full((sizes["SN"], sizes["SK"]), 127, device=where, dtype=torch.int8)
    x = torch.randn(tokens, product.groups * product.columns, device=where)
    moved = sum(tensor.numel() * tensor.element_size() for tensor in (x, weight, scale)) + 4.0 * tokens * product.rows
    done = 2.0 * tokens * product.rows * product.columns * product.terms
    return Call(operator, [x, weight, scale], attributes, DENSE, 0, moved, done)


def make_experts(device: Device, spec: ModelSpec, form: str, tokens: int) -> Call:
    """All experts of a layer, of which every token chooses at random; codes are not NaN, and scales are small."""
    torch.manual_seed(0)
    where, [found] = device.torch_device, [one for one in operator_calls(spec, HF, (form,)) if one.operator == form]
    sizes, operator = found.sizes, found.operator
    chosen = torch.stack([torch.randperm(sizes["X"], device=where)[: sizes["K"]] for _ in range(tokens)])
    codes = torch.randint(-128, 127, (sizes["X"], sizes["CODES"]), device=where, dtype=torch.int8).bitwise_and_(-2)
    scales = torch.full((sizes["X"], sizes["SCALES"]), 117, device=where, dtype=torch.int8)
    x, weights = torch.randn(tokens, sizes["C"], device=where), torch.rand(tokens, sizes["K"], device=where)
    inputs = [x, chosen, weights, codes, scales, torch.arange(sizes["X"], device=where)]
    read = int(chosen.unique().numel()) * (sizes["CODES"] + sizes["SCALES"])
    done = 6.0 * chosen.numel() * spec.moe_intermediate_size * sizes["C"]  # three products
    return Call(operator, inputs, found.attributes, DENSE, 0, read + 8.0 * x.numel(), done)


def state(device: Device, batch: int, count: int, width: int, rope_dim: int, rows: str) -> Tensor:
    """Rows of the state with random values; packed ones repeat a block."""
    if rows == DENSE:
        return torch.randn(batch, count, width, device=device.torch_device, dtype=torch.bfloat16)
    block = pack(torch.randn(1, min(count, 1024), width), rows, rope_dim).to(device.torch_device)
    return block.repeat(batch, -(-count // block.shape[1]), 1)[:, :count].contiguous()


def one(device: Device, call: Call, bandwidth: float, rate: float) -> dict[str, Any]:
    """Time of our kernels, the floor, and the peer's."""
    floor = max(call.bytes / bandwidth, call.operations / rate)
    # As many copies as it takes to read other bytes than a cache holds, as far as memory goes: a copy holds every tensor.
    held = sum(tensor.numel() * tensor.element_size() for tensor in call.inputs)
    calls = [call] + [
        call._replace(inputs=[tensor.clone() for tensor in call.inputs])
        for _ in range(min(CALLS, math.ceil(SPREAD / call.bytes), max(1, int(MEMORY / held))) - 1)
    ]
    launches = [ours(device, each) for each in calls]
    taken = replay(device, [launch for launch, _ in launches])
    row: dict[str, Any] = {
        "us": taken * 1e6, "floor_us": floor * 1e6, "share_of_floor": floor / taken, "launches": len(launches[0][1].launches),
        "bound": "memory" if call.bytes / bandwidth > call.operations / rate else "compute",
    }  # fmt: skip
    single = call.operator == "FoldkvBlockLinear" or call.inputs[0].shape[1] == 1
    if call.row_format == DENSE and single and (peer := torch_step(call)) is not None:
        try:
            row["torch_us"] = replay(device, [torch_step(each) for each in calls]) * 1e6  # type: ignore[misc]
        except torch.OutOfMemoryError:
            row["torch_us"] = None
            torch.cuda.empty_cache()
        del peer
    return row


def steps_of(call: Call, sm: int) -> Plan:
    """What a call launches."""
    sizes = _sizes(call)
    return plan(
        call.operator,
        sizes,
        call.attributes,
        sm=sm,
        dtype="bfloat16",
        row_format=call.row_format,
        rope_dim=call.rope_dim,
    )


def _sizes(call: Call) -> dict[str, int]:
    shapes = [tuple(tensor.shape) for tensor in call.inputs]
    return PLUGINS[call.operator].dimensions(shapes, row_format=call.row_format) | call.attributes


def ours(device: Device, call: Call) -> tuple[Callable[[], None], Plan]:
    """A function that launches the operator's kernels on the current stream, and what it launches."""
    spec, sizes, steps = PLUGINS[call.operator], _sizes(call), steps_of(call, device.sm)
    launcher = device.load([steps])
    outputs, shapes = [], spec.output_shapes(sizes, row_format=call.row_format)
    for index, (tensor, shape) in enumerate(zip(spec.outputs, shapes, strict=True)):
        if index in spec.aliases:
            outputs.append(call.inputs[spec.aliases[index]])
            continue
        stored = torch.bfloat16 if call.row_format == DENSE else torch.int8
        outputs.append(
            device.place(torch.empty(shape, dtype=stored if tensor.dtype == STATE else _TYPES[tensor.dtype]))
        )
    workspace = device.place(torch.empty(max(steps.workspace, 1), dtype=torch.uint8))
    addresses = [device.expose(tensor) for tensor in call.inputs], [tensor.data_ptr() for tensor in outputs]

    def launch() -> None:
        launcher.launch(steps, *addresses, workspace=workspace.data_ptr(), stream=device.stream)

    launch.keep = outputs, workspace, call  # type: ignore[attr-defined]  # the buffers live as long as the function
    return launch, steps


def torch_step(call: Call) -> Callable[[], Tensor] | None:
    """The operator's step in torch, in bfloat16, as one would write it without a kernel; None if it is not a product."""
    values = call.inputs
    if call.operator == "FoldkvBlockLinear":
        groups = call.attributes["groups"]
        weight = (values[1].view(torch.float8_e4m3fn) if values[1].dtype == torch.int8 else values[1]).bfloat16()
        wide = weight.unflatten(0, (groups, -1)).transpose(1, 2)
        return lambda: torch.matmul(values[0].bfloat16().unflatten(1, (groups, -1)).transpose(0, 1), wide)
    if call.operator == "FoldkvIndexScores":
        q, weights, entries = values[:3]
        return lambda: torch.matmul(
            torch.matmul(entries, q[:, 0].bfloat16().transpose(1, 2)).relu(), weights[:, 0, :, None].bfloat16()
        )
    if call.operator == "FoldkvIndexSelect":
        return lambda: values[0].topk(call.attributes["topk"], dim=-1).indices
    if not call.operator.endswith("Attention"):
        return None
    q, ring, entries = values[:3]

    def attend() -> Tensor:
        far = entries if call.operator != "FoldkvWindowAttention" else ring[:, :0]
        if call.operator == "FoldkvSparseAttention":
            far = entries.gather(1, values[3][:, 0, :, None].long().expand(-1, -1, entries.shape[-1]))
        keys = torch.cat((ring[:, 1:], far), dim=1)
        logits = torch.matmul(q[:, 0].bfloat16(), keys.transpose(1, 2)) * q.shape[-1] ** -0.5
        return torch.matmul(logits.softmax(dim=-1), keys)

    return attend


def replay(device: Device, runs: Sequence[Callable[[], Any]]) -> float:
    """Seconds of one call: the median over replays of a CUDA graph of ``CALLS`` calls that take the functions in turn."""
    if device.torch_device != "cuda":  # a rehearsal: the same calls, without a graph
        start = time.perf_counter()
        for run in runs:
            run()
        return (time.perf_counter() - start) / len(runs)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())  # which may still be writing the inputs
    with torch.cuda.stream(side):
        for run in runs:
            run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(CALLS):
            runs[i % len(runs)]()
    graph.replay()
    return timed(graph.replay, ROUNDS) / CALLS


def timed(run: Callable[[], Any], rounds: int) -> float:
    """Median seconds of ``run`` on the GPU."""
    torch.cuda.synchronize()
    taken = []
    for _ in range(rounds):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        taken.append(start.elapsed_time(end) / 1e3)
    return statistics.median(taken)


def copy_bandwidth(device: Device) -> float:
    """Bytes per second, read and written, of a large copy."""
    if device.torch_device != "cuda":
        return 1e9
    source = torch.randint(0, 255, (2 << 30,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    target.copy_(source)
    return 2 * source.numel() / timed(lambda: target.copy_(source), 9)


def matmul_rate(device: Device) -> float:
    """Operations per second of a large bfloat16 product of random values."""
    if device.torch_device != "cuda":
        return 1e9
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    torch.matmul(a, a)
    return 2 * 8192**3 / timed(lambda: torch.matmul(a, a), 9)


if __name__ == "__main__":
    main()
