"""The command line: parses, calls one library function per command, prints what it returned.

errors.py lists the exit codes; shell.py turns errors into them.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from . import __version__
from .errors import FoldkvError, InputError
from .export.checkpoint.config_reader import spec_from_file
from .progress import Progress
from .shell import Group, progress
from .units import duration_text, read_tokens, size_text

if TYPE_CHECKING:
    from .export.contract.geometry import ModelSpec
    from .optimize.fit import TargetPlan
    from .optimize.history import Estimate
    from .optimize.kept_weights import Package
    from .pipeline import Step


class _Tokens(click.ParamType[int]):
    """A number of tokens: 4096, 64k or 1M (powers of 1024)."""

    name = "tokens"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        try:
            return read_tokens(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


_json = click.option("--json", "as_json", is_flag=True, help="Print the facts as JSON.")
_folder = click.Path(path_type=Path)
_allow_unknown_key = click.option(
    "--allow-unknown-key",
    "allow_unknown_keys",
    multiple=True,
    metavar="NAME",
    help="Ignore this key of config.json, although foldkv does not know what it changes. Can be repeated.",
)


_plugins = click.option(
    "--plugins",
    type=click.Choice(["on", "off"]),
    help="On GPU targets, run the compressed-KV operators in plugins (the default) or as function bodies.",
)


def _on(switch: str | None) -> bool | None:
    """Whether --plugins is on; None if it was not given."""
    return None if switch is None else switch == "on"


def _show(facts: Any, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(facts, indent=2, ensure_ascii=False))
        return
    from .inspection import describe

    click.echo(describe(facts))


def _table(rows: list[list[str]], numbers: tuple[int, ...] = ()) -> None:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        cells = [
            cell.rjust(width) if i in numbers else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        click.echo("  ".join(cells).rstrip())


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option("-v", "--verbose", is_flag=True, help="Show more: what packages say, and tracebacks.")
@click.version_option(__version__, prog_name="foldkv")
def main(verbose: bool) -> None:
    """Turn DeepSeek-V4-class checkpoints into engines that keep the KV cache compressed."""


@main.command("export")
@click.argument("checkpoint", type=_folder)
@click.option("-o", "--output", type=_folder, required=True, help="Folder of the graph package.")
@click.option(
    "--profile",
    default="hf",
    show_default=True,
    help="Numerics: hf is what transformers computes, served what deployed systems compute.",
)
@click.option(
    "--weights",
    type=click.Choice(["float32", "reference", "repack"]),
    default="float32",
    show_default=True,
    help="Write weights in float32, use the checkpoint's files in place, or copy them as they are stored.",
)
@_allow_unknown_key
@_json
def export_command(
    checkpoint: Path, output: Path, profile: str, weights: str, allow_unknown_keys: tuple[str, ...], as_json: bool
) -> None:
    """Export CHECKPOINT to an ONNX graph with its compressed caches as explicit state.

    With reference and repack, quantised weights stay quantised, also in engines for GPUs that keep their format, and every
    kind of layer is one function. reference copies no weights; OUTPUT must be on the checkpoint's file system. Bundles can be
    built from all three, with or without plugins.
    """
    from .artifact import read_manifest
    from .export.graph import KIND, export_checkpoint
    from .optimize.history import record_export

    report, start = progress(), time.monotonic()
    _expect_export(report, checkpoint, weights, allow_unknown_keys)
    path = export_checkpoint(
        checkpoint, output, profile=profile, weights=weights, allow_unknown_keys=allow_unknown_keys, progress=report
    )
    seconds = time.monotonic() - start
    record_export(path, seconds)
    if as_json:
        manifest = read_manifest(path, kind=KIND)
        facts = {
            "graph": str(path),
            "seconds": round(seconds, 2),
            "bytes": sum(f["bytes"] for f in manifest["files"].values()),
        }
        _show(facts | {name: manifest[name] for name in ("profile", "weights", "operators")}, True)
    else:
        click.echo(f"graph package: {path}")


def _expect_export(report: Progress, checkpoint: Path, weights: str, allow_unknown_keys: tuple[str, ...]) -> None:
    """Report how long comparable exports took. Says nothing of a checkpoint that cannot be read: export refuses it."""
    from .optimize.fit import export_estimate
    from .optimize.history import read_runs

    with contextlib.suppress(FoldkvError, OSError):
        package = _package(checkpoint, weights, allow_unknown_keys)
        spec = spec_from_file(checkpoint, allow_unknown_keys=allow_unknown_keys)
        expected = export_estimate(spec, read_runs(), package)
        if expected is not None:
            report.expect(expected.low, expected.high)


@main.command("inject")
@click.argument("graph", type=_folder)
@click.option("-o", "--output", type=_folder, required=True, help="Folder of the injected graph package.")
@click.option("--target", required=True, help="Target to inject for. See `foldkv targets`.")
@click.option(
    "--layout", default="dense", show_default=True, help="How the engine keeps cache rows: dense, fp8 or fp8+fp4."
)
@_json
def inject_command(graph: Path, output: Path, target: str, layout: str, as_json: bool) -> None:
    """Assign nodes of GRAPH to the compressed-KV attention plugins of a target."""
    from .optimize.targets import resolve_targets
    from .plugins.inject import inject

    chosen = resolve_targets([target])[0]
    if chosen.sm is None or not chosen.backend.takes_plugins:
        raise InputError(f"target {target!r} is not a GPU, so it takes no plugins. Build from the graph directly.")
    injection = inject(
        graph, output, target=target, sm=chosen.sm, dtype=chosen.precision, layout=layout, progress=progress()
    )
    if as_json:
        click.echo(json.dumps(injection.facts(), indent=2))
        return
    rows = [["operator", "nodes", "plugin", "why not"]]
    for row in injection.rows:
        why = "; ".join(f"{count} x {reason}" for reason, count in row.refusals.items())
        rows.append([row.operator, str(row.nodes), str(row.injected), why])
    _table(rows, numbers=(1, 2))
    click.echo(f"graph package: {output}")


@main.command("build")
@click.argument("graph", type=_folder)
@click.option("-o", "--output", type=_folder, required=True, help="Folder that gets one bundle per target.")
@click.option(
    "--target",
    "targets",
    multiple=True,
    required=True,
    help="Target to build for; can be repeated. See `foldkv targets`.",
)
@_plugins
@click.option(
    "--layout",
    help="Format of cache rows: dense (the default); with plugins also fp8 or fp8+fp4; on the cpu also fp8+fp4 for the profile served.",
)
@click.option(
    "--jobs", type=click.IntRange(min=1), help="Builds at once; default: as many as memory and processors allow."
)
@_json
def build_command(
    graph: Path, output: Path, targets: tuple[str, ...], plugins: str | None, layout: str | None, jobs: int | None,
    as_json: bool,
) -> None:  # fmt: skip
    """Build one bundle per target from the graph package GRAPH. TensorRT-RTX builds without a GPU.

    Targets that this machine cannot build are refused before the first build. A bundle is left unchanged if its graph, settings
    and tools are unchanged.
    """
    from .optimize.build import build_bundles
    from .optimize.history import record_builds

    report = build_bundles(graph, output, targets, plugins=_on(plugins), layout=layout, jobs=jobs, progress=progress())
    record_builds(graph, report.results)
    if as_json:
        _show({"bundles": [result.to_dict() for result in report.results]}, True)
        sys.exit(report.exit_code)
    for result in report.results:
        where = result.reason if result.status == "failed" else str(result.folder)
        click.echo(f"{result.target}: {result.status} ({result.seconds:.1f} s): {where}")
    sys.exit(report.exit_code)


@main.command("generate")
@click.argument("bundle", type=_folder)
@click.argument("text")
@click.option("-n", "--max-new-tokens", type=click.IntRange(min=1), default=128, show_default=True)
@click.option("--context", type=_Tokens(), help="Tokens to plan the state for; default: as many as this call needs.")
@click.option("--temperature", type=float, default=0.0, show_default=True, help="0 is greedy.")
@click.option("--top-k", type=int, help="Sample from the k most likely tokens.")
@click.option(
    "--top-p",
    type=float,
    default=1.0,
    show_default=True,
    help="Sample from the most likely tokens that together reach this probability.",
)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--stop", multiple=True, help="End before this text; can be repeated.")
@click.option(
    "--add-special-tokens/--no-add-special-tokens",
    default=True,
    show_default=True,
    help="Add the tokenizer's special tokens to TEXT, as AutoTokenizer does, or feed TEXT unchanged.",
)
@click.option("--threads", type=click.IntRange(min=1), help="Threads per operator; default: all processors.")
@_json
def generate_command(
    bundle: Path, text: str, max_new_tokens: int, context: int | None, temperature: float, top_k: int | None, top_p: float,
    seed: int, stop: tuple[str, ...], add_special_tokens: bool, threads: int | None, as_json: bool,
) -> None:  # fmt: skip
    """Continue TEXT with the model of BUNDLE, printing as it goes."""
    from .runtime import Sampling, Session, Tokenizer, load_bundle, stream_text

    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    loaded = load_bundle(bundle)
    tokenizer = Tokenizer.from_bundle(loaded)
    prompt = tokenizer.encode(text, add_special_tokens=add_special_tokens)
    if not prompt:
        raise InputError("the text is empty; give at least one character to continue.")
    room = context or min(len(prompt) + max_new_tokens, loaded.model.max_position_embeddings)
    with Session(bundle, context=room, threads=threads) as session:
        pieces = []
        for piece in stream_text(
            session, tokenizer, [prompt], max_new_tokens=max_new_tokens, sampling=sampling, stop=stop
        ):
            pieces.append(piece)
            if not as_json:
                click.echo(piece.text, nl=False)
        if not as_json:
            click.echo()
            return
        facts = {
            "prompt_tokens": len(prompt),
            "tokens": [token for piece in pieces for token in piece.token_ids],
            "text": "".join(piece.text for piece in pieces),
            "finish_reason": pieces[-1].finish_reason,
            "stop_reason": pieces[-1].stop_reason,
            "state_bytes": session.state_bytes,
        }
        click.echo(json.dumps(facts, indent=2, ensure_ascii=False))


@main.command("validate")
@click.argument("bundle", type=_folder)
@click.option("--reference", type=_folder, required=True, help="The checkpoint the bundle was made from.")
@click.option("--report", type=_folder, required=True, help="Folder for report.html, report.json and junit.xml.")
@click.option(
    "--gate",
    "gates",
    multiple=True,
    metavar="NAME=VALUE",
    help="Replace a gate's threshold; can be repeated. The report marks it.",
)
@click.option("--text", type=_folder, help="UTF-8 text to measure on; default: sources of Python's standard library.")
@click.option("--seed", type=int, default=0, show_default=True, help="Chooses the windows of the text and the values.")
@click.option("--texts", type=int, default=6, show_default=True, help="Number of windows of the text.")
@click.option("--text-tokens", type=_Tokens(), default=384, show_default=True, help="Tokens per window.")
@click.option(
    "--distance",
    "distances",
    type=_Tokens(),
    multiple=True,
    default=(16, 64, 128, 256, 512),
    show_default=True,
    help="Bytes from a value to the question for it, a multiple of 4; can be repeated.",
)
@click.option(
    "--cases-per-distance", type=int, default=20, show_default=True, help="Values to retrieve at each distance."
)
@click.option(
    "--context",
    "contexts",
    type=_Tokens(),
    multiple=True,
    help="Also plant values in a stream of this many tokens, for example 64k; can be repeated. The reference reads up to 64k.",
)
@click.option(
    "--baseline",
    type=_folder,
    metavar="REPORT",
    help="An older report (its folder or report.json): show what has changed since.",
)
@click.option(
    "--threads",
    type=click.IntRange(min=1),
    help="Threads for bundle and reference; default: 1 for a small model, else all processors.",
)
@_allow_unknown_key
@_json
def validate_command(
    bundle: Path, reference: Path, report: Path, gates: tuple[str, ...], text: Path | None, seed: int, texts: int,
    text_tokens: int, distances: tuple[int, ...], cases_per_distance: int, contexts: tuple[int, ...],
    baseline: Path | None, threads: int | None, allow_unknown_keys: tuple[str, ...], as_json: bool,
) -> None:  # fmt: skip
    """Measure how much accuracy BUNDLE lost against the PyTorch reference. BUNDLE must be for the target cpu.

    The exit code is 1 if a gate fails, or if one holds on too little evidence ("not informative").
    """
    _wait_passively()
    from .validation.result import to_json
    from .validation.settings import Plan
    from .validation.validate import validate

    result = validate(
        bundle,
        reference,
        report,
        gates=_thresholds(gates),
        plan=Plan(seed, texts, text_tokens, distances, cases_per_distance, contexts),
        text=text,
        allow_unknown_keys=allow_unknown_keys,
        baseline=baseline,
        threads=threads,
        progress=progress(),
    )
    if as_json:
        click.echo(json.dumps(to_json(result), indent=2, ensure_ascii=False))
    else:
        _print_report(to_json(result))
        click.echo(f"report: {report / 'report.html'}")
    sys.exit(result.exit_code)


def _wait_passively() -> None:
    """Let torch's idle threads sleep: two libraries whose threads wait actively are very slow on a busy machine.

    OpenMP reads the setting when torch is loaded, so this comes first. A value that the user set is kept.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def _thresholds(gates: tuple[str, ...]) -> dict[str, float]:
    values: dict[str, float] = {}
    for gate in gates:
        name, _, value = gate.partition("=")
        if name in values:
            raise InputError(f"--gate {name} is given twice. Give each gate one threshold.")
        try:
            values[name] = float(value)
        except ValueError:
            raise InputError(f"--gate {gate!r}: expected NAME=VALUE with a number, for example kl-mean=1e-5.") from None
    return values


def _print_report(content: dict[str, Any]) -> None:
    """Print a report from its JSON: gates, what lacks evidence, notes, what changed, and the verdict."""
    from .validation.report import format_beside

    rows = [["gate", "", "measured", "", "threshold", ""]]
    for gate in content["gates"]:
        word = gate["verdict"].upper() if gate["verdict"] == "fails" else gate["verdict"]
        changed = f"{gate['changed']}, default {gate['default']:g}" if gate["changed"] else ""
        value = format_beside(float(gate["value"]), gate["threshold"])
        rows.append([gate["name"], word, value, gate["comparison"], f"{gate['threshold']:g}", changed])
    _table(rows, numbers=(2,))
    click.echo()
    for gate in content["gates"]:
        if gate["verdict"] == "not informative":
            click.echo(f"{gate['name']} is not informative: {gate['lack']}")
    for note in content["notes"]:
        click.echo(f"note: {note}")
    if content["comparison"]:
        _print_comparison(content["comparison"])
    click.echo(("PASSED: " if content["passed"] else "NOT PASSED: ") + content["headline"])


def _print_comparison(found: dict[str, Any]) -> None:
    click.echo(f"since {found['report']} ({found['date']}; {found['headline']}):")
    rows = [["gate", "before", "now", ""]]
    for gate in found["gates"]:
        sides = [f"{float(side['value']):.4g}" if side else "" for side in (gate["before"], gate["now"])]
        rows.append([gate["name"], *sides, gate["change"]])
    _table(rows, numbers=(1, 2))
    for difference in found["differences"]:
        click.echo(f"differs: {difference}")


@main.command("run")
@click.argument("pipeline", type=_folder)
@click.option("--dry-run", is_flag=True, help="Show what would be done and why, with estimates. Nothing is written.")
@click.option("--force", is_flag=True, help="Also run stages that are unchanged.")
@click.option(
    "--only",
    type=click.Choice(["export", "build", "validate"]),
    help="Run only this stage. What it reads must exist and be current.",
)
@_json
def run_command(pipeline: Path, dry_run: bool, force: bool, only: str | None, as_json: bool) -> None:
    """Run every stage of the file PIPELINE; unchanged stages are skipped.

    A run that cannot succeed is refused before the first stage. A stage runs again if its inputs, its settings, foldkv or its
    tools changed, or if its artifact is damaged. `--dry-run` shows which of these.
    """
    _wait_passively()
    from .config import load_config
    from .optimize.targets import load_targets
    from .pipeline import preview, run_pipeline

    config = load_config(pipeline)
    if dry_run:
        _print_steps(preview(config, only=only, force=force), Path(config.output), as_json)
        return
    result = run_pipeline(config, only=only, force=force, progress=progress())
    if as_json:
        facts = {
            "graph": str(result.graph), "report": str(result.report) if result.report else None, "passed": result.passed,
            "bundles": [bundle.to_dict() for bundle in result.bundles],
            "gates": result.gates, "headline": result.judged.get("headline"), "notes": result.judged.get("notes", []),
            "not_validated": result.not_validated, "stages": result.stages,
        }  # fmt: skip
        click.echo(json.dumps(facts, indent=2, ensure_ascii=False))
        sys.exit(result.exit_code)
    click.echo()
    _table(
        [
            ["stage", "", "seconds"],
            *(
                [name, "unchanged" if s["skipped"] else "done", f"{s['seconds']:.1f}"]
                for name, s in result.stages.items()
            ),
        ],
        numbers=(2,),
    )
    click.echo()
    for bundle in result.bundles:
        kind = "engine" if load_targets()[bundle.target].backend.engine else "bundle"
        click.echo(
            f"{kind} {bundle.target}: {bundle.folder if bundle.status != 'failed' else 'FAILED: ' + bundle.reason}"
        )
    if result.report:
        click.echo(f"report: {result.report / 'report.html'}\n")
        _print_report(result.judged)
    elif result.not_validated:
        click.echo(f"not validated: {', '.join(result.not_validated)}")
    sys.exit(result.exit_code)


def _print_steps(steps: list[Step], output: Path, as_json: bool) -> None:
    from .artifact import free_bytes

    need, free = sum(step.bytes or 0 for step in steps), free_bytes(output)
    if as_json:
        facts = {"steps": [step.to_dict() for step in steps], "bytes": need, "free_bytes": free}
        click.echo(json.dumps(facts, indent=2, ensure_ascii=False))
        return
    rows = [["stage", "", "time", "on disk", "why"]]
    for step in steps:
        name = f"{step.stage} {step.target}".strip()
        if not step.reason:
            rows.append([name, "unchanged", "", "", ""])
            continue
        size = size_text(step.bytes) if step.bytes is not None else ""
        why = step.reason.splitlines()[0]
        rows.append([name, "runs", "" if step.stage == "validate" else _estimated(step.seconds), size, why])
    _table(rows, numbers=(3,))
    if need:
        click.echo(f"\nthis writes {size_text(need)} into {output}; free there: {size_text(free)}")


@main.command("plan")
@click.argument("checkpoint", type=_folder)
@click.option(
    "--context", type=_Tokens(), default="1M", show_default=True, help="Tokens per sequence, for example 64k or 1M."
)
@click.option("--batch", type=click.IntRange(min=1), default=1, show_default=True, help="Sequences.")
@click.option(
    "--layout", help="One row format; default: all that a target keeps. With --target: a layout as for `build`."
)
@click.option(
    "--target",
    "targets",
    multiple=True,
    help="Check whether it fits this target; can be repeated. See `foldkv targets`.",
)
@click.option(
    "--chunk",
    type=_Tokens(),
    help="With --target: tokens of a sequence that go through the model at once; default: 256, at most the context.",
)
@_plugins
@click.option("--profile", help="With --target: profile of the graph, as for `export`; default: hf.")
@click.option(
    "--weights",
    type=click.Choice(["float32", "reference", "repack"]),
    help="With --target: as for `export`; default: float32.",
)
@click.option("--max-context", is_flag=True, help="With --target: show the largest context that fits on one device.")
@click.option(
    "--plot", type=_folder, metavar="FILE", help="Draw the caches against the context, as FILE.html or FILE.svg."
)
@_allow_unknown_key
@_json
def plan_command(
    checkpoint: Path, context: int, batch: int, layout: str | None, targets: tuple[str, ...], chunk: int | None,
    plugins: str | None, profile: str | None, weights: str | None, max_context: bool, plot: Path | None,
    allow_unknown_keys: tuple[str, ...], as_json: bool,
) -> None:  # fmt: skip
    """Show how much memory CHECKPOINT, a folder or a bare config.json, needs for caches and weights.

    The caches are shown beside those of V3.2 at the same context. Weights are counted as wide as the rows; with fp8 rows, as
    released (experts in fp4, the rest in fp8).

    With --target: caches, activations and weights on each target, in the formats that it keeps; how many GPUs that takes if
    they share the weights and each holds all caches; disk; and time. Times are estimated from earlier runs on this machine:
    export, build and run record them in history.jsonl in FOLDKV_CACHE (default: ~/.cache/foldkv). `build` writes the format
    that is marked with *.
    """
    from .export.plot import check_plot_path
    from .optimize.fit import within_model

    only_targets = {
        "--chunk": chunk, "--plugins": plugins, "--profile": profile, "--weights": weights,
        "--max-context": max_context or None,
    }  # fmt: skip
    given = [name for name, value in only_targets.items() if value is not None]
    if given and not targets:
        raise click.UsageError(
            f"{', '.join(given)} {'changes' if len(given) == 1 else 'change'} nothing without --target. Name a target, for example cpu."
        )
    spec = spec_from_file(checkpoint, allow_unknown_keys=allow_unknown_keys)
    if plot is not None:
        check_plot_path(plot)
    planned = within_model(spec, context)
    if chunk is not None and chunk > planned:
        raise InputError(f"--chunk is {chunk:,}, more than the context of {planned:,} tokens. Give a smaller chunk.")
    sizes = {"context": planned, "batch": batch, "asked": context}
    if targets:
        facts = _plan_targets(
            spec, _package(checkpoint, weights or "float32", allow_unknown_keys), targets,
            sizes | {"chunk": chunk or min(256, planned)}, layout, as_json,
            plugins=_on(plugins), profile=profile or "hf", max_context=max_context,
        )  # fmt: skip
    else:
        facts = _plan_layouts(spec, sizes, layout, as_json)
    if plot is not None:
        _plot(plot, checkpoint, spec, batch, layout, targets)
    if as_json:
        _show(facts | ({"plot": str(plot)} if plot is not None else {}), True)
    elif plot is not None:
        click.echo(f"plot: {plot}")


def _sizes_facts(sizes: dict[str, int]) -> dict[str, int]:
    """The sizes that were planned, and the context that was asked for if it was more than the model takes."""
    facts = dict(sizes)
    asked = facts.pop("asked")
    return facts | ({"context_asked": asked} if asked != facts["context"] else {})


def _plan_layouts(spec: ModelSpec, sizes: dict[str, int], layout: str | None, as_json: bool) -> dict[str, Any]:
    """The facts; also prints them as a table unless ``as_json``."""
    from .export.memory import OFFERED, parameter_count, plan_memory, weight_bytes

    context, batch = sizes["context"], sizes["batch"]
    plans = []
    for name in [layout] if layout else OFFERED:
        try:
            plans.append(plan_memory(spec, context=context, batch=batch, layout=name))
        except InputError:
            if layout or name == "bf16":
                raise
    rows_of = [
        plan.to_dict()
        | {
            "weights": weight_bytes(spec, plan.layout),
            "total_with_weights": weight_bytes(spec, plan.layout) + plan.total,
        }
        for plan in plans
    ]
    facts = {"parameters": parameter_count(spec), **_sizes_facts(sizes), "plans": rows_of}
    if as_json:
        return facts
    click.echo(f"{parameter_count(spec) / 1e9:.3g} B parameters; {context:,} tokens x {batch}")
    rows = [["layout", "window", "entries", "index", "carry", "caches", "of V3.2", "weights", "total"]]
    for plan in plans:
        g = plan.groups
        carry = sum(size for name, size in g.items() if "carry" in name)
        parts = [g["window"], g.get("entries", 0), g.get("index_entries", 0), carry, plan.total]
        weights = weight_bytes(spec, plan.layout)
        share = f"{100 * plan.share_of_v32:.2f} %"
        cells = [*(size_text(part) for part in parts), share, size_text(weights), size_text(weights + plan.total)]
        rows.append([plan.layout, *cells])
    _table(rows, numbers=tuple(range(1, 9)))
    if any(plan.layout not in OFFERED for plan in plans):
        click.echo(f"No target keeps {layout} yet; these are the bytes that it would take.")
    click.echo(
        f"V3.2 in fp8 at this context: {size_text(plans[0].v32)}. The share compares the parts that grow with the context."
    )
    return facts


def _plan_targets(
    spec: ModelSpec, package: Package, names: tuple[str, ...], sizes: dict[str, int], layout: str | None, as_json: bool,
    **options: Any,
) -> dict[str, Any]:  # fmt: skip
    """The facts; also prints them as tables unless ``as_json``."""
    from .export.memory import parameter_count
    from .optimize.fit import export_estimate, graph_bytes, plan_targets
    from .optimize.history import read_runs
    from .optimize.kept_weights import FORMATS
    from .optimize.targets import resolve_targets

    targets, runs = resolve_targets(names), read_runs()
    options |= {name: sizes[name] for name in ("context", "batch", "chunk")}
    plans = plan_targets(spec, targets, layout=layout, runs=runs, package=package, **options)
    export, graph = export_estimate(spec, runs, package), graph_bytes(spec, package)
    facts = {
        "parameters": parameter_count(spec), **_sizes_facts(sizes), "profile": options["profile"], **vars(package),
        "graph": graph, "export_seconds": export.to_dict() if export else None,
        "targets": [plan.to_dict() for plan in plans],
    }  # fmt: skip
    if as_json:
        return facts
    click.echo(
        f"{parameter_count(spec) / 1e9:.3g} B parameters; {sizes['context']:,} tokens x {sizes['batch']}, chunks of {sizes['chunk']}"
    )
    held = {name: size for name in FORMATS for plan in plans if (size := plan.weights.get(name))}
    rows = [
        ["target", "memory", "rows", "caches", "activations", *(f"{n}, {size_text(size)}" for n, size in held.items())]
    ]
    for plan in plans:
        cells = [size_text(plan.capacity), plan.layout, size_text(plan.caches), size_text(plan.activation_bytes)]
        rows.append([plan.target.name, *cells, *(_verdict(plan, name) for name in held)])
    _table(rows, numbers=(1, 3, 4))
    if options["max_context"]:
        _print_max_context(plans, list(held))
    _print_disk_and_time(plans, graph, export)
    _print_assumptions(plans)
    return facts


def _package(checkpoint: Path, weights: str, allow_unknown_keys: tuple[str, ...]) -> Package:
    """The format in which an export with ``--weights`` would keep its weights."""
    from .optimize.kept_weights import Package

    return Package(weights, "float32" if weights == "float32" else _stored_format(checkpoint, allow_unknown_keys))


def _stored_format(checkpoint: Path, allow_unknown_keys: tuple[str, ...]) -> str:
    """The format of the experts of a checkpoint, from its headers if its weights are there, else from config.json."""
    from .export.checkpoint.config_reader import read_config
    from .optimize.kept_weights import stored_format

    if not checkpoint.is_dir() or not any(checkpoint.glob("*.safetensors")):
        return stored_format(read_config(checkpoint))
    from .export.checkpoint.reader import Checkpoint

    source = Checkpoint(checkpoint, allow_unknown_keys=allow_unknown_keys)
    return stored_format(source.config, {name: stored.dtype for name, stored in source.headers.items()})


def _verdict(plan: TargetPlan, format_: str) -> str:
    """Whether the model fits with weights in a format. If not: what one device lacks, and how many GPUs it takes.

    The format that a build writes is marked.
    """
    if format_ not in plan.weights:
        return "not kept"
    over, devices, mark = plan.over(format_), plan.devices(format_), " *" if format_ == plan.built_in else ""
    if not over:
        return f"fits{mark}"
    if not plan.target.backend.gpu:
        return f"{size_text(over)} over{mark}"
    if devices is None:  # caches and activations alone are too large, even if many GPUs share the weights
        return f"{size_text(plan.replicated - plan.capacity)} over on every GPU{mark}"
    return f"{size_text(over)} over, {devices} GPUs{mark}"


def _print_max_context(plans: list[TargetPlan], formats: list[str]) -> None:
    click.echo("\nlargest context that fits on one device")
    rows = [["target", "rows", *formats]]
    for plan in plans:
        found = [plan.max_context.get(name) for name in formats]
        cells = ["not kept" if tokens is None else f"{tokens:,}" if tokens else "none" for tokens in found]
        rows.append([plan.target.name, plan.layout, *cells])
    _table(rows, numbers=tuple(range(2, 2 + len(formats))))


def _print_disk_and_time(plans: list[TargetPlan], graph: int, export: Estimate | None) -> None:
    click.echo()
    rows = [["stage", "on disk", "time"], ["export", size_text(graph), _estimated(export)]]
    shown = {plan.target.name: plan for plan in plans}  # a target's bundle has the same size with any row format
    rows += [
        [
            f"build {name}",
            size_text(plan.bundle),
            "not on this machine (see --json)" if plan.missing else _estimated(plan.build),
        ]
        for name, plan in shown.items()
    ]
    _table(rows, numbers=(1,))
    click.echo()


def _print_assumptions(plans: list[TargetPlan]) -> None:
    click.echo(
        "`foldkv build` writes the format marked with *: the target's widest after `export --weights float32`, the checkpoint's "
        "own after `--weights reference` or `repack`."
    )
    if any(plan.target.backend.gpu for plan in plans):
        click.echo(
            "Over: what one device lacks. GPUs share the weights; each holds all caches and activations. The driver is not counted."
        )
    if any(plan.activations.largest == "experts" for plan in plans):
        click.echo(
            "Activations are estimates. In engines, at most 1 GiB of them are experts' weights, gathered for a few tokens at a time."
        )
    else:
        click.echo("Activations are estimates. They are largest in attention and grow with chunk and context.")


def _estimated(found: Estimate | None) -> str:
    if found is None:
        return "no comparable runs yet"
    low, high = duration_text(found.low), duration_text(found.high)
    span = high if low == high else f"{low} to {high}"
    return f"{span} (estimate from {found.runs} run{'s' if found.runs > 1 else ''} on this machine)"


def _plot(
    path: Path, checkpoint: Path, spec: ModelSpec, batch: int, layout: str | None, targets: tuple[str, ...]
) -> None:
    from .export.contract.layouts import DENSE
    from .export.plot import write_plot
    from .optimize.targets import resolve_targets

    limits = {t.name: t.memory_gib << 30 for t in resolve_targets(targets) if t.memory_gib} if targets else {}
    name = checkpoint.resolve().parent.name if checkpoint.name == "config.json" else checkpoint.resolve().stem
    rows = "bf16" if layout == DENSE else layout or "fp8+fp4"
    write_plot(path, {name: spec}, batch=batch, layout=rows, limits=limits)


@main.command("inspect")
@click.argument("artifact", type=_folder)
@_allow_unknown_key
@_json
def inspect_command(artifact: Path, allow_unknown_keys: tuple[str, ...], as_json: bool) -> None:
    """Show facts about ARTIFACT: a checkpoint, a graph package, a bundle or a report, whose files are verified.

    For a bundle: shapes, layout, bytes of the state, engine and plugins. For a report: gates, figures and what was measured. For
    a graph package: nodes, operators and how its weights are stored. For a checkpoint: geometry and how its tensors are stored.
    """
    from .inspection import inspect_artifact

    _show(inspect_artifact(artifact, allow_unknown_keys=allow_unknown_keys), as_json)


@main.command("doctor")
@_json
def doctor_command(as_json: bool) -> None:
    """Show what works on this machine, and what is missing for the rest."""
    from .doctor import examine

    facts = examine()
    if as_json:
        _show(facts, True)
        return
    click.echo(
        f"Python {facts['python']}, {facts['processors']} processors, {size_text(facts['memory_bytes'])}, {facts['cuda_devices']} CUDA devices"
    )
    rows = [["package", "version", "needed", "for"]]
    for row in facts["packages"]:
        rows.append([row["package"], row["version"] or "missing", row["needs"], row["for"]])
    _table(rows)
    click.echo()
    for name, works in facts["can"].items():
        lacks = facts["lacks"][name]
        click.echo(f"{name}: {'yes' if works else 'no, needs ' + ', '.join(lacks['what'])}")
        if lacks["install"]:
            click.echo(f"  {lacks['install']}")
    for row in facts["packages"]:
        if row["problem"]:
            click.echo(f"{row['package']} is installed, but cannot be imported: {row['problem']}")


@main.command("targets")
@click.option(
    "--coverage",
    type=_folder,
    metavar="CHECKPOINT",
    help="Instead show which operators of this checkpoint or bare config.json have a plugin.",
)
@_allow_unknown_key
@_json
def targets_command(coverage: Path | None, allow_unknown_keys: tuple[str, ...], as_json: bool) -> None:
    """List the targets that bundles can be built for, their backends, and whether this machine can build them."""
    from .optimize.choices import PLUGINS, Choice, missing_for
    from .optimize.targets import load_targets

    targets = load_targets()
    if coverage is not None:
        _print_coverage(coverage, allow_unknown_keys, sorted({t.sm for t in targets.values() if t.sm}), as_json)
        return
    missing = {
        name: missing_for(Choice(target, PLUGINS and target.backend.takes_plugins, "dense"))
        for name, target in targets.items()
    }
    if as_json:
        here = [{"builds_here": not missing[name], "missing": missing[name]} for name in targets]
        facts = [target.to_dict() | more for target, more in zip(targets.values(), here, strict=True)]
        click.echo(json.dumps(facts, indent=2))
        return
    rows = [["target", "sm", "memory", "GB/s", "precision", "backends", "built here"]]
    for t in targets.values():
        memory = f"{t.memory_gib} GiB" if t.memory_gib else ""
        cells = [str(t.sm or ""), memory, str(t.bandwidth_gb_s or ""), t.precision, ", ".join(t.backends)]
        rows.append([t.name, *cells, "no" if missing[t.name] else "yes"])
    _table(rows, numbers=(1, 2, 3))
    if any(missing.values()):
        click.echo("`foldkv targets --json` shows what is missing for a target.")


def _print_coverage(checkpoint: Path, allow_unknown_keys: tuple[str, ...], sms: list[int], as_json: bool) -> None:
    from .plugins.coverage import coverage
    from .plugins.declarations import BODIES

    found = coverage(spec_from_file(checkpoint, allow_unknown_keys=allow_unknown_keys), sms)
    if as_json:
        click.echo(json.dumps({"plugins": [row.to_dict() for row in found], "bodies": BODIES}, indent=2))
        return
    rows = [["operator", "state", "rows", "type", *(f"sm{sm}" for sm in sms)]]
    reasons: dict[str, int] = {}
    for row in found:
        marks = ["yes" if not gap else f"no ({reasons.setdefault(gap, len(reasons) + 1)})" for gap in row.gaps.values()]
        rows.append([row.operator, row.group, row.rows, row.dtype, *marks])
    _table(rows)
    for reason, number in reasons.items():
        click.echo(f"({number}) {reason}")
    for operator, why in BODIES.items():
        click.echo(f"{operator} {why}.")
