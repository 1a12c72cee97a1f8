"""The tables of README, docs/results.md and docs/gpu.md, each made from a file of benchmarks/results."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from foldkv.plugins.declarations import PLUGINS

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"

Step = tuple[str, Mapping[str, Any]]


def result(name: str) -> Any:
    """A result file as JSON values."""
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def gpu_results() -> list[Any]:
    """The results of every GPU that the kit was run on."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(RESULTS.glob("gpu-*.json"))]


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _mib(count: float) -> str:
    return f"{count / 2**20:,.0f} MiB" if count >= 10 * 2**20 else f"{count / 2**20:.1f} MiB"


def executed(results: Sequence[Mapping[str, Any]]) -> str:
    """What was executed where."""
    kernels, model, engine = (_steps(results, step) for step in ("kernels", "model", "engine"))
    rows = [
        ("`cpu` bundle (ONNX Runtime)", "CPU, in every `make test` and `make demo`", "transformers"),
        (
            "Triton kernels of the compressed-KV plugins, compiled for sm80 to sm121",
            f"{_listed(kernels, _kernels)}; in Triton's interpreter in every `make test`",
            "the operators' definitions in float64",
        ),
        ("The small model in PyTorch with these kernels", _listed(model, _model), "the same modules on the CPU"),
        *_untried(kernels),
        ("TensorRT-RTX engines for sm80, 86, 89, 120, 121 (built without a GPU)", *_engines(engine)),
        ("TensorRT 11 engines for h100, h200, b200, b300", "**never built, never run**", "**nothing**"),
        (
            "ONNX Runtime CUDA bundles for any NVIDIA GPU (built without a GPU)",
            "**never yet**; their graphs on the CPU, in every `make test`",
            "the `cpu` bundle",
        ),
    ]
    return _table(("part", "executed on", "compared with"), rows)


def _untried(kernels: list[Step]) -> Iterator[tuple[str, str, str]]:
    """A row for the plugins whose kernels no GPU has run yet."""
    tried = {row["operator"] for _, content in kernels for row in content["rows"]}
    names = ", ".join(f"`{name.removeprefix('Foldkv')}`" for name in PLUGINS if name not in tried)
    if tried and names:
        where = "**no GPU yet**; in Triton's interpreter in every `make test`"
        yield (
            f"Triton kernels of the newer plugins {names}, compiled for sm80 to sm121",
            where,
            "the operators' definitions in float64",
        )


def _steps(results: Sequence[Mapping[str, Any]], step: str) -> list[Step]:
    """Device and result of a step, where it was run on a GPU."""
    found = [(result["device"].removeprefix("NVIDIA "), result["steps"].get(step)) for result in results]
    return [(device, content) for device, content in found if content and content["status"] != "no GPU"]


def _listed(steps: list[Step], say: Callable[[str, Mapping[str, Any]], str]) -> str:
    return "; ".join(say(device, content) for device, content in steps) or "**no GPU yet**"


def _kernels(device: str, content: Mapping[str, Any]) -> str:
    return f"**{device}** ({content['date']}): {_right(content['rows'])} calls right"


def _model(device: str, content: Mapping[str, Any]) -> str:
    compared = [row for row in content["rows"] if "distance" in row]
    return f"**{device}** ({content['date']}): logits within bounds in {_right(compared)} forms of its caches"


def _right(rows: Sequence[Mapping[str, Any]]) -> str:
    return f"{sum('failure' not in row for row in rows)} of {len(rows)}"


def _engine(device: str, content: Mapping[str, Any]) -> str:
    if content["status"] == "passed":
        return f"**{device}** ({content['date']})"
    why = re.search(r"The engine cannot run.*?compute capability (\d+\.\d+)", " ".join(content["reasons"]))
    if why:
        return f"{device} (compute capability {why[1]}) refused them ({content['date']})"
    return f"tried on {device} ({content['date']}): {content['status']}, see [docs/gpu.md](docs/gpu.md)"


def _engines(steps: list[Step]) -> tuple[str, str]:
    """Where engines were executed, and what their numerics were compared with."""
    if any(content["status"] == "passed" for _, content in steps):
        return _listed(steps, _engine), "the `cpu` bundle"
    return f"**never yet**{''.join(f'; {_engine(device, content)}' for device, content in steps)}", "**nothing**"


#: What the table of times shows: context, batch, chunk.
PLACES = ((1 << 16, 1, 1), (1 << 20, 1, 1), (1 << 16, 64, 1), (1 << 20, 16, 1), (1 << 20, 64, 1), (1 << 16, 1, 256))


def times(results: Sequence[Mapping[str, Any]], model: str = "v4-flash") -> str:
    """Times of the kernels per device, of one model."""
    parts = []
    for device, content in _steps(results, "speed"):
        parts.append(
            f"**{device}**, {content['date']}, driver {content['driver']}, torch {content['versions']['torch']}, Triton "
            f"{content['versions']['triton']}; copies {content['copy_gb_s']:,.0f} GB/s, bfloat16 products "
            f"{content['bf16_tflop_s']:,.0f} TFLOP/s. V4-Flash, microseconds of one layer (share of the floor; torch):\n"
        )
        heads = [
            f"{context >> 10}k x {batch}" + (f", chunk {chunk}" if chunk > 1 else "")
            for context, batch, chunk in PLACES
        ]
        rows = {_place(row): row for row in content["rows"] if row["model"] == model and "us" in row and "rows" in row}
        lines = [
            [f"`{name.removeprefix('Foldkv')}` {rows_of}", *(_time(rows.get((name, rows_of, *at))) for at in PLACES)]
            for name, rows_of in dict.fromkeys((row["operator"], row["rows"]) for row in rows.values())
        ]
        parts.append(_table(("operator, rows", *heads), lines))
    return "\n".join(parts)


def _place(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return row["operator"], row["rows"], row["context"], row["batch"], row["chunk"]


def _time(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return "-"
    beside = f"; {row['torch_us']:.0f}" if row.get("torch_us") else ""
    return f"{row['us']:.1f} ({100 * row['share_of_floor']:.0f} %{beside})"


def clients() -> str:
    """An engine with many clients beside sessions one after the other."""
    rows = result("serving-cpu")["throughput"]
    heads = ("clients", "tokens a second, engine / sessions", "the scheduler's own time, of the model's")
    return _table(
        heads, ([f"{row['clients']}", f"{row['ratio']:.1f} x", f"{100 * row['scheduler_share']:.1f} %"] for row in rows)
    )


def load() -> str:
    """A server under load, killed and restarted."""

    def line(name: str, label: str) -> list[str]:
        row, kill = result("serving-load")[name]["load"], result("serving-load")[name]["kill"]
        memory = [f"{row['memory_bytes'][key] / 2**20:.0f}" for key in ("first", "last", "most")]
        failed = sum(count for how, count in row["ended"].items() if how.startswith("error"))
        return [
            label, f"{row['clients']}, {row['seconds']:.0f} s", f"{row['ended'].get('answered', 0):,}", f"{row['ended'].get('left', 0):,}", f"{failed}",
            f"{row['wrong_count'] - failed}", " / ".join(memory), f"{kill['answered_before']}", f"{kill['files']}, {kill['damaged']}",
            f"{kill['tokens_from_before']:,}, {'the same' if kill['same'] else 'OTHER'} answers",
        ]  # fmt: skip

    heads = (
        "steps", "clients", "answered", "left early", "errors", "answers that are not those given alone", "MiB after a third, at the end, most",
        "answered until kill -9", "states on disk, damaged", "after the restart: tokens not fed, answers",
    )  # fmt: skip
    return _table(heads, [line("batch_invariant", "`--batch-invariant`"), line("shared_steps", "shared (default)")])


def peer() -> str:
    """Our engine beside onnxruntime-genai's."""

    def line(row: Mapping[str, Any], first: Mapping[str, Any]) -> list[str]:
        grown = [f"{row[key] / first[key]:.1f} x" for key in ("foldkv_tokens_s", "genai_tokens_s")]
        return [f"{row['clients']}", *grown, f"{row['genai_tokens_s'] / row['foldkv_tokens_s']:.1f} x"]

    rows = result("serving-peer")["rows"]
    heads = (
        "clients",
        "foldkv, as many times as with one",
        "onnxruntime-genai, as many times as with one",
        "tokens a second, genai / foldkv",
    )
    return _table(heads, (line(row, rows[0]) for row in rows))


def waiting() -> str:
    """What a long prompt does to others."""
    row = result("serving-cpu")["waiting"]
    alone, beside = row["alone_s"], row["while_a_long_prompt_is_fed_s"]
    return (
        f"While a prompt of {row['long_prompt']:,} tokens was fed, which took {row['the_long_prompt_s']:.1f} s, an answer that was being written "
        f"waited {1e3 * row['longest_gap_of_a_running_answer_s']:.0f} ms for a token at most. A prompt of 64 tokens that came in between had its first token "
        f"after {1e3 * beside:.0f} ms; alone after {1e3 * alone:.0f} ms."
    )


def reuse() -> str:
    """The first token of a prompt, cold and after a kept state."""

    def line(row: Mapping[str, Any]) -> list[str]:
        return [
            f"{row['tokens']:,}", f"{row['cold_s']:.2f} s", f"{1e3 * row['hit_s']:.0f} ms", f"{row['cold_s'] / row['hit_s']:.0f} x",
            f"{row['snapshot_bytes']:,}", f"{row['planned_bytes']:,}",
            f"{row['kept_states']}, {row['kept_bytes_of_the_prompt'] / row['snapshot_bytes']:.1f} x",
        ]  # fmt: skip

    heads = (
        "tokens",
        "cold",
        "after a kept state",
        "ratio",
        "bytes of a state",
        "planned",
        "states kept of the prompt, bytes of all",
    )
    return _table(heads, map(line, result("serving-cpu")["reuse"]))


def decode() -> str:
    """A decode step of the cpu bundle beside transformers."""
    rows = result("decode-cpu")["rows"]

    def line(row: Mapping[str, Any]) -> list[str]:
        grown = [f"{row[key] / rows[0][key]:.2f}" for key in ("foldkv_step_s", "transformers_step_s")]
        prefill = row["transformers_prefill_s"] / row["foldkv_prefill_s"]
        return [f"{row['context']:,}", f"{row['ratio']:.1f} x", *grown, f"{prefill:.1f} x"]

    heads = (
        "context",
        "step: transformers / foldkv",
        "growth, foldkv",
        "growth, transformers",
        "prefill: transformers / foldkv",
    )
    return _table(heads, map(line, rows))  # fmt: skip


def experts() -> str:
    """Steps and memory by the number of experts."""

    def line(row: Mapping[str, Any]) -> list[str]:
        ways = ("float32", "bfloat16", "stored", "transformers")
        step = " / ".join(f"{1000 * row['step_seconds'][way]:.0f}" for way in ways)
        chunk = " / ".join(f"{row['chunk_seconds'][way]:.2f}" for way in ways)
        memory = [" / ".join(_mib(row["resident_bytes"][way][kind]) for way in ways) for kind in ("RssAnon", "RssFile")]
        return [f"{row['experts']}", step, chunk, *memory]

    heads = ("experts", "step, ms", "chunk of 128, s", "memory of its own", "pages of files")
    return _table(heads, map(line, result("moe-cpu")["rows"]))


def full_width() -> str:
    """Differences of the streams after layers of full width."""
    head = ("layer", "prompt: largest", "prompt: middle token", "decoded: largest", "decoded: middle token")
    keys = ("prompt_largest", "prompt_median", "decoded_largest", "decoded_median")
    rows = result("full-width-cpu")["layers"]
    return _table(head, ((row["kind"], *(f"{row[key]:.1e}" for key in keys)) for row in rows))


def matrices() -> str:
    """Products with e4m3 matrices in every form, in nanoseconds for a parameter."""
    found = result("matrices-cpu")
    forms = [name for name in found["rows"][0] if name != "tokens"]

    def line(row: Mapping[str, Any]) -> list[str]:
        cells = [f"{row[form]['ns']:.2f} ns, {100 * row[form]['bandwidth_share']:.0f} %" for form in forms]
        return [str(row["tokens"]), *cells, f"{max(row[form]['error'] for form in forms):.0e}"]

    return _table(("tokens", *forms, "largest error"), map(line, found["rows"]))


def half_real() -> str:
    """A whole model with some real experts: memory, bytes from the disk and seconds."""
    head = (
        "real experts of a layer", "anonymous memory", "pages of files", "first step, cold", "later steps: fastest, middle", "processor time of a step",
        "read in a step", "chunk", "experts touched",
    )  # fmt: skip

    def line(row: Mapping[str, Any]) -> list[str]:
        single = [step for step in row["steps"] if step["tokens"] == 1][1:]
        [chunk] = [step for step in row["steps"] if step["tokens"] > 1]
        seconds, work, read = (
            sorted(step[key] for step in single) for key in ("seconds", "processor_ms", "read_bytes")
        )
        first, middle = row["steps"][0], len(single) // 2
        return [
            f"{row['marked']}, {row['stacks']['expert_bytes'] / 1e9:.1f} GB", _mib(row["anonymous_peak"]),
            _mib(max(step["file_pages"] for step in row["steps"])),
            f"{first['seconds']:.0f} s, {first['read_bytes'] / 1e9:.1f} GB", f"{seconds[0]:.1f} s, {seconds[middle]:.1f} s",
            f"{work[middle] / 1000:.1f} s", f"{read[middle] / 1e9:.2f} GB", f"{chunk['seconds']:.0f} s for {chunk['tokens']}",
            f"{row['distinct_experts']:,}",
        ]  # fmt: skip

    return _table(head, map(line, result("half-real-cpu")["rows"]))


def half_real_validate() -> str:
    """A whole model validated a layer at a time: what it did, and for how long."""
    found = result("half-real-validate")
    phases = [*found["phases"], {"second": found["seconds"], "what": ""}]
    spent = [(one["what"], after["second"] - one["second"]) for one, after in itertools.pairwise(phases) if one["what"]]
    return _table(("the run says", "minutes"), ((what, f"{seconds / 60:.1f}") for what, seconds in spent))


def expert_layer() -> str:
    """One layer of experts at the width of V4-Flash, in both forms."""

    def line(row: Mapping[str, Any]) -> list[str]:
        both = ("stored", "stacked")
        step = " / ".join(f"{1000 * row['step_seconds'][form]:.1f}" for form in both)
        chunk = " / ".join(f"{row['chunk_seconds'][form]:.2f}" for form in both)
        faster = f"{row['times_faster']['step']:.0f} x, {row['times_faster']['chunk']:.0f} x"
        error = " / ".join(f"{row['error'][form]:.0e}" for form in both)
        return [f"{row['experts']}", step, chunk, faster, error, f"{row['stacking_gb_s']:.2f} GB/s"]

    heads = ("experts", "step, ms", "chunk of 128, s", "faster: step, chunk", "relative error", "stacking")
    return _table(heads, map(line, result("experts-cpu")["rows"]))


def e4m3_experts() -> str:
    """One layer of experts in e4m3, which every step decodes."""
    found = result("experts-cpu")["e4m3"]
    share = found["read_gb_s"] / found["bandwidth_gb_s"]
    head = ("step, ms", "of e2m1 decoded in the same way", "for a parameter", "share of the bandwidth", "all layers of V4-Flash, a token", "relative error")  # fmt: skip
    row = [
        f"{1000 * found['step_seconds']:.0f}", f"{1000 * found['step_of_e2m1_stored']:.0f}", f"{found['ns']:.1f} ns", f"{100 * share:.0f} %",
        f"{found['token_seconds_of_all_layers']:.0f} s", f"{found['error']:.0e}",
    ]  # fmt: skip
    return _table(head, [row])


def million() -> str:
    """The small model up to a million tokens."""
    rows = result("million-cpu")["rows"]

    def line(row: Mapping[str, Any], step: Mapping[str, Any]) -> list[str]:
        over = row["peak_rss_bytes"] - row["state_bytes"]
        known = "not run" if row["reference"] is None else f"{row['reference']}"
        sizes = [_mib(row["state_bytes"]), _mib(row["peak_rss_bytes"]), _mib(over)]
        return [
            f"{row['context']:,}", *sizes, f"{step['growth']:.1f} x", f"{row['torch_kl_mean']:.1e}", f"{row['subject']}", known,
        ]  # fmt: skip

    heads = ("context", "state", "peak memory", "peak less state", "step, over that at 1,024", "KL, nats",
             f"values retrieved, of {rows[0]['cases']}", "by transformers")  # fmt: skip
    return _table(heads, (line(*pair) for pair in zip(rows, rows[-1]["decode"], strict=True)))


def stages() -> str:
    """Seconds and memory of each stage of the main job."""
    rows = result("stages-cpu")["rows"]
    lines = [[row["stage"], f"{row['seconds']:.1f} s", _mib(row["peak_rss_bytes"])] for row in rows]
    return _table(("stage", "time", "peak memory"), lines)


def exports() -> str:
    """Export of full-size checkpoints from their headers, and of other tools."""
    own = [
        [f"foldkv, {row['model']}", f"{row['seconds']:.0f} s", _mib(row["peak_rss_bytes"]),
         f"{row['package_bytes_written'] / 2**20:.1f} MiB", f"{sum(row['nodes'].values()):,}"]
        for row in result("export-full")["rows"]
    ]  # fmt: skip
    peers = result("export-peers")
    flash = [row for row in peers["rows"] if row["model"] == "deepseek-v4-flash" and "first" not in row["tool"]]
    beside = [
        [f"{row['tool']}, {row['model']} (beside each other)", f"{row['seconds']:.0f} s", _mib(row["peak_rss_bytes"]),
         f"{row['bytes_written'] / 2**20:.1f} MiB", f"{sum(row['nodes'].values()):,}"]
        for row in flash
    ]  # fmt: skip
    guess = peers["extrapolated"]["torch_export_all_layers_cpu_seconds"]
    beside.append(["torch.onnx.export without a cache (estimate from three layers)", f"{guess} s", "-", "-", "-"])
    return _table(("tool, model", "time", "peak memory", "written", "nodes"), own + beside)


def real_size() -> str:
    """Bundles for six GPUs from full-size checkpoints."""
    rows = []
    for row in result("real-size")["rows"]:
        name = row["model"].removeprefix("deepseek-")
        export = row["export"]
        size = f"{row['graph_bytes'] / 2**20:.1f} MiB"
        rows.append(
            [f"{name}, export", f"{export['seconds']:.0f} s", "", _mib(export["largest_child_so_far"]), size, ""]
        )
        for layout in ("dense", "fp8+fp4"):
            bundles = row[layout].values()
            rows.append([
                f"{name}, {len(bundles)} GPUs, {layout}", f"{row[f'cold, {layout}']['seconds']:.0f} s",
                f"{row[f'warm, {layout}']['seconds']:.0f} s", _mib(max(one["peak_rss_bytes"] for one in bundles)),
                f"{max(one['bytes'] for one in bundles) / 2**20:.0f} MiB",
                f"{max(one['weight_bytes'] for one in bundles) / 2**30:,.1f} GiB",
            ])  # fmt: skip
    before = ["V4-Flash cut to one layer, one GPU, before", "88 s", "", "14,210 MiB", "4,101 MiB", "4.0 GiB in it"]
    head = ("", "cold", "warm", "largest process", "largest package or bundle", "weights on GPUs")
    return _table(head, [*rows, before])


def real_steps() -> str:
    """What a decode step of one sequence launches and moves in every segment, over all GPUs."""
    rows = []
    for row in result("real-size")["rows"]:
        name = row["model"].removeprefix("deepseek-")
        for layout in ("dense", "fp8+fp4"):
            bundles = list(row[layout].values())
            for kind in bundles[0]["segments"]:
                found = [one["segments"][kind] for one in bundles]
                moved = [one["weights"] + one["state"] + one["activations"] for one in found]
                rows.append([
                    f"{name}, {layout}, `{kind}`", str(found[0]["calls"]),
                    _span([one["plan_bytes"] / 1e6 for one in found], ".1f"),
                    _span([one["layers"] for one in found], ",.0f"),
                    _span([sum(one["launches"].values()) for one in found], ",.0f"),
                    _span([count / 1e6 for count in moved], ",.1f"),
                    _span([count / one["floor"] for count, one in zip(moved, found, strict=True)], ".2f"),
                ])  # fmt: skip
            steps = [one["step"] for one in bundles]
            rows.append([
                f"**{name}, {layout}, a step**", "", "", "", _span([one["launches"] for one in steps], ",.0f"),
                _span([one["bytes"] / 1e6 for one in steps], ",.0f"),
                _span([one["bytes"] / one["floor"] for one in steps], ".2f"),
            ])  # fmt: skip
    head = ("model, rows, segment", "calls", "plan, MB", "network layers", "launches", "MB a token", "over the floor")
    return _table(head, rows)


def _span(values: Sequence[float], form: str) -> str:
    """The smallest and the largest value, or one if they look the same."""
    low, high = (f"{value:{form}}" for value in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"
