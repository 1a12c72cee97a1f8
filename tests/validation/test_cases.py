"""Everything that a model is measured on begins as a served prompt begins, and has no special token after that."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer as Library
from tokenizers.processors import TemplateProcessing

from foldkv.errors import InputError
from foldkv.manifests import BundleManifest, read, write
from foldkv.runtime.tokenizer import Tokenizer
from foldkv.validation.behaviour_cases import kind_cases, sweep_cases, sweep_lengths
from foldkv.validation.cases import as_prompt, retrieval_cases, split_answer, text_windows
from foldkv.validation.long_context import measure_depths
from foldkv.validation.runners import SessionRunner, TransformersRunner
from foldkv.validation.settings import Plan
from foldkv.validation.validate import validate

BOS, EOS = 256, 257


@pytest.fixture(scope="module")
def tokenizer(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """One that puts <bos> before and <eos> after every text."""
    library = Library.from_file(str(tiny_checkpoint / "tokenizer.json"))
    library.post_processor = TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", BOS), ("<eos>", EOS)]
    )
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    library.save(str(path))
    return Tokenizer(path)


class Memory:
    """Answers every question right, and keeps what it read."""

    def tail_logits(self, tokens: Sequence[int], tail: Sequence[int]) -> np.ndarray:
        self.tokens, self.tail = list(tokens), list(tail)
        return np.eye(258, dtype=np.float32)[[*tail[1:], 0]]


def test_a_planted_stream_begins_as_a_prompt_does_and_fits_the_context(tokenizer: Tokenizer) -> None:
    memory = Memory()
    figure = measure_depths(memory, None, tokenizer, 1024)
    assert figure.subject == figure.cases == 28
    assert begins_as_served([*memory.tokens, *memory.tail])
    assert len(memory.tokens) + len(memory.tail) <= 1024


def test_every_window_begins_with_the_tokenizers_prefix_and_keeps_its_length(tokenizer: Tokenizer) -> None:
    tokens = tokenizer.encode("def f(x): return x\n" * 20, add_special_tokens=False)
    windows = text_windows(tokens, 40, 3, seed=0, prefix=tokenizer.prefix)
    assert [len(window) for window in windows] == [40, 40, 40]
    for window in windows:
        assert window[0] == BOS and bytes(window[1:]) in bytes(tokens)
    assert text_windows(tokens[:5], 40, 3, seed=0, prefix=(BOS,)) == [[BOS, *tokens[:5]]]


def test_a_window_without_room_for_text_is_refused() -> None:
    with pytest.raises(
        InputError, match=r"no room for text after the 2 special tokens .* at least 3 \(--text-tokens\)"
    ):
        text_windows([1, 2, 3], 2, 1, seed=0, prefix=(BOS, BOS))


def test_questions_have_the_same_answers_with_special_tokens_and_without(
    tokenizer: Tokenizer, tiny_checkpoint: Path
) -> None:
    plain = Tokenizer(tiny_checkpoint / "tokenizer.json")
    for case in retrieval_cases([16, 64], 3, seed=0):
        fed, answer = split_answer(tokenizer, case.prompt, case.answer)
        assert (fed[1:], answer) == split_answer(plain, case.prompt, case.answer) and fed[0] == BOS
        assert bytes(answer).decode() == case.answer
        assert len(fed) <= replace(Plan(), distances=(64,), text_tokens=2, case_tokens=1).longest(1)
    for case in kind_cases(tokenizer, 2, 256, seed=0):
        assert begins_as_served([*case.tokens, case.answer[-1]]) and len(case.tokens) < 256


@pytest.mark.parametrize(("window", "tokens"), [(32, 256), (9, 40)])
def test_the_first_token_counts_in_the_lengths_of_the_sweep(tokenizer: Tokenizer, window: int, tokens: int) -> None:
    cases = sweep_cases(tokenizer, window, tokens, (16, 64), 1, seed=0)
    lengths = [length for length, _ in sweep_lengths(window, tokens, 1)]
    assert [len(case.tokens) - len(case.answer) + 1 for case in cases] == lengths
    for case in cases:
        assert begins_as_served([*case.tokens, case.answer[-1]])
        text, distance = bytes(case.tokens[1:]).decode(), int(case.groups[2].split()[1])
        assert text[-2 - distance :][:3] == text[-2:] + chr(case.answer[-1]), "the value is in the prompt, so far back"


def test_a_text_begins_as_a_prompt_and_nothing_is_put_after_it(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("ab") == [BOS, 97, 98, EOS] and as_prompt(tokenizer, "ab") == [BOS, 97, 98]


def test_a_whole_validation_with_special_tokens_is_as_good_as_one_without(
    tokenizer: Tokenizer, tiny_bundle: Path, tiny_report: Path, tiny_checkpoint: Path, shared_folder: Path,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    bundle = tmp_path / "bundle"
    shutil.copytree(tiny_bundle, bundle)
    (bundle / "tokenizer.json").write_text(tokenizer.to_json())
    manifest = read(BundleManifest, tiny_bundle)
    (bundle / "manifest.json").unlink()
    write(bundle, manifest)
    fed: dict[str, list[list[int]]] = {}

    def watched(runner: type, name: str) -> None:
        method: Callable[..., Any] = getattr(runner, name)

        def call(self: Any, tokens: list[int], *more: Any, **options: Any) -> Any:
            fed.setdefault(f"{runner.__name__}.{name}", []).append(list(tokens))
            return method(self, tokens, *more, **options)

        monkeypatch.setattr(runner, name, call)

    names = {SessionRunner: ("look", "logits", "logits_in", "again", "tail_logits"),
             TransformersRunner: ("read", "alone", "logits", "tail_logits")}  # fmt: skip
    for runner, methods in names.items():
        for name in methods:
            watched(runner, name)
    plan = Plan(
        texts=1,
        text_tokens=128,
        distances=(16, 32),
        cases_per_distance=5,
        cases_per_kind=1,
        case_tokens=256,
        contexts=(640,),
    )
    text = shared_folder / "tiny-report-text.txt"
    result = validate(bundle, tiny_checkpoint, tmp_path / "report", plan=plan, text=text)
    assert {name.split(".")[1] for name in fed} == {name for methods in names.values() for name in methods}
    assert all(begins_as_served(tokens) for asked in fed.values() for tokens in asked)
    assert len(fed["SessionRunner.look"][0]) == 128
    # One more token moves every window by one, and one of ten answers with it, but no more.
    before = json.loads((tiny_report / "report.json").read_text())["metrics"]
    assert (
        before["retrieval_answered"] >= 9 and result.metrics["retrieval_answered"] >= before["retrieval_answered"] - 1
    )
    assert result.metrics["retrieval_loss"] == 0 and result.long_context[0].subject > 14
    assert {verdict.gate.name for verdict in result.verdicts if verdict.word == "fails"} == set()


def begins_as_served(tokens: Sequence[int]) -> bool:
    """Whether the token that begins a text is there first, and no other special one anywhere."""
    return tokens[0] == BOS and not {BOS, EOS} & {*tokens[1:]}
