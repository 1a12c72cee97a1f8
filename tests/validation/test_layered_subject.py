"""A chain that goes a layer at a time over all texts gives the bits of a session."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mappings import in_files

from foldkv.errors import FoldkvError
from foldkv.export.checkpoint.reader import Checkpoint
from foldkv.runtime.bundle import load_bundle
from foldkv.runtime.chain import ChainModel
from foldkv.runtime.model import Model
from foldkv.validation import jobs
from foldkv.validation.inside import GraphChoices
from foldkv.validation.layered_subject import LayeredSubject, LayeredSubjectRunner
from foldkv.validation.runners import SessionRunner

pytestmark = pytest.mark.slow
CONTEXT = 300
TEXTS = [np.random.default_rng(seed).integers(0, 256, size).tolist() for seed, size in enumerate((283, 1, 64, 150))]
SIZES = [
    1,
    3,
    7,
    64,
    1,
    74,
]  # edges inside of entries and windows; some chunks of one token, which other sessions decode


@pytest.fixture(params=["hf", "served, packed rows"])
def model(request: pytest.FixtureRequest) -> Iterator[Model]:
    if request.param == "hf":
        folder = request.getfixturevalue("tiny_bundle")
    else:
        folder = request.getfixturevalue("served_bundles")["fp8+fp4"]
    with Model(folder, threads=1) as opened:
        yield opened


def layered(model: Model, folder: Path | None = None) -> LayeredSubjectRunner:
    return LayeredSubjectRunner(model, context=CONTEXT, folder=folder)


def test_every_answer_is_that_of_a_session(model: Model, tmp_path: Path) -> None:
    """And what is as long as a text, of every layer, is in files."""
    with SessionRunner(model, context=CONTEXT, folder=tmp_path) as session, layered(model, tmp_path) as runner:
        # Announced together, so that the state of one text is what the next finds.
        runner.announce(looks=TEXTS)
        for tokens in TEXTS:
            want, have = session.look(tokens), runner.look(tokens)
            assert np.array_equal(want.logits, have.logits)
            assert len(want.streams) == len(have.streams) == model.bundle.model.num_layers
            assert all(map(np.array_equal, want.streams, have.streams))
            assert want.rows.keys() == have.rows.keys()
            assert all(np.array_equal(want.rows[name], have.rows[name]) for name in want.rows)
            assert np.array_equal(want.before(0), have.before(0))
            assert all(in_files(one, tmp_path) for side in (want, have) for one in (side.logits, *side.streams))
        tokens = TEXTS[3]
        assert np.array_equal(session.logits(tokens, last=5), runner.logits(tokens, last=5))
        assert np.array_equal(session.logits_in(tokens, SIZES), runner.logits_in(tokens, SIZES))
        want_tail, have_tail = (side.tail_logits(tokens, TEXTS[0][:100]) for side in (session, runner))
        assert want_tail.shape == (100, model.bundle.model.vocab_size) and np.array_equal(want_tail, have_tail)


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Texts and the first layer of every pass through the weights."""
    found: list[tuple[int, int]] = []
    layers = LayeredSubject.layers

    def counted(self: LayeredSubject, texts: Any, streams: Any, *, first: int = 0) -> Any:
        found.append((len(texts), first))
        return layers(self, texts, streams, first=first)

    monkeypatch.setattr(LayeredSubject, "layers", counted)
    return found


def test_what_is_announced_costs_one_pass_and_what_is_known_none(
    tiny_bundle: Path, passes: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "TOKENS_AT_ONCE", 350)
    with Model(tiny_bundle, threads=1) as model, layered(model) as runner:
        runner.announce(logits=[(tokens, None) for tokens in TEXTS])
        assert passes == [(3, 0), (1, 0)]  # 283 + 1 + 64 tokens, then 150
        for tokens in TEXTS:
            runner.logits(tokens)
        assert len(passes) == 2
        runner.logits_in(TEXTS[1], [1])
        assert len(passes) == 2, "the same chunks are the same question"
        runner.look(TEXTS[1])
        assert passes[2:] == [(1, 0)]


def test_an_interrupted_pass_goes_on_and_of_another_bundle_nothing_is_taken(
    tiny_bundle: Path, served_bundles: dict[str, Path], passes: list[tuple[int, int]], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    run = LayeredSubject._run

    def killed(self: LayeredSubject, owner: str, *given: Any, **more: Any) -> Any:
        if owner == "layers.2":
            raise KeyboardInterrupt
        return run(self, owner, *given, **more)

    with Model(tiny_bundle, threads=1) as model, Model(served_bundles["dense"], threads=1) as other:
        with SessionRunner(model, context=CONTEXT) as session:
            want = session.look(TEXTS[3])
        with monkeypatch.context() as patch, layered(model, tmp_path) as runner:
            patch.setattr(LayeredSubject, "_run", killed)
            with pytest.raises(KeyboardInterrupt):
                runner.look(TEXTS[3])
        with layered(other, tmp_path) as runner:
            runner.look(TEXTS[3])
        with layered(model, tmp_path) as runner:
            have = runner.look(TEXTS[3])
    assert passes == [(1, 0), (1, 0), (1, 2)]
    assert np.array_equal(want.logits, have.logits) and all(map(np.array_equal, want.streams, have.streams))
    assert want.rows.keys() == have.rows.keys()
    assert all(np.array_equal(want.rows[name], have.rows[name]) for name in want.rows)


def test_a_failure_names_the_call_and_the_next_question_is_answered(tiny_bundle: Path) -> None:
    with Model(tiny_bundle, threads=1) as model, layered(model) as runner:
        want = runner.logits(TEXTS[2])
        with pytest.raises(FoldkvError, match=r"ONNX Runtime failed in embed on a chunk of 2 tokens in a batch of 1"):
            runner.announce(logits=[([1, 10**6], 1)])
        assert np.array_equal(runner.logits(TEXTS[2]), want)
        with SessionRunner(model, context=CONTEXT) as session:
            assert np.array_equal(runner.logits(TEXTS[3]), session.logits(TEXTS[3]))


def test_choices_are_those_of_one_prefill(tiny_bundle: Path, tiny_checkpoint: Path) -> None:
    layers = list(Checkpoint(tiny_checkpoint).spec.indexed_ratios)
    chain = ChainModel(load_bundle(tiny_bundle), threads=1)
    one, together = (GraphChoices(chain, layers) for _ in range(2))
    together.prepare(TEXTS)
    for tokens in TEXTS:
        want, have = one.chosen(tokens), together.chosen(tokens)
        assert want.keys() == have.keys() == set(layers)
        assert all(
            want[layer].dtype == have[layer].dtype and np.array_equal(want[layer], have[layer]) for layer in layers
        )
    one.close()
    together.close()
    chain.close()
