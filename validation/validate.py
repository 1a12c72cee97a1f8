"""Compare a bundle with the PyTorch reference on the same inputs, judge the result and write the report."""

from __future__ import annotations

import datetime
import json
import platform
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .. import __version__
from ..artifact import MANIFEST, sha256_file, sha256_json, staged
from ..errors import ArtifactError, InputError
from ..export.checkpoint.reader import Checkpoint
from ..export.contract.chain import ChainTable
from ..export.contract.profiles import PROFILES, SERVED
from ..inputs import refuse_unreadable_name
from ..manifests import BundleManifest, ReportManifest, read, write
from ..packages import require, version_of
from ..progress import Progress, Say, silent
from ..runtime.bundle import Bundle, load_bundle
from ..runtime.chain import threads_for
from ..runtime.tokenizer import Tokenizer
from .baseline import JSON, KIND, compare, read_report
from .cases import Text, load_text
from .gates import LONG_CONTEXT, Gate, judge, resolve_gates
from .long_context import REFERENCE_CONTEXT, planted_stream
from .measure import Sides, measure, measure_contexts
from .report import write_report
from .result import Measurements, ValidationResult, measurements_from_json
from .runners import OracleRunner, SessionRunner, TransformersRunner, torch_threads
from .settings import Plan

MEASURED, JUDGED_AGAIN, UNCHANGED = "measured", "judged again", "unchanged"


def validate(
    bundle: Path,
    reference: Path,
    report: Path,
    *,
    gates: Mapping[str, float] | None = None,
    plan: Plan | None = None,
    text: Path | None = None,
    baseline: Path | None = None,
    threads: int | None = None,
    keep: bool = False,
    key: str = "",
    allow_unknown_keys: Sequence[str] = (),
    progress: Say = silent,
) -> ValidationResult:
    """Measure a bundle against its checkpoint and write the report.

    Args:
        bundle: folder of one target.
        reference: the checkpoint folder that the bundle was made from.
        report: folder for report.html, report.json and junit.xml; replaced if it holds an older report.
        gates: thresholds by gate name that replace the defaults.
        plan: which cases.
        text: a UTF-8 file to measure on; the default is some of the standard library's sources.
        baseline: an older report, its folder or report.json: the new one shows what changed.
        threads: threads of subject and reference; the default is :func:`~foldkv.runtime.chain.threads_for`.
        keep: if the report there has figures of the same bundle, plan, text and versions, judge those again.
        key: stored in the report's manifest, for a caller that wants to know later what the report was made for.
        allow_unknown_keys: keys of the reference's config.json to ignore, in addition to those that the export ignored.
        progress: called with one line per step; a :class:`~foldkv.progress.Progress` gets more.

    Raises:
        InputError: the bundle was made from another checkpoint, is an engine or has no tokenizer; a gate is unknown or its
            threshold out of range; the text cannot be read or has nothing to predict; the baseline is not a report; a context
            is too short or too long, or the gate of long contexts has none.
        ArtifactError: the bundle is damaged, or of a profile that this version does not know.
        CheckpointError: the reference cannot be loaded.
        MissingDependencyError: a package that validation needs is missing.
    """
    for path in (bundle, reference, report):
        refuse_unreadable_name(Path(path))
    plan, words, bundle, report = plan or Plan(), load_text(text), Path(bundle), Path(report)
    if threads is not None and (type(threads) is not int or threads < 1):
        raise InputError(f"threads must be an integer of 1 or more, got {threads!r}.")
    require("validate")
    loaded = _checked_bundle(bundle)
    chosen = resolve_gates(gates or {}, loaded.profile)
    longest = loaded.largest("context") or loaded.model.max_position_embeddings
    check_contexts(plan, min(longest, loaded.model.max_position_embeddings), gates or {}, what=str(bundle))
    old = read_report(baseline) if baseline is not None else None
    unvalidated = _not_validated(bundle, loaded.manifest)
    measured = _measured_key(bundle, plan, words)
    made, stored = _stored(report, measured) if keep else (None, None)
    threads = (
        stored.provenance["threads"] if stored is not None else threads or threads_for(ChainTable.read(loaded.engine))
    )
    command = _command(bundle, reference, report, plan, text, chosen, threads, allow_unknown_keys)
    judged = sha256_json([command, unvalidated, str(baseline), old, key])

    def judged_result(found: Measurements, source: str) -> ValidationResult:
        verdicts = judge(chosen, found.metrics)
        result = ValidationResult(**vars(found), verdicts=verdicts, not_validated=unvalidated, source=source)
        result.provenance["command"] = command
        if old is not None:
            result.comparison = compare(str(baseline), old, result.provenance, verdicts)
        return result

    if stored is not None and made is not None and made.judged == judged:
        return judged_result(stored, UNCHANGED)
    checkpoint = None
    if stored is None:
        allowed = loaded.manifest.inputs.checkpoint.allowed_unknown_keys
        checkpoint = Checkpoint(reference, allow_unknown_keys=(*allowed, *allow_unknown_keys))
        _check_checkpoint(bundle, checkpoint, loaded.manifest)
    with staged(report, kind=KIND) as folder:
        if stored is not None:
            result = judged_result(stored, JUDGED_AGAIN)
        else:
            assert checkpoint is not None
            found = _measure(loaded, checkpoint, plan, words, threads, Progress.of(progress))
            result = judged_result(found, MEASURED)
        write_report(result, folder)
        write(
            folder,
            ReportManifest(foldkv_version=__version__, passed=result.passed, key=key, measured=measured, judged=judged),
        )
    progress(result.headline)
    return result


def _checked_bundle(folder: Path) -> Bundle:
    bundle = load_bundle(folder)
    if not bundle.backend.validates:
        raise InputError(
            f"{folder} is for {bundle.target}, a GPU; such bundles cannot be validated yet. "
            "Validate the bundle of the target cpu that was built from the same graph."
        )
    if bundle.profile not in PROFILES:
        raise ArtifactError(f"{folder} has the profile {bundle.profile!r}; this version knows {', '.join(PROFILES)}.")
    return bundle


def _check_checkpoint(bundle: Path, checkpoint: Checkpoint, manifest: BundleManifest) -> None:
    expected, found = manifest.inputs.checkpoint.sha256, checkpoint.identity()
    if found != expected:
        raise InputError(
            f"{bundle} was made from another checkpoint than {checkpoint.folder} (sha256 {expected[:12]}... against "
            f"{found[:12]}...). Validate against the checkpoint that was exported."
        )


def _measured_key(bundle: Path, plan: Plan, text: Text) -> str:
    """A digest of everything that the figures depend on; thresholds are not part of it."""
    versions = {name: version_of(name) for name in ("transformers", "torch", "onnxruntime")}
    return sha256_json([__version__, versions, vars(plan), text.sha256, sha256_file(bundle / MANIFEST)])


def _stored(report: Path, measured: str) -> tuple[ReportManifest | None, Measurements | None]:
    """The manifest of the report there, and its figures if they were measured from the same inputs."""
    try:
        manifest = read(ReportManifest, report, verify=True)
    except ArtifactError:
        return None, None
    if manifest.measured != measured:
        return manifest, None
    return manifest, measurements_from_json(json.loads((report / JSON).read_text(encoding="utf-8")))


def _not_validated(bundle: Path, manifest: BundleManifest) -> list[dict[str, str]]:
    """Bundles beside this one that were built from the same graph."""
    found = []
    for folder in sorted(bundle.resolve().parent.iterdir()):
        if folder == bundle.resolve() or not (folder / MANIFEST).is_file():
            continue
        try:
            other = read(BundleManifest, folder)
            if other.inputs.graph == manifest.inputs.graph:
                found.append({"target": other.target.name, "folder": folder.name})
        except ArtifactError:
            continue  # not a bundle, or not a usable one
    return found


def _command(
    bundle: Path, reference: Path, report: Path, plan: Plan, text: Path | None, gates: list[Gate], threads: int,
    allow_unknown_keys: Sequence[str],
) -> str:  # fmt: skip
    """A shell command that measures the same again."""
    words = ["foldkv", "validate", str(bundle), "--reference", str(reference), "--report", str(report), *plan.options()]
    words += [word for gate in gates if gate.given is not None for word in ("--gate", f"{gate.name}={gate.given!r}")]
    words += ["--text", str(text)] if text is not None else []
    words += [word for key in allow_unknown_keys for word in ("--allow-unknown-key", key)]
    return shlex.join([*words, "--threads", str(threads)])


def _measure(
    bundle: Bundle, checkpoint: Checkpoint, plan: Plan, text: Text, threads: int, progress: Progress
) -> Measurements:
    tokenizer = Tokenizer.from_bundle(bundle)
    progress("loading the subject and the reference")
    with (
        torch_threads(threads),
        SessionRunner(bundle.folder, context=plan.longest(), threads=threads, progress=progress) as subject,
    ):
        folder, allowed = checkpoint.folder, checkpoint.allowed_keys
        oracle = OracleRunner(folder, allow_unknown_keys=allowed) if bundle.profile == SERVED else None
        reference = TransformersRunner(folder, allow_unknown_keys=allowed)
        sides = Sides(subject, reference, oracle, checkpoint, tokenizer, threads)
        found = measure(sides, plan, text, progress)
        measure_contexts(found, plan, sides, progress)
        found.provenance = _provenance(sides, plan, text)
    return found


def check_contexts(plan: Plan, longest: int, gates: Mapping[str, float], *, what: str) -> None:
    """Check the long contexts of a plan before anything is loaded; ``what`` takes ``longest`` tokens at most.

    Raises:
        InputError: a context is too short or too long, or the gate of long contexts has none that the reference reads.
    """
    for context in plan.contexts:
        planted_stream(context, seed=plan.seed)
        if context > longest:
            raise InputError(f"a context of {context} tokens was asked for; {what} takes at most {longest}.")
    if LONG_CONTEXT in gates and not any(context <= REFERENCE_CONTEXT for context in plan.contexts):
        raise InputError(
            f"gate {LONG_CONTEXT} compares with the reference, which reads contexts of up to {REFERENCE_CONTEXT} tokens, but "
            "none of those is measured. Give one with --context (validate.contexts in a pipeline file), or leave the gate out."
        )


def _provenance(sides: Sides, plan: Plan, text: Text) -> dict[str, Any]:
    session, spec = sides.subject.session, sides.checkpoint.spec
    manifest, folder = session.bundle.manifest, session.bundle.folder
    ratios = spec.indexed_ratios.values()
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "foldkv": __version__,
        "subject": sides.subject.name,
        "reference": sides.reference.name,
        "bundle": str(folder),
        "bundle_manifest_sha256": sha256_file(folder / MANIFEST),
        "checkpoint": str(sides.checkpoint.folder),
        "checkpoint_sha256": manifest.inputs.checkpoint.sha256,
        "text": text.name,
        "text_sha256": text.sha256,
        "profile": manifest.profile,
        "layout": manifest.layout,
        "state_bytes": session.state_bytes,
        "state_context": session.context,
        "layers_against": "transformers" if sides.oracle is None else sides.oracle.name,
        "precision": manifest.precision,
        "window": manifest.model.sliding_window,
        "choice_from_tokens": (spec.index_topk + 1) * max(ratios) - 1 if ratios else 0,
        "target": manifest.target.name,
        "backend": f"{manifest.backend} {manifest.tool_versions.get(manifest.backend, '')}",
        "machine": f"{platform.system()} {platform.machine()}, executed on the CPU",
        "threads": sides.threads,
        "plan": {name: list(v) if isinstance(v, tuple) else v for name, v in vars(plan).items()},
    }
