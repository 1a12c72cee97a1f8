"""Measure a bundle and its reference on the same tokens."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import InputError
from ..export.checkpoint.reader import Checkpoint
from ..progress import Progress
from ..runtime.tokenizer import Tokenizer
from .cases import RetrievalCase, Text, retrieval_cases, text_windows
from .divergence import Taps, compare_layers
from .long_context import REFERENCE_CONTEXT, largest_loss, least_answered, measure_depths
from .metrics import TokenFigures, compare_logits, concatenate, mcnemar, summary, wilson
from .result import Measurements
from .runners import OracleRunner, Runner, SessionRunner, TransformersRunner
from .selection import compare_selections
from .settings import Plan

# Sizes that never line up with a window or a ratio: every chunk edge falls somewhere else.
_ODD_CHUNKS = (1, 3, 7, 2, 13, 5, 31, 1, 11)


@dataclass(frozen=True)
class Sides:
    """Subject and references, opened; the oracle only in the profile served."""

    subject: SessionRunner
    reference: TransformersRunner
    oracle: OracleRunner | None
    checkpoint: Checkpoint
    tokenizer: Tokenizer
    threads: int


def measure(sides: Sides, plan: Plan, text: Text, progress: Progress) -> Measurements:
    """Measure everything except long contexts.

    Raises:
        InputError: the text has fewer than two tokens.
    """
    subject, reference, oracle, tokenizer = sides.subject, sides.reference, sides.oracle, sides.tokenizer
    tokens_of_text = tokenizer.encode(text.words)
    if len(tokens_of_text) < 2:
        raise InputError(
            f"the text {text.name} has {len(tokens_of_text)} tokens; there is nothing to predict. Give a longer one."
        )
    texts = text_windows(tokens_of_text, plan.text_tokens, plan.texts, seed=plan.seed)
    ratios = sides.checkpoint.spec.indexed_ratios
    taps = Taps(subject.session.bundle, list(ratios), threads=sides.threads)
    figures: list[TokenFigures] = []
    worst: list[dict[str, Any]] = []
    not_finite, chunk_error = 0, 0.0
    chunked: list[TokenFigures] = []
    against_oracle: list[TokenFigures] = []
    expected_choices, actual_choices = [], []
    layers = []
    for number, tokens in enumerate(texts, 1):
        progress(f"text {number} of {len(texts)}, {len(tokens)} tokens")
        progress.steps(number - 1, len(texts), "texts")
        first = number == 1
        chosen = taps.chosen(tokens)
        reading, actual = reference.read(tokens, chosen, streams=first and oracle is None), subject.logits(tokens)
        expected = reading.logits
        expected_choices.append(reading.selections)
        actual_choices.append(chosen)
        not_finite += int((~np.isfinite(actual)).sum())
        pieces = subject.logits_in(tokens, _odd_sizes(len(tokens)))
        chunk_error = max(chunk_error, _largest(np.abs(pieces - actual)))
        targets = np.array(tokens[1:])
        chunked.append(compare_logits(actual[:-1], pieces[:-1], targets))
        if oracle is not None:
            reading = oracle.read(tokens)
            against_oracle.append(compare_logits(reading.logits[:-1], actual[:-1], targets))
        if first:
            layers = compare_layers(
                reading.streams,
                taps.streams(tokens),
                subject.session.bundle.model.layer_types,
                typical=oracle is not None,
            )
        part = compare_logits(expected[:-1], actual[:-1], targets)
        figures.append(part)
        worst.append(_worst_case(tokenizer, tokens, int(np.argmax(part.kl)), part, expected, actual))
    selection = compare_selections(expected_choices, actual_choices, ratios)
    total = concatenate(figures)
    cases = retrieval_cases(list(plan.distances), plan.cases_per_distance, seed=plan.seed)
    solved = np.zeros((2, len(cases)), bool)
    for number, case in enumerate(cases):
        if number % plan.cases_per_distance == 0:
            progress(f"retrieval at distance {case.distance}")
        progress.steps(number, len(cases), "values")
        solved[0, number] = _answers(reference, tokenizer, case)
        solved[1, number] = _answers(subject, tokenizer, case)
    metrics = summary(total) | {
        "not_finite": float(not_finite),
        "chunk_error_max": chunk_error,
        "chunk_kl_mean": float(concatenate(chunked).kl.mean()),
        "text_windows": len(texts[0]) / max(1, *sides.checkpoint.spec.ratios),
        "layer_error_max": max(figure.error for figure in layers),
        "retrieval_reference": float(solved[0].mean()),
        "retrieval_answered": float(solved[0].sum()),
        "retrieval_subject": float(solved[1].mean()),
        "retrieval_loss": float(solved[0].mean() - solved[1].mean()),
        "retrieval_p": mcnemar(solved[0], solved[1]),
    }
    if selection:
        metrics |= {
            "queries_with_choice": float(min(figure.queries for figure in selection)),
            "queries_tied": float(sum(figure.tied for figure in selection)),
            "topk_overlap": min(figure.overlap for figure in selection),
            "mass_recalled": min(figure.mass_recalled for figure in selection),
        }
    if oracle is not None:
        parity = concatenate(against_oracle)
        metrics["oracle_kl_mean"] = float(parity.kl.mean())
        metrics["oracle_kl_max"] = float(parity.kl.max())
        metrics["oracle_logit_error_p50"] = float(np.median(parity.logit_error))
    return Measurements(
        metrics=metrics,
        retrieval=_by_distance(cases, solved),
        by_position=_by_position(figures),
        layers=layers,
        selection=selection,
        worst=sorted(worst, key=lambda case: -case["kl"])[:5],
    )


def measure_contexts(found: Measurements, plan: Plan, sides: Sides, progress: Progress) -> None:
    """Measure the long contexts, each in its own session, and add them to ``found``."""
    for context in plan.contexts:
        progress(f"values planted in {context:,} tokens")
        known = sides.reference if context <= REFERENCE_CONTEXT else None
        with SessionRunner(sides.subject.session.bundle.folder, context=context, threads=sides.threads) as subject:
            found.long_context.append(measure_depths(subject, known, sides.tokenizer, context, seed=plan.seed))
    if (loss := largest_loss(found.long_context)) is not None:
        found.metrics["long_context_loss"] = loss
        found.metrics["long_context_answered"] = float(least_answered(found.long_context))


def _answers(runner: Runner, tokenizer: Tokenizer, case: RetrievalCase) -> bool:
    """Whether the greedy continuation is the answer: every answer token is the likeliest one."""
    prompt, answer = tokenizer.encode(case.prompt), tokenizer.encode(case.answer)
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
