"""Behaviour: how many cases of each kind reference and subject solve, each kind apart, with what that is evidence for."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .behaviour_cases import KINDS, SWEEP, BehaviourCase
from .metrics import compare_logits, mcnemar, wilson

Logits = npt.NDArray[np.float32]
#: Chance below which a count is not put down to guessing, nor a loss to luck.
RARE = 0.01
NO_STATEMENT, NO_LOSS, WORSE = "no statement", "no loss found", "worse"


@dataclass(frozen=True)
class BehaviourFigure:
    """Cases of one kind, or of one group of it.

    Attributes:
        kind: one of ``behaviour_cases.KINDS``.
        group: of the sweep, a residue, place or distance; empty for the whole kind.
        cases: how many there are.
        tokens: of the longest one.
        guess: mean chance of a guess.
        reference, subject: how many each answers exactly.
        lost, won: how many only the reference, and only the subject answers.
        p: exact one-sided McNemar test of ``lost`` against ``won``.
        kl_median, kl_max: KL (nats) between both at the tokens of the answers: of the cases' largest ones, the median and the largest.
        oracle_kl_median: the same median against the oracle of the subject's profile; None without one.
    """

    kind: str
    group: str
    cases: int
    tokens: int
    guess: float
    reference: int
    subject: int
    lost: int
    won: int
    p: float
    kl_median: float
    kl_max: float
    oracle_kl_median: float | None

    @property
    def reference_interval(self) -> tuple[float, float]:
        """Its share's 95 % Wilson interval."""
        return wilson(self.reference, self.cases)

    @property
    def subject_interval(self) -> tuple[float, float]:
        """Its share's 95 % Wilson interval."""
        return wilson(self.subject, self.cases)

    @property
    def lack(self) -> str | None:
        """Why the answers say nothing about the subject, or None."""
        if at_least(self.reference, self.cases, self.guess) >= RARE:
            return f"the reference answers {self.reference} of {self.cases}, no more than guessing could"
        if 2.0**-self.reference >= RARE:
            return f"the reference answers {self.reference}; losing all of them could be chance"
        return None

    @property
    def word(self) -> str:
        """What the answers say. A loss that is no chance needs no more evidence."""
        if self.p < RARE:
            return WORSE
        return NO_LOSS if self.lack is None else NO_STATEMENT


def at_least(solved: int, cases: int, guess: float) -> float:
    """The chance that guesses solve this many cases or more: the tail of a binomial distribution."""
    return sum(math.comb(cases, k) * guess**k * (1 - guess) ** (cases - k) for k in range(solved, cases + 1))


@dataclass(frozen=True)
class Answered:
    """One case: whether each side's likeliest tokens are the answer, and their largest KL at the answer's tokens."""

    reference: bool
    subject: bool
    kl: float
    oracle_kl: float | None = None


def answered(case: BehaviourCase, reference: Logits, subject: Logits, oracle: Logits | None) -> Answered:
    """Compare logits [k, V] before each of the answer's k tokens; a subject that is not finite has solved nothing."""
    wanted = np.array(case.answer)
    kl = float(compare_logits(reference, subject, wanted).kl.max())
    parity = None if oracle is None else float(compare_logits(oracle, subject, wanted).kl.max())
    return Answered(is_answer(case.answer, reference), is_answer(case.answer, subject), kl, parity)


def is_answer(answer: Sequence[int], logits: Logits) -> bool:
    """Whether the greedy continuation is the answer: each of its tokens is the likeliest one, given those before it."""
    return bool(np.isfinite(logits).all()) and logits.argmax(axis=-1).tolist() == list(answer)


def ask(
    cases: Sequence[BehaviourCase],
    reference: Callable[[list[int], int], Logits],
    subject: Callable[[list[int], int], Logits],
    oracle: Callable[[list[int], int], Logits] | None,
    progress: Callable[[str, int, int], None],
) -> list[BehaviourFigure]:
    """Let all sides read all cases.

    Args:
        cases: of any kinds.
        reference, subject: from tokens and a number to logits after that many tokens at the end.
        oracle: likewise; asked for the sweep only.
        progress: told the kind, the number of the case and how many there are.
    """
    found = []
    for number, case in enumerate(cases):
        progress(case.kind, number, len(cases))
        size = len(case.answer)
        parity = oracle(case.tokens, size) if oracle is not None and case.kind == SWEEP else None
        found.append(answered(case, reference(case.tokens, size), subject(case.tokens, size), parity))
    return figures(cases, found)


def figures(cases: Sequence[BehaviourCase], found: Sequence[Answered]) -> list[BehaviourFigure]:
    """A figure for every kind, followed by those of its groups, residues first."""
    rows = []
    for kind in KINDS:
        pairs = [(case, one) for case, one in zip(cases, found, strict=True) if case.kind == kind]
        if not pairs:
            continue
        rows.append(_figure(kind, "", pairs))
        for place in range(len(pairs[0][0].groups)):
            for group in sorted({case.groups[place] for case, _ in pairs}, key=_natural):
                rows.append(_figure(kind, group, [pair for pair in pairs if pair[0].groups[place] == group]))
    return rows


def _natural(group: str) -> tuple[str, float]:
    words, _, number = group.rpartition(" ")
    return words, float(number)


def _figure(kind: str, group: str, pairs: Sequence[tuple[BehaviourCase, Answered]]) -> BehaviourFigure:
    cases, found = zip(*pairs, strict=True)
    reference, subject = (np.array([getattr(one, name) for one in found]) for name in ("reference", "subject"))
    parity = [one.oracle_kl for one in found if one.oracle_kl is not None]
    return BehaviourFigure(
        kind=kind,
        group=group,
        cases=len(cases),
        tokens=max(len(case.tokens) for case in cases),
        guess=float(np.mean([case.guess for case in cases])),
        reference=int(reference.sum()),
        subject=int(subject.sum()),
        lost=int((reference & ~subject).sum()),
        won=int((~reference & subject).sum()),
        p=mcnemar(reference, subject),
        kl_median=float(np.median([one.kl for one in found])),
        kl_max=max(one.kl for one in found),
        oracle_kl_median=float(np.median(parity)) if parity else None,
    )


def metrics(rows: Sequence[BehaviourFigure]) -> dict[str, float]:
    """What gates read: all cases together, where each counts once; and the sweep's KL, of its worst group."""
    whole = [row for row in rows if not row.group]
    if not whole:
        return {}
    lost, won = sum(row.lost for row in whole), sum(row.won for row in whole)
    found = {
        "behaviour_cases": float(sum(row.cases for row in whole)),
        "behaviour_answered": float(sum(row.reference for row in whole)),
        "behaviour_p": mcnemar(np.arange(lost + won) < lost, np.arange(lost + won) >= lost),
    }
    sweep = [row for row in rows if row.kind == SWEEP]
    if sweep:
        found["sweep_lengths"] = float(sum(row.cases for row in sweep if not row.group))
        found["sweep_kl_max"] = max(row.kl_max for row in sweep)
        parity = [row.oracle_kl_median for row in sweep if row.oracle_kl_median is not None]
        if parity:
            found["sweep_oracle_kl"] = max(parity)
    return found
