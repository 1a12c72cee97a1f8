"""The command line: parses, calls one library function per command, prints what it returned.

errors.py lists the exit codes; shell.py turns errors into them.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from . import __version__
from .errors import FoldkvError, InputError
from .export.checkpoint.config_reader import spec_from_file
from .progress import Progress
from .records import to_json
from .shell import Group, progress
from .units import read_size, read_tokens, size_text

if TYPE_CHECKING:
    from .export.contract.geometry import ModelSpec


class _Tokens(click.ParamType[int]):
    """A number of tokens: 4096, 64k or 1M (powers of 1024)."""

    name = "tokens"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        try:
            return read_tokens(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


class _Numbers(click.ParamType[tuple[int, ...]]):
    """Numbers with commas: 0,1."""

    name = "numbers"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        try:
            return tuple(int(number) for number in str(value).split(","))
        except ValueError:
            self.fail(f"{value!r} is not a list of numbers such as 0,1", param, ctx)


class _Size(click.ParamType[int]):
    """Bytes: 4096, 512KiB, 4MiB or 1GiB."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        try:
            return read_size(value)
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


_weights_from = click.option(
    "--weights-from",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder with the checkpoint's weight files; default: FOLDKV_WEIGHTS, `weights` beside the manifest, where they were.",
)
_signature = click.option(
    "--signature",
    type=_folder,
    metavar="EVIDENCE",
    help="The bundle must be the one that this folder of `foldkv evidence --key` vouches for. With --public-key.",
)
_public_key = click.option(
    "--public-key",
    type=_folder,
    metavar="FILE",
    help="Key that --signature must be made with: an elliptic curve's, in PEM.",
)
_read_in_place = click.option(
    "--no-place",
    is_flag=True,
    help="On the cpu, read weights from the checkpoint's files, and copy none. Slow: every step decodes matrices and experts.",
)
_matrices = click.option(
    "--matrices",
    type=click.Choice(["auto", "float32", "bfloat16"]),
    default="auto",
    show_default=True,
    help="On the cpu, the type in which the matrices of a large model are read: float32 is the fastest and is made in memory; auto takes it if that is at most half of the free memory.",
)
_plugins = click.option(
    "--plugins",
    type=click.Choice(["on", "off"]),
    help="On GPU targets, run operators in plugins (the default) or as function bodies.",
)
_backend = click.option(
    "--backend",
    metavar="NAME",
    help="Build for the GPU targets with this backend, for example onnxruntime-cuda, instead of the first that `foldkv targets` lists.",
)


def _on(switch: str | None) -> bool | None:
    """Whether --plugins is on; None if it was not given."""
    return None if switch is None else switch == "on"


def _show(facts: Any, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(facts, indent=2, ensure_ascii=False))
        return
    from .tables import describe

    click.echo(describe(facts))


def _print(lines: Sequence[str]) -> None:
    click.echo("\n".join(lines))


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option("-v", "--verbose", is_flag=True, help="Show more: what packages say, and tracebacks.")
@click.version_option(__version__, prog_name="foldkv")
def main(verbose: bool) -> None:
    """Turn DeepSeek-V4-class checkpoints into engines that keep the KV cache compressed."""


def _look_at_checkpoint(given: Mapping[str, Any]) -> None:
    from .export.checkpoint.reader import Checkpoint

    Checkpoint(
        given["reference" if "reference" in given else "checkpoint"], allow_unknown_keys=given["allow_unknown_keys"]
    )


@main.command("export", look=_look_at_checkpoint)
@click.argument("checkpoint", type=_folder)
@click.option("-o", "--output", type=_folder, required=True, help="Folder of the graph package.")
@click.option(
    "--profile",
    default="hf",
    show_default=True,
    help="Numerics: hf is what transformers computes, served what deployed systems compute.",
)
@click.option(
    "--flat", is_flag=True, help="Write the whole model as one graph for other tools, with its weights beside it."
)
@_allow_unknown_key
@_json
def export_command(
    checkpoint: Path, output: Path, profile: str, flat: bool, allow_unknown_keys: tuple[str, ...], as_json: bool
) -> None:
    """Export CHECKPOINT to ONNX, with its compressed caches as explicit state: one graph per kind of layer.

    The graphs take weights as inputs. No weight is read or copied: a lock says where each lies in the checkpoint's files. With
    --flat, OUTPUT is instead one ONNX model of all layers, for Netron, other tools and plain ONNX Runtime.
    """
    from .export.flat import export_flat
    from .export.package import export_checkpoint
    from .manifests import GraphManifest, read
    from .optimize.history import record_export

    report, start = progress(), time.monotonic()
    if flat:
        path = export_flat(checkpoint, output, profile=profile, allow_unknown_keys=allow_unknown_keys, progress=report)
        click.echo(json.dumps({"model": str(path)}) if as_json else f"model: {path}")
        return
    _expect_export(report, checkpoint, allow_unknown_keys)
    path = export_checkpoint(
        checkpoint, output, profile=profile, allow_unknown_keys=allow_unknown_keys, progress=report
    )
    seconds = time.monotonic() - start
    record_export(path, seconds)
    if as_json:
        manifest = read(GraphManifest, path)
        size = sum(file.bytes for file in manifest.files.values())
        facts = {"graph": str(path), "seconds": round(seconds, 2), "bytes": size, "profile": manifest.profile}
        kinds = {name: row.operators for name, row in manifest.segments.items()}
        _show(
            facts | {"weights": to_json(manifest.weights), "layers": manifest.layers, "segments": kinds,
                     "operators": manifest.operators}, True,
        )  # fmt: skip
    else:
        click.echo(f"graph package: {path}")


def _expect_export(report: Progress, checkpoint: Path, allow_unknown_keys: tuple[str, ...]) -> None:
    """Report how long comparable exports took. Says nothing of a checkpoint that cannot be read: export refuses it."""
    from .optimize.fit import export_estimate, stored_in
    from .optimize.history import read_runs

    with contextlib.suppress(FoldkvError, OSError):
        stored = stored_in(checkpoint, allow_unknown_keys=allow_unknown_keys)
        spec = spec_from_file(checkpoint, allow_unknown_keys=allow_unknown_keys)
        expected = export_estimate(spec, read_runs(), stored)
        if expected is not None:
            report.expect(expected.low, expected.high)


def _look_at_graph(given: Mapping[str, Any]) -> None:
    from .artifact import read_manifest
    from .manifests import GraphManifest
    from .optimize.targets import resolve_targets

    if "targets" in given:
        resolve_targets(given["targets"], given["backend"])
    else:
        resolve_targets([given["target"]])
    read_manifest(given["graph"], kind=GraphManifest.KIND)


@main.command("inject", look=_look_at_graph)
@click.argument("graph", type=_folder)
@click.option("-o", "--output", type=_folder, required=True, help="Folder of the injected graph package.")
@click.option("--target", required=True, help="Target to inject for. See `foldkv targets`.")
@click.option(
    "--layout", default="dense", show_default=True, help="How the engine keeps cache rows: dense, fp8 or fp8+fp4."
)
@_json
def inject_command(graph: Path, output: Path, target: str, layout: str, as_json: bool) -> None:
    """Assign nodes of GRAPH to the plugins of a target."""
    from .optimize.targets import resolve_targets
    from .plugins.inject import inject
    from .records import to_json
    from .targets_text import injection_lines

    chosen = resolve_targets([target])[0]
    if chosen.sm is None or not chosen.backend.takes_plugins:
        raise InputError(f"target {target!r} is not a GPU, so it takes no plugins. Build from the graph directly.")
    injection = inject(
        graph, output, target=target, sm=chosen.sm, dtype=chosen.precision, layout=layout, progress=progress()
    )
    if as_json:
        click.echo(json.dumps(to_json(injection.facts()), indent=2))
        return
    _print(injection_lines(injection.rows))
    click.echo(f"graph package: {output}")


@main.command("build", look=_look_at_graph)
@click.argument("graph", type=_folder)
@click.option("-o", "--output", type=_folder, required=True, help="Folder that gets one bundle per target.")
@click.option(
    "--target",
    "targets",
    multiple=True,
    required=True,
    help="Target to build for; can be repeated. See `foldkv targets`.",
)
@_backend
@_plugins
@click.option(
    "--layout",
    help="Format of cache rows: dense (the default); with plugins also fp8 or fp8+fp4; with ONNX Runtime also fp8+fp4 for the profile served.",
)
@click.option("--jobs", type=click.IntRange(min=1), help="Targets at once; default: the processors of this process.")
@_weights_from
@click.option(
    "--cache", type=_folder, help="Folder with plans of engines, which machines can share; default: FOLDKV_CACHE."
)
@click.option(
    "--ray",
    metavar="local|ADDRESS",
    help="Let the workers of this Ray cluster build the plans of engines; local: one of this machine's processors.",
)
@click.option(
    "--no-place",
    is_flag=True,
    help="Leave the weights of bundles for ONNX Runtime as they are stored; every step then converts them. Slow, but writes none.",
)
@_json
def build_command(
    graph: Path, output: Path, targets: tuple[str, ...], backend: str | None, plugins: str | None, layout: str | None,
    jobs: int | None, weights_from: Path | None, cache: Path | None, ray: str | None, no_place: bool, as_json: bool,
) -> None:  # fmt: skip
    """Build one bundle per target from the graph package GRAPH. TensorRT-RTX and ONNX Runtime build without a GPU.

    Targets that this machine cannot build are refused before the first build. A bundle is left unchanged if its graph, settings
    and tools are unchanged. Engines of GPU targets hold no weights: they are built without them, and taken from the cache if an
    equal one was built before, for another model of the same kind too.
    """
    from .optimize.build import build_bundles
    from .optimize.history import record_builds
    from .optimize.targets import resolve_targets

    report = build_bundles(
        graph, output, resolve_targets(targets, backend), plugins=_on(plugins), layout=layout, jobs=jobs,
        weights_from=weights_from, place=not no_place, cache=cache, ray=ray, progress=progress(),
    )  # fmt: skip
    record_builds(graph, report.results)
    if as_json:
        _show({"bundles": [result.to_dict() for result in report.results]}, True)
        sys.exit(report.exit_code)
    for result in report.results:
        where = result.reason if result.status == "failed" else str(result.folder)
        click.echo(f"{result.target}: {result.status} ({result.seconds:.1f} s): {where}")
    sys.exit(report.exit_code)


@main.command("pack")
@click.argument("artifact", type=_folder)
@click.option("-o", "--output", type=_folder, required=True, help="Folder to ship.")
@click.option("--with-weights", is_flag=True, required=True, help="Put the weight files into the folder, too.")
@_weights_from
@_json
def pack_command(artifact: Path, output: Path, with_weights: bool, weights_from: Path | None, as_json: bool) -> None:
    """Make one folder to ship from a graph package or a bundle: with its weights, and their sha256 in its lock.

    Files are shared by reflink or hard link where the file system allows it, else copied; holes stay holes. An interrupted
    run is continued by the next.
    """
    from .export.pack import pack

    ways, rows = pack(artifact, output, weights_from=weights_from, progress=progress())
    facts = [{"name": r.name, "bytes": r.bytes, "sha256": r.sha256, "how": ways[r.name]} for r in rows]
    if as_json:
        _show({"folder": str(output), "files": facts}, True)
        return
    for row in facts:
        click.echo(f"{row['name']}: {row['how']}, sha256 {row['sha256']}")
    click.echo(f"packed: {output}")


@main.command("verify")
@click.argument("artifact", type=_folder)
@_weights_from
@click.option("--jobs", type=click.IntRange(min=1), help="Files read at once; default: the processors of this process.")
@click.option(
    "--report", type=_folder, help="Of a bundle: also check that this report is about its engines and these weights."
)
@_signature
@_public_key
@_json
def verify_command(
    artifact: Path, weights_from: Path | None, jobs: int | None, report: Path | None, signature: Path | None,
    public_key: Path | None, as_json: bool,
) -> None:  # fmt: skip
    """Check every byte of a graph package or a bundle, and of the weights that its lock names.

    Weights are compared with the sha256 in the lock (`pack` writes it), or with the names in the Hugging Face cache. Files
    that nobody has hashed before are named, with their sha256. Stacks of experts that runs of a bundle have made are checked too.
    A report speaks for one engine set with one lock: with other weights the same plans were not validated. With --signature, evidence
    vouches for the bundle, and its own report must be about these weights, too.
    """
    from .export.locate import find_weights
    from .export.pack import read_locked
    from .export.weight_digests import refuse_others, verify_weights
    from .manifests import BundleManifest
    from .runtime.stacks import verify_stacks

    _expect_key(signature, public_key)
    manifest, lock = read_locked(artifact)
    bundled = isinstance(manifest, BundleManifest)
    if (report is not None or signature is not None) and not bundled:
        raise InputError(
            f"--report and --signature are about a bundle; {artifact} is a graph package. Give the bundle, or leave them out."
        )
    files = find_weights(artifact, lock, manifest.inputs.checkpoint, weights_from)
    start = time.monotonic()
    rows = verify_weights(lock, files, jobs=jobs, progress=progress())
    seconds, size = time.monotonic() - start, sum(row.bytes for row in rows)
    refuse_others(rows)
    stacks = verify_stacks(artifact, lock, files, progress=progress())
    unknown = [row.name for row in rows if row.expected is None]
    headlines = dict[str, str]()
    if isinstance(manifest, BundleManifest) and (report is not None or signature is not None):
        from .validation.binding import check_report

        if signature is not None and public_key is not None:
            from .export.contract.evidence import REPORT
            from .runtime.bundle import load_bundle
            from .runtime.signature import check_signature

            signed = check_signature(load_bundle(artifact), signature, public_key)
            headlines["signature"] = check_report(
                signature / REPORT, artifact, manifest, lock, rows, content=signed.report
            )
        if report is not None:
            headlines["report"] = check_report(report, artifact, manifest, lock, rows)
    if as_json:
        _show(
            {"artifact": str(artifact), "bytes": size, "seconds": round(seconds, 2), "unknown": unknown,
             "files": {row.name: row.sha256 for row in rows}, "stacks": [str(path) for path in stacks], **headlines},
            True,
        )  # fmt: skip
        return
    click.echo(f"{artifact}: {len(manifest.files)} files as its manifest says")
    for row in rows:
        click.echo(
            f"{row.name}: sha256 {row.sha256}, {f'as the {row.source} says' if row.source else 'nothing to compare with'}"
        )
    if stacks:
        click.echo(f"{len(stacks)} files with stacks in {stacks[0].parent}: as they were written")
    click.echo(
        f"{len(rows)} file{'s' if len(rows) != 1 else ''} of weights, {size_text(size)} in {seconds:.1f} s ({size / 1e9 / max(seconds, 1e-9):.2f} GB/s)"
    )
    if unknown:
        click.echo(
            f"{len(unknown)} of these were read and compared with nothing: neither the lock nor a cache of Hugging Face has a sha256 of them. Keep "
            "the ones above, and compare them next time."
        )
    for what, headline in headlines.items():
        vouches = f"{signature} vouches for this bundle and these weights, signed with the key of {public_key}"
        click.echo(
            f"{vouches if what == 'signature' else f'{report} is about this bundle and these weights'}: {headline}"
        )


def _expect_key(signature: Path | None, public_key: Path | None) -> None:
    if (signature is None) != (public_key is None):
        raise click.UsageError(
            "--signature and --public-key belong together: the evidence, and the key that you trust."
        )


@main.command("evidence")
@click.argument("bundle", type=_folder)
@click.argument("report", type=_folder)
@click.option("-o", "--output", type=_folder, required=True, help="Folder of the evidence.")
@click.option(
    "--key",
    type=_folder,
    metavar="FILE",
    help="Sign with this private key: an elliptic curve's, in PEM, without a password.",
)
@click.option(
    "--license",
    "licence",
    metavar="SPDX",
    help="The model's licence; default: what the README.md beside its weights states.",
)
@_weights_from
@_json
def evidence_command(
    bundle: Path, report: Path, output: Path, key: Path | None, licence: str | None, weights_from: Path | None, as_json: bool
) -> None:  # fmt: skip
    """Write what a release of BUNDLE files beside it: a CycloneDX ML-BOM, an in-toto statement and its REPORT, signed with --key.

    A report about another bundle or other weights is refused; every byte of the weights is read for that. What the report found does
    not matter here: the statement says PASSED or FAILED. `foldkv verify` and runtimes check the signature.
    """
    from .validation.evidence import write_evidence

    made = write_evidence(
        bundle, report, output, key=key, licence=licence, weights_from=weights_from, progress=progress()
    )
    if as_json:
        _show(to_json(made) | {"folder": str(made.folder)}, True)
        return
    if made.licence is None:
        click.echo("licence of the model: not stated beside its weights. Give it with --license.")
    click.echo(f"{'signed ' if made.signed else ''}evidence: {made.folder}: {made.headline}")


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
@click.option(
    "--threads",
    type=click.IntRange(min=1),
    help="The most threads per operator; default: 1 for a small model, else all processors.",
)
@click.option(
    "--devices", type=_Numbers(), help="For engines: GPUs that share the layers, such as 0,1; default: the first alone."
)
@_weights_from
@click.option("--verify", is_flag=True, help="Read the weight files whole first, and refuse others than the lock's.")
@_signature
@_public_key
@_read_in_place
@_matrices
@_json
def generate_command(
    bundle: Path, text: str, max_new_tokens: int, context: int | None, temperature: float, top_k: int | None, top_p: float,
    seed: int, stop: tuple[str, ...], add_special_tokens: bool, threads: int | None, devices: tuple[int, ...] | None,
    weights_from: Path | None, verify: bool, signature: Path | None, public_key: Path | None, no_place: bool, matrices: str, as_json: bool,
) -> None:  # fmt: skip
    """Continue TEXT with the model of BUNDLE, printing as it goes."""
    _expect_key(signature, public_key)
    from .runtime import Model, Sampling, Tokenizer, load_bundle
    from .runtime.serving import Engine, Request

    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    loaded = load_bundle(bundle)
    tokenizer = Tokenizer.from_bundle(loaded)
    prompt = tokenizer.encode(text, add_special_tokens=add_special_tokens)
    if not prompt:
        raise InputError("the text is empty; give at least one character to continue.")
    room = context or min(len(prompt) + max_new_tokens, loaded.model.max_position_embeddings)
    with (
        Model(
            bundle,
            context=room,
            threads=threads,
            devices=devices,
            weights_from=weights_from,
            verify=verify,
            place=not no_place,
            matrices=matrices,
            signature=signature,
            public_key=public_key,
            progress=progress(),
        ) as model,
        Engine(model, tokenizer=tokenizer, slots=1, context=room) as engine,
    ):
        pieces = []
        for piece in engine.stream(Request(prompt, max_new_tokens, sampling, stop=stop)):
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
            "state_bytes": engine.stats().state_bytes,
        }
        click.echo(json.dumps(facts, indent=2, ensure_ascii=False))


@main.command("serve")
@click.argument("bundle", type=_folder)
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen at.")
@click.option(
    "--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0 takes one that is free."
)
@click.option(
    "--context", type=_Tokens(), help="Tokens of a prompt and its answer; default: what the model takes, at most 32k."
)
@click.option("--slots", type=click.IntRange(min=1), default=8, show_default=True, help="Answers that run at once.")
@click.option(
    "--chunk", type=_Tokens(), default=256, show_default=True, help="Tokens of a prompt that go through at once."
)
@click.option("--max-queue", type=click.IntRange(min=1), default=64, show_default=True, help="Requests that may wait.")
@click.option(
    "--batch-invariant",
    is_flag=True,
    help="Compute every answer's steps alone, so that its bits depend on nobody. Slower.",
)
@click.option("--prefix-memory", type=_Size(), metavar="SIZE", help="Memory for states to use again, such as 4GiB.")
@click.option("--prefix-folder", type=_folder, help="Folder that keeps such states on disk.")
@click.option("--prefix-disk", type=_Size(), metavar="SIZE", help="Room of --prefix-folder; default: 64GiB.")
@click.option(
    "--prefix-exact/--no-prefix-exact",
    default=True,
    show_default=True,
    help="Keep and use only states that leave an answer's bits as they are; otherwise also those after prompts and answers, "
    "so that conversations go on where they ended.",
)
@click.option("--chat-format", metavar="NAME", help="Encoding of conversations, for bundles that do not say theirs.")
@click.option("--model-name", metavar="NAME", help="Name that clients ask for; default: the checkpoint's.")
@click.option("--api-keys", type=_folder, metavar="FILE", help="Answer only clients that send a key of this file.")
@click.option("--no-keys", is_flag=True, help="Answer everybody, also where other machines reach --host.")
@click.option(
    "--no-free-grammars", is_flag=True, help="Refuse grammars that clients write by hand (structured_outputs.grammar)."
)
@click.option("--open-metrics", is_flag=True, help="/metrics needs no key.")
@click.option(
    "--max-body", type=_Size(), default="4MiB", show_default=True, metavar="SIZE", help="Most bytes of a request."
)
@click.option(
    "--max-connections",
    type=click.IntRange(min=1),
    default=512,
    show_default=True,
    help="Connections that are open at once; others are closed.",
)
@click.option(
    "--timeout",
    type=click.FloatRange(min=0, min_open=True),
    help="Seconds that a request may take, from its arrival to the end of all its answers; default: any.",
)
@click.option(
    "--grace",
    type=click.FloatRange(min=0),
    default=30.0,
    show_default=True,
    help="Seconds that running answers have after a signal.",
)
@click.option(
    "--allow-origin", "origins", multiple=True, metavar="ORIGIN", help="Let web pages from there ask; can be repeated."
)
@click.option("--no-page", is_flag=True, help="Leave out the page at /.")
@click.option(
    "--threads",
    type=click.IntRange(min=1),
    help="The most threads per operator; default: 1 for a small model, else all processors.",
)
@click.option(
    "--devices", type=_Numbers(), help="For engines: GPUs that share the layers, such as 0,1; default: the first alone."
)
@_weights_from
@click.option("--verify", is_flag=True, help="Read the weight files whole first, and refuse others than the lock's.")
@_signature
@_public_key
@_read_in_place
@_matrices
@_json
def serve_command(
    bundle: Path, host: str, port: int, context: int | None, slots: int, chunk: int, max_queue: int, batch_invariant: bool,
    prefix_memory: int | None, prefix_folder: Path | None, prefix_disk: int | None, prefix_exact: bool, chat_format: str | None,
    model_name: str | None, api_keys: Path | None, no_keys: bool, no_free_grammars: bool, open_metrics: bool, max_body: int, max_connections: int,
    timeout: float | None, grace: float, origins: tuple[str, ...], no_page: bool, threads: int | None,
    devices: tuple[int, ...] | None, weights_from: Path | None, verify: bool, signature: Path | None, public_key: Path | None,
    no_place: bool, matrices: str, as_json: bool,
) -> None:  # fmt: skip
    """Answer OpenAI's clients with the model of BUNDLE, until a signal comes.

    The API is at /v1; /health, /ready and /metrics are for those who run it, and / is a page to chat. After SIGTERM or Ctrl-C no
    new request is taken, and those that run have --grace seconds.
    """
    _expect_key(signature, public_key)
    from .runtime import Model, load_bundle
    from .runtime.server.app import Limits
    from .runtime.server.serve import Address, Prefixes, Sizes, Started, serve, who_may_ask

    def say(started: Started) -> None:
        click.echo(json.dumps(to_json(started)) if as_json else str(started))

    address = Address(host, port)
    limits = Limits(
        keys=who_may_ask(address, api_keys, no_keys=no_keys), open_metrics=open_metrics, max_body=max_body, origins=origins,
        page=not no_page, any_host=no_keys, connections=max_connections,
    )  # fmt: skip
    sizes = Sizes(context, slots, chunk, max_queue, batch_invariant)
    with address.socket() as listening:
        room = sizes.context_of(load_bundle(bundle))
        with Model(
            bundle, threads=threads, weights_from=weights_from, devices=devices, context=room, batch=slots, verify=verify,
            place=not no_place, matrices=matrices, signature=signature, public_key=public_key, progress=progress(),
        ) as model:  # fmt: skip
            serve(
                model, listening, limits=limits, chat=chat_format, name=model_name, timeout=timeout, grace=grace, say=say, sizes=sizes,
                free_grammars=not no_free_grammars, prefixes=Prefixes(prefix_memory, prefix_folder, prefix_disk, prefix_exact),
            )  # fmt: skip


def _look_at_bundle(given: Mapping[str, Any]) -> None:
    from .artifact import read_manifest
    from .manifests import BundleManifest

    _thresholds(given["gates"])
    read_manifest(given["bundle"], kind=BundleManifest.KIND)
    _look_at_checkpoint(given)


@main.command("validate", look=_look_at_bundle)
@click.argument("bundle", type=_folder)
@click.option("--reference", type=_folder, required=True, help="The checkpoint the bundle was made from.")
@click.option(
    "--report", type=_folder, required=True, help="Folder for report.html, report.md, report.json and junit.xml."
)
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
    "--cases-per-kind",
    type=int,
    default=8,
    show_default=True,
    help="Cases of each kind of behaviour: dense, code, clauses, hops, aggregation; 0 for none.",
)
@click.option(
    "--case-tokens",
    type=_Tokens(),
    default=256,
    show_default=True,
    help="Tokens of such a case, and of the sweep's longest prompt, at most.",
)
@click.option(
    "--sweep-cases",
    type=int,
    default=1,
    show_default=True,
    help="Values to retrieve with prompts of each length around multiples of 128 and of the window; 0 for none.",
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
@click.option(
    "--devices", type=_Numbers(), help="For engines: GPUs that share the layers, such as 0,1; default: the first alone."
)
@_matrices
@click.option(
    "--layered/--whole",
    default=None,
    help="Compute references and bundles for the cpu a layer at a time, with little memory, or with the whole model in memory; default: whole if it fits.",
)
@click.option(
    "--ray",
    metavar="local|ADDRESS",
    help="Let the workers of this Ray cluster answer texts and cases; local: one of this machine's processors. The figures are the same.",
)
@_allow_unknown_key
@_json
def validate_command(
    bundle: Path, reference: Path, report: Path, gates: tuple[str, ...], text: Path | None, seed: int, texts: int,
    text_tokens: int, distances: tuple[int, ...], cases_per_distance: int, cases_per_kind: int,
    case_tokens: int, sweep_cases: int, contexts: tuple[int, ...],
    baseline: Path | None, threads: int | None, devices: tuple[int, ...] | None, matrices: str, layered: bool | None,
    ray: str | None, allow_unknown_keys: tuple[str, ...], as_json: bool,
) -> None:  # fmt: skip
    """Measure how much accuracy BUNDLE lost against the PyTorch reference. BUNDLE can be of any target that this machine executes.

    A bundle in bfloat16 is judged by what PyTorch's own bfloat16 loses on the same texts. The exit code is 1 if a gate fails, or if
    one holds on too little evidence ("not informative"); 3 if this machine lacks the GPU or a package.
    """
    _wait_passively()
    from .report_text import report_lines
    from .validation.result import to_json
    from .validation.settings import Plan
    from .validation.validate import validate

    result = validate(
        bundle,
        reference,
        report,
        gates=_thresholds(gates),
        plan=Plan(
            seed, texts, text_tokens, distances, cases_per_distance, contexts, cases_per_kind, case_tokens, sweep_cases
        ),
        text=text,
        allow_unknown_keys=allow_unknown_keys,
        baseline=baseline,
        threads=threads,
        devices=devices,
        matrices=matrices,
        layered=layered,
        ray=ray,
        progress=progress(),
    )
    if as_json:
        click.echo(json.dumps(to_json(result), indent=2, ensure_ascii=False))
    else:
        _print(report_lines(to_json(result)))
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


@main.command("trends")
@click.argument("folder", type=_folder)
@click.option(
    "-o", "--output", type=_folder, metavar="FILE", help="Write a page, FILE.html, with a plot per gate and target."
)
@_json
def trends_command(folder: Path, output: Path | None, as_json: bool) -> None:
    """Show how the figures of one model moved: all reports in FOLDER, by date, per gate and target.

    Values are compared only where they were measured alike: the same checkpoint, profile, text and plan.
    """
    from .report_text import trend_lines
    from .validation.trends import check_page, facts, read_trends, write_page

    if output is not None:
        check_page(output)
    trends = read_trends(folder)
    if output is not None:
        write_page(trends, output, folder)
    if as_json:
        _show(facts(trends), True)
        return
    _print(trend_lines(trends))
    if output is not None:
        click.echo(f"page: {output}")


def _look_at_pipeline(given: Mapping[str, Any]) -> None:
    from .config import load_config

    load_config(given["pipeline"])


@main.command("run", look=_look_at_pipeline)
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
    from .artifact import free_bytes
    from .config import load_config
    from .pipeline import preview, run_pipeline
    from .run_text import preview_lines, result_lines

    config = load_config(pipeline)
    if dry_run:
        steps, free = preview(config, only=only, force=force), free_bytes(Path(config.output))
        if as_json:
            need = sum(step.bytes or 0 for step in steps)
            _show({"steps": [step.to_dict() for step in steps], "bytes": need, "free_bytes": free}, True)
        else:
            _print(preview_lines(steps, Path(config.output), free))
        return
    result = run_pipeline(config, only=only, force=force, progress=progress())
    if as_json:
        facts = {
            "graph": str(result.graph), "passed": result.passed,
            "bundles": [bundle.to_dict() for bundle in result.bundles],
            "reports": {
                name: {"folder": str(report.folder)}
                | {key: report.content[key] for key in ("passed", "headline", "not_executed", "gates", "notes")}
                for name, report in result.reports.items()
            },
            "not_validated": result.not_validated, "stages": result.stages,
        }  # fmt: skip
        click.echo(json.dumps(facts, indent=2, ensure_ascii=False))
        sys.exit(result.exit_code)
    _print(result_lines(result))
    sys.exit(result.exit_code)


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
@_backend
@_plugins
@click.option("--profile", help="With --target: profile of the graph, as for `export`; default: hf.")
@click.option("--max-context", is_flag=True, help="With --target: show the largest context that fits on one device.")
@click.option(
    "--devices",
    type=click.IntRange(min=1),
    help="With --target: show what each of this many GPUs of one machine holds.",
)
@click.option(
    "--plot", type=_folder, metavar="FILE", help="Draw the caches against the context, as FILE.html or FILE.svg."
)
@_allow_unknown_key
@_json
def plan_command(
    checkpoint: Path, context: int, batch: int, layout: str | None, targets: tuple[str, ...], chunk: int | None,
    backend: str | None, plugins: str | None, profile: str | None, max_context: bool, devices: int | None,
    plot: Path | None, allow_unknown_keys: tuple[str, ...], as_json: bool,
) -> None:  # fmt: skip
    """Show how much memory CHECKPOINT, a folder or a bare config.json, needs for caches and weights.

    The caches are shown beside those of V3.2 at the same context. Weights are counted as wide as the rows; with fp8 rows, as
    released (experts in fp4, the rest in fp8).

    With --target: caches, activations and weights on each target, in the formats that it keeps; how many GPUs of one
    machine hold the model if they share its layers; disk; and time. Times are estimated from earlier runs on this machine:
    export, build and run record them in history.jsonl in FOLDKV_CACHE (default: ~/.cache/foldkv). `build` writes the format
    that is marked with *.
    """
    from .export.plot import check_plot_path
    from .optimize.fit import stored_in, within_model
    from .plan_text import Sizes, plan_layouts, plan_on_targets

    only_targets = {
        "--chunk": chunk, "--backend": backend, "--plugins": plugins, "--profile": profile,
        "--max-context": max_context or None, "--devices": devices,
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
    sizes = Sizes(planned, batch, context)
    if targets:
        stored = stored_in(checkpoint, allow_unknown_keys=allow_unknown_keys)
        said = plan_on_targets(
            spec, stored, targets, sizes, layout, chunk=chunk or min(256, planned), profile=profile or "hf",
            backend=backend, plugins=_on(plugins), max_context=max_context, devices=devices,
        )  # fmt: skip
    else:
        said = plan_layouts(spec, sizes, layout)
    if not as_json:
        _print(said.lines)
    if plot is not None:
        _plot(plot, checkpoint, spec, batch, layout, targets)
    if as_json:
        _show(said.facts | ({"plot": str(plot)} if plot is not None else {}), True)
    elif plot is not None:
        click.echo(f"plot: {plot}")


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
    from .doctor import doctor_lines, examine

    facts = examine()
    if as_json:
        _show(facts, True)
    else:
        _print(doctor_lines(facts))


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
    from .backends import backend_named
    from .optimize.choices import PLUGINS, Choice, missing_for
    from .optimize.targets import load_targets
    from .targets_text import target_lines

    targets = load_targets()
    if coverage is not None:
        _show_coverage(coverage, allow_unknown_keys, sorted({t.sm for t in targets.values() if t.sm}), as_json)
        return
    missing, built_with = {}, {}
    for name, target in targets.items():
        found = {
            backend: missing_for(Choice(other, PLUGINS and other.backend.takes_plugins, "dense"))
            for backend, other in ((backend, target.built_by(backend_named(backend))) for backend in target.backends)
        }
        missing[name] = found[target.backends[0]]
        built_with[name] = [backend for backend, lack in found.items() if not lack]
    if as_json:
        here = [
            {"builds_here": not missing[name], "missing": missing[name], "built_here_with": built_with[name]}
            for name in targets
        ]
        facts = [target.to_dict() | more for target, more in zip(targets.values(), here, strict=True)]
        click.echo(json.dumps(facts, indent=2))
    else:
        _print(target_lines(targets.values(), built_with))


def _show_coverage(checkpoint: Path, allow_unknown_keys: tuple[str, ...], sms: list[int], as_json: bool) -> None:
    from .plugins.coverage import coverage
    from .plugins.declarations import BODIES
    from .targets_text import coverage_lines

    found = coverage(spec_from_file(checkpoint, allow_unknown_keys=allow_unknown_keys), sms)
    if as_json:
        click.echo(json.dumps({"plugins": [row.to_dict() for row in found], "bodies": BODIES}, indent=2))
    else:
        _print(coverage_lines(found, sms, BODIES))
