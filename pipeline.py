"""Run the stages of a pipeline file in order; unchanged stages are skipped.

checkpoint -> OUTPUT/graph -> OUTPUT/bundles/<target> -> OUTPUT/report, or OUTPUT/reports/<target> if several are validated

:func:`preview` says what a run would do and why. It makes the same checks that the run makes before each stage.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import __version__
from .artifact import MANIFEST, check_destination, sha256_file, sha256_json
from .config import PipelineConfig
from .errors import EXIT_ENVIRONMENT, EXIT_GATE_FAILED, EXIT_OK, ArtifactError, InputError
from .manifests import BundleManifest, GraphManifest, ReportManifest, reason_to_replace
from .optimize.build import build_bundles, check_ray, reasons_to_build
from .optimize.choices import check_here, choose
from .optimize.fit import export_estimate, graph_bytes, plan_target
from .optimize.history import Estimate, read_runs, record_builds, record_export
from .optimize.kept_weights import stored_format
from .optimize.outcome import BuildReport, TargetResult
from .optimize.recipe import Shapes, default_shapes
from .optimize.targets import resolve_targets
from .packages import FEATURES, missing, require
from .progress import Progress, Say, silent
from .runtime.bundle import missing_for

if TYPE_CHECKING:
    from .export.checkpoint.reader import Checkpoint
    from .validation.settings import Plan

EXPORT, BUILD, VALIDATE = "export", "build", "validate"
STAGES = (EXPORT, BUILD, VALIDATE)
_FORCED = "--force"


@dataclass
class PipelineResult:
    """Where the artifacts are, the reports by target, and what each stage did and its seconds."""

    graph: Path
    bundles: list[TargetResult] = field(default_factory=list)
    reports: dict[str, TargetReport] = field(default_factory=dict)
    stages: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def passed(self) -> bool | None:
        """Whether all reports passed; None without one."""
        return all(report.content["passed"] for report in self.reports.values()) if self.reports else None

    @property
    def not_validated(self) -> list[str]:
        """Targets with a bundle that no report covers, or one that says that it was not executed."""
        covered = {name for name, report in self.reports.items() if report.content["not_executed"] is None}
        return [bundle.target for bundle in self.bundles if bundle.status != "failed" and bundle.target not in covered]

    @property
    def exit_code(self) -> int:
        """The code of the first target that failed, else 1 if a gate failed, else 3 if a bundle could not be executed here, else 0."""
        codes = {report.exit_code for report in self.reports.values()}
        first = next((code for code in (EXIT_GATE_FAILED, EXIT_ENVIRONMENT) if code in codes), EXIT_OK)
        return BuildReport(self.bundles).exit_code or first


@dataclass(frozen=True)
class TargetReport:
    """A report: its folder, its content, and the exit code that it stands for."""

    folder: Path
    content: dict[str, Any]
    exit_code: int


@dataclass(frozen=True)
class Step:
    """What a run would do about one artifact.

    Attributes:
        stage: one of :data:`STAGES`.
        target: the target of a build or a report, else "".
        folder: the artifact's folder.
        reason: why it would be made again; "" if it is unchanged.
        seconds: how long that may take, or None if unknown.
        bytes: the artifact's size on disk, or None if it is small.
    """

    stage: str
    target: str
    folder: Path
    reason: str
    seconds: Estimate | None = None
    bytes: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return {
            "stage": self.stage, "target": self.target or None, "folder": str(self.folder), "runs": bool(self.reason),
            "reason": self.reason, "seconds": self.seconds.to_dict() if self.seconds else None, "bytes": self.bytes,
        }  # fmt: skip


def run_pipeline(
    config: PipelineConfig, *, only: str | None = None, force: bool = False, progress: Say = silent
) -> PipelineResult:
    """Run the stages of a pipeline. A stage is skipped if its inputs and settings are unchanged.

    Args:
        config: the pipeline file.
        only: run only this stage; what it reads must exist and be current.
        force: also run stages that are unchanged.
        progress: called with one line per step; a :class:`~foldkv.progress.Progress` gets more.

    Raises:
        FoldkvError: the run cannot succeed, raised before the first stage starts; or a stage failed: earlier artifacts stay.
    """
    work, report = _Pipeline(config, only), Progress.of(progress)
    work.check()
    result = PipelineResult(graph=work.graph)
    if EXPORT in work.stages:
        _timed(result, EXPORT, report, lambda part: _export(work, force, part))
    if BUILD in work.stages:
        _timed(result, BUILD, report, lambda part: _build(work, result, force, part))
    built = {bundle.target for bundle in result.bundles if bundle.status != "failed"}
    wanted = [name for name in config.validation.targets if only == VALIDATE or name in built]
    if VALIDATE in work.stages and wanted:
        _timed(result, VALIDATE, report, lambda part: _validate(work, result, wanted, force, part))
    return result


def preview(config: PipelineConfig, *, only: str | None = None, force: bool = False) -> list[Step]:
    """What :func:`run_pipeline` would do with the same arguments, and why. Nothing is written.

    Raises:
        FoldkvError: the run would be refused before its first stage.
    """
    work = _Pipeline(config, only)
    work.check()
    steps: list[Step] = []
    if EXPORT in work.stages:
        steps.append(_export_step(work, force))
    if BUILD in work.stages:
        steps += _build_steps(work, force, "the graph package is rebuilt" if any(s.reason for s in steps) else "")
    if VALIDATE in work.stages:
        made = list(steps)
        for name in config.validation.targets:
            changed = [step for step in made if step.reason and step.target in ("", name)]
            reason = "the bundle is rebuilt" if changed else _FORCED if force else work.validate_reason(name)
            [target] = [one for one in work.targets if one.name == name]
            if reason and (lacking := missing_for(target.backend, target.sm or 0)):
                reason += f"; it will say that it was not executed here (exit code {EXIT_ENVIRONMENT}): this machine lacks {' and '.join(lacking)}"
            steps.append(Step(VALIDATE, name, work.report(name), reason))
    return steps


def _timed(result: PipelineResult, stage: str, report: Progress, work: Callable[[Progress], bool]) -> None:
    start = time.monotonic()
    with report.part(stage) as part:
        done = work(part)
    result.stages[stage] = {"seconds": round(time.monotonic() - start, 2), "skipped": not done}


class _Pipeline:
    """A pipeline file, and the questions that its stages ask."""

    def __init__(self, config: PipelineConfig, only: str | None) -> None:
        self.config = config
        output = Path(config.output)
        self.graph, self.bundles = output / "graph", output / "bundles"
        if only not in (None, *STAGES):
            raise InputError(f"stage {only!r} is not known; expected one of {', '.join(STAGES)}.")
        if only == VALIDATE and not config.validation.enabled:
            raise InputError(
                "validate.enabled is false in this pipeline. Set it to true, or leave out --only validate."
            )
        self.only = only
        self.targets = resolve_targets(config.build.targets, config.build.backend)
        wanted = STAGES if config.validation.enabled else (EXPORT, BUILD)
        self.stages = wanted if only is None else (only,)

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """The checkpoint, from its headers."""
        from .export.checkpoint.reader import Checkpoint

        return Checkpoint(Path(self.config.checkpoint), allow_unknown_keys=self.config.export.allow_unknown_keys)

    @cached_property
    def shapes(self) -> Shapes:
        """Sizes that engines are built for: what the file says, else what suits the model."""
        given = self.config.build.shapes.model_dump(exclude_none=True)
        return replace(default_shapes(self.checkpoint.spec), **{name: tuple(sizes) for name, sizes in given.items()})

    def report(self, target: str) -> Path:
        """Where the report of a target goes: OUTPUT/report, or OUTPUT/reports/TARGET if there are several."""
        output = Path(self.config.output)
        return output / "reports" / target if len(self.config.validation.targets) > 1 else output / "report"

    def build_options(self) -> dict[str, Any]:
        """Arguments of ``build_bundles`` that decide the bundles."""
        build = self.config.build
        return {"plugins": build.plugins == "on", "layout": build.layout, "shapes": self.shapes}

    # Everything that is known to fail is refused before the first stage starts.

    def check(self) -> None:
        """Refuse what cannot succeed; see :func:`run_pipeline`."""
        from .export.contract.profiles import check_profile
        from .export.tensor_table import check_tensors

        config = self.config
        targets = self.targets
        check_tensors(self.checkpoint)
        spec = self.checkpoint.spec
        check_profile(config.export.profile, spec)
        options = {name: value for name, value in self.build_options().items() if name != "shapes"}
        choices = choose(spec, config.export.profile, targets, **options)
        if config.validation.enabled:
            self._check_validation()
        if BUILD in self.stages:
            check_here(choices)
            if config.build.ray is not None:
                check_ray(targets)
        if EXPORT in self.stages:
            if missing(FEATURES["export"].modules) and self.export_reason():
                require("export")
            check_destination(self.graph, kind=GraphManifest.KIND)
        if BUILD in self.stages:
            for target in targets:
                check_destination(self.bundles / target.name, kind=BundleManifest.KIND)
        if self.only in (BUILD, VALIDATE):
            self._check_earlier()

    def _check_validation(self) -> None:
        from .export.checkpoint.texts import TOKENIZER
        from .validation.baseline import read_report
        from .validation.cases import load_text
        from .validation.gates import resolve_gates
        from .validation.validate import check_contexts

        wanted, profile = self.config.validation, self.config.export.profile
        if wanted.ray is not None:
            require("validate with Ray")
        if wanted.text is not None:
            load_text(Path(wanted.text))
        for older, report in ((self.baseline(name), self.report(name)) for name in wanted.targets):
            if older is None:
                continue
            read_report(older)
            if older.resolve().is_relative_to(report.resolve()):
                raise InputError(
                    f"validate.baseline is {wanted.baseline}, the report that this run replaces. Copy it elsewhere and name the copy."
                )
        built = self.config.build.targets
        for name in wanted.targets:
            if name not in built:
                raise InputError(
                    f"validate.targets has {name!r}, which build.targets does not list ({', '.join(built)}). Add it there, or leave it out."
                )
            if wanted.targets.count(name) > 1:
                raise InputError(f"validate.targets has {name!r} twice. Leave out one.")
        validated = [target for target in self.targets if target.name in wanted.targets]
        longest = self.checkpoint.spec.max_position_embeddings
        check_contexts(self.plan(), longest, wanted.gates, what=f"the model of {self.config.checkpoint}")
        for target in validated:
            resolve_gates(wanted.gates, profile, target.precision)
            if target.backend.engine:
                most = min(longest, self.shapes.context[2])
                check_contexts(self.plan(), most, wanted.gates, what=f"the engine for {target.name}")
        if wanted.devices is not None and not any(target.backend.engine for target in validated):
            raise InputError("validate.devices are for engines, and none of validate.targets has any. Leave them out.")
        if not (self.checkpoint.folder / TOKENIZER).is_file():
            raise InputError(
                f"{self.checkpoint.folder} has no {TOKENIZER}, which validate needs. "
                "Put the model's tokenizer there, or set validate.enabled to false."
            )
        if VALIDATE not in self.stages:
            return
        for name in wanted.targets:
            check_destination(self.report(name), kind=ReportManifest.KIND)
        require("validate", otherwise="or set validate.enabled to false")

    def _check_earlier(self) -> None:
        """Check that what the one stage reads is what a whole run would make."""
        if reason := self.export_reason():
            raise ArtifactError(
                f"--only {self.only} reads {self.graph}, which is not current: {reason}. Run without --only, or --only export first."
            )
        for name in self.config.validation.targets if self.only == VALIDATE else ():
            if reason := self.build_reasons(name)[name]:
                raise ArtifactError(
                    f"--only validate reads {self.bundles / name}, which is not current: {reason}. Run without --only, or "
                    "--only build first."
                )

    # Why a stage would run.

    def export_reason(self) -> str:
        """Why the graph package is not what would be exported; "" if it is."""
        reason, manifest = reason_to_replace(GraphManifest, self.graph)
        return reason if manifest is None else export_changes(self.config, self.checkpoint, self.graph, manifest)

    def build_reasons(self, only: str | None = None) -> dict[str, str]:
        """Per target, or for one, why its bundle is not what would be built. The graph package must exist."""
        return reasons_to_build(self.graph, self.bundles, self.targets, only=only, **self.build_options())

    def plan(self) -> Plan:
        """What `validate` measures."""
        from .validation.settings import Plan

        wanted = self.config.validation
        return Plan(
            wanted.seed,
            wanted.texts,
            wanted.text_tokens,
            tuple(wanted.distances),
            wanted.cases_per_distance,
            tuple(wanted.contexts),
            wanted.cases_per_kind,
            wanted.case_tokens,
            wanted.sweep_cases,
        )

    def devices(self, target: str) -> tuple[int, ...] | None:
        """The GPUs that execute the bundle of a target; None where the runtime decides."""
        wanted = self.config.validation.devices
        [one] = [one for one in self.targets if one.name == target]
        return tuple(wanted) if wanted is not None and one.backend.engine else None

    def baseline(self, target: str) -> Path | None:
        """The older report of a target: what the file names, or its folder TARGET if several are validated."""
        wanted = self.config.validation
        if wanted.baseline is None:
            return None
        return Path(wanted.baseline) / target if len(wanted.targets) > 1 else Path(wanted.baseline)

    def validate_key(self, target: str) -> str:
        """What the report of a target depends on, as JSON."""
        from .validation.baseline import MEASURES, read_report

        wanted = self.config.validation
        key = {
            "plan": asdict(self.plan()),
            "gates": wanted.gates,
            "text": sha256_file(Path(wanted.text)) if wanted.text else None,
            "baseline": sha256_json(read_report(older)) if (older := self.baseline(target)) else None,
            "devices": self.devices(target),
            "threads": wanted.threads,
            "bundle": sha256_file(self.bundles / target / MANIFEST),
            "foldkv": __version__,
            "measures": MEASURES,
        }
        return json.dumps(key, sort_keys=True)

    def validate_reason(self, target: str) -> str:
        """Why the report of a target is not what would be measured; "" if it is. The bundle must exist."""
        folder, key = self.report(target), self.validate_key(target)
        reason, manifest = reason_to_replace(ReportManifest, folder)
        if manifest is not None and not manifest.measured:
            return "its bundle could not be executed then"
        if manifest is None or manifest.key == key:
            return reason
        try:
            old = json.loads(manifest.key)
        except ValueError:
            old = None
        if not isinstance(old, dict):  # `foldkv validate` wrote it
            return f"{folder} was not made by this pipeline"
        new = json.loads(key)
        return "; ".join(_validate_change(name, old.get(name), new[name]) for name in new if old.get(name) != new[name])


def export_changes(config: PipelineConfig, source: Checkpoint, graph: Path, made: GraphManifest) -> str:
    """Why a graph package, whose manifest is ``made``, is not what would be exported; "" if it is."""
    from .export.package import graph_spec, tool_versions

    wanted = config.export
    changes = [f"export.profile was {made.profile}, is {wanted.profile}"] if made.profile != wanted.profile else []
    changes += [
        f"{name} was {made.tool_versions.get(name)}, is {new}"
        for name, new in tool_versions().items()
        if made.tool_versions.get(name) != new
    ]
    if not changes and made.spec != graph_spec(wanted.profile):
        changes.append("this foldkv exports differently")
    return "; ".join(changes) or _checkpoint_changes(source, graph, made)


def _checkpoint_changes(source: Checkpoint, graph: Path, made: GraphManifest) -> str:
    from .export.checkpoint.reader import model_facts
    from .export.contract.lock import LOCK, WeightsLock
    from .export.locate import files_identity
    from .export.package import CONFIG

    # Only headers are hashed; files that were written again are found below.
    if made.inputs.checkpoint.sha256 != source.identity():
        old = json.loads((graph / CONFIG).read_text())
        keys = [key for key in sorted({*old, *source.config}) if old.get(key) != source.config.get(key)]
        what = f"config.json: {', '.join(keys)}" if keys else "its files"
        return f"the checkpoint {source.folder} changed ({what})"
    locked = WeightsLock.read(graph / LOCK).files
    if made.inputs.checkpoint.files != files_identity({name: source.folder / name for name in locked}):
        return f"weight files of the checkpoint {source.folder} were written again or replaced"
    if made.inputs.checkpoint.texts != source.texts_digest():
        return f"the tokenizer, the chat encoding or the generation_config.json of {source.folder} changed"
    if made.model != model_facts(source):
        return f"the special tokens of {source.folder} changed"
    return ""


def _validate_change(name: str, old: Any, new: Any) -> str:
    if name == "bundle":
        return "the bundle changed"
    if name == "text":
        return "the text changed"
    if name == "foldkv":
        return f"it was made by foldkv {old}; this is {new}"
    if name == "measures":
        return "this foldkv measures otherwise"
    if not isinstance(old, dict):
        return f"validate.{name} changed"
    prefix = "validate." if name == "plan" else "validate.gates."
    keys = [key for key in sorted({*old, *new}) if old.get(key) != new.get(key)]
    unset = "unset" if name == "plan" else "the default"
    return "; ".join(f"{prefix}{key} was {old.get(key, unset)}, is {new.get(key, unset)}" for key in keys)


def _export(work: _Pipeline, force: bool, progress: Progress) -> bool:
    from .export.package import export_checkpoint

    reason = _FORCED if force else work.export_reason()
    if not reason:
        progress(f"unchanged, {work.graph}")
        return False
    progress(f"starts: {reason}")
    expected = export_estimate(work.checkpoint.spec, read_runs(), _stored(work))
    if expected is not None:
        progress.expect(expected.low, expected.high)
    start = time.monotonic()
    export_checkpoint(
        Path(work.config.checkpoint),
        work.graph,
        profile=work.config.export.profile,
        allow_unknown_keys=work.config.export.allow_unknown_keys,
        progress=progress,
    )
    record_export(work.graph, time.monotonic() - start)
    return True


def _build(work: _Pipeline, result: PipelineResult, force: bool, progress: Progress) -> bool:
    report = build_bundles(
        work.graph,
        work.bundles,
        work.targets,
        **work.build_options(),
        jobs=work.config.build.jobs,
        cache=Path(work.config.build.cache) if work.config.build.cache else None,
        ray=work.config.build.ray,
        force=force,
        progress=progress,
    )
    record_builds(work.graph, report.results)
    result.bundles = report.results
    return any(bundle.status != "unchanged" for bundle in report.results)


def _validate(
    work: _Pipeline, result: PipelineResult, targets: Sequence[str], force: bool, progress: Progress
) -> bool:  # fmt: skip
    from .validation.result import to_json
    from .validation.validate import MEASURED, UNCHANGED, validate

    wanted, sources = work.config.validation, set[str]()
    for name in targets:
        report = work.report(name)
        if reason := _FORCED if force else work.validate_reason(name):
            progress(f"{name} starts: {reason}")
        # Always called: the report also lists what has been built beside the bundle since.
        found = validate(
            work.bundles / name, Path(work.config.checkpoint), report, gates=wanted.gates, plan=work.plan(),
            threads=wanted.threads, ray=wanted.ray, devices=work.devices(name), keep=not force, key=work.validate_key(name),
            text=Path(wanted.text) if wanted.text else None,
            baseline=work.baseline(name),
            allow_unknown_keys=work.config.export.allow_unknown_keys,
            report_absent=True, progress=progress,
        )  # fmt: skip
        if found.source != MEASURED:
            progress(f"{found.source}, {report}")
        sources.add(found.source)
        result.reports[name] = TargetReport(report, to_json(found), found.exit_code)
    return sources != {UNCHANGED}


# Estimates of a preview.


def _stored(work: _Pipeline) -> str:
    dtypes = {name: stored.dtype for name, stored in work.checkpoint.headers.items()}
    return stored_format(work.checkpoint.config, dtypes)


def _export_step(work: _Pipeline, force: bool) -> Step:
    reason = _FORCED if force else work.export_reason()
    if not reason:
        return Step(EXPORT, "", work.graph, "")
    spec = work.checkpoint.spec
    seconds = export_estimate(spec, read_runs(), _stored(work))
    return Step(EXPORT, "", work.graph, reason, seconds, graph_bytes(spec, _stored(work)))


def _build_steps(work: _Pipeline, force: bool, earlier: str) -> list[Step]:
    names = [target.name for target in work.targets]
    reasons = dict.fromkeys(names, earlier or _FORCED) if earlier or force else work.build_reasons()
    runs, steps = read_runs(), []
    spec, shapes, config = work.checkpoint.spec, work.shapes, work.config
    choices = choose(
        spec, config.export.profile, work.targets, plugins=config.build.plugins == "on",
        layout=config.build.layout,
    )  # fmt: skip
    for choice in choices:
        name = choice.target.name
        if not reasons[name]:
            steps.append(Step(BUILD, name, work.bundles / name, ""))
            continue
        planned = plan_target(
            spec, choice.target, context=min(shapes.context[2], spec.max_position_embeddings), layout=choice.layout,
            batch=shapes.batch[2], chunk=shapes.chunk[2], plugins=config.build.plugins == "on",
            profile=config.export.profile, runs=runs, stored=_stored(work),
        )  # fmt: skip
        steps.append(Step(BUILD, name, work.bundles / name, reasons[name], planned.build, planned.bundle))
    return steps
