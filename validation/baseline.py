"""What changed since an older report: gate by gate, with what cannot be compared and why."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from ..artifact import MANIFEST
from ..errors import InputError
from ..inputs import refuse_unreadable_name
from ..manifests import ReportManifest, read
from .gates import BEHAVIOUR, CONTEXTS, RETRIEVAL, TEXT, Verdict

KIND = ReportManifest.KIND
#: Of the report's JSON (schema/report.schema.json).
SCHEMA_VERSION = 4
#: Raised when the same inputs give other figures: other cases, or another way to measure.
MEASURES = 2
JSON = "report.json"

#: Facts of the provenance that must be equal so that figures can be compared: for all gates, or for one kind.
_ALL = {"checkpoint_sha256": "checkpoint", "profile": "profile"}
_PLANNED = {
    TEXT: ("other windows of the text", ("seed", "texts", "text_tokens")),
    RETRIEVAL: ("other values", ("seed", "distances", "cases_per_distance")),
    CONTEXTS: ("other contexts", ("seed", "contexts")),
    BEHAVIOUR: ("other cases", ("seed", "distances", "cases_per_kind", "case_tokens", "sweep_cases")),
}
#: Facts that may differ between releases, and are shown.
_TOLD = ("foldkv", "subject", "profile", "layout", "precision", "backend", "reference", "yardstick", "machine")


#: Digests of what was measured, which differ between releases.
_BOUND = {"engine_set_sha256": "engine set", "weights_lock_sha256": "weights lock", "weights_sha256": "weights"}


@dataclass(frozen=True)
class Judged:
    """A gate in one report; the value is None if nothing was measured."""

    verdict: str
    value: float | None
    threshold: float


@dataclass(frozen=True)
class GateChange:
    """A gate before and now (None if it was not judged), why the two values cannot be compared (None if they can), and what
    else changed, in words (empty if only the value did)."""

    name: str
    comparison: str
    before: Judged | None
    now: Judged | None
    not_comparable: str | None
    change: str


@dataclass(frozen=True)
class Comparison:
    """An older report beside this one: where it is, its date and headline, facts that differ, and every gate."""

    report: str
    date: str
    headline: str
    differences: list[str]
    gates: list[GateChange]


def read_report(path: Path) -> dict[str, Any]:
    """The content of a report, from its folder or its report.json.

    Raises:
        InputError: it is neither, or this version cannot read it.
        ArtifactError: the folder's files are damaged.
    """
    path = Path(path)
    refuse_unreadable_name(path)
    if (path / MANIFEST).is_file():
        read(ReportManifest, path, verify=True)
    file = path / JSON if path.is_dir() else path
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(
            f"{path} is not a report: {file} cannot be read ({error.strerror}). Give the folder that --report named, or its {JSON}."
        ) from None
    except ValueError as error:
        raise InputError(f"{file} is not a report: it is not JSON ({error}). Give the {JSON} of a report.") from None
    return checked_report(content, file)


def checked_report(content: Any, file: Path) -> dict[str, Any]:
    """The content of a report's JSON that was read from ``file``, if this version can read it. Raises :class:`InputError` else."""
    import jsonschema

    version = content.get("schema_version") if isinstance(content, dict) else None
    if type(version) is int and version < SCHEMA_VERSION:
        raise InputError(
            f"{file} is a report of version {version}; this foldkv compares with reports of version {SCHEMA_VERSION}, whose figures are "
            "others. Validate the older bundle again with this foldkv, and give that report."
        )
    schema = json.loads(resources.files("foldkv.validation").joinpath("schema/report.schema.json").read_text())
    try:
        jsonschema.validate(content, schema)
    except jsonschema.ValidationError as error:
        raise InputError(
            f"{file} is not a report that this version reads: {error.message[:200]} at {error.json_path}. "
            "Give a report of this version, or make the older one again."
        ) from None
    return content  # type: ignore[no-any-return]


def compare(
    name: str, old: Mapping[str, Any], provenance: Mapping[str, Any], verdicts: Sequence[Verdict]
) -> Comparison:
    """Compare an older report with the verdicts of a new one.

    Args:
        name: the older report, as it was given.
        old: its content.
        provenance: the new report's provenance.
        verdicts: the new report's verdicts.
    """
    before = {gate["name"]: gate for gate in old["gates"]}
    earlier = old["provenance"]
    changes = []
    for verdict in verdicts:
        found = before.pop(verdict.gate.name, None)
        why = unlike(verdict.gate.of, verdict.gate.metric, found["metric"], earlier, provenance) if found else None
        now = Judged(verdict.word, verdict.value, verdict.gate.threshold)
        # Thresholds that follow from a yardstick differ a little in every run.
        chosen = not found or not found["yardstick"] or bool(verdict.gate.changed or found["changed"])
        changes.append(_change(verdict.gate.name, verdict.gate.comparison, _judged(found), now, why, chosen))
    changes += [_change(gate, row["comparison"], _judged(row), None, None, True) for gate, row in before.items()]
    return Comparison(name, earlier["date"], old["headline"], _differences(earlier, provenance), changes)


def _change(
    name: str, comparison: str, before: Judged | None, now: Judged | None, unlike: str | None, chosen: bool
) -> GateChange:  # fmt: skip
    """``chosen``: whether somebody chose the thresholds."""
    words = []
    if before is None or now is None:
        words.append("new" if before is None else "not judged now")
    else:
        if before.verdict != now.verdict:
            words.append(f"{before.verdict} before, {now.verdict} now")
        if before.threshold != now.threshold and chosen:
            words.append(f"threshold {before.threshold:g} before, {now.threshold:g} now")
    if unlike:
        words.append(f"not comparable: {unlike}")
    return GateChange(name, comparison, before, now, unlike, "; ".join(words))


def _judged(gate: Mapping[str, Any] | None) -> Judged | None:
    if gate is None:
        return None
    value = gate["value"]
    return Judged(gate["verdict"], None if value is None else float(value), float(gate["threshold"]))


def unlike(of: str, metric: str, before: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> str | None:
    """Why the figures of a gate in two reports cannot be compared, or None.

    Args:
        of: what the gate is about, as in :class:`~foldkv.validation.gates.Gate`.
        metric, before: its metric now and then.
        old, new: the provenance of the reports.
    """
    found = [f"another figure, {before}"] if metric != before else []
    found += [f"another {word}" for key, word in _ALL.items() if old[key] != new[key]]
    if old.get("measures", 1) != new.get("measures", 1):
        found.append("another way to measure")
    if of == TEXT and old["text_sha256"] != new["text_sha256"]:
        found.append("another text")
    words, names = _PLANNED[of]
    if any(old["plan"][name] != new["plan"][name] for name in names):
        found.append(words)
    return ", ".join(found) or None


def _differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    def text(side: Mapping[str, Any]) -> str:
        return f"{side['text']} ({side['text_sha256'][:12]}...)"

    rows = [(name, old[name], new[name]) for name in _TOLD]
    rows += [("matrices", old.get("matrices", "as built"), new.get("matrices", "as built"))]
    rows += [
        ("checkpoint", old["checkpoint_sha256"][:12], new["checkpoint_sha256"][:12]),
        ("text", text(old), text(new)),
        *((words, old[key][:12], new[key][:12]) for key, words in _BOUND.items()),
    ]
    rows += [(name.replace("_", " "), old["plan"][name], new["plan"][name]) for name in new["plan"]]
    return [f"{word}: {_short(was)} before, {_short(now)} now" for word, was, now in rows if was != now]


def _short(value: Any) -> str:
    """A value for a message; a list as its items."""
    return " ".join(str(item) for item in value) or "none" if isinstance(value, list) else str(value)
