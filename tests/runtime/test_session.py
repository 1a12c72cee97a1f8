"""Sessions: parity with transformers, independence of chunks and neighbours, snapshots, limits."""

from __future__ import annotations

import json
import random
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import DeepseekV4ForCausalLM

from foldkv.artifact import read_manifest
from foldkv.errors import CapacityError, FoldkvError, InputError
from foldkv.export.checkpoint.config_reader import spec_from_file
from foldkv.export.contract.state import state_tensors, total_bytes
from foldkv.runtime.bundle import load_bundle
from foldkv.runtime.sampling import Sampling
from foldkv.runtime.session import Session
from foldkv.runtime.snapshots import Snapshot

PROMPT = list(b"def scale(values, factor):\n    return [value * factor for value in values]\n\n\ndef ")
OTHER = list(b"Licensed under the Apache License, Version 2.0")


def test_greedy_text_is_that_of_transformers_for_500_tokens(tiny_bundle: Path, tiny_checkpoint: Path) -> None:
    """By induction: if every token is the likeliest one after all before it, greedy decoding writes these tokens."""
    with Session(tiny_bundle, context=640) as session:
        new = session.generate([PROMPT], max_new_tokens=500, stop_tokens=[])[0]
    assert len(new) == 500
    model = DeepseekV4ForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        logits = model.eval()(input_ids=torch.tensor([PROMPT + new[:-1]]), use_cache=False).logits[0]
    assert logits[len(PROMPT) - 1 :].argmax(-1).tolist() == new


def test_a_text_ends_where_the_bundle_says(tiny_bundle: Path, tmp_path: Path) -> None:
    """Without being told to: any of the ids that the bundle names ends a text, and is no part of it."""
    with Session(tiny_bundle, context=128) as session:
        whole = session.generate([OTHER], max_new_tokens=40, stop_tokens=[])[0]
    end = next(token for place, token in enumerate(whole) if place and token not in whole[:place])
    bundle = shutil.copytree(tiny_bundle, tmp_path / "bundle")
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["model"]["eos_token_ids"] = [0, end]
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    with Session(bundle, context=128) as session:
        assert session.generate([OTHER], max_new_tokens=40)[0] == whole[: whole.index(end)] != []


@pytest.mark.parametrize("chunk", [1, 3, 4, 31, 33, 256])
def test_the_size_of_chunks_does_not_matter(tiny_bundle: Path, chunk: int) -> None:
    text = (PROMPT * 3)[:170]
    with Session(tiny_bundle, context=256, chunk=256) as whole, Session(tiny_bundle, context=256, chunk=chunk) as parts:
        np.testing.assert_allclose(
            parts.prefill([text], logits="all")[0], whole.prefill([text], logits="all")[0], atol=1e-4
        )
        np.testing.assert_allclose(parts.decode([65]), whole.decode([65]), atol=1e-4)


def test_a_sequence_does_not_depend_on_its_neighbours(tiny_bundle: Path) -> None:
    prompts = [PROMPT, OTHER, PROMPT[:5]]
    with Session(tiny_bundle, context=256, batch=3) as session:
        together = session.generate(prompts, max_new_tokens=60, stop_tokens=[])
    with Session(tiny_bundle, context=256) as session:
        alone = [session.generate([prompt], max_new_tokens=60, stop_tokens=[])[0] for prompt in prompts]
    assert together == alone


def test_sampled_tokens_do_not_depend_on_the_slot(tiny_bundle: Path) -> None:
    sampling = Sampling(temperature=1.0, top_k=40, top_p=0.95, seed=7)
    with Session(tiny_bundle, context=256, batch=2) as session:
        first = session.generate([PROMPT, OTHER], max_new_tokens=30, sampling=sampling, stop_tokens=[], requests=[4, 9])
        second = session.generate(
            [OTHER, PROMPT], max_new_tokens=30, sampling=sampling, stop_tokens=[], requests=[9, 4]
        )
        again = session.generate([OTHER], max_new_tokens=30, sampling=sampling, stop_tokens=[], requests=[9])
        other = session.generate([OTHER], max_new_tokens=30, sampling=sampling, stop_tokens=[], requests=[10])
    assert first == second[::-1]
    assert again[0] == second[0] != other[0]


def test_a_snapshot_restored_gives_the_same_bits(tiny_bundle: Path) -> None:
    with Session(tiny_bundle, context=256, batch=2) as session:
        session.prefill([PROMPT, OTHER])
        snapshot = session.snapshot()
        first = [session.decode([65 + step, 97 + step]) for step in range(40)]
        session.restore(snapshot)
        assert session.positions.tolist() == [len(PROMPT), len(OTHER)]
        second = [session.decode([65 + step, 97 + step]) for step in range(40)]
        with Session(tiny_bundle, context=256, batch=2) as fresh:
            fresh.restore(snapshot)
            third = [fresh.decode([65 + step, 97 + step]) for step in range(40)]
    np.testing.assert_array_equal(first, second)
    np.testing.assert_array_equal(first, third)


def test_a_slot_is_forked_moved_and_rewound(tiny_bundle: Path, shared_session: Session) -> None:
    """Also where the slot held more before, around the window of 128 and the ratios of 4 and 128, and in another session."""
    with Session(tiny_bundle, context=512, batch=3) as session, Session(tiny_bundle, context=300, batch=2) as other:
        for length in (3, 127, 130, 257):
            text = (PROMPT * 4)[:length]
            session.reset()
            session.forward([text, (OTHER * 9)[:260], []])
            beside = session.state_rows(1)
            kept = session.snapshot_slot(0)
            steps = [session.forward([[step], [], []])[0] for step in (65, 66)]
            for taker, slot in ((session, 0), (session, 2), (other, 1)):
                taker.restore_slot(slot, kept)
                chunks: list[list[int]] = [[] for _ in range(taker.batch)]
                for step, expected in zip((65, 66), steps, strict=True):
                    chunks[slot] = [step]
                    np.testing.assert_array_equal(taker.forward(chunks)[slot], expected)
            assert all(np.array_equal(rows, session.state_rows(1)[name]) for name, rows in beside.items())
            # Nothing of what a slot held before stays behind the rows.
            session.restore_slot(1, kept)
            session.reset([2])
            session.restore_slot(2, kept)
            for array in session._buffers.arrays.values():  # type: ignore[attr-defined]
                assert np.array_equal(array[1], array[2])
        for message, call in (
            ("exceeds the context", lambda: Session.restore_slot(shared_session, 0, kept)),
            ("slots must be numbers", lambda: session.restore_slot(3, kept)),
            ("slots must be numbers", lambda: session.snapshot_slot(-1)),
            ("expected what snapshot_slot", lambda: session.restore_slot(0, session.snapshot())),  # type: ignore[arg-type]
        ):
            with pytest.raises(InputError, match=message):
                call()


def test_a_sequence_alone_in_a_batch_has_the_bits_of_a_batch_of_one(tiny_bundle: Path) -> None:
    """Chunks always: they run for one slot after the other. Steps while no other slot has a token."""
    with Session(tiny_bundle, context=256) as one, Session(tiny_bundle, context=256, batch=3) as three:
        expected = one.forward([PROMPT])[0]
        np.testing.assert_array_equal(three.forward([OTHER, PROMPT, OTHER * 2])[1], expected)
        np.testing.assert_array_equal(three.forward([[], [65], []])[1], one.forward([[65]])[0])


def test_a_snapshot_of_another_shape_is_refused_and_changes_nothing(tiny_bundle: Path) -> None:
    with Session(tiny_bundle, context=256) as session, Session(tiny_bundle, context=320) as other:
        session.prefill([PROMPT])
        other.prefill([OTHER])
        with pytest.raises(InputError, match="context 320"):
            session.restore(other.snapshot())
        assert session.positions.tolist() == [len(PROMPT)]


def test_exceeding_the_context_is_refused_before_the_state_is_touched(tiny_bundle: Path) -> None:
    with Session(tiny_bundle, context=96) as session, Session(tiny_bundle, context=512) as large:
        session.prefill([PROMPT])
        before = session.snapshot()
        room = 96 - len(PROMPT)
        with pytest.raises(CapacityError, match=r"exceed the context of 96\. Nothing was changed"):
            session.prefill([[65] * (room + 1)])
        with pytest.raises(CapacityError):
            session.stream([PROMPT], max_new_tokens=room + 2)
        after = session.snapshot()
        assert after.positions == before.positions
        for left, right in zip(before.rows[0], after.rows[0], strict=True):
            np.testing.assert_array_equal(left, right)
        large.prefill([PROMPT])
        np.testing.assert_allclose(session.prefill([[65] * room]), large.prefill([[65] * room]), atol=1e-4)
        with pytest.raises(CapacityError):
            session.decode([65])


@pytest.mark.parametrize(("context", "batch"), [(1, 1), (333, 1), (4096, 3)])
def test_the_bytes_of_the_state_are_the_planned_ones(
    tiny_bundle: Path, tiny_checkpoint: Path, context: int, batch: int
) -> None:
    planned = total_bytes(state_tensors(spec_from_file(tiny_checkpoint)), context, batch)
    with Session(tiny_bundle, context=context, batch=batch) as session:
        assert session.state_bytes == planned


def arrays(session: Session) -> dict[str, np.ndarray]:
    return session._buffers.arrays  # type: ignore[attr-defined]


@pytest.mark.parametrize("layout", ["hf", "dense", "fp8+fp4"])
def test_a_reset_leaves_nothing_of_the_text_in_any_buffer(
    tiny_bundle: Path, served_bundles: dict[str, Path], layout: str
) -> None:
    """After any calls: the buffers are those of a new session, of all slots or of those that were reset."""
    bundle, rng = tiny_bundle if layout == "hf" else served_bundles[layout], random.Random(layout)
    sizes = {"context": 128, "batch": 3, "chunk": 16, "threads": 1}
    with Session(bundle, **sizes) as session, Session(bundle, **sizes) as other, Session(bundle, **sizes) as fresh:
        new = {name: array.copy() for name, array in arrays(fresh).items()}
        kept: list[Snapshot] = []

        def text() -> list[list[int]]:
            return [rng.choices(range(256), k=rng.choice([0, 1, 5, 37])) for _ in range(3)]

        for _ in range(8):
            one = rng.choice([session, other])
            call = rng.choice(["forward", "fail", "snapshot", "restore", "generate", "reset"])
            if call == "forward" and one.positions.max() < 80:
                one.forward(text())
            elif call == "fail" and one.positions.max() < 80:
                fail_half_way(one, text())
            elif call == "snapshot":
                kept.append(one.snapshot())
            elif call == "restore" and kept:
                one.restore(rng.choice(kept))  # of either session
            elif call == "generate":
                one.generate([[1, 2, *part] for part in text()], max_new_tokens=3, stop_tokens=[])
            elif call == "reset":
                one.reset([slot := rng.randrange(3)])
                assert all(np.array_equal(array[slot], new[name][slot]) for name, array in arrays(one).items())
        for one in (session, other):
            one.reset()
            for name, array in arrays(one).items():
                np.testing.assert_array_equal(array, new[name], err_msg=name)
            executor: Any = one._executor
            assert not any(tensor.host.any() for lane in executor._lanes.values() for tensor in lane.tensors())
            assert one.positions.tolist() == [0, 0, 0] and one.pending == (None, None, None)
        tokens = text()
        for ours, theirs in zip(session.forward(tokens), fresh.forward(tokens), strict=True):
            np.testing.assert_array_equal(ours, theirs)


def fail_half_way(session: Session, text: list[list[int]]) -> None:
    """A run that has written the state and then fails; a snapshot from before mends the session."""
    before, executor = session.snapshot(), session._executor
    assert executor is not None
    run = executor.run

    def failing(*arguments: Any, **options: Any) -> Any:
        run(*arguments, **options)
        raise FoldkvError("out of memory")

    executor.run = failing  # type: ignore[method-assign]
    try:
        if any(text):
            with pytest.raises(FoldkvError, match="out of memory"):
                session.forward(text)
            with pytest.raises(FoldkvError, match="left the state damaged"):
                session.snapshot()
    finally:
        executor.run = run  # type: ignore[method-assign]
    session.restore(before)


def test_a_ragged_snapshot_holds_no_more_than_each_slot_does(tiny_bundle: Path) -> None:
    with Session(tiny_bundle, context=256, batch=2) as session:
        session.prefill([PROMPT, PROMPT])
        session.reset([1])
        session.forward([[], OTHER[:6]])
        both = session.snapshot()
        session.reset([0])
        one = session.snapshot()
    assert both.bytes > one.bytes
    rows = [tensor.used_rows(6) for tensor in load_bundle(tiny_bundle).state.tensors]
    assert [len(copy) for copy in both.rows[1]] == rows


def test_resetting_one_slot_leaves_the_other(tiny_bundle: Path) -> None:
    with Session(tiny_bundle, context=256, batch=2) as session, Session(tiny_bundle, context=256, batch=2) as other:
        session.prefill([PROMPT, OTHER])
        session.reset([0])
        assert session.positions.tolist() == [0, len(OTHER)]
        session.forward([PROMPT[:9], []])
        other.prefill([PROMPT[:9], OTHER])
        np.testing.assert_allclose(session.decode([65, 66]), other.decode([65, 66]), atol=1e-5)


def test_streams_give_what_generate_gives_and_stop_at_stop_tokens(tiny_bundle: Path) -> None:
    with Session(tiny_bundle, context=256) as session:
        tokens = session.generate([PROMPT], max_new_tokens=40, stop_tokens=[])[0]
        assert [token for _, token in session.stream([PROMPT], max_new_tokens=40, stop_tokens=[])] == tokens
        stop = tokens[-1]
        stopped = session.generate([PROMPT], max_new_tokens=40, stop_tokens=[stop])[0]
        assert stopped == tokens[: tokens.index(stop)]


def fed(bundle: Path, tokens: list[int]) -> np.ndarray:
    """Logits after a text that is fed at once."""
    with Session(bundle, context=512) as session:
        return session.prefill([tokens])[0]


def test_a_conversation_turn_by_turn_is_the_conversation_at_once(tiny_bundle: Path) -> None:
    """Whatever feeds the next turn: generate, forward with all its logits, decode."""
    turns = [PROMPT[:20], OTHER[:11], PROMPT[:7]]
    with Session(tiny_bundle, context=512, batch=2) as session:
        held: list[int] = []
        for number, turn in enumerate(turns):
            new = session.generate([turn, OTHER], max_new_tokens=9, stop_tokens=[], resume=number > 0)[0]
            held += [*turn, *new]
            assert session.positions[0] == len(held) - 1 and session.pending[0] == held[-1]
        with Session(tiny_bundle, context=512) as whole:
            assert whole.generate([held[:-9]], max_new_tokens=9, stop_tokens=[])[0] == held[-9:]
        at_once = session.snapshot()
        held += OTHER
        np.testing.assert_allclose(session.forward([OTHER, []])[0][0], fed(tiny_bundle, held), atol=1e-4)
        assert session.pending == (None, at_once.pending[1]), "a slot that gets no token stays as it is"
        session.restore(at_once)
        rows = session.forward([OTHER, []], logits="all")[0]
        assert len(rows) == len(OTHER), "the row of the token before them is not theirs"
        np.testing.assert_allclose(rows[-1], fed(tiny_bundle, held), atol=1e-4)
        session.restore(at_once)
        for token in OTHER:
            after = session.decode([token, 65])
        np.testing.assert_allclose(after[0], fed(tiny_bundle, held), atol=1e-4)


def test_a_stop_token_is_no_part_of_what_a_slot_holds(tiny_bundle: Path) -> None:
    with Session(tiny_bundle, context=256) as session:
        whole = session.generate([OTHER], max_new_tokens=30, stop_tokens=[])[0]
        stop = next(token for place, token in enumerate(whole) if place > 3 and token not in whole[:place])
        stream = session.stream([OTHER], max_new_tokens=30, stop_tokens=[stop])
        new = [token for _, token in stream]
        assert (stream.finish_reasons, stream.stop_tokens) == (["stop"], [stop])
        assert session.positions[0] == len(OTHER) + len(new) and session.pending == (None,)
        np.testing.assert_allclose(session.decode([65])[0], fed(tiny_bundle, [*OTHER, *new, 65]), atol=1e-4)


def test_a_stream_that_is_dropped_leaves_what_it_gave_out(tiny_bundle: Path) -> None:
    """Also in the middle of a round: the slots after the last one that gave a token out hold one less."""
    with Session(tiny_bundle, context=256, batch=2) as session:
        stream, given = session.stream([PROMPT, OTHER], max_new_tokens=20, stop_tokens=[]), ([], [])
        for _ in range(7):
            slot, token = next(stream)
            given[slot].append(token)
        stream.close()
        assert [len(tokens) for tokens in given] == [4, 3] and stream.finish_reasons == [None, None]
        snapshot = session.snapshot()
        after = session.forward([[66], [67]])
        np.testing.assert_allclose(after[0][0], fed(tiny_bundle, [*PROMPT, *given[0], 66]), atol=1e-4)
        np.testing.assert_allclose(after[1][0], fed(tiny_bundle, [*OTHER, *given[1], 67]), atol=1e-4)
        with Session(tiny_bundle, context=256, batch=2) as other:
            other.restore(snapshot)
            assert other.pending == snapshot.pending and snapshot.pending[0] == given[0][-1]
            np.testing.assert_array_equal(other.forward([[66], [67]])[0], after[0])
        session.restore(snapshot)
        session.reset([0])
        assert session.pending == (None, snapshot.pending[1])


def test_an_empty_prompt_goes_on_where_the_length_ended_a_text(tiny_bundle: Path) -> None:
    with Session(tiny_bundle, context=256) as session:
        whole = session.generate([PROMPT], max_new_tokens=20, stop_tokens=[])[0]
        stream = session.stream([PROMPT], max_new_tokens=8, stop_tokens=[])
        first = [token for _, token in stream]
        assert stream.finish_reasons == ["length"]
        assert first + session.generate([[]], max_new_tokens=12, stop_tokens=[], resume=True)[0] == whole
        session.reset()
        with pytest.raises(InputError, match="prompt 0 is empty"):
            session.generate([[]], max_new_tokens=1, resume=True)


def test_one_slot_can_be_ended_while_the_others_go_on(tiny_bundle: Path) -> None:
    with Session(tiny_bundle, context=256, batch=2) as session:
        expected = session.generate([PROMPT, OTHER], max_new_tokens=10, stop_tokens=[])
        stream, given = session.stream([PROMPT, OTHER], max_new_tokens=10, stop_tokens=[]), ([], [])
        for slot, token in stream:
            given[slot].append(token)
            if len(given[0]) == 3:
                stream.stop(0)
        assert given == (expected[0][:3], expected[1]) and stream.finish_reasons == ["stop", "length"]
        assert session.positions.tolist() == [len(PROMPT) + 2, len(OTHER) + 9]


def test_the_token_before_counts_for_the_capacity(tiny_bundle: Path) -> None:
    with Session(tiny_bundle, context=96) as session:
        session.generate([PROMPT[:40]], max_new_tokens=5, stop_tokens=[])
        room = 96 - 45
        with pytest.raises(CapacityError):
            session.stream([[65] * room], max_new_tokens=2, resume=True)
        with pytest.raises(CapacityError):
            session.forward([[65] * (room + 1)])
        session.generate([[65] * room], max_new_tokens=1, stop_tokens=[], resume=True)
        assert session.positions[0] == 96


def test_a_stream_notices_that_the_session_was_used(tiny_bundle: Path) -> None:
    with Session(tiny_bundle, context=256) as session:
        stream = session.stream([PROMPT], max_new_tokens=5, stop_tokens=[])
        next(stream)
        session.reset()
        with pytest.raises(InputError, match="was used while a stream was open"):
            next(stream)


def generate(**options: Any) -> Callable[[Session], object]:
    return lambda session: session.generate(**{"prompts": [PROMPT], "max_new_tokens": 1, **options})


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (generate(prompts=[[]]), "prompt 0 is empty"),
        (generate(max_new_tokens=0), "max_new_tokens must be an integer of 1 or more"),
        (generate(max_new_tokens=True), "max_new_tokens must be an integer of 1 or more, got True"),
        (generate(max_new_tokens=2.0), "max_new_tokens must be an integer of 1 or more, got 2.0"),
        (generate(prompts=[PROMPT, PROMPT]), "got 2 prompts"),
        (generate(prompts=[]), "got 0 prompts"),
        (generate(prompts="text"), "prompts must be a list, got 'text'"),
        (generate(prompts=7), "prompts must be a list, got 7"),
        (generate(prompts=[7]), "slot 0: expected a sequence of integer token ids, got 7"),
        (generate(prompts=[[1, True]]), "slot 0: expected a sequence of integer token ids"),
        (generate(prompts=[[None]]), "slot 0: expected a sequence of integer token ids"),
        (generate(prompts=[[1 << 70]]), "slot 0: expected a sequence of integer token ids"),
        (generate(requests=[-1]), "requests must be 1 integers"),
        (generate(requests=3), "requests must be a list, got 3"),
        (generate(requests=[True]), "requests must be 1 integers"),
        (generate(stop_tokens=[258]), r"stop_tokens must be token ids, 0 to 257, got \[258\]"),
        (generate(stop_tokens=[-1]), "stop_tokens must be token ids"),
        (generate(stop_tokens=["</s>"]), "stop_tokens must be token ids.* For a text that ends a sequence use `stop`"),
        (generate(stop_tokens=[True]), "stop_tokens must be token ids"),
        (generate(stop_tokens=[1.0]), "stop_tokens must be token ids"),
        (generate(stop_tokens=257), "stop_tokens must be a list, got 257"),
        (generate(stop_tokens="ab"), "stop_tokens must be a list, got 'ab'"),
        (generate(sampling=0.7), "sampling must be a Sampling"),
        (generate(resume="no"), "resume must be True or False, got 'no'"),
        (lambda s: s.prefill([[258]]), "token 0 has the id 258; the vocabulary has the ids 0 to 257"),
        (lambda s: s.prefill([[-1]]), "has the id -1"),
        (lambda s: s.prefill([[1.5]]), "expected a sequence of integer token ids"),
        (lambda s: s.prefill(["text"]), "expected a sequence of integer token ids"),
        (lambda s: s.prefill(None), "prompts must be a list, got None"),
        (lambda s: s.decode(5), "tokens must be a list, got 5"),
        (lambda s: s.decode([True]), "expected a sequence of integer token ids"),
        (lambda s: s.forward([[1], [2]]), "got tokens for 2 slots"),
        (lambda s: s.forward(3), "chunks must be a list, got 3"),
        (lambda s: s.forward([[1]], logits="some"), "logits must be"),
        (lambda s: s.reset([3]), "slots must be numbers from 0 to 0"),
        (lambda s: s.reset(0), "slots must be a list, got 0"),
        (lambda s: s.reset([False]), "slots must be numbers from 0 to 0"),
        (lambda s: s.reset(["a"]), "slots must be numbers from 0 to 0"),
        (lambda s: s.restore(None), "expected what snapshot"),
    ],
)
def test_a_wrong_argument_is_one_error_and_changes_nothing(
    shared_session: Session, call: Callable[[Session], object], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        call(shared_session)
    assert shared_session.positions.tolist() == [len(OTHER)]


@pytest.fixture(scope="module")
def shared_session(tiny_bundle: Path) -> Iterator[Session]:
    """One that holds a text and that no test changes."""
    with Session(tiny_bundle, context=128) as session:
        session.prefill([OTHER])
        yield session


def test_numbers_of_numpy_are_numbers(shared_session: Session) -> None:
    stream = shared_session.stream([np.array(PROMPT)], max_new_tokens=1, stop_tokens=np.array([1, 2]))
    assert stream.finish_reasons == [None]
    shared_session.stream([PROMPT], max_new_tokens=1, stop_tokens={np.int64(3)})


@pytest.mark.parametrize(
    "options", [{"context": 0}, {"context": 1 << 30}, {"batch": 0}, {"chunk": True}, {"threads": -1}, {"batch": 1.0}]
)
def test_a_wrong_option_is_refused(tiny_bundle: Path, options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(options))):
        Session(tiny_bundle, **options)


def test_a_bundle_that_is_no_path_is_refused() -> None:
    with pytest.raises(InputError, match="bundle must be the path of a folder, got 7"):
        Session(7)  # type: ignore[arg-type]


def test_a_closed_session_says_so(tiny_bundle: Path) -> None:
    session = Session(tiny_bundle, context=64)
    session.close()
    session.close()
    with pytest.raises(FoldkvError, match="closed"):
        session.decode([1])


def test_a_decode_step_does_not_copy_the_caches(tiny_bundle: Path) -> None:
    """At the same position, a state of 200 MB costs the time of one of 0.3 MB; copying it would take several steps' time."""
    with Session(tiny_bundle, context=1024) as small, Session(tiny_bundle, context=1 << 20) as large:
        assert large.state_bytes > 200e6 > 500 * small.state_bytes
        seconds: dict[Session, list[float]] = {small: [], large: []}
        for session in seconds:
            session.prefill([PROMPT])
        for _ in range(30):
            for session, times in seconds.items():
                start = time.perf_counter()
                session.decode([65])
                times.append(time.perf_counter() - start)
        assert statistics.median(seconds[large]) < 2 * statistics.median(seconds[small])


def test_a_service_needs_neither_torch_nor_onnx(tiny_bundle: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from foldkv.runtime.session import Session\n"
        f"Session(Path({str(tiny_bundle)!r}), context=64).generate([[65, 66]], max_new_tokens=3)\n"
        "print([name for name in ('torch', 'onnx', 'onnx_ir', 'onnxscript', 'transformers', 'triton') if name in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_the_manifest_lists_the_state_that_the_graph_has(tiny_bundle: Path) -> None:
    manifest = read_manifest(tiny_bundle, kind="foldkv.bundle")
    groups = [row["group"] for row in manifest["state"]]
    assert groups.count("window") == 4 and groups.count("entries") == 3 and groups.count("index_entries") == 2
