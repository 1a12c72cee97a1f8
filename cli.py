"""The command line: parses, calls one library function per command, prints what it returned.

Exit codes: 0 ok, 1 a validation gate failed, 2 bad usage or bad input, 3 the environment lacks something,
4 internal error.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import foldkv
from foldkv.errors import EXIT_INTERNAL, FoldkvError, InputError
from foldkv.units import duration_text, read_tokens, size_text

if TYPE_CHECKING:
    from foldkv.export.spec import ModelSpec
    from foldkv.optimize.fit import TargetPlan
    from foldkv.optimize.history import Estimate
    from foldkv.pipeline import Step


class _Tokens(click.ParamType[int]):
    """A number of tokens: 4096, 64k or 1M (powers of 1024)."""

    name = "tokens"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        try:
            return read_tokens(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


class _Group(click.Group):
    """Turns every error into one message and its exit code; -v shows the traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, click.Abort, BrokenPipeError):
            raise  # click ends quietly where the reader of a pipe has gone
        except Exception as error:  # noqa: BLE001 - the last resort of the command line
            if ctx.params.get("verbose"):
                traceback.print_exc()
            if isinstance(error, FoldkvError):
                click.echo(f"error: {error}", err=True)
                ctx.exit(error.exit_code)
            click.echo(f"internal error: {type(error).__name__}: {error}\nRun again with -v and report it.", err=True)
            ctx.exit(EXIT_INTERNAL)


_json = click.option("--json", "as_json", is_flag=True, help="Print the facts as JSON.")
_folder = click.Path(path_type=Path)
_plugins = click.option(
    "--plugins",
    type=click.Choice(["on", "off"]),
    help="Give the compressed-KV operators of GPU targets to plugins, the default, or use function bodies.",
)


def _on(switch: str | None) -> bool | None:
    """Of --plugins; None where it was not given."""
    return None if switch is None else switch == "on"


def _progress() -> Callable[[str], None]:
    """One line per step on stderr, so that stdout stays for results."""
    return lambda line: click.echo(line, err=True)


def _show(facts: Any, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(facts, indent=2, ensure_ascii=False))
        return
    from foldkv.inspection import describe

    click.echo(describe(facts))


def _table(rows: list[list[str]], numbers: tuple[int, ...] = ()) -> None:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        cells = [
            cell.rjust(width) if i in numbers else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        click.echo("  ".join(cells).rstrip())


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option("-v", "--verbose", is_flag=True, help="Show a traceback with an error.")
@click.version_option(foldkv.__version__, prog_name="foldkv")
def main(verbose: bool) -> None:
    """DeepSeek-V4-class checkpoints to engines that keep the KV cache compressed."""


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
def export_command(checkpoint: Path, output: Path, profile: str, weights: str) -> None:
    """Export CHECKPOINT to an ONNX graph with its compressed caches as explicit state.

    With reference and repack quantised weights stay as they are, in engines too where the GPU's keep them, and every kind of
    layer is one function; reference copies no weight and needs the checkpoint's file system. Bundles and plugins are made of all.
    """
    from foldkv.export.graph import export_checkpoint
    from foldkv.optimize.history import record_export

    start = time.monotonic()
    path = export_checkpoint(checkpoint, output, profile=profile, weights=weights, progress=_progress())
    record_export(path, time.monotonic() - start)
    click.echo(f"graph package: {path}")


@main.command("inject")
@click.argument("graph", type=_folder)
@click.option("-o", "--output", type=_folder, required=True, help="Folder of the injected graph package.")
@click.option("--target", required=True, help="What to inject for. See `foldkv targets`.")
@click.option(
    "--layout", default="dense", show_default=True, help="How the engine keeps cache rows: dense, fp8 or fp8+fp4."
)
@_json
def inject_command(graph: Path, output: Path, target: str, layout: str, as_json: bool) -> None:
    """Give the nodes of GRAPH to the compressed-KV attention plugins that a target has."""
    from foldkv.optimize.targets import resolve_targets
    from foldkv.plugins.inject import inject

    chosen = resolve_targets([target])[0]
    if chosen.sm is None:
        raise InputError(f"target {target!r} is not a GPU and takes no plugins; build it from the graph as it is.")
    injection = inject(
        graph, output, target=target, sm=chosen.sm, dtype=chosen.precision, layout=layout, progress=_progress()
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
    "--target", "targets", multiple=True, required=True, help="What to build for; repeat it. See `foldkv targets`."
)
@_plugins
@click.option(
    "--layout",
    help="How cache rows are kept: dense, the default; with plugins fp8 or fp8+fp4; on the cpu fp8+fp4 for the profile served.",
)
@click.option("--jobs", type=click.IntRange(min=1), help="Builds at once; default: what memory and processors allow.")
def build_command(
    graph: Path, output: Path, targets: tuple[str, ...], plugins: str | None, layout: str | None, jobs: int | None
) -> None:
    """Build one bundle per target from the graph package GRAPH. No GPU is needed where TensorRT-RTX builds.

    What this machine cannot build is refused before anything is built. A bundle whose graph, settings and tools are unchanged is
    left as it is.
    """
    from foldkv.optimize.build import build_bundles
    from foldkv.optimize.history import record_builds

    report = build_bundles(graph, output, targets, plugins=_on(plugins), layout=layout, jobs=jobs, progress=_progress())
    record_builds(graph, report.results)
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
@click.option("--top-k", type=int, help="Sample among the k likeliest tokens.")
@click.option(
    "--top-p",
    type=float,
    default=1.0,
    show_default=True,
    help="Sample among the likeliest tokens that hold this share.",
)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--stop", multiple=True, help="Stop when this text appears; repeat it.")
@_json
def generate_command(
    bundle: Path, text: str, max_new_tokens: int, context: int | None, temperature: float, top_k: int | None, top_p: float,
    seed: int, stop: tuple[str, ...], as_json: bool,
) -> None:  # fmt: skip
    """Continue TEXT with the model of BUNDLE, printing as it goes."""
    from foldkv.runtime.bundle import load_bundle
    from foldkv.runtime.sampling import Sampling
    from foldkv.runtime.session import Session
    from foldkv.runtime.tokenizer import Tokenizer

    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    loaded = load_bundle(bundle)
    tokenizer = Tokenizer.from_bundle(loaded)
    prompt = tokenizer.encode(text)
    if not prompt:
        raise InputError("the text is empty; give at least one character to continue.")
    with Session(
        bundle, context=context or min(len(prompt) + max_new_tokens, loaded.model.max_position_embeddings)
    ) as session:
        pieces, tokens, printed = tokenizer.stream(), [], ""
        for _, token in session.stream(
            [prompt], max_new_tokens=max_new_tokens, sampling=sampling, stop_tokens=loaded.model.eos_token_ids
        ):
            tokens.append(token)
            piece = pieces.push(token)
            printed += piece
            if not as_json:
                click.echo(piece, nl=False)
            if any(mark in printed for mark in stop):
                break
        rest = pieces.finish()
        if as_json:
            facts = {
                "prompt_tokens": len(prompt),
                "tokens": tokens,
                "text": printed + rest,
                "state_bytes": session.state_bytes,
            }
            click.echo(json.dumps(facts, indent=2, ensure_ascii=False))
        else:
            click.echo(rest)


@main.command("validate")
@click.argument("bundle", type=_folder)
@click.option("--reference", type=_folder, required=True, help="The checkpoint the bundle was made from.")
@click.option("--report", type=_folder, required=True, help="Folder for report.html, report.json and junit.xml.")
@click.option(
    "--gate",
    "gates",
    multiple=True,
    metavar="NAME=VALUE",
    help="Replace a gate's threshold; repeat it. The report marks it.",
)
@click.option("--text", type=_folder, help="UTF-8 text to measure on; default: sources of Python's standard library.")
@click.option("--seed", type=int, default=0, show_default=True, help="Which windows of the text, and which values.")
@click.option("--texts", type=int, default=6, show_default=True, help="Windows of the text.")
@click.option("--text-tokens", type=_Tokens(), default=384, show_default=True, help="Tokens of a window.")
@click.option(
    "--distance",
    "distances",
    type=_Tokens(),
    multiple=True,
    default=(16, 64, 128, 256, 512),
    show_default=True,
    help="Bytes from a value to the question for it, a multiple of 4; repeat it.",
)
@click.option(
    "--cases-per-distance", type=int, default=20, show_default=True, help="Values to retrieve at each distance."
)
@click.option(
    "--context",
    "contexts",
    type=_Tokens(),
    multiple=True,
    help="Plant values in a stream of this many tokens too, for example 64k; repeat it. The reference reads up to 64k.",
)
@click.option(
    "--baseline",
    type=_folder,
    metavar="REPORT",
    help="An older report, its folder or report.json: show what changed since.",
)
@click.option(
    "--threads",
    type=click.IntRange(min=1),
    help="Threads of both sides; default: 1 for a small model, else all processors.",
)
@_json
def validate_command(
    bundle: Path, reference: Path, report: Path, gates: tuple[str, ...], text: Path | None, seed: int, texts: int,
    text_tokens: int, distances: tuple[int, ...], cases_per_distance: int, contexts: tuple[int, ...],
    baseline: Path | None, threads: int | None, as_json: bool,
) -> None:  # fmt: skip
    """Measure what accuracy BUNDLE, of the target cpu, lost against the PyTorch reference.

    Exit 1 if a gate fails, or if one holds on too little evidence ("not informative").
    """
    _wait_passively()
    from foldkv.validation.plan import Plan
    from foldkv.validation.result import to_json
    from foldkv.validation.validate import validate

    result = validate(
        bundle,
        reference,
        report,
        gates=_thresholds(gates),
        plan=Plan(seed, texts, text_tokens, distances, cases_per_distance, contexts),
        text=text,
        baseline=baseline,
        threads=threads,
        progress=_progress(),
    )
    if as_json:
        click.echo(json.dumps(to_json(result), indent=2, ensure_ascii=False))
    else:
        _print_report(to_json(result))
        click.echo(f"report: {report / 'report.html'}")
    sys.exit(result.exit_code)


def _wait_passively() -> None:
    """Let torch's idle threads sleep: two libraries whose threads wait actively collapse on a busy machine.

    OpenMP reads the setting when torch is loaded, so it comes first; one of the user's own stays.
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
    """Gates, what was too little, what a reader must know, what changed, and the verdict, from a report's JSON."""
    from foldkv.validation.report import format_beside

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
@click.option("--dry-run", is_flag=True, help="Say what would be done and why, with estimates; nothing is written.")
@click.option("--force", is_flag=True, help="Run stages that are unchanged, too.")
@click.option(
    "--only",
    type=click.Choice(["export", "build", "validate"]),
    help="Run this stage alone; what it reads must be there and current.",
)
@_json
def run_command(pipeline: Path, dry_run: bool, force: bool, only: str | None, as_json: bool) -> None:
    """Run every stage of the file PIPELINE; unchanged stages are skipped.

    What cannot succeed is refused before the first stage. A stage runs again where its inputs, its settings, foldkv or its tools
    changed, or its artifact is damaged; `--dry-run` says which of these.
    """
    _wait_passively()
    from foldkv.config import load_config
    from foldkv.pipeline import preview, run_pipeline

    config = load_config(pipeline)
    if dry_run:
        _print_steps(preview(config, only=only, force=force), Path(config.output), as_json)
        return
    result = run_pipeline(config, only=only, force=force, progress=_progress())
    if as_json:
        facts = {
            "graph": str(result.graph), "report": str(result.report) if result.report else None, "passed": result.passed,
            "bundles": [{"target": b.target, "status": b.status, "folder": str(b.folder), "reason": b.reason} for b in result.bundles],
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
        kind = "bundle" if bundle.target == "cpu" else "engine"
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
    from foldkv.artifact import free_bytes

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
    "--layout", help="One row format; default: all that a target keeps. With --target: a name as `build` takes it."
)
@click.option("--target", "targets", multiple=True, help="Will it fit this? Repeat it. See `foldkv targets`.")
@click.option(
    "--chunk",
    type=_Tokens(),
    help="With --target: tokens of a sequence that go through the model at once; default: 256, or the context.",
)
@_plugins
@click.option("--profile", help="With --target: of the graph, as `export` is given it; default: hf.")
@click.option(
    "--weights",
    type=click.Choice(["float32", "reference", "repack"]),
    help="With --target: as `export` is given it; default: float32.",
)
@click.option("--max-context", is_flag=True, help="With --target: the largest context that fits on one device.")
@click.option(
    "--plot", type=_folder, metavar="FILE", help="Draw the caches against the context, as FILE.html or FILE.svg."
)
@_json
def plan_command(
    checkpoint: Path, context: int, batch: int, layout: str | None, targets: tuple[str, ...], chunk: int | None,
    plugins: str | None, profile: str | None, weights: str | None, max_context: bool, plot: Path | None, as_json: bool,
) -> None:  # fmt: skip
    """Memory of CHECKPOINT, a folder or a bare config.json: caches and weights.

    The caches stand beside those of V3.2 at the same context. Weights are as wide as the rows; with fp8 rows they are
    counted as released (experts in fp4, the rest in fp8).

    With --target: caches, activations and weights on each target, in the formats that it keeps; how many GPUs that takes if
    the weights are shared out and each GPU holds all caches; disk; and time, estimated from earlier runs on this machine, which
    export, build and run record in history.jsonl of FOLDKV_CACHE, by default ~/.cache/foldkv. `build` writes the format that is
    marked with *.
    """
    from foldkv.export.plot import check_plot_path
    from foldkv.export.spec import ModelSpec
    from foldkv.optimize.fit import within_model

    only_targets = {
        "--chunk": chunk, "--plugins": plugins, "--profile": profile, "--weights": weights,
        "--max-context": max_context or None,
    }  # fmt: skip
    given = [name for name, value in only_targets.items() if value is not None]
    if given and not targets:
        raise click.UsageError(f"{', '.join(given)} changes nothing without --target. Name a target, for example cpu.")
    spec = ModelSpec.from_file(checkpoint)
    if plot is not None:
        check_plot_path(plot)
    planned = within_model(spec, context)
    if chunk is not None and chunk > planned:
        raise InputError(f"--chunk is {chunk:,}, more than the context of {planned:,} tokens. Give a smaller chunk.")
    sizes = {"context": planned, "batch": batch, "asked": context}
    if targets:
        _plan_targets(
            spec, checkpoint, targets, sizes | {"chunk": chunk or min(256, planned)}, layout, as_json,
            plugins=_on(plugins), profile=profile or "hf", weights=weights or "float32", max_context=max_context,
        )  # fmt: skip
    else:
        _plan_layouts(spec, sizes, layout, as_json)
    if plot is not None:
        _plot(plot, checkpoint, spec, batch, layout, targets)
        click.echo(f"plot: {plot}", err=as_json)


def _sizes_facts(sizes: dict[str, int]) -> dict[str, int]:
    """The sizes that were planned, and the context that was asked for if it was more than the model takes."""
    facts = dict(sizes)
    asked = facts.pop("asked")
    return facts | ({"context_asked": asked} if asked != facts["context"] else {})


def _plan_layouts(spec: ModelSpec, sizes: dict[str, int], layout: str | None, as_json: bool) -> None:
    from foldkv.export.plan import OFFERED, parameter_count, plan_memory, weight_bytes

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
        click.echo(json.dumps(facts, indent=2))
        return
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


def _plan_targets(
    spec: ModelSpec, checkpoint: Path, names: tuple[str, ...], sizes: dict[str, int], layout: str | None, as_json: bool, *,
    weights: str, **options: Any,
) -> None:  # fmt: skip
    from foldkv.export.plan import parameter_count
    from foldkv.optimize.fit import export_estimate, graph_bytes, plan_targets
    from foldkv.optimize.formats import FORMATS, Package
    from foldkv.optimize.history import read_runs
    from foldkv.optimize.targets import resolve_targets

    targets, runs = resolve_targets(names), read_runs()
    package = Package(weights, "float32" if weights == "float32" else _stored_format(checkpoint))
    options |= {name: sizes[name] for name in ("context", "batch", "chunk")}
    plans = plan_targets(spec, targets, layout=layout, runs=runs, package=package, **options)
    export, graph = export_estimate(spec, runs, package), graph_bytes(spec, package)
    if as_json:
        facts = {
            "parameters": parameter_count(spec), **_sizes_facts(sizes), "profile": options["profile"], **vars(package),
            "graph": graph, "export_seconds": export.to_dict() if export else None,
            "targets": [plan.to_dict() for plan in plans],
        }  # fmt: skip
        click.echo(json.dumps(facts, indent=2))
        return
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


def _stored_format(checkpoint: Path) -> str:
    """The format of the experts of a checkpoint, from its headers if its weights are there, else from config.json."""
    from foldkv.export.spec import read_config
    from foldkv.optimize.formats import stored_format

    if not checkpoint.is_dir():
        return stored_format(read_config(checkpoint))
    if not any(checkpoint.glob("*.safetensors")):
        return stored_format(read_config(checkpoint / "config.json"))
    from foldkv.export.checkpoint import Checkpoint

    source = Checkpoint(checkpoint)
    return stored_format(source.config, {name: stored.dtype for name, stored in source.headers.items()})


def _verdict(plan: TargetPlan, format_: str) -> str:
    """Whether the model fits with weights in a format; else by what one device is too small, and how many GPUs it takes.

    The format that a build writes is marked.
    """
    if format_ not in plan.weights:
        return "not kept"
    over, devices, mark = plan.over(format_), plan.devices(format_), " *" if format_ == plan.built_in else ""
    if not over:
        return f"fits{mark}"
    if plan.target.sm is None:
        return f"{size_text(over)} over{mark}"
    if devices is None:  # caches and activations alone are too large, however many share the weights
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
    shown = {plan.target.name: plan for plan in plans}  # whatever its rows, a target's bundle weighs the same
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
        "`foldkv build` writes the format marked with *: the widest of a target from `export --weights float32`, the checkpoint's "
        "own from `--weights reference` or `repack`."
    )
    if any(plan.target.sm for plan in plans):
        click.echo(
            "Over: what one device lacks. GPUs share the weights; each holds all caches and activations, nothing for the driver."
        )
    if any(plan.activations.largest == "experts" for plan in plans):
        click.echo(
            "Activations are estimates; in engines at most 1 GiB of them are weights of experts, gathered for a few tokens at a time."
        )
    else:
        click.echo("Activations are estimates, largest in attention: they follow chunk and context.")


def _estimated(found: Estimate | None) -> str:
    if found is None:
        return "no comparable runs yet"
    low, high = duration_text(found.low), duration_text(found.high)
    span = high if low == high else f"{low} to {high}"
    return f"{span} (estimate from {found.runs} run{'s' if found.runs > 1 else ''} on this machine)"


def _plot(
    path: Path, checkpoint: Path, spec: ModelSpec, batch: int, layout: str | None, targets: tuple[str, ...]
) -> None:
    from foldkv.export.layouts import DENSE
    from foldkv.export.plot import write_plot
    from foldkv.optimize.targets import resolve_targets

    limits = {t.name: t.memory_gib << 30 for t in resolve_targets(targets) if t.memory_gib} if targets else {}
    name = checkpoint.resolve().parent.name if checkpoint.name == "config.json" else checkpoint.resolve().stem
    rows = "bf16" if layout == DENSE else layout or "fp8+fp4"
    write_plot(path, {name: spec}, batch=batch, layout=rows, limits=limits)


@main.command("inspect")
@click.argument("artifact", type=_folder)
@_json
def inspect_command(artifact: Path, as_json: bool) -> None:
    """Facts of ARTIFACT: a checkpoint, a graph package, a bundle or a report. Its files are verified.

    Of a bundle: shapes, layout, bytes of the state, engine and plugins; of a report: gates, figures, and what was measured; of a
    graph package: nodes, operators and how it has its weights; of a checkpoint: geometry and how its tensors are stored.
    """
    from foldkv.inspection import inspect_artifact

    _show(inspect_artifact(artifact), as_json)


@main.command("doctor")
@_json
def doctor_command(as_json: bool) -> None:
    """What works on this machine, and what is missing for the rest."""
    from foldkv.doctor import examine

    facts = examine()
    if as_json:
        _show(facts, True)
        return
    click.echo(
        f"Python {facts['python']}, {facts['processors']} processors, {size_text(facts['memory_bytes'])}, {facts['cuda_devices']} CUDA devices"
    )
    _table(
        [
            ["package", "version", "for"],
            *([row["package"], row["version"] or "missing", row["for"]] for row in facts["packages"]),
        ]
    )
    for name, works in facts["can"].items():
        click.echo(f"{name}: {'yes' if works else 'no'}")


@main.command("targets")
@click.option(
    "--coverage",
    type=_folder,
    metavar="CHECKPOINT",
    help="Show instead which operators of this checkpoint, or bare config.json, have a plugin.",
)
@_json
def targets_command(coverage: Path | None, as_json: bool) -> None:
    """The targets that bundles can be built for, by which backend, and whether that works on this machine."""
    from foldkv.optimize.choices import PLUGINS, Choice, missing_for
    from foldkv.optimize.targets import load_targets

    targets = load_targets()
    if coverage is not None:
        _print_coverage(coverage, sorted({t.sm for t in targets.values() if t.sm}), as_json)
        return
    missing = {
        name: missing_for(Choice(target, PLUGINS and target.sm is not None, "dense"))
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
        click.echo("What is missing for a target: `foldkv targets --json`.")


def _print_coverage(checkpoint: Path, sms: list[int], as_json: bool) -> None:
    from foldkv.export.spec import ModelSpec
    from foldkv.plugins.coverage import coverage
    from foldkv.plugins.spec import BODIES

    found = coverage(ModelSpec.from_file(checkpoint), sms)
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
