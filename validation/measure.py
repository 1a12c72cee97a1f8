"""Measure a bundle and its reference on the same tokens."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np

from ..errors import InputError
from ..progress import Progress
from ..runtime.tokenizer import Tokenizer
from .behaviour import BehaviourFigure, ask, is_answer
from .behaviour import metrics as behaviour_metrics
from .behaviour_cases import SWEEP, BehaviourCase, kind_cases, sweep_cases
from .cases import RetrievalCase, Text, retrieval_cases, split_answer, text_windows
from .deployments import MEASURED, NO_QUANTISED_WEIGHTS, DeploymentFigure, deployment_figure
from .divergence import LayerFigure, Streams, first_divergence, layer_figure, token_errors
from .inside import index_keys
from .jobs import Job
from .long_context import REFERENCE_CONTEXT, largest_loss, least_answered, measure_depths
from .metrics import TokenFigures, blocks, compare_logits, concatenate, mcnemar, summary, wilson
from .reproducers import Reproducers
from .result import Measurements
from .runners import Look, Oracle, Reading, Runner
from .selection import Ints, Selection, SelectionFigure, compare_selections
from .settings import Plan
from .sides import Sides

# Sizes that never line up with a window or a ratio: every chunk edge falls somewhere else.
_ODD_CHUNKS = (1, 3, 7, 2, 13, 5, 31, 1, 11)


def measure(
    sides: Sides, plan: Plan, text: Text, behaviour: list[BehaviourCase], progress: Progress, reproducers: Reproducers
) -> Measurements:  # fmt: skip
    """Measure everything except long contexts, and save the layers that tell most.

    ``behaviour`` is what :func:`behaviour_cases` gave.

    Raises:
        InputError: the text has fewer than two tokens.
    """
    subject, reference, oracle, tokenizer = sides.subject, sides.reference, sides.oracle, sides.tokenizer
    yardstick = sides.yardstick
    tokens_of_text = tokenizer.encode(text.words, add_special_tokens=False)
    if len(tokens_of_text) < 2:
        raise InputError(
            f"the text {text.name} has {len(tokens_of_text)} tokens; there is nothing to predict. Give a longer one."
        )
    texts = text_windows(tokens_of_text, plan.text_tokens, plan.texts, seed=plan.seed, prefix=tokenizer.prefix)
    ratios = sides.checkpoint.spec.indexed_ratios
    inside = _Inside(sides)
    roundeds: list[Reading] = []
    figures: list[TokenFigures] = []
    measures: list[TokenFigures] = []
    worst: list[dict[str, Any]] = []
    not_finite, chunk_error = 0, 0.0
    chunked: list[TokenFigures] = []
    against_oracle: list[TokenFigures] = []
    deployed: dict[str, list[TokenFigures]] = {}
    expected_choices = []
    yardstick_choices: list[tuple[dict[int, Selection], dict[int, Ints]]] = []
    layers: list[LayerFigure] = []
    alone: list[Streams] = []
    cases = retrieval_cases(list(plan.distances), plan.cases_per_distance, seed=plan.seed)
    questions = [split_answer(tokenizer, case.prompt, case.answer) for case in cases]
    # All that the sides will be asked: one that reads its weights again for every question reads them once.
    asked_last: list[tuple[list[int], int | None]] = [(tokens, len(answer)) for tokens, answer in questions]
    asked_last += [(case.tokens, len(case.answer)) for case in behaviour]
    seen = texts if inside.needs_streams else texts[:1]
    subject.announce(
        looks=seen,
        pieces=[(tokens, _odd_sizes(len(tokens))) for tokens in texts],
        logits=[*((one, None) for one in texts[len(seen) :]), *asked_last],
    )
    inside.announce(texts, progress)
    looks = []
    for number, tokens in enumerate(texts, 1):
        progress(f"text {number} of {len(texts)}, {len(tokens)} tokens, by the bundle")
        progress.steps(number - 1, len(texts), "texts")
        looks.append(subject.look(tokens) if number == 1 or inside.needs_streams else Look(subject.logits(tokens)))
        actual, pieces = looks[-1].logits, subject.logits_in(tokens, _odd_sizes(len(tokens)))
        for rows in blocks(len(actual)):
            not_finite += int((~np.isfinite(actual[rows])).sum())
            chunk_error = max(chunk_error, _largest(np.abs(pieces[rows] - actual[rows])))
        chunked.append(compare_logits(actual[:-1], pieces[:-1], np.array(tokens[1:])))
    once, again = subject.again(texts[0])
    inside.prepare(texts, looks)
    actual_choices = [inside.chosen(tokens, look) for tokens, look in zip(texts, looks, strict=True)]
    jobs = [
        Job(tokens, chosen=chosen, keep_streams=number == 0 and oracle is None)
        for number, (tokens, chosen) in enumerate(zip(texts, actual_choices, strict=True))
    ]
    jobs += [Job(tokens, last=last) for tokens, last in asked_last]
    jobs += (
        [Job(texts[0], given=looks[0].streams, keep_streams=True)] if oracle is None or yardstick is not None else []
    )
    if oracle is not None:
        oracle.prepare(_oracle_jobs(oracle, texts, looks[0], behaviour))
    if yardstick is not None:
        # The reference is asked about its choices too.
        yardstick.prepare(
            [*(Job(tokens, chosen={}) for tokens in texts), Job(texts[0], given=looks[0].streams, keep_streams=True)]
        )
        roundeds = [yardstick.read(tokens, {}) for tokens in texts]
        jobs += [Job(tokens, chosen=_choices(one)) for tokens, one in zip(texts, roundeds, strict=True)]
    reference.prepare(jobs)
    for number, (tokens, look, chosen) in enumerate(zip(texts, looks, actual_choices, strict=True), 1):
        progress(f"text {number} of {len(texts)}, {len(tokens)} tokens, by the reference")
        progress.steps(number - 1, len(texts), "texts")
        first, actual, targets = number == 1, look.logits, np.array(tokens[1:])
        reading = reference.read(tokens, chosen, streams=first and oracle is None)
        expected = reading.logits
        expected_choices.append(reading.selections)
        if oracle is not None:
            reading = oracle.read(tokens, streams=first)
            against_oracle.append(compare_logits(reading.logits[:-1], actual[:-1], targets))
            for name in oracle.deployments:
                other = oracle.read(tokens, deployment=name).logits
                deployed.setdefault(name, []).append(compare_logits(other[:-1], actual[:-1], targets))
        if yardstick is not None:
            rounded = roundeds[number - 1]
            choices = _choices(rounded)
            # Ties are settled as the yardstick has them, as they are for the subject.
            exact = reference.read(tokens, choices)
            measures.append(compare_logits(exact.logits[:-1], rounded.logits[:-1], targets))
            yardstick_choices.append((exact.selections, choices))
        if first:
            layers, alone = _layers(sides, tokens, look, reading)
        part = compare_logits(expected[:-1], actual[:-1], targets)
        figures.append(part)
        worst.append(_worst_case(tokenizer, tokens, int(np.argmax(part.kl)), part, expected, actual))
    inside.close()
    _reproduce(sides, reproducers, texts, looks[0], layers, alone, worst)
    selection = compare_selections(expected_choices, actual_choices, ratios)
    total = concatenate(figures)
    solved = np.zeros((2, len(cases)), bool)
    for number, case in enumerate(cases):
        if number % plan.cases_per_distance == 0:
            progress(f"retrieval at distance {case.distance}")
        progress.steps(number, len(cases), "values")
        solved[:, number] = [_answers(side, *questions[number]) for side in (reference, subject)]
    asked = _ask(sides, behaviour, progress)
    metrics = (
        summary(total)
        | behaviour_metrics(asked)
        | {
            "not_finite": float(not_finite),
            "chunk_error_max": chunk_error,
            "restore_error_max": _largest(np.abs(once - again)),
            "chunk_kl_mean": float(concatenate(chunked).kl.mean()),
            "text_windows": len(texts[0]) / max(1, *sides.checkpoint.spec.ratios),
            "layer_error_max": max(figure.error for figure in layers),
            "layer_own_max": max(figure.own for figure in layers),
            "layer_excess": max(figure.excess for figure in layers),
            "retrieval_reference": float(solved[0].mean()),
            "retrieval_answered": float(solved[0].sum()),
            "retrieval_subject": float(solved[1].mean()),
            "retrieval_loss": float(solved[0].mean() - solved[1].mean()),
            "retrieval_p": mcnemar(solved[0], solved[1]),
        }
    )
    if selection:
        metrics |= {
            "queries_with_choice": float(min(figure.queries for figure in selection)),
            "queries_tied": float(sum(figure.tied for figure in selection)),
            "topk_overlap": min(figure.overlap for figure in selection),
            "mass_recalled": min(figure.mass_recalled for figure in selection),
        }
    if yardstick is not None:
        both = [list(side) for side in zip(*yardstick_choices, strict=True)]
        metrics |= _measured(concatenate(measures), compare_selections(both[0], both[1], ratios))
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
        behaviour=asked,
        deployments=_deployments(deployed) if oracle is not None else [],
        reproducers=reproducers.rows,
        worst=sorted(worst, key=lambda case: -case["kl"])[:5],
    )


def _oracle_jobs(oracle: Oracle, texts: list[list[int]], look: Look, behaviour: list[BehaviourCase]) -> list[Job]:
    """All that the oracle will be asked."""
    jobs = [Job(tokens, keep_streams=number == 0) for number, tokens in enumerate(texts)]
    jobs += [Job(tokens, deployment=name) for tokens in texts for name in oracle.deployments]
    jobs += [Job(texts[0], given=look.streams, keep_streams=True)]
    return jobs + [Job(case.tokens) for case in behaviour if case.kind == SWEEP]


def _choices(reading: Reading) -> dict[int, Ints]:
    return {layer: one.chosen for layer, one in reading.selections.items()}


def behaviour_cases(tokenizer: Tokenizer, window: int, plan: Plan) -> list[BehaviourCase]:
    """The cases of behaviour that a plan asks for, of a model with this sliding window.

    Raises:
        InputError: a kind needs more tokens than the plan gives.
    """
    cases = kind_cases(tokenizer, plan.cases_per_kind, plan.case_tokens, seed=plan.seed)
    return cases + sweep_cases(tokenizer, window, plan.case_tokens, plan.distances, plan.sweep_cases, seed=plan.seed)


def _ask(sides: Sides, cases: list[BehaviourCase], progress: Progress) -> list[BehaviourFigure]:
    def told(kind: str, number: int, count: int) -> None:
        if number == 0 or cases[number - 1].kind != kind:
            progress(f"behaviour: {kind}")
        progress.steps(number, count, "cases")

    oracle = sides.oracle
    return ask(
        cases,
        lambda tokens, last: sides.reference.logits(tokens, last=last),
        lambda tokens, last: sides.subject.logits(tokens, last=last),
        None if oracle is None else lambda tokens, last: oracle.read(tokens).logits[-last:],
        told,
    )


class _Inside:
    """What the subject's indexers chose, observed or recomputed; see inside.py."""

    def __init__(self, sides: Sides) -> None:
        self._sides, self._layers = sides, list(sides.checkpoint.spec.indexed_ratios)

    @property
    def needs_streams(self) -> bool:
        """Whether choices are recomputed."""
        return self._sides.choices is None and bool(self._layers)

    def announce(self, texts: list[list[int]], progress: Progress) -> None:
        """Say of which texts it will be asked: a chain that goes a layer at a time reads them now."""
        choices = self._sides.choices
        if choices is not None and choices.ahead:
            choices.prepare(texts, folder=self._sides.subject.kept, progress=progress)

    def prepare(self, texts: list[list[int]], looks: list[Look]) -> None:
        """Tell the reference or the oracle that it will be asked what its indexers choose from the subject's rows, if it will."""
        if self.needs_streams:
            (self._sides.oracle or self._sides.reference).prepare(
                [
                    Job(tokens, given=look.streams, keys=self._keys(tokens, look))
                    for tokens, look in zip(texts, looks, strict=True)
                ]
            )

    def _keys(self, tokens: list[int], look: Look) -> dict[int, Any]:
        sides = self._sides
        return index_keys(sides.subject.bundle, sides.checkpoint.spec, look.rows, len(tokens))

    def chosen(self, tokens: list[int], look: Look) -> dict[int, Ints]:
        """By layer, the entries [n, places] of each query."""
        if not self._layers:
            return {}
        sides = self._sides
        if sides.choices is not None:
            return sides.choices.chosen(tokens)
        return (sides.oracle or sides.reference).alone(tokens, look.streams, self._keys(tokens, look)).chosen

    def close(self) -> None:
        """Free what says the choices."""
        if self._sides.choices is not None:
            self._sides.choices.close()


def _layers(sides: Sides, tokens: list[int], look: Look, reading: Reading) -> tuple[list[LayerFigure], list[Streams]]:
    """What every layer computes on the first text, and what ``reading``'s side makes of the subject's streams there. It is the
    reference's or, if there is one, the oracle's."""
    alone = (sides.oracle or sides.reference).alone(tokens, look.streams).streams
    steps: list[Any] = [None] * len(look.streams)
    if sides.yardstick is not None:
        exact = sides.reference.alone(tokens, look.streams).streams if sides.oracle is not None else alone
        rounded = sides.yardstick.alone(tokens, look.streams).streams
        steps = [token_errors(*both) for both in zip(exact, rounded, strict=True)]
    kinds = sides.subject.bundle.model.layer_types
    rows = zip(kinds, reading.streams, alone, look.streams, steps, strict=True)
    figures = [
        layer_figure(
            layer,
            kind,
            token_errors(total, streams),
            token_errors(own, streams),
            step,
            typical=sides.oracle is not None,
        )
        for layer, (kind, total, own, streams, step) in enumerate(rows)
    ]
    return figures, alone


def _reproduce(
    sides: Sides, reproducers: Reproducers, texts: list[list[int]], look: Look, layers: list[LayerFigure],
    alone: list[Streams], worst: list[dict[str, Any]],
) -> None:  # fmt: skip
    """Save the first layer that diverges on the first text, and the layer that adds most before the worst token of all texts.

    A reference that is computed layer by layer is asked nothing more: each question would cost a pass through its weights. Then the
    worst layer is that of the first text.
    """
    side = sides.oracle or sides.reference
    tokens, first = texts[0], first_divergence(layers)
    if first is not None:
        why = "the first that diverges from the reference"
        reproducers.save(
            "first-divergence", why, layer=first, tokens=tokens, before=look.before(first), expected=alone[first],
            actual=look.streams[first], reference=side.name, limit=layers[first].limit,
        )  # fmt: skip
    count = len(tokens)
    if sides.reference.in_memory and sides.subject.in_memory:
        number = int(np.argmax([case["kl"] for case in worst]))
        count = worst[number]["position"] + 1
        tokens = texts[number][:count]
        if number:  # of the first text both are known
            look = sides.subject.look(tokens)
            alone = side.alone(tokens, look.streams).streams
    alone, streams = [one[:count] for one in alone], [one[:count] for one in look.streams]
    errors = [float(np.max(token_errors(*both))) for both in zip(alone, streams, strict=True)]
    layer = int(np.argmax(np.nan_to_num(errors, nan=np.inf)))
    reproducers.save(
        "worst-case", f"the one that adds the largest error, {errors[layer]:.2g}, before the worst token", layer=layer, tokens=tokens,
        before=look.before(layer)[:count], expected=alone[layer], actual=streams[layer], reference=side.name, limit=layers[layer].limit,
    )  # fmt: skip


def _deployments(found: dict[str, list[TokenFigures]]) -> list[DeploymentFigure]:
    return [
        deployment_figure(name, found[name]) if name in found else DeploymentFigure(name, NO_QUANTISED_WEIGHTS)
        for name in MEASURED
    ]


def _measured(figures: TokenFigures, selection: list[SelectionFigure]) -> dict[str, float]:
    """The yardstick: what PyTorch's bfloat16 loses on the same texts."""
    found = summary(figures)
    names = ("kl_mean", "kl_p999", "kl_max", "top1_agreement", "logit_error_max", "perplexity_ratio", "delta_p_rms")
    metrics = {f"yardstick_{name}": found[name] for name in names}
    if selection:
        metrics["yardstick_topk_overlap"] = min(figure.overlap for figure in selection)
        metrics["yardstick_mass_recalled"] = min(figure.mass_recalled for figure in selection)
    return metrics


def measure_contexts(found: Measurements, plan: Plan, sides: Sides, progress: Progress) -> None:
    """Measure the long contexts, each in its own session, and add them to ``found``."""
    for context in plan.contexts:
        progress(f"values planted in {context:,} tokens")
        known = sides.reference if context <= REFERENCE_CONTEXT else None
        with sides.subject.at(context) as subject:
            found.long_context.append(measure_depths(subject, known, sides.tokenizer, context, seed=plan.seed))
    if (loss := largest_loss(found.long_context)) is not None:
        found.metrics["long_context_loss"] = loss
        found.metrics["long_context_answered"] = float(least_answered(found.long_context))


def _answers(runner: Runner, tokens: list[int], answer: list[int]) -> bool:
    """Whether the greedy continuation is the answer: every answer token is the likeliest one."""
    return is_answer(answer, runner.logits(tokens, last=len(answer)))


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
