"""The stages of a pipeline file, one after the other; what is unchanged is skipped.

checkpoint -> OUTPUT/graph -> OUTPUT/bundles/<target> -> OUTPUT/report
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import foldkv
from foldkv.artifact import read_manifest, verify_files
from foldkv.config import PipelineConfig
from foldkv.errors import EXIT_GATE_FAILED, EXIT_OK, ArtifactError, InputError
from foldkv.optimize.build import BuildReport, TargetResult, build_bundles
from foldkv.optimize.history import record_builds, record_export
from foldkv.optimize.spec import Shapes
from foldkv.optimize.targets import resolve_targets

Progress = Callable[[str], None]


@dataclass
class PipelineResult:
    """Where the artifacts are, what each stage did and took (seconds), and the content of the report, empty without one."""

    graph: Path
    bundles: list[TargetResult] = field(default_factory=list)
    report: Path | None = None
    judged: dict[str, Any] = field(default_factory=dict)
    passed: bool | None = None
    stages: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def gates(self) -> list[dict[str, Any]]:
        """What the gates said."""
        return list(self.judged.get("gates", []))

    @property
    def not_validated(self) -> list[str]:
        """Targets with a bundle that no report speaks of."""
        validated = self.judged["provenance"]["target"] if self.judged else None
        return [bundle.target for bundle in self.bundles if bundle.status != "failed" and bundle.target != validated]

    @property
    def exit_code(self) -> int:
        """That of the first target that failed, else 1 if a gate failed, else 0."""
        code = BuildReport(self.bundles).exit_code
        return code or (EXIT_GATE_FAILED if self.passed is False else EXIT_OK)


def run_pipeline(config: PipelineConfig, *, progress: Progress = lambda _: None) -> PipelineResult:
    """Run every stage of a pipeline; a stage whose inputs and settings are unchanged is skipped.

    Raises:
        FoldkvError: what the stages raise; earlier artifacts stay.
    """
    from foldkv.export.checkpoint import Checkpoint
    from foldkv.validation.baseline import read_report
    from foldkv.validation.cases import load_text
    from foldkv.validation.gates import resolve_gates

    # What can be known to be wrong is refused before the first stage starts.
    resolve_targets(config.build.targets)
    resolve_gates(config.validation.gates, config.export.profile)
    if config.validation.text is not None:
        load_text(Path(config.validation.text))
    if (baseline := config.validation.baseline) is not None:
        read_report(Path(baseline))
        if Path(baseline).resolve().is_relative_to((Path(config.output) / "report").resolve()):
            raise InputError(
                f"validate.baseline is {baseline}, the report that this run replaces. Copy it elsewhere and name the copy."
            )
    if config.validation.enabled and config.validation.target not in config.build.targets:
        raise InputError(
            f"validate.target is {config.validation.target!r}, which build.targets does not list ({', '.join(config.build.targets)})."
        )
    shapes = _shapes(config)
    Checkpoint(Path(config.checkpoint)).check()
    output = Path(config.output)
    result = PipelineResult(graph=output / "graph")
    _timed(result, "export", lambda: _export(config, result.graph, progress))
    _timed(result, "build", lambda: _build(config, shapes, result, output / "bundles", progress))
    built = {bundle.target: bundle for bundle in result.bundles if bundle.status != "failed"}
    if config.validation.enabled and config.validation.target in built:
        result.report = output / "report"
        bundle = built[config.validation.target].folder
        _timed(result, "validate", lambda: _validate(config, bundle, result, progress))
    return result


def _timed(result: PipelineResult, stage: str, work: Callable[[], bool]) -> None:
    start = time.monotonic()
    done = work()
    result.stages[stage] = {"seconds": round(time.monotonic() - start, 2), "skipped": not done}


def _current(folder: Path, kind: str) -> dict[str, Any] | None:
    """The manifest of a whole artifact there, or None."""
    try:
        manifest = read_manifest(folder, kind=kind)
        verify_files(folder, manifest)
    except ArtifactError:
        return None
    return manifest


def _export(config: PipelineConfig, out: Path, progress: Progress) -> bool:
    from foldkv.export.graph import KIND, export_checkpoint

    old = _current(out, KIND)
    if old is not None and is_export_of(config, out, old):
        progress(f"export: unchanged, {out}")
        return False
    start = time.monotonic()
    export_checkpoint(
        Path(config.checkpoint),
        out,
        profile=config.export.profile,
        weights=config.export.weights,
        progress=lambda line: progress(f"export: {line}"),
    )
    record_export(out, time.monotonic() - start)
    return True


def is_export_of(config: PipelineConfig, graph: Path, manifest: dict[str, Any]) -> bool:
    """Whether a graph package is what these settings would export again."""
    from foldkv.export.checkpoint import Checkpoint
    from foldkv.export.graph import graph_spec, same_files, tool_versions

    settings = (manifest["foldkv_version"], manifest["spec"], manifest["tool_versions"], manifest["weights"])
    if settings != (foldkv.__version__, graph_spec(config.export.profile), tool_versions(), config.export.weights):
        return False
    checkpoint = Checkpoint(Path(config.checkpoint))
    # Of weights that stay as they are stored headers are known only; a file that was replaced is another file.
    expected = checkpoint.digest() if config.export.weights == "float32" else checkpoint.identity()
    return bool(manifest["inputs"]["checkpoint"]["sha256"] == expected) and same_files(graph, manifest, checkpoint)


def _shapes(config: PipelineConfig) -> Shapes:
    given = config.build.shapes
    return Shapes(*(tuple(sizes) for sizes in (given.batch, given.chunk, given.context)))  # type: ignore[arg-type]


def _build(config: PipelineConfig, shapes: Shapes, result: PipelineResult, out: Path, progress: Progress) -> bool:
    report = build_bundles(
        result.graph,
        out,
        config.build.targets,
        plugins=config.build.plugins == "on",
        layout=config.build.layout,
        shapes=shapes,
        jobs=config.build.jobs,
        progress=lambda line: progress(f"build: {line}"),
    )
    record_builds(result.graph, report.results)
    result.bundles = report.results
    return any(bundle.status != "unchanged" for bundle in report.results)


def _validate(config: PipelineConfig, bundle: Path, result: PipelineResult, progress: Progress) -> bool:
    from foldkv.validation.plan import Plan
    from foldkv.validation.result import to_json
    from foldkv.validation.validate import MEASURED, UNCHANGED, validate

    assert result.report is not None
    wanted = config.validation
    plan = Plan(
        wanted.seed,
        wanted.texts,
        wanted.text_tokens,
        tuple(wanted.distances),
        wanted.cases_per_distance,
        tuple(wanted.contexts),
    )
    found = validate(
        bundle, Path(config.checkpoint), result.report, gates=wanted.gates, plan=plan, threads=wanted.threads, keep=True,
        text=Path(wanted.text) if wanted.text else None,
        baseline=Path(wanted.baseline) if wanted.baseline else None,
        progress=lambda line: progress(f"validate: {line}"),
    )  # fmt: skip
    if found.source != MEASURED:
        progress(f"validate: {found.source}, {result.report}")
    result.judged, result.passed = to_json(found), found.passed
    return found.source != UNCHANGED
