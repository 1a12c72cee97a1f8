"""Compare a bundle with the PyTorch reference on the same inputs, judge the result and write the report."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from .. import __version__
from ..artifact import MANIFEST, sha256_file, sha256_json, staged
from ..backends import FLOAT32
from ..cluster import Cluster
from ..errors import ArtifactError, InputError, MissingDependencyError, listing
from ..export.checkpoint.reader import Checkpoint
from ..export.contract.chain import ChainTable
from ..export.contract.engine_set import EngineTable
from ..export.contract.profiles import PROFILES, SERVED
from ..inputs import refuse_unreadable_name
from ..manifests import BundleManifest, ReportManifest, read, write
from ..packages import require, version_of
from ..progress import Progress, Say, silent
from ..runtime.backend import default_threads
from ..runtime.bundle import Bundle, load_bundle, missing_here
from ..runtime.chain import threads_for
from ..runtime.model import Model
from ..runtime.tokenizer import Tokenizer
from ..runtime.wide import AUTO, BFLOAT16
from .baseline import JSON, KIND, MEASURES, SCHEMA_VERSION, compare, read_report
from .behaviour_cases import BehaviourCase
from .binding import not_validated, weights_digest
from .cases import Text, load_text
from .environment import computing, environment, instructions
from .gates import LONG_CONTEXT, Gate, judge, not_measured, resolve_gates
from .layered_files import begin_run
from .layered_subject import open_subject
from .long_context import REFERENCE_CONTEXT, planted_stream
from .measure import behaviour_cases, measure, measure_contexts
from .provenance import about, executed
from .report import write_report
from .reproducers import FOLDER as REPRODUCERS
from .reproducers import Reproducers
from .result import Measurements, ValidationResult, measurements_from_json
from .room import Opened, check_layered
from .runners import torch_threads
from .settings import Plan, prompt_room
from .sides import Sides, open_choices, open_oracle, open_transformers
from .spread import spread
from .spread_worker import Sources

MEASURED, JUDGED_AGAIN, UNCHANGED, NOT_EXECUTED = "measured", "judged again", "unchanged", "not executed"


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
    devices: Sequence[int] | None = None,
    matrices: str = AUTO,
    keep: bool = False,
    key: str = "",
    allow_unknown_keys: Sequence[str] = (),
    layered: bool | None = None,
    report_absent: bool = False,
    ray: str | None = None,
    progress: Say = silent,
) -> ValidationResult:
    """Measure a bundle against its checkpoint and write the report.

    Args:
        bundle: folder of one target.
        reference: the checkpoint folder that the bundle was made from.
        report: folder for report.html, report.md, report.json and junit.xml; replaced if it holds an older report.
        gates: thresholds by gate name that replace the defaults.
        plan: which cases.
        text: a UTF-8 file to measure on; the default is some of the standard library's sources.
        baseline: an older report, its folder or report.json: the new one shows what changed.
        threads: threads of the reference, and of a subject on the CPU; the default is
            :func:`~foldkv.runtime.chain.threads_for`.
        devices: for engines: numbers of the GPUs that share the layers; the default is the first GPU alone.
        matrices: how a bundle for the cpu reads the matrices of a large model; see :class:`~foldkv.runtime.Model`. "auto" takes float32
            only where memory holds it beside the reference; the report says which it was.
        keep: if the report there has figures of the same bundle, plan, text and versions, judge those again.
        key: stored in the report's manifest, for a caller that wants to know later what the report was made for.
        allow_unknown_keys: keys of the reference's config.json to ignore, in addition to those that the export ignored.
        layered: compute references a layer at a time, and a bundle for the cpu too, or with the whole model in memory; the default is
            the whole model if the references take less than :data:`~.room.WHOLE_SHARE` of this machine's free memory. The figures are the same.
        report_absent: if this machine cannot execute the bundle, write a report that says so, instead of an error.
        ray: address of a Ray cluster whose workers answer texts and cases, or "local" for one of this machine's processors. A bundle
            for a GPU answers here, its references there. The figures are the same.
        progress: called with one line per step; a :class:`~foldkv.progress.Progress` gets more.

    Raises:
        InputError: the bundle was made from another checkpoint or has no tokenizer; a gate is unknown or its threshold out of
            range; the text cannot be read or has nothing to predict; cases of behaviour need more tokens; the baseline is not a report; a case is too long for the
            bundle, a context too short, or the gate of long contexts has none; there are no such GPUs.
        ArtifactError: the bundle is damaged, or of a profile that this version does not know.
        CheckpointError: the reference cannot be loaded.
        MissingDependencyError: a package that validation needs is missing, or this machine cannot execute the bundle.
    """
    for path in (bundle, reference, report):
        refuse_unreadable_name(Path(path))
    plan, words, bundle, report = plan or Plan(), load_text(text), Path(bundle), Path(report)
    if threads is not None and (type(threads) is not int or threads < 1):
        raise InputError(f"threads must be an integer of 1 or more, got {threads!r}.")
    require("validate")
    loaded = _checked_bundle(bundle, devices)
    if ray is not None:
        require("validate with Ray")
    chosen = resolve_gates(gates or {}, loaded.profile, loaded.precision)
    longest = loaded.largest("context") or loaded.model.max_position_embeddings
    check_contexts(plan, min(longest, loaded.model.max_position_embeddings), gates or {}, what=str(bundle))
    old = read_report(baseline) if baseline is not None else None
    unvalidated = not_validated(bundle, loaded.manifest)
    measured = _measured_key(loaded, plan, words, devices, matrices)
    made, stored = _stored(report, measured) if keep else (None, None)
    if stored is not None and threads not in (None, stored.provenance["threads"]):
        stored = None  # other threads add in another order
    threads = stored.provenance["threads"] if stored is not None else threads or _default_threads(loaded)

    def command(form: str) -> str:
        return _command(bundle, reference, report, plan, text, chosen, threads, devices, form, allow_unknown_keys)

    judged = sha256_json([command(matrices), unvalidated, str(baseline), old, key])

    def judged_result(found: Measurements, source: str, absent: str = "") -> ValidationResult:
        verdicts = not_measured(chosen, f"not executed here: {absent}") if absent else judge(chosen, found.metrics)
        result = ValidationResult(
            **vars(found), verdicts=verdicts, not_validated=unvalidated, source=source, not_executed=absent or None
        )
        # How matrices were read depends on the memory that was free, unless the line says it.
        result.provenance["command"] = command(result.provenance.get("matrices", matrices))
        if old is not None:
            result.comparison = compare(str(baseline), old, result.provenance, verdicts)
        return result

    if stored is not None and made is not None and made.judged == judged:
        return judged_result(stored, UNCHANGED)
    checkpoint, lacking = None, list[str]()
    if stored is None:
        allowed = loaded.manifest.inputs.checkpoint.allowed_unknown_keys
        checkpoint = Checkpoint(reference, allow_unknown_keys=(*allowed, *allow_unknown_keys))
        _check_checkpoint(bundle, checkpoint, loaded.manifest)
        if (lacking := missing_here(loaded)) and not report_absent:
            title = f"the bundle {bundle} for {loaded.target} cannot be executed here, so nothing was measured; missing"
            step = "Validate it on a machine that has these. The bundle of the target 'cpu' can be validated on every machine."
            raise MissingDependencyError(listing(title, lacking, step))
    with staged(report, kind=KIND) as folder:
        if stored is not None:
            result = judged_result(stored, JUDGED_AGAIN)
            if (report / REPRODUCERS).is_dir():
                shutil.copytree(report / REPRODUCERS, folder / REPRODUCERS)
        else:
            assert checkpoint is not None
            facts = about(loaded, checkpoint, plan, words, threads)
            if lacking:
                absent = f"this machine lacks {' and '.join(lacking)}"
                result = judged_result(Measurements.nothing(facts), NOT_EXECUTED, absent)
            else:
                # Outside of the folder that an interruption removes: the next run goes on with what is there.
                scratch = report.absolute().with_name(f"{report.name}.foldkv-reference")
                found = _measure(
                    loaded,
                    checkpoint,
                    plan,
                    words,
                    threads,
                    devices,
                    matrices,
                    layered,
                    measured,
                    scratch,
                    folder,
                    ray,
                    Progress.of(progress),
                )
                shutil.rmtree(scratch, ignore_errors=True)
                found.provenance = facts | found.provenance
                result = judged_result(found, MEASURED)
        write_report(result, folder)
        facts_of_report = ReportManifest(
            foldkv_version=__version__,
            passed=result.passed,
            key=key,
            measured="" if lacking else measured,
            judged=judged,
        )
        write(folder, facts_of_report)
    progress(result.headline)
    return result


def _checked_bundle(folder: Path, devices: Sequence[int] | None) -> Bundle:
    bundle = load_bundle(folder)
    if bundle.profile not in PROFILES:
        raise ArtifactError(f"{folder} has the profile {bundle.profile!r}; this version knows {', '.join(PROFILES)}.")
    if devices is not None and not bundle.backend.engine:
        raise InputError(
            f"devices are for bundles with engines; {folder} is for {bundle.backend.library}. Leave them out."
        )
    return bundle


def _default_threads(bundle: Bundle) -> int:
    return threads_for((EngineTable if bundle.backend.engine else ChainTable).read(bundle.engine))


def _check_checkpoint(bundle: Path, checkpoint: Checkpoint, manifest: BundleManifest) -> None:
    expected, found = manifest.inputs.checkpoint.sha256, checkpoint.identity()
    if found != expected:
        raise InputError(
            f"{bundle} was made from another checkpoint than {checkpoint.folder} (sha256 {expected[:12]}... against "
            f"{found[:12]}...). Validate against the checkpoint that was exported."
        )


def _measured_key(bundle: Bundle, plan: Plan, text: Text, devices: Sequence[int] | None, matrices: str) -> str:
    """A digest of everything that the figures depend on; thresholds are not part of it."""
    versions = {name: version_of(name) for name in ("transformers", "torch", bundle.backend.module)}
    places = None if devices is None else list(devices)
    what = [__version__, SCHEMA_VERSION, MEASURES, versions, vars(plan), text.sha256]
    return sha256_json([*what, sha256_file(bundle.folder / MANIFEST), places, matrices])


def _stored(report: Path, measured: str) -> tuple[ReportManifest | None, Measurements | None]:
    """The manifest of the report there, and its figures if they were measured from the same inputs."""
    try:
        manifest = read(ReportManifest, report, verify=True)
    except ArtifactError:
        return None, None
    if manifest.measured != measured:
        return manifest, None
    return manifest, measurements_from_json(json.loads((report / JSON).read_text(encoding="utf-8")))


def _command(
    bundle: Path, reference: Path, report: Path, plan: Plan, text: Path | None, gates: list[Gate], threads: int,
    devices: Sequence[int] | None, matrices: str, allow_unknown_keys: Sequence[str],
) -> str:  # fmt: skip
    """A shell command that measures the same again."""
    words = ["foldkv", "validate", str(bundle), "--reference", str(reference), "--report", str(report), *plan.options()]
    words += [word for gate in gates if gate.given is not None for word in ("--gate", f"{gate.name}={gate.given!r}")]
    words += ["--text", str(text)] if text is not None else []
    words += [word for key in allow_unknown_keys for word in ("--allow-unknown-key", key)]
    words += ["--devices", ",".join(map(str, devices))] if devices is not None else []
    words += ["--matrices", matrices] if matrices != AUTO else []
    return shlex.join([*words, "--threads", str(threads)])


def _measure(
    bundle: Bundle, checkpoint: Checkpoint, plan: Plan, text: Text, threads: int, devices: Sequence[int] | None,
    matrices: str, layered: bool | None, measured: str, scratch: Path, report: Path, ray: str | None, progress: Progress,
) -> Measurements:  # fmt: skip
    tokenizer = Tokenizer.from_bundle(bundle)
    behaviour = behaviour_cases(tokenizer, checkpoint.spec.sliding_window, plan)
    progress("loading the subject and the reference")
    longest = plan.longest(len(tokenizer.prefix))
    room = max([longest, *plan.contexts])
    with ExitStack() as stack:
        cluster, workers = None, 0
        if ray is not None:
            cluster = stack.enter_context(Cluster(ray, "validate with Ray", processors=default_threads()))
            workers = cluster.tasks_here(threads)
        opened = Opened(checkpoint.spec, bundle.profile, bundle.precision, bundle.backend.gpu, workers)
        whole = opened.fits_whole() if layered is None else not layered
        if not whole:
            check_layered(opened, plan, _tokens_of_cases(plan, behaviour), scratch)
            begin_run(scratch, sha256_json([measured, threads, computing()]))
        stack.enter_context(torch_threads(threads))
        model = stack.enter_context(
            Model(
                bundle.folder, threads=None if bundle.backend.engine else threads, devices=devices,
                context=max(room, bundle.smallest("context")),
                matrices=_matrices(matrices, whole and ray is None, opened), progress=progress,
            )
        )  # fmt: skip
        subject = stack.enter_context(
            open_subject(model, context=longest, layered=not whole, folder=scratch, progress=progress)
        )
        reading: dict[str, Any] = {"whole": whole, "folder": scratch, "progress": progress}
        sides = Sides(
            subject=subject,
            choices=open_choices(model, checkpoint, whole=whole),
            reference=open_transformers(checkpoint, FLOAT32, **reading),
            oracle=open_oracle(checkpoint, **reading) if bundle.profile == SERVED else None,
            yardstick=open_transformers(checkpoint, bundle.precision, **reading)
            if bundle.precision != FLOAT32
            else None,
            checkpoint=checkpoint,
            tokenizer=tokenizer,
            threads=threads,
        )
        progress("hashing the weights")
        weights = weights_digest(bundle, progress)
        if cluster is not None:
            sources = Sources(
                str(bundle.folder.resolve()), str(checkpoint.folder.resolve()), bundle.digest, checkpoint.identity(),
                tuple(checkpoint.allowed_keys), tuple(environment(bundle, executed=not bundle.backend.gpu).items()), instructions(), threads, whole, longest,
                model.matrices,
            )  # fmt: skip
            sides = spread(sides, cluster, sources)
        reproducers = stack.enter_context(Reproducers(report, model, checkpoint))
        found = measure(sides, plan, text, behaviour, progress, reproducers)
        measure_contexts(found, plan, sides, progress)
        found.provenance = executed(sides) | {"weights_sha256": weights}
        if changes := model.changes():
            title = f"{bundle.folder} or its weights were changed while it was measured"
            raise ArtifactError(listing(title, changes, "Validate it again."))
    return found


def _tokens_of_cases(plan: Plan, behaviour: Sequence[BehaviourCase]) -> int:
    """Tokens of all values to retrieve, at most, and of all cases of behaviour."""
    return plan.cases_per_distance * sum(map(prompt_room, plan.distances)) + sum(len(case.tokens) for case in behaviour)


def _matrices(asked: str, whole: bool, opened: Opened) -> str:
    """How the subject reads its matrices: as asked, or as a service does if memory holds them in float32 beside the references."""
    if asked != AUTO or opened.gpu or (whole and opened.fits_whole(more=4)):
        return asked
    return BFLOAT16


def check_contexts(plan: Plan, longest: int, gates: Mapping[str, float], *, what: str) -> None:
    """Check the long contexts of a plan before anything is loaded; ``what`` takes ``longest`` tokens at most.

    Raises:
        InputError: a context is too short or too long, or the gate of long contexts has none that the reference reads.
    """
    if plan.longest() > longest:
        raise InputError(
            f"the longest case has {plan.longest()} tokens; {what} takes at most {longest}. Choose shorter texts (--text-tokens) "
            "and distances (--distance)."
        )
    for context in plan.contexts:
        planted_stream(context, seed=plan.seed)
        if context > longest:
            raise InputError(f"a context of {context} tokens was asked for; {what} takes at most {longest}.")
    if LONG_CONTEXT in gates and not any(context <= REFERENCE_CONTEXT for context in plan.contexts):
        raise InputError(
            f"gate {LONG_CONTEXT} compares with the reference, which reads contexts of up to {REFERENCE_CONTEXT} tokens, but "
            "none of those is measured. Give one with --context (validate.contexts in a pipeline file), or leave the gate out."
        )
