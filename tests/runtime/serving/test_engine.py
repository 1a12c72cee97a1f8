"""Many requests over one model: each gets what it would get alone, in a fair order, and leaves when it wants."""

from __future__ import annotations

import asyncio
import itertools
import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from foldkv.errors import CapacityError, FoldkvError, InputError, QueueFullError
from foldkv.runtime import Completion, Model, Sampling, Session, Tokenizer, Usage
from foldkv.runtime.serving import Engine, PrefixIndex, Request
from foldkv.runtime.serving.answer import Group
from foldkv.runtime.serving.prefix_files import PrefixFolder
from foldkv.runtime.serving.request import check_request
from foldkv.runtime.serving.scheduler import Scheduler, is_kept

pytestmark = pytest.mark.slow

CHUNK, CONTEXT = 32, 512
NEVER: tuple[int, ...] = ()


@pytest.fixture(scope="module")
def model(tiny_bundle: Path) -> Iterator[Model]:
    with Model(tiny_bundle) as opened:
        yield opened


@pytest.fixture
def engine(model: Model) -> Iterator[Engine]:
    with Engine(model, slots=3, context=CONTEXT, chunk=CHUNK, max_queue=64) as opened:
        yield opened


def prompt(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng([length, seed]).integers(0, 256, length).tolist()


def index(model: Model, **more: Any) -> PrefixIndex:
    return PrefixIndex.of(model, **({"chunk": CHUNK, "memory_bytes": 1 << 28} | more))


def mixed(count: int) -> list[Request]:
    rng = np.random.default_rng(5)
    return [
        Request(
            prompt(int(length), number),
            max_new_tokens=int(most),
            stop_tokens=NEVER,
            logprobs=1,
            sampling=Sampling(temperature=0.8, top_k=40, min_p=0.01, seed=number),
        )
        for number, (length, most) in enumerate(
            zip(rng.integers(1, 120, count), rng.integers(1, 12, count), strict=True)
        )
    ]


def alone(model: Model, request: Request, number: int = 0) -> list[int]:
    """What a session of its own gives: no code of the engine."""
    with Session(model, context=CONTEXT, chunk=CHUNK) as session:
        assert not isinstance(request.prompt, str)
        tokens = session.stream(
            [request.prompt], max_new_tokens=request.max_new_tokens or 1, sampling=request.sampling,
            stop_tokens=request.stop_tokens, requests=[number],
        )  # fmt: skip
        return [token for _, token in tokens]


def test_each_gets_what_it_gets_alone_whoever_else_is_there(engine: Engine, model: Model) -> None:
    requests = mixed(9)
    quiet = [engine.complete(request)[0] for request in requests]
    crowd = [engine.submit(request) for request in reversed(requests)]
    for request, generation, expected in zip(requests, reversed(crowd), quiet, strict=True):
        [completion] = generation.result()
        assert completion.token_ids == expected.token_ids and completion.finish_reason == "length"
        assert len(completion.token_ids) == len(completion.logprobs) == request.max_new_tokens
        assert completion.usage == Usage(len(request.prompt), 0, len(completion.token_ids))
        np.testing.assert_allclose(
            [one.logprob for one in completion.logprobs], [one.logprob for one in expected.logprobs], atol=1e-4
        )
    for request, expected in list(zip(requests, quiet, strict=True))[:3]:
        assert alone(model, request) == list(expected.token_ids)


#: A chunk, the length of a prompt, a seed, and the lengths of prompts beside it. Windows have 128 tokens, groups 4 or 128; most chunks end
#: inside of a group.
PLACES = {
    "chunk": st.sampled_from([18, 30, 33, 64, 127, 130]),
    "length": st.integers(1, 200),
    "seed": st.integers(0, 99),
    "beside": st.lists(st.integers(1, 70), max_size=2),
}


@settings(max_examples=6, deadline=None)
@example(chunk=30, length=128, seed=0, beside=[5])
@example(chunk=33, length=131, seed=1, beside=[40, 1])
@example(chunk=127, length=127, seed=2, beside=[])
@given(**PLACES)
def test_neither_kept_states_nor_neighbours_change_a_bit(
    model: Model, chunk: int, length: int, seed: int, beside: list[int]
) -> None:
    shared, hot = prompt(length, seed), Sampling(temperature=0.8, top_k=40, seed=seed)
    asked = Request([*shared, *prompt(3, seed)], 3, hot, logprobs=2, stop_tokens=NEVER)
    with Engine(model, slots=1, context=CONTEXT, chunk=chunk) as alone:
        [expected] = alone.complete(asked)
    with index(model, chunk=chunk) as prefixes, Engine(
        model, slots=3, context=CONTEXT, chunk=chunk, prefixes=prefixes, batch_invariant=True
    ) as engine:  # fmt: skip
        engine.complete(Request(shared, 1, stop_tokens=NEVER))
        others = [engine.submit(Request(prompt(other, seed + 1), 4, stop_tokens=NEVER)) for other in beside]
        [answer] = engine.complete(asked)
        assert [len(other.result()[0].token_ids) for other in others] == [4] * len(others)
    assert answer.logprobs == expected.logprobs
    assert answer.usage is not None and answer.usage.cached_tokens == length // chunk * chunk


def test_a_long_prompt_delays_others_by_one_chunk_at_a_time(model: Model) -> None:
    given: list[tuple[str, int]] = []
    with Session(model, context=CONTEXT, batch=3, chunk=CHUNK) as session:
        scheduler = Scheduler(session)

        def add(name: str, length: int, most: int) -> Group:
            checked = check_request(
                Request(prompt(length), max_new_tokens=most, stop_tokens=NEVER), model.bundle, None, CONTEXT
            )
            group = Group(checked, name, None, lambda piece: given.append((name, step)))
            scheduler.add(group)
            return group

        step = 0
        add("short", 5, 20)
        for _ in range(3):
            step += 1
            scheduler.step()
        long = add("long", 10 * CHUNK, 1)
        second = add("second", 2 * CHUNK, 1)
        while scheduler.busy:
            step += 1
            scheduler.step()
        steps = [at for name, at in given if name == "short"]
        assert max(b - a for a, b in itertools.pairwise(steps)) <= 2, "a chunk, then a token of the others"
        # Prompts take turns: the second, of two chunks, is answered while the first is fed, not after it.
        ends = dict(given)
        assert ends["second"] < ends["long"] and long.ended and second.ended
        assert session.positions.tolist() == [0, 0, 0]


def test_prompts_that_begin_alike_are_not_fed_again_and_have_the_same_bits(model: Model) -> None:
    lengths = [31, 32, 65, 128, 200, 257]
    shared = prompt(300, 9)
    with index(model) as prefixes, Engine(
        model, slots=3, context=CONTEXT, chunk=CHUNK, batch_invariant=True
    ) as cold, Engine(
        model, slots=3, context=CONTEXT, chunk=CHUNK, batch_invariant=True, prefixes=prefixes
    ) as warm:  # fmt: skip
        assert warm.complete(Request(shared, max_new_tokens=1))[0].usage.cached_tokens == 0  # type: ignore[union-attr]
        requests = [
            Request([*shared[:length], *prompt(3, length)], max_new_tokens=3, logprobs=2, stop_tokens=NEVER)
            for length in lengths
        ]
        answers = [generation.result()[0] for generation in [warm.submit(request) for request in requests]]
        for length, request, answer in zip(lengths, requests, answers, strict=True):
            assert answer.logprobs == cold.complete(request)[0].logprobs, length
            assert answer.usage is not None
            boundary = length // CHUNK * CHUNK
            # Kept are the first four boundaries, four of each doubling, and the last.
            held = [at for at in range(CHUNK, boundary + 1, CHUNK) if is_kept(at // CHUNK, 300 // CHUNK)]
            assert answer.usage.cached_tokens == max(held, default=0), length
        stats = warm.stats()
        assert stats.cached_tokens == sum(answer.usage.cached_tokens for answer in answers if answer.usage)
        assert stats.prefixes is not None and stats.prefixes.hits == len([one for one in lengths if one >= CHUNK])


@settings(max_examples=4, deadline=None)
@example(chunk=30, length=123, seed=0, beside=[60])
@example(chunk=32, length=128, seed=1, beside=[])
@given(**PLACES)
def test_states_after_answers_are_used_if_bits_need_not_be_the_same(
    model: Model, chunk: int, length: int, seed: int, beside: list[int]
) -> None:
    """Results are within what another chunking changes anyway."""
    with index(model, chunk=chunk) as prefixes, Engine(
        model, slots=4, context=CONTEXT, chunk=chunk, prefixes=prefixes
    ) as engine:  # fmt: skip
        first = prompt(length, seed)
        others = [engine.submit(Request(prompt(other, seed + 1), stop_tokens=NEVER)) for other in beside]
        [answer] = engine.complete(Request(first, 6, stop_tokens=NEVER, exact=False))
        turn = [*first, *answer.token_ids, *prompt(4, seed)]
        loose, exact, none = (
            engine.complete(Request(turn, 1, logprobs=5, stop_tokens=NEVER, **more))[0]
            for more in ({"exact": False}, {"exact": True}, {"use_prefixes": False})
        )
        for other in others:
            other.cancel()
    cached = [one.usage.cached_tokens for one in (loose, exact, none) if one.usage]
    assert cached == [length + 5, length // chunk * chunk, 0]
    for got in (loose, exact):  # equal logits may change places
        np.testing.assert_allclose(*([value for _, value in one.logprobs[0].top] for one in (got, none)), atol=1e-3)


def test_kept_states_are_there_after_a_restart(model: Model, tmp_path: Path) -> None:
    request = Request(prompt(2 * CHUNK + 5), max_new_tokens=3, logprobs=1, stop_tokens=NEVER)
    answers = []
    for _ in range(2):
        with index(model, folder=tmp_path / "kept", disk_bytes=1 << 28) as prefixes, Engine(
            model, slots=2, context=CONTEXT, chunk=CHUNK, prefixes=prefixes
        ) as engine:  # fmt: skip
            answers.append(engine.complete(request)[0])
            prefixes.flush()
    assert [answer.usage.cached_tokens for answer in answers if answer.usage] == [0, 2 * CHUNK]
    assert answers[0].logprobs == answers[1].logprobs


def test_completions_of_a_request_share_its_prompt_and_draw_for_themselves(engine: Engine, model: Model) -> None:
    hot = Sampling(temperature=1.2, seed=4)
    request = Request(prompt(50), max_new_tokens=6, n=5, sampling=hot, stop_tokens=NEVER)
    chunks = engine.stats().chunk_steps
    completions = engine.complete(request)
    assert engine.stats().chunk_steps - chunks == 2, "fed once"
    assert [one.index for one in completions] == list(range(5))
    for number, completion in enumerate(completions):
        assert list(completion.token_ids) == alone(model, request, number)


def test_text_ends_where_it_should(engine: Engine, model: Model) -> None:
    whole = engine.complete(Request("def ", max_new_tokens=12, stop_tokens=NEVER))[0]
    assert whole.text == Tokenizer.from_bundle(model.bundle).decode(whole.token_ids)
    mark = whole.text[3:5]
    ended = engine.complete(Request("def ", max_new_tokens=12, stop=mark, stop_tokens=NEVER))[0]
    assert ended.finish_reason == "stop" and ended.stop_reason == mark
    assert ended.text == whole.text[: whole.text.index(mark)]
    token = whole.token_ids[4]
    ended = engine.complete(Request("def ", max_new_tokens=12, stop_tokens=[token]))[0]
    assert ended.stop_reason == token and ended.token_ids == whole.token_ids[: whole.token_ids.index(token)]
    filled = engine.complete(Request(prompt(CONTEXT - 3), stop_tokens=NEVER))[0]
    assert filled.finish_reason == "length" and len(filled.token_ids) == 4, "the last one is not fed"


class OnlyDigits:
    """Three digits, nothing else."""

    def __init__(self) -> None:
        self.left = 3

    def allowed(self) -> np.ndarray[Any, np.dtype[np.bool_]]:
        mask = np.zeros(258, bool)
        mask[48:58] = True
        return mask

    def took(self, token: int) -> None:
        assert 48 <= token < 58
        self.left -= 1

    @property
    def ended(self) -> bool:
        return self.left == 0


def test_answers_keep_to_their_constraint(engine: Engine) -> None:
    request = Request(
        "x = ", max_new_tokens=9, n=2, constraint=OnlyDigits, sampling=Sampling(temperature=1.0), stop_tokens=NEVER
    )
    for completion in engine.complete(request):
        assert completion.text.isdigit() and len(completion.text) == 3 and completion.finish_reason == "stop"

    class Broken(OnlyDigits):
        def took(self, token: int) -> None:
            raise RuntimeError("broken")

    beside = engine.submit(Request("x", max_new_tokens=5, stop_tokens=NEVER))
    with pytest.raises(RuntimeError, match="broken"):
        engine.complete(Request("x", max_new_tokens=5, constraint=Broken))
    assert beside.result()[0].finish_reason == "length", "others go on"


@pytest.mark.parametrize("invariant", [False, True])
def test_a_completion_that_fails_ends_the_others_of_its_request_in_the_same_step(model: Model, invariant: bool) -> None:
    """Also if that step would have given them their last token."""
    made = list[OnlyDigits]()

    class Limited(OnlyDigits):
        def __init__(self) -> None:
            super().__init__()
            made.append(self)

        def took(self, token: int) -> None:
            super().took(token)
            if self is made[0] and self.left == 1:
                raise RuntimeError("broken")

    given = list[Completion | BaseException]()
    request = Request(prompt(9), max_new_tokens=2, n=3, constraint=Limited, stop_tokens=NEVER)
    with Session(model, context=CONTEXT, batch=3, chunk=CHUNK) as session:
        scheduler = Scheduler(session, batch_invariant=invariant)
        scheduler.add(Group(check_request(request, model.bundle, None, CONTEXT), "", None, given.append))
        while scheduler.busy:
            scheduler.step()
        assert scheduler.counts.finished == {"error": 3} and scheduler.counts.new_tokens == 3
    assert isinstance(given[-1], RuntimeError), "nothing comes after the error"


def test_who_leaves_early_leaves_at_once(engine: Engine) -> None:
    endless = Request(prompt(20), stop_tokens=NEVER)
    stream = engine.stream(endless)
    next(stream)
    stream.close()
    running = [engine.submit(endless) for _ in range(3)]
    queued = engine.submit(endless)
    next(running[0])
    queued.cancel()
    [completion] = queued.result()
    assert (completion.finish_reason, completion.token_ids) == ("cancelled", ())
    for generation in running:
        generation.cancel()
        assert generation.result()[0].finish_reason == "cancelled"
    late = engine.complete(Request(prompt(20), stop_tokens=NEVER, timeout=0.05))[0]
    assert late.finish_reason == "timeout" and late.usage is not None

    async def leave() -> int:
        count = 0
        async for _ in engine.generate(endless):
            count += 1
            if count == 2:
                break
        both = await asyncio.gather(*(collected(engine, mixed(2)[number]) for number in (0, 1)))
        return sum(len(pieces) for pieces in both)

    async def collected(engine: Engine, request: Request) -> list[Completion]:
        return [piece async for piece in engine.generate(request)]

    assert asyncio.run(leave()) > 2
    assert engine.drain(20)
    assert engine.stats().running == engine.stats().waiting == 0


def test_a_full_queue_refuses_and_a_closed_engine_too(model: Model) -> None:
    endless = Request([1], stop_tokens=NEVER)
    with Engine(model, slots=1, context=CONTEXT, chunk=CHUNK, max_queue=2) as engine:
        first = engine.submit(endless)
        next(first)
        waiting = [engine.submit(endless) for _ in range(2)]
        with pytest.raises(QueueFullError, match="2 requests wait"):
            engine.submit(endless)
        assert not engine.not_ready() and not engine.drain(0.01) and engine.not_ready()
        with pytest.raises(InputError, match="being closed"):
            engine.submit(endless)
    assert [one.result()[0].finish_reason for one in (first, *waiting)] == ["cancelled"] * 3
    engine.close()


def test_a_failed_step_ends_who_was_in_it_and_nobody_else(
    engine: Engine, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = mixed(1)[0]
    expected = engine.complete(request)[0].token_ids
    forward, failing = Session.forward, threading.Event()

    def fails_once(self: Session, *given: Any, **more: Any) -> Any:
        if failing.is_set():
            failing.clear()
            self._torn = True
            raise FoldkvError("ONNX Runtime failed")
        return forward(self, *given, **more)

    running = engine.submit(Request([1], stop_tokens=NEVER))
    next(running)
    monkeypatch.setattr(Session, "forward", fails_once)
    failing.set()
    with pytest.raises(FoldkvError, match="ONNX Runtime failed"):
        running.result()
    assert engine.complete(request)[0].token_ids == expected and not engine.not_ready()


def test_a_failed_step_keeps_nothing_and_the_engine_goes_on(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """With steps computed alone, one answer can have ended in the very step in which another one fails."""
    forward, left = Session.forward, [5]

    def fails_later(self: Session, chunks: Any, **more: Any) -> Any:
        left[0] -= 1
        if left[0] == 0:
            self._torn = True
            raise FoldkvError("ONNX Runtime failed")
        return forward(self, chunks, **more)

    with index(model) as prefixes, Engine(
        model, slots=2, context=CONTEXT, chunk=CHUNK, prefixes=prefixes, batch_invariant=True
    ) as engine:  # fmt: skip
        monkeypatch.setattr(Session, "forward", fails_later)
        # A chunk and a chunk of each, with a step of the first between; then a step in which the first ends and the second fails.
        for first_most in range(1, 5):
            left[0] = 5
            pair = [
                engine.submit(Request(prompt(9, number), most, exact=False, stop_tokens=NEVER))
                for number, most in enumerate((first_most, 50))
            ]
            with pytest.raises(FoldkvError, match="ONNX Runtime failed"):
                for generation in pair:
                    generation.result()
            for generation in pair:
                generation.cancel()
        assert not engine.not_ready()
        assert engine.complete(Request(prompt(9), 2, stop_tokens=NEVER))[0].finish_reason == "length"
        monkeypatch.setattr(Session, "snapshot_slot", lambda self, slot: (_ for _ in ()).throw(MemoryError()))
        assert engine.complete(Request(prompt(50, 7), 2, stop_tokens=NEVER))[0].finish_reason == "length"


def test_many_completions_of_one_request_keep_nobody_out(model: Model) -> None:
    def group(request: Request) -> Group:
        checked = check_request(request, model.bundle, None, CONTEXT)
        return Group(checked, request.id or "", None, lambda _: None)

    large = group(Request(prompt(300), 3, n=128, stop_tokens=NEVER))
    assert all(answer._writer is None for answer in large.answers), "what each needs is made when it begins"
    small = group(Request(prompt(4), 1, stop_tokens=NEVER))
    with Session(model, context=CONTEXT, chunk=CHUNK) as session:
        scheduler = Scheduler(session)
        scheduler.add(large)
        while not scheduler.counts.new_tokens:
            scheduler.step()
        scheduler.add(small)
        while not small.ended:
            scheduler.step()
        assert scheduler.counts.new_tokens < 10, "the small one did not wait for all of the large one"
        large.cancelled = True
        while scheduler.busy:
            scheduler.step()
        assert scheduler.counts.finished["cancelled"] > 100
        assert scheduler.counts.finished.total() == 129


def test_a_step_wakes_an_event_loop_once_however_many_wait_in_it(engine: Engine) -> None:
    woken = list[str]()

    async def ask() -> list[list[Completion]]:
        loop = asyncio.get_running_loop()
        wake = loop.call_soon_threadsafe

        def counted(*given: Any, **more: Any) -> Any:
            woken.append(threading.current_thread().name)
            return wake(*given, **more)

        loop.call_soon_threadsafe = counted  # type: ignore[method-assign]
        return await asyncio.gather(*(pieces(Request(prompt(9, one), 12, stop_tokens=NEVER)) for one in range(3)))

    async def pieces(request: Request) -> list[Completion]:
        return [piece async for piece in engine.generate(request)]

    before = engine.stats()
    answers = asyncio.run(ask())
    after = engine.stats()
    assert [sum(len(piece.token_ids) for piece in answer) for answer in answers] == [12, 12, 12]
    steps = after.decode_steps - before.decode_steps + after.chunk_steps - before.chunk_steps
    assert 0 < woken.count("foldkv-engine") <= steps < 36


def test_what_a_client_has_been_given_is_counted(model: Model) -> None:
    """At once, not when the step is over; failures and requests that never began too."""
    given: list[tuple[int, int]] = []

    def give(piece: Completion | BaseException) -> None:
        assert not isinstance(piece, BaseException)
        given.append((scheduler.counts.new_tokens, scheduler.counts.finished.total()))

    with Session(model, context=CONTEXT, chunk=CHUNK) as session:
        scheduler = Scheduler(session)
        request = Request(prompt(9), 3, n=2, stop_tokens=NEVER)
        scheduler.add(Group(check_request(request, model.bundle, None, CONTEXT), "", None, give))
        while scheduler.busy:
            scheduler.step()
        assert given == [(1, 0), (2, 0), (3, 0), (3, 1), (4, 1), (5, 1), (6, 1), (6, 2)]
        assert scheduler.counts.finished == {"length": 2}


@dataclass
class Disk:
    """A disk that gives nothing while it is ``stuck``."""

    folder: Path
    free: threading.Event = field(default_factory=threading.Event)
    asked: threading.Event = field(default_factory=threading.Event)
    readers: list[str] = field(default_factory=list)  # names of threads

    @contextmanager
    def stuck(self) -> Iterator[None]:
        self.free.clear(), self.asked.clear(), self.readers.clear()
        try:
            yield
        finally:
            self.free.set()


#: After this and anything else a state of 2 chunks is on the disk.
SHARED = prompt(2 * CHUNK + 5, 3)


@pytest.fixture
def disk(model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Disk:
    disk, load = Disk(tmp_path / "kept"), PrefixFolder._load
    with kept(model, disk) as prefixes, Engine(model, context=CONTEXT, chunk=CHUNK, prefixes=prefixes) as engine:
        engine.complete(Request(SHARED, 1, stop_tokens=NEVER))

    def slow(self: PrefixFolder, path: Path, key: Any) -> Any:
        disk.readers.append(threading.current_thread().name)
        disk.asked.set()
        assert disk.free.wait(10)
        return load(self, path, key)

    monkeypatch.setattr(PrefixFolder, "_load", slow)
    return disk


def kept(model: Model, disk: Disk) -> PrefixIndex:
    """No state has room in memory."""
    return index(model, memory_bytes=1000, folder=disk.folder, disk_bytes=1 << 24)


def test_reading_a_kept_state_from_disk_holds_up_nobody_else(model: Model, disk: Disk) -> None:
    def request(more: int, **options: Any) -> Request:
        return Request([*SHARED, more], 2, stop_tokens=NEVER, **options)

    with kept(model, disk) as prefixes, Engine(
        model, slots=3, context=CONTEXT, chunk=CHUNK, prefixes=prefixes
    ) as engine:  # fmt: skip
        with disk.stuck():
            reading = [engine.submit(request(1)), engine.submit(request(2))]
            assert disk.asked.wait(10)
            [other] = engine.complete(Request(prompt(9), 3, stop_tokens=NEVER))
            [late] = engine.complete(request(3, timeout=0.05))
            gone = engine.submit(request(4))
            gone.cancel()
            reasons = [one.finish_reason for one in (other, late, *gone.result())]
            assert reasons == ["length", "timeout", "cancelled"] and len(disk.readers) == 1
        for answer in [*reading[0].result(), *reading[1].result()]:
            assert answer.usage is not None and answer.usage.cached_tokens == 2 * CHUNK
        # It was read once for both, is not in memory, and was not read again when they began.
        assert len(disk.readers) == 1 and disk.readers[0].startswith("foldkv-prefixes")
        stats = prefixes.stats()
        assert (stats.hits, stats.misses, stats.memory_bytes) == (2, 1, 0)


def test_a_request_whose_kept_state_is_being_read_ends_with_the_engine(
    model: Model, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    for failing in (False, True):
        with kept(model, disk) as prefixes, Engine(
            model, slots=2, context=CONTEXT, chunk=CHUNK, prefixes=prefixes
        ) as engine, disk.stuck():  # fmt: skip
            waiting = engine.submit(Request([*SHARED, 1], 3, stop_tokens=NEVER))
            assert disk.asked.wait(10)
            if failing:
                monkeypatch.setattr(engine._scheduler, "step", lambda: 1 / 0)
                with pytest.raises(FoldkvError, match="division"):
                    waiting.result()
                assert engine.stats().finished == {"error": 1}
            else:
                closing = threading.Thread(target=engine.close)
                closing.start()
                assert waiting.result()[0].finish_reason == "cancelled"
                assert closing.is_alive(), "it waits for the disk"
                disk.free.set()
                closing.join()
                assert engine.stats().finished == {"cancelled": 1}


def test_an_index_for_other_chunks_is_refused(model: Model) -> None:
    with index(model, chunk=CHUNK * 2) as prefixes, pytest.raises(InputError, match=rf"chunk={CHUNK}"):
        Engine(model, slots=1, context=CONTEXT, chunk=CHUNK, prefixes=prefixes)


def test_the_end_of_a_sequence_is_no_stop_reason(engine: Engine, model: Model) -> None:
    [end] = model.bundle.model.eos_token_ids
    sure = Sampling(logit_bias={end: 1000.0})
    for stops in (None, [5, end]):
        [completion] = engine.complete(Request(prompt(4), 5, sure, stop_tokens=stops))
        assert (completion.finish_reason, completion.stop_reason, completion.token_ids) == ("stop", None, ())


def test_a_request_leaves_one_line(engine: Engine, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "foldkv.serving"):
        engine.complete(Request("secret words", max_new_tokens=2, n=2, id="mine", stop_tokens=NEVER))
        engine.drain(5)
    [line] = [record.getMessage() for record in caplog.records if record.name == "foldkv.serving"]
    assert (
        line.startswith("request mine: 12 prompt tokens, 0 of them kept, 4 new in 2 completions")
        and "secret" not in line
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": ""}, "no token"), ({"prompt": []}, "empty"), ({"prompt": [300]}, "token 0 of the prompt is 300"),
        ({"prompt": [True]}, "token 0"), ({"prompt": 5}, "text or a list"), ({"prompt": ["a"]}, "text or a list"),
        ({"max_new_tokens": 0}, "max_new_tokens"), ({"n": 0}, "n must"), ({"n": 1000}, "n must"), ({"logprobs": -1}, "logprobs"),
        ({"logprobs": True}, "logprobs"), ({"timeout": 0}, "timeout"), ({"timeout": float("nan")}, "timeout"), ({"stop": ""}, "stop string"),
        ({"stop": [1]}, "stop must"), ({"stop_tokens": [258]}, "stop_tokens"), ({"sampling": 1}, "Sampling"), ({"id": 1}, "id must"),
        ({"constraint": 3}, "constraint"), ({"exact": 1}, "exact"), ({"sampling": Sampling(logit_bias={999: 1.0})}, "logit_bias"),
        ({"max_new_tokens": CONTEXT + 1}, "exceed the context of 512"), ({"prompt": [1] * (CONTEXT + 1)}, "exceed the context"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_refused_before_anything_runs(
    model: Model, options: dict[str, Any], message: str
) -> None:
    request = Request(**({"prompt": "a"} | options))
    with pytest.raises(InputError, match=message) as caught:
        check_request(request, model.bundle, Tokenizer.from_bundle(model.bundle), CONTEXT)
    assert isinstance(caught.value, CapacityError) == ("exceed" in message)
