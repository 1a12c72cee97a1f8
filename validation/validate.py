"""Compare a bundle with the PyTorch reference on the same inputs and judge the result."""

from __future__ import annotations

import datetime
import hashlib
import itertools
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

import foldkv
from foldkv.artifact import read_manifest, sha256_file, staged, write_manifest
from foldkv.errors import EXIT_GATE_FAILED, EXIT_OK, ArtifactError, InputError
from foldkv.export.checkpoint import Checkpoint
from foldkv.export.profiles import PROFILES, SERVED
from foldkv.export.spec import CSA
from foldkv.runtime.bundle import load_bundle
from foldkv.runtime.tokenizer import Tokenizer
from foldkv.validation.cases import RetrievalCase, load_text, retrieval_cases, text_windows
from foldkv.validation.gates import LONG_CONTEXT, Verdict, judge, resolve_gates
from foldkv.validation.layers import LayerFigure, compare_layers, subject_chosen, subject_streams
from foldkv.validation.long_context import (
    REFERENCE_CONTEXT,
    ContextFigure,
    largest_loss,
    measure_depths,
    planted_stream,
)
from foldkv.validation.metrics import TokenFigures, compare_logits, concatenate, mcnemar, summary, wilson
from foldkv.validation.report import write_report
from foldkv.validation.runners import OracleRunner, Runner, SessionRunner, TransformersRunner
from foldkv.validation.selection import SelectionFigure, compare_selections

KIND = "foldkv.report"
# Sizes that never line up with a window or a ratio: every chunk edge falls somewhere else.
_ODD_CHUNKS = (1, 3, 7, 2, 13, 5, 31, 1, 11)


@dataclass(frozen=True)
class Plan:
    """What is measured; all of it changes the figures and stands in the report."""

    seed: int = 0
    texts: int = 6
    text_tokens: int = 384
    distances: tuple[int, ...] = (16, 64, 128, 256, 512)
    cases_per_distance: int = 20
    contexts: tuple[int, ...] = ()

    def longest(self) -> int:
        """Tokens of the longest case, with room for its answer."""
        return max(self.text_tokens, max(self.distances) + 24 * 4 + 8)


@dataclass
class ValidationResult:
    """Metrics, verdicts and the evidence behind them, as the report shows them."""

    metrics: dict[str, float]
    verdicts: list[Verdict]
    retrieval: list[dict[str, Any]]
    by_position: list[dict[str, float]]
    worst: list[dict[str, Any]]
    layers: list[LayerFigure] = field(default_factory=list)
    selection: list[SelectionFigure] = field(default_factory=list)
    long_context: list[ContextFigure] = field(default_factory=list)
    provenance: dict[str, Any] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        """Whether every gate holds."""
        return all(verdict.passed for verdict in self.verdicts)

    @property
    def exit_code(self) -> int:
        """0 if every gate holds, else 1."""
        return EXIT_OK if self.passed else EXIT_GATE_FAILED


def validate(
    bundle: Path,
    reference: Path,
    report: Path,
    *,
    gates: Mapping[str, float] | None = None,
    plan: Plan | None = None,
    text: Path | None = None,
    key: str = "",
    allow_unknown_keys: Sequence[str] = (),
    progress: Callable[[str], None] = lambda _: None,
) -> ValidationResult:
    """Measure a bundle against its checkpoint and write the report.

    Args:
        bundle: folder of one target.
        reference: the checkpoint folder that the bundle was made from.
        report: folder for report.html, report.json and junit.xml; replaced if it holds an older report.
        gates: thresholds by gate name that replace the defaults.
        plan: which cases.
        text: a UTF-8 file to measure on; the default is some of the standard library's sources.
        key: stored in the report's manifest, for a caller that wants to know later what it was made for.
        allow_unknown_keys: keys of the reference's config.json to ignore, beside those that the export was allowed to.
        progress: called with one line per step.

    Raises:
        InputError: the bundle was made from another checkpoint, an unknown gate, a bundle without tokenizer, a
            text that cannot be read, contexts that are too short or too long or without the gate that they were to have.
        ArtifactError: the bundle is damaged, or of a profile that this version does not know.
        CheckpointError: the reference cannot be loaded.
        MissingDependencyError: the bundle's device or transformers is not here.
    """
    plan, words = plan or Plan(), load_text(text)
    loaded = load_bundle(Path(bundle))
    if loaded.profile not in PROFILES:
        raise ArtifactError(f"{bundle} has the profile {loaded.profile!r}; this version knows {', '.join(PROFILES)}.")
    chosen = resolve_gates(gates or {}, loaded.profile)
    longest = loaded.largest("context") or loaded.model.max_position_embeddings
    check_contexts(plan, min(longest, loaded.model.max_position_embeddings), gates or {}, what=str(bundle))
    manifest = read_manifest(Path(bundle), kind="foldkv.bundle")
    made = manifest["inputs"]["checkpoint"]
    allowed = (*made.get("allowed_unknown_keys", ()), *allow_unknown_keys)
    checkpoint = Checkpoint(reference, allow_unknown_keys=allowed)
    expected, found = made["sha256"], checkpoint.identity() if made.get("of") == "headers" else checkpoint.digest()
    if found != expected:
        raise InputError(
            f"{bundle} was made from another checkpoint than {reference} (sha256 {expected[:12]}... against "
            f"{found[:12]}...). Validate against the checkpoint that was exported."
        )
    tokenizer = Tokenizer.from_bundle(loaded)
    with staged(Path(report), kind=KIND) as folder:
        progress("loading the subject and the reference")
        subject = SessionRunner(Path(bundle), context=plan.longest())
        torch_reference = TransformersRunner(reference, allow_unknown_keys=allowed)
        oracle = OracleRunner(reference, allow_unknown_keys=allowed) if loaded.profile == SERVED else None
        result = _measure(subject, torch_reference, oracle, checkpoint, tokenizer, plan, words, progress)
        for context in plan.contexts:
            progress(f"values planted in {context:,} tokens")
            known = torch_reference if context <= REFERENCE_CONTEXT else None
            result.long_context.append(
                measure_depths(SessionRunner(Path(bundle), context=context), known, tokenizer, context, seed=plan.seed)
            )
        if (loss := largest_loss(result.long_context)) is not None:
            result.metrics["long_context_loss"] = loss
        result.verdicts = judge(chosen, result.metrics)
        result.provenance = _provenance(
            Path(bundle), Path(reference), Path(report), manifest, plan, subject, torch_reference
        )
        result.provenance["text_sha256"] = hashlib.sha256(words.encode()).hexdigest()
        result.provenance["command"] += "".join(f" --gate {name}={value:g}" for name, value in (gates or {}).items())
        result.provenance["command"] += "".join(f" --context {context}" for context in plan.contexts)
        if text is not None:
            result.provenance["command"] += f" --text {text}"
        write_report(result, folder)
        write_manifest(
            folder, kind=KIND, content={"foldkv_version": foldkv.__version__, "passed": result.passed, "key": key}
        )
    progress(
        "passed" if result.passed else "failed: " + ", ".join(v.gate.name for v in result.verdicts if not v.passed)
    )
    return result


def check_contexts(plan: Plan, longest: int, gates: Mapping[str, float], *, what: str) -> None:
    """Check the long contexts of a plan before anything is loaded; ``what`` takes ``longest`` tokens at most.

    Raises:
        InputError: a context is too short or too long, or the gate of long contexts has none that the reference reads.
    """
    for context in plan.contexts:
        planted_stream(context, seed=plan.seed)
        if context > longest:
            raise InputError(f"a context of {context} tokens was asked for; {what} takes {longest} at most.")
    if LONG_CONTEXT in gates and not any(context <= REFERENCE_CONTEXT for context in plan.contexts):
        raise InputError(
            f"gate {LONG_CONTEXT} compares with the reference, which reads contexts of up to {REFERENCE_CONTEXT} tokens; none "
            "of those is measured. Give one with --context (validate.contexts in a pipeline file), or leave the gate out."
        )


def _measure(
    subject: SessionRunner, reference: TransformersRunner, oracle: OracleRunner | None, checkpoint: Checkpoint,
    tokenizer: Tokenizer, plan: Plan, text: str, progress: Callable[[str], None],
) -> ValidationResult:  # fmt: skip
    texts = text_windows(
        tokenizer.encode(text, add_special_tokens=False), plan.text_tokens, plan.texts, seed=plan.seed,
        prefix=tokenizer.prefix,
    )  # fmt: skip
    figures: list[TokenFigures] = []
    worst: list[dict[str, Any]] = []
    not_finite, chunk_error = 0, 0.0
    chunked: list[TokenFigures] = []
    against_oracle: list[TokenFigures] = []
    for number, tokens in enumerate(texts, 1):
        progress(f"text {number} of {len(texts)}")
        expected, actual = reference.logits(tokens), subject.logits(tokens)
        not_finite += int((~np.isfinite(actual)).sum())
        pieces = subject.logits_in(tokens, _odd_sizes(len(tokens)))
        chunk_error = max(chunk_error, _largest(np.abs(pieces - actual)))
        targets = np.array(tokens[1:])
        chunked.append(compare_logits(actual[:-1], pieces[:-1], targets))
        if oracle is not None:
            against_oracle.append(compare_logits(oracle.logits(tokens)[:-1], actual[:-1], targets))
        part = compare_logits(expected[:-1], actual[:-1], targets)
        figures.append(part)
        at = int(np.argmax(part.kl))
        worst.append(_worst_case(tokenizer, tokens, at, part, expected, actual))
    progress(f"layer by layer, {len(texts[0])} tokens")
    kinds = subject.session.bundle.manifest["model"]["layer_types"]
    streams = (oracle or reference).streams(texts[0])
    layers = compare_layers(
        streams, subject_streams(subject.session.bundle, texts[0]), kinds, typical=oracle is not None
    )
    progress("entries that the indexers choose")
    ratios = {layer: checkpoint.spec.ratios[layer] for layer, kind in enumerate(kinds) if kind == CSA}
    selection = compare_selections(
        [reference.selections(tokens) for tokens in texts],
        [subject_chosen(subject.session.bundle, tokens, list(ratios)) for tokens in texts],
        ratios,
    )
    total = concatenate(figures)
    cases = retrieval_cases(list(plan.distances), plan.cases_per_distance, seed=plan.seed)
    solved = np.zeros((2, len(cases)), bool)
    for number, case in enumerate(cases):
        if number % plan.cases_per_distance == 0:
            progress(f"retrieval at distance {case.distance}")
        solved[0, number] = _answers(reference, tokenizer, case)
        solved[1, number] = _answers(subject, tokenizer, case)
    metrics = summary(total) | {
        "not_finite": float(not_finite),
        "chunk_error_max": chunk_error,
        "chunk_kl_mean": float(concatenate(chunked).kl.mean()),
        "topk_overlap": min((figure.overlap for figure in selection), default=1.0),
        "mass_recalled": min((figure.mass_recalled for figure in selection), default=1.0),
        "layer_error_max": max(figure.error for figure in layers),
        "retrieval_reference": float(solved[0].mean()),
        "retrieval_subject": float(solved[1].mean()),
        "retrieval_loss": float(solved[0].mean() - solved[1].mean()),
        "retrieval_p": mcnemar(solved[0], solved[1]),
    }
    if oracle is not None:
        parity = concatenate(against_oracle)
        metrics["oracle_kl_mean"] = float(parity.kl.mean())
        metrics["oracle_kl_max"] = float(parity.kl.max())
        metrics["oracle_logit_error_p50"] = float(np.median(parity.logit_error))
    return ValidationResult(
        metrics=metrics,
        verdicts=[],
        retrieval=_by_distance(cases, solved),
        by_position=_by_position(figures),
        layers=layers,
        selection=selection,
        worst=sorted(worst, key=lambda case: -case["kl"])[:5],
    )


def _answers(runner: Runner, tokenizer: Tokenizer, case: RetrievalCase) -> bool:
    """Whether the greedy continuation is the answer: every answer token is the likeliest one."""
    # What a tokenizer puts after a text would stand between question and answer.
    prompt, answer = (tokenizer.encode(text, add_special_tokens=False) for text in (case.prompt, case.answer))
    prompt = [*tokenizer.prefix, *prompt]
    logits = runner.logits([*prompt, *answer[:-1]])[len(prompt) - 1 :]
    return bool(np.isfinite(logits).all()) and logits.argmax(axis=-1).tolist() == answer


def _odd_sizes(length: int) -> list[int]:
    sizes: list[int] = []
    while (rest := length - sum(sizes)) > 0:
        sizes.append(min(_ODD_CHUNKS[len(sizes) % len(_ODD_CHUNKS)], rest))
    return sizes


def _largest(values: Any) -> float:
    return float(values.max()) if np.isfinite(values).all() else float("inf")


def _worst_case(
    tokenizer: Tokenizer, tokens: list[int], at: int, part: TokenFigures, expected: Any, actual: Any
) -> dict[str, Any]:
    def top(logits: Any) -> list[list[Any]]:
        best = np.argsort(-np.nan_to_num(logits, nan=-np.inf))[:5]
        return [
            [tokenizer.decode([int(token)], skip_special_tokens=False), round(float(logits[token]), 5)]
            for token in best
        ]

    return {
        "kl": float(part.kl[at]), "logit_error": float(part.logit_error[at]), "position": at,
        "context": tokenizer.decode(tokens[max(0, at - 79) : at + 1], skip_special_tokens=False),
        "next": tokenizer.decode([tokens[at + 1]], skip_special_tokens=False),
        "reference_top": top(expected[at]), "subject_top": top(actual[at]),
    }  # fmt: skip


def _by_distance(cases: list[RetrievalCase], solved: Any) -> list[dict[str, Any]]:
    rows = []
    for distance in dict.fromkeys(case.distance for case in cases):
        mask = np.array([case.distance == distance for case in cases])
        count = int(mask.sum())
        row: dict[str, Any] = {"distance": distance, "cases": count}
        for name, values in (("reference", solved[0]), ("subject", solved[1])):
            right = int(values[mask].sum())
            row[name] = right / count
            row[f"{name}_interval"] = list(wilson(right, count))
        rows.append(row)
    return rows


def _by_position(figures: list[TokenFigures], buckets: int = 24) -> list[dict[str, float]]:
    longest = max(len(part.kl) for part in figures)
    edges = np.unique(np.linspace(0, longest, buckets + 1).astype(int))
    rows = []
    for low, high in itertools.pairwise(edges):
        kl = np.concatenate([part.kl[low:high] for part in figures])
        error = np.concatenate([part.logit_error[low:high] for part in figures])
        if len(kl):
            rows.append({"position": float(low), "kl_mean": float(kl.mean()), "logit_error_max": float(error.max())})
    return rows


def _provenance(
    bundle: Path, reference: Path, report: Path, manifest: dict[str, Any], plan: Plan, subject: SessionRunner,
    torch_reference: TransformersRunner,
) -> dict[str, Any]:  # fmt: skip
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "foldkv": foldkv.__version__,
        "subject": subject.name,
        "reference": torch_reference.name,
        "bundle": str(bundle),
        "bundle_manifest_sha256": sha256_file(bundle / "manifest.json"),
        "checkpoint_sha256": manifest["inputs"]["checkpoint"]["sha256"],
        "profile": manifest["profile"],
        "layout": manifest["layout"],
        "state_bytes": subject.session.state_bytes,
        "state_context": subject.session.context,
        "layers_against": "transformers" if manifest["profile"] != SERVED else OracleRunner.name,
        "precision": manifest["precision"],
        "window": manifest["model"]["sliding_window"],
        "target": manifest["target"]["name"],
        "backend": f"{manifest['backend']} {next(iter(manifest['tool_versions'].values()), '')}",
        "machine": f"{platform.system()} {platform.machine()}, executed on the CPU",
        "plan": {name: list(v) if isinstance(v, tuple) else v for name, v in vars(plan).items()},
        "command": f"foldkv validate {bundle} --reference {reference} --report {report}",
    }
