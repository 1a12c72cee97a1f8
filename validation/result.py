"""What a validation found: measured figures, the verdicts on them, and both to and from the report's JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from ..errors import EXIT_ENVIRONMENT, EXIT_GATE_FAILED, EXIT_OK
from .baseline import SCHEMA_VERSION, Comparison
from .behaviour import NO_STATEMENT, BehaviourFigure
from .deployments import DeploymentFigure, not_reproduced
from .divergence import LayerFigure, first_divergence
from .gates import FAILS, LOOSENED, NOT_INFORMATIVE, Gate, Verdict
from .long_context import REFERENCE_CONTEXT, ContextFigure, DepthFigure
from .pages import plain
from .reproducers import Reproducer
from .selection import RECOMPUTED, SelectionFigure


@dataclass
class Measurements:
    """The figures and the evidence behind them: everything that needs a model to measure.

    Attributes:
        metrics: what gates read, and more.
        retrieval: by distance, the shares that were answered, with their intervals.
        by_position: errors by position in the texts.
        worst: the token of each text where the distributions differ most.
        layers, selection, long_context, behaviour, deployments, reproducers: see their classes.
        provenance: what was compared with what, when, by which versions, on which text.
    """

    metrics: dict[str, float]
    retrieval: list[dict[str, Any]]
    by_position: list[dict[str, float]]
    worst: list[dict[str, Any]]
    layers: list[LayerFigure] = field(default_factory=list)
    selection: list[SelectionFigure] = field(default_factory=list)
    long_context: list[ContextFigure] = field(default_factory=list)
    behaviour: list[BehaviourFigure] = field(default_factory=list)
    deployments: list[DeploymentFigure] = field(default_factory=list)
    reproducers: list[Reproducer] = field(default_factory=list)
    provenance: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def nothing(cls, provenance: dict[str, Any]) -> Measurements:
        """No figures, because the subject could not be executed."""
        return cls({}, [], [], [], provenance=provenance)

    @property
    def first_divergence(self) -> int | None:
        """The first layer that diverges from the reference."""
        return first_divergence(self.layers)


@dataclass
class ValidationResult(Measurements):
    """Measurements with the verdicts on them.

    Attributes:
        verdicts: one per gate that was asked for.
        not_validated: bundles beside the subject that have its graph or its engines and were not measured: target, folder, and why
            the report does not speak for them.
        comparison: the comparison with an older report, if one was given.
        source: ``measured``; ``judged again``, with the figures of the report there; ``unchanged``; or ``not executed``.
        not_executed: why this machine could not execute the subject, so that there are no figures; None if it did.
    """

    verdicts: list[Verdict] = field(default_factory=list)
    not_validated: list[dict[str, str]] = field(default_factory=list)
    comparison: Comparison | None = None
    source: str = "measured"
    not_executed: str | None = None

    @property
    def passed(self) -> bool:
        """Whether every gate holds on enough evidence."""
        return self.not_executed is None and all(verdict.passed for verdict in self.verdicts)

    @property
    def exit_code(self) -> int:
        """0 if every gate holds, 3 if the subject could not be executed here, else 1."""
        if self.not_executed is not None:
            return EXIT_ENVIRONMENT
        return EXIT_OK if self.passed else EXIT_GATE_FAILED

    @property
    def headline(self) -> str:
        """The whole verdict in a few words, for example ``1 of 10 gates fails, 2 are not informative``."""
        if self.not_executed is not None:
            return f"not executed here: {self.not_executed}"
        count = len(self.verdicts)
        failed, silent = (sum(v.word == word for v in self.verdicts) for word in (FAILS, NOT_INFORMATIVE))
        loose = sum(v.gate.changed == LOOSENED for v in self.verdicts)
        parts = []
        if failed:
            parts.append(f"{failed} of {count} gates {'fails' if failed == 1 else 'fail'}")
        if silent:
            subject = f"{silent}" if failed else f"{silent} of {count} gates"
            parts.append(f"{subject} {'is' if silent == 1 else 'are'} not informative")
        if not parts:
            parts.append("all gates hold")
        if loose:
            parts.append(f"{loose} {'is' if loose == 1 else 'are'} loosened")
        return ", ".join(parts)

    @property
    def not_reproduced(self) -> list[str]:
        """What the bundle's profile leaves out of what deployed systems compute."""
        return not_reproduced(self.provenance["profile"])

    def notes(self) -> list[str]:
        """What a reader must know to read the figures correctly."""
        notes = []
        queries, tied = (sum(getattr(row, name) for row in self.selection) for name in ("queries", "tied"))
        if tied:
            notes.append(
                f"Index scores tie exactly at the last place in {tied:,} of {queries:,} queries that had a choice. Several sets of "
                "entries are equally good there. For texts the reference takes the one that is closest to the subject's, so that "
                "logits, layers and entries can be compared. Retrieval answers are compared without this."
            )
        if self.selection and self.provenance["choices"] == RECOMPUTED:
            notes.append(
                "A bundle for a GPU does not say which entries its indexers chose. They were recomputed in float32 from its own streams "
                "and index rows: an indexer that chooses otherwise than its rows say shows in the streams after its layer."
            )
        if self.selection and min(row.queries for row in self.selection) == 0:
            needed = self.provenance["choice_from_tokens"]
            notes.append(
                "In a layer with an indexer no query of these texts had more compressed entries than places: how entries are chosen "
                f"there was not measured. That needs texts of more than {needed:,} tokens (--text-tokens)."
            )
        if far := [figure.context for figure in self.long_context if figure.reference is None]:
            sizes = ", ".join(f"{context:,}" for context in far)
            notes.append(
                f"Contexts of {sizes} tokens are shown but not judged: the reference reads at most {REFERENCE_CONTEXT:,}."
            )
        if missing := self.not_reproduced:
            notes.append(f"A bundle of the profile served does not reproduce: {'; '.join(missing)}.")
        silent = [f"{row.kind} ({row.lack})" for row in self.behaviour if not row.group and row.word == NO_STATEMENT]
        if silent:
            notes.append(
                f"Too weak for a statement about behaviour: {'; '.join(silent)}. Nothing is known about the bundle there; a reference that "
                "answers is needed, or more cases (--cases-per-kind, --sweep-cases)."
            )
        if mute := sorted(
            {row.group[-1] for row in self.behaviour if "mod 4" in row.group and row.word == NO_STATEMENT}
        ):
            notes.append(
                f"Of prompts with lengths of {', '.join(mute)} mod 4 too few are answered for a statement by answers; the distributions were "
                "compared at all lengths (gate sweep)."
            )
        plan = self.provenance["plan"]
        asked = {
            "behaviour (--cases-per-kind)": plan["cases_per_kind"], "prompts of every length (--sweep-cases)": plan["sweep_cases"],
        }  # fmt: skip
        if not_asked := [what for what, count in asked.items() if not count]:
            notes.append(f"Not asked for, so nothing is known about it: {', '.join(not_asked)}.")
        if self.not_validated:
            names = ", ".join(f"{row['folder']} ({row['why']})" for row in self.not_validated)
            notes.append(
                f"Beside the bundle but not validated: {names}. They have the same graph or the same engines; nothing here was measured "
                "on them."
            )
        return notes


def to_json(result: ValidationResult) -> dict[str, Any]:
    """The report as JSON values, as schema/report.schema.json describes them. Infinity is the string "inf"."""
    content = {
        "schema_version": SCHEMA_VERSION,
        "passed": result.passed,
        "headline": result.headline,
        "not_executed": result.not_executed,
        "notes": result.notes(),
        "gates": [gate_json(verdict) for verdict in result.verdicts],
        "not_validated": result.not_validated,
        "comparison": asdict(result.comparison) if result.comparison else None,
        "metrics": result.metrics,
        "retrieval": result.retrieval,
        "layers": [asdict(figure) for figure in result.layers],
        "selection": [vars(figure) for figure in result.selection],
        "long_context": [asdict(figure) for figure in result.long_context],
        "behaviour": [_behaviour_json(figure) for figure in result.behaviour],
        "deployments": [asdict(figure) for figure in result.deployments],
        "not_reproduced": result.not_reproduced,
        "first_divergence": result.first_divergence,
        "by_position": result.by_position,
        "worst_cases": result.worst,
        "reproducers": [asdict(row) for row in result.reproducers],
        "provenance": result.provenance,
    }
    return plain(content)  # type: ignore[no-any-return]


def gate_json(verdict: Verdict) -> dict[str, Any]:
    """A gate with its verdict."""
    gate: Gate = verdict.gate
    return {
        "name": gate.name, "metric": gate.metric, "comparison": gate.comparison, "threshold": gate.threshold,
        "default": gate.default, "changed": gate.changed, "reason": gate.reason,
        "needs": [need.words(gate.threshold) for need in gate.needs],
        "yardstick": None if gate.yardstick is None else {"metric": gate.yardstick.metric, "factor": gate.yardstick.factor},
        "value": verdict.value, "verdict": verdict.word, "passed": verdict.passed, "lack": verdict.lack,
    }  # fmt: skip


def _behaviour_json(figure: BehaviourFigure) -> dict[str, Any]:
    derived = ("reference_interval", "subject_interval", "word", "lack")
    return asdict(figure) | {name: getattr(figure, name) for name in derived}


def measurements_from_json(content: Mapping[str, Any]) -> Measurements:
    """What :func:`to_json` wrote, without the verdicts: they are judged again from the figures."""
    return Measurements(
        metrics={name: float(value) for name, value in content["metrics"].items()},
        retrieval=list(content["retrieval"]),
        by_position=[{name: float(value) for name, value in row.items()} for row in content["by_position"]],
        worst=[_worst(case) for case in content["worst_cases"]],
        layers=[_layer(row) for row in content["layers"]],
        selection=[SelectionFigure(**row) for row in content["selection"]],
        long_context=[_context(row) for row in content["long_context"]],
        deployments=[_deployment(row) for row in content["deployments"]],
        behaviour=[_behaviour(row) for row in content["behaviour"]],
        reproducers=[
            Reproducer(**{**row, "atol": float(row["atol"]), "commands": tuple(row["commands"])})
            for row in content["reproducers"]
        ],
        provenance=dict(content["provenance"]),
    )


def _layer(row: Mapping[str, Any]) -> LayerFigure:
    figures = {name: None if row[name] is None else float(row[name]) for name in row.keys() - {"layer", "kind"}}
    return LayerFigure(**{**row, **figures})


def _deployment(row: Mapping[str, Any]) -> DeploymentFigure:
    numbers = {name: None if row[name] is None else float(row[name]) for name in row.keys() - {"name", "lack"}}
    return DeploymentFigure(**{**row, **numbers})


def _behaviour(row: Mapping[str, Any]) -> BehaviourFigure:
    kept = {name: row[name] for name in BehaviourFigure.__dataclass_fields__}
    numbers = {name: None if row[name] is None else float(row[name]) for name in kept if "kl" in name}
    return BehaviourFigure(**{**kept, **numbers})


def _context(row: Mapping[str, Any]) -> ContextFigure:
    kl = None if row["kl_mean"] is None else float(row["kl_mean"])
    return ContextFigure(**{**row, "kl_mean": kl, "depths": [DepthFigure(**depth) for depth in row["depths"]]})


def _worst(case: Mapping[str, Any]) -> dict[str, Any]:
    tops = {name: [[token, float(value)] for token, value in case[name]] for name in ("reference_top", "subject_top")}
    return {**case, **tops, "kl": float(case["kl"]), "logit_error": float(case["logit_error"])}
