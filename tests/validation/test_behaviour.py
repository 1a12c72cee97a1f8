"""Cases of behaviour have the answers that they ask for, and figures say no more than their cases do."""

from __future__ import annotations

import math
import random
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from foldkv.errors import InputError
from foldkv.runtime.tokenizer import Tokenizer
from foldkv.validation.behaviour import Answered, BehaviourFigure, answered, at_least, figures, metrics
from foldkv.validation.behaviour_cases import (
    AGGREGATION,
    CLAUSES,
    CODE,
    DENSE,
    HOPS,
    SWEEP,
    BehaviourCase,
    kind_cases,
    question,
    sweep_cases,
    sweep_lengths,
)
from foldkv.validation.cases import split_answer


@pytest.fixture(scope="module")
def tokenizer(tiny_checkpoint: Path) -> Tokenizer:
    return Tokenizer(tiny_checkpoint / "tokenizer.json")


def solved(kind: str, prompt: str) -> str:
    """The answer by a reader of its own: regular expressions over the document."""
    if kind == DENSE:
        records, key = re.findall(r"([A-Za-z]+)(\d\d);", prompt), re.split(";", prompt)[-1]
        assert len({name for name, _ in records}) == len(records), "every key once"
        return dict(records)[key]
    if kind == CODE:
        asked = re.findall(r"# (\w+)\(", prompt)[-1]
        [rest] = re.findall(rf"def {asked}\((.*):\n", prompt)
        return str(rest)
    if kind == CLAUSES:
        terms = dict(re.findall(r"(\d+)\. The licensee .* within (\d+) days\.", prompt))
        assert len(set(terms.values())) == len(terms), "a term leads to one clause"
        last = prompt.splitlines()[-1]
        if last.startswith("Clause"):
            return f" {terms[last.split()[1].rstrip(':')]} days"
        return f" {({term: number for number, term in terms.items()})[last.split()[0]]}."
    if kind == HOPS:
        links = dict(re.findall(r"(\w+) = (\w+)\n", prompt))
        start = re.findall(r"So (\w+) is", prompt)[-1]
        return f" {links[links[links[start]]]}"
    assert kind == AGGREGATION
    words = Counter(prompt.split("\n\n")[1].split("\n")[0].split())
    (first, most), (_, second) = words.most_common(2)
    assert most > second, "no tie"
    return f" {first}"


@pytest.mark.parametrize("kind", [DENSE, CODE, CLAUSES, HOPS, AGGREGATION])
@pytest.mark.parametrize("tokens", [256, 3000])
def test_a_case_has_the_answer_that_its_document_gives_and_fills_its_tokens(
    tokenizer: Tokenizer, kind: str, tokens: int
) -> None:
    for number in range(10):
        found = question(kind, f"0:{number}", tokenizer, tokens)
        assert found.answer == solved(kind, found.prompt)
        size = len(tokenizer.encode(found.prompt + found.answer))
        assert size <= tokens and (size > 0.7 * tokens or (kind == DENSE and tokens == 256))
    assert question(kind, "0:1", tokenizer, tokens) == question(kind, "0:1", tokenizer, tokens) != found


def test_a_size_that_holds_no_case_is_refused_with_the_size_that_does(tokenizer: Tokenizer) -> None:
    with pytest.raises(InputError, match=r"kind code takes \d+ tokens with this tokenizer; 64 were given \(--case-tok"):
        kind_cases(tokenizer, 1, 64, seed=0)


def test_an_answer_may_begin_in_the_midst_of_a_token() -> None:
    class Joining:
        """Joins the last letter of a prompt with the first digit after it."""

        prefix = (9,)

        def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
            assert not add_special_tokens
            return [hash(part) % 1000 for part in re.findall(r"[a-z]\d|.", text)]

    fed, answer = split_answer(Joining(), ";k", "42")  # type: ignore[arg-type]
    assert fed == [9, *Joining().encode(";k4", add_special_tokens=False)]
    assert answer == Joining().encode("k42", add_special_tokens=False)


@pytest.mark.parametrize(("window", "tokens"), [(32, 256), (128, 256), (128, 1000), (48, 700)])
def test_the_sweep_has_every_residue_at_every_edge(tokenizer: Tokenizer, window: int, tokens: int) -> None:
    lengths = sweep_lengths(window, tokens)
    edges = {length - int(place.split()[-1]) for length, place in lengths}
    assert {128, 256, window, 2 * window} >= edges - {tokens // 128 * 128} and 128 in edges and window in edges
    assert {length % 4 for length, _ in lengths} == {0, 1, 2, 3}
    assert {length - edge for length, _ in lengths for edge in edges if abs(length - edge) < 3} == {-1, 0, 1, 2}
    cases = sweep_cases(tokenizer, window, tokens, (16, 64, 128), 3, seed=1)
    assert Counter(len(case.tokens) - len(case.answer) + 1 for case in cases) == {length: 3 for length, _ in lengths}
    for case in cases:
        text = bytes(case.tokens).decode()
        prompt, rest = text[: 1 - len(case.answer)], text[1 - len(case.answer) :]
        distance = int(case.groups[2].split()[1])
        assert prompt[-1 - distance : len(prompt) - distance + 2] == prompt[-1] + bytes(case.answer).decode()
        assert prompt[:-1].count(prompt[-1]) == 1 and rest == bytes(case.answer[:-1]).decode()


def test_guesses_have_the_binomial_tail() -> None:
    rng = np.random.default_rng(0)
    drawn = rng.binomial(8, 0.25, 200_000)
    for solved_cases in (0, 1, 3, 6):
        assert at_least(solved_cases, 8, 0.25) == pytest.approx(float((drawn >= solved_cases).mean()), abs=4e-3)


def row(reference: int, subject: int, lost: int, won: int, p: float, guess: float = 0.01) -> BehaviourFigure:
    return BehaviourFigure(DENSE, "", 8, 256, guess, reference, subject, lost, won, p, 0.0, 0.0, None)


def test_a_weak_reference_allows_no_statement_but_a_loss_is_always_told() -> None:
    assert row(8, 8, 0, 0, 1.0).word == "no loss found"
    assert row(6, 6, 0, 0, 1.0).word == "no statement" and "could be chance" in str(row(6, 6, 0, 0, 1.0).lack)
    assert row(7, 7, 0, 0, 1.0, guess=0.6).word == "no statement", "guessing answers as many"
    assert row(7, 0, 7, 0, 2.0**-7, guess=0.6).word == "worse"
    assert row(8, 4, 4, 0, 2.0**-4).word == "no loss found", "four losses of four are chance 1 in 16 times"


def logits(answer: list[int], *, right: bool) -> np.ndarray:
    rows = np.zeros((len(answer), 11), np.float32)
    rows[np.arange(len(answer)), answer if right else [(token + 1) % 11 for token in answer]] = 3
    return rows


def test_figures_count_losses_by_residue_and_place() -> None:
    rng = random.Random(0)
    cases, found = [], []
    for number in range(32):
        residue = number % 4
        answer = [rng.randrange(10), rng.randrange(10)]
        case = BehaviourCase(SWEEP, (f"length mod 4 = {residue}", "a multiple of 128 +0", "distance 16"), [0] * 9, answer, 0.01)  # fmt: skip
        good, bad = logits(answer, right=True), logits(answer, right=False)
        cases.append(case)
        found.append(answered(case, good, bad if residue == 3 else good, None))
    rows = {one.group: one for one in figures(cases, found)}
    assert list(rows) == ["", *(f"length mod 4 = {r}" for r in range(4)), "a multiple of 128 +0", "distance 16"]
    assert [rows[f"length mod 4 = {r}"].lost for r in range(4)] == [0, 0, 0, 8]
    assert [rows[f"length mod 4 = {r}"].word for r in range(4)] == ["no loss found"] * 3 + ["worse"]
    worst = rows["length mod 4 = 3"]
    assert worst.p == 2.0**-8 and worst.subject_interval[1] < worst.reference_interval[0]
    p = math.exp(3) / (math.exp(3) + 10)
    assert worst.kl_max == pytest.approx((p - (1 - p) / 10) * 3) and rows["length mod 4 = 1"].kl_max == 0
    totals = metrics(list(rows.values()))
    assert totals["behaviour_p"] == 2.0**-8 and totals["behaviour_answered"] == 32 == totals["sweep_lengths"]
    assert totals["sweep_kl_max"] == worst.kl_max and "sweep_oracle_kl" not in totals


def test_a_subject_that_is_not_finite_solves_nothing() -> None:
    case = BehaviourCase(CODE, (), [1], [1, 2], 0.1)
    broken = logits([1, 2], right=True)
    broken[1, 5] = np.nan
    one = answered(case, logits([1, 2], right=True), broken, None)
    assert one == Answered(True, False, math.inf)
