"""The index of prefixes in memory, against a model that compares every entry."""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from slot_snapshots import MEANING, equal, snapshot

from foldkv.errors import InputError
from foldkv.runtime.serving import prefix_files, prefixes
from foldkv.runtime.serving.prefixes import PrefixIndex

Tokens = tuple[int, ...]
#: Few tokens, so that many of them begin with each other.
TOKENS = st.lists(st.integers(0, 1), min_size=1, max_size=5).map(tuple)
STEPS = st.lists(st.tuples(st.sampled_from(["put", "find"]), TOKENS, st.booleans()), max_size=40)


def index(memory_bytes: int = 1 << 30, producer: str = "this") -> PrefixIndex:
    return PrefixIndex(MEANING, producer=producer, memory_bytes=memory_bytes)


def size_of(tokens: Tokens) -> int:
    return snapshot(tokens).bytes + 4 * len(tokens)


@dataclass
class Model:
    """What an index in memory must do: a list of entries, the least recently used first."""

    most: int
    held: list[tuple[Tokens, bool]] = field(default_factory=list)
    evictions: int = 0

    @property
    def bytes(self) -> int:
        return sum(size_of(tokens) for tokens, _ in self.held)

    def put(self, tokens: Tokens, exact: bool) -> None:
        old = [one for one in self.held if one[0] == tokens]
        best = exact or any(was for _, was in old)
        self.held = [one for one in self.held if one[0] != tokens]
        if size_of(tokens) <= self.most:
            self.held.append((tokens, best))
        while self.bytes > self.most:
            self.held.pop(0)
            self.evictions += 1

    def find(self, tokens: Tokens, exact: bool) -> tuple[Tokens, bool] | None:
        fit = [
            one for one in self.held if one[0] == tokens[: len(one[0])] and one[0] != tokens and (one[1] or not exact)
        ]
        if not fit:
            return None
        best = max(fit, key=lambda one: len(one[0]))
        self.held.remove(best)
        self.held.append(best)
        return best


@settings(max_examples=50, deadline=None)
@given(steps=STEPS, most=st.sampled_from([0, size_of((0, 0, 0)), 3 * size_of((0, 0, 0)), 1 << 30]))
def test_it_finds_what_a_search_of_all_entries_finds(steps: list[tuple[str, Tokens, bool]], most: int) -> None:
    ours, model = index(most), Model(most)
    found = {True: 0, False: 0}
    for step, tokens, exact in steps:
        if step == "put":
            ours.put(tokens, snapshot(tokens), exact=exact)
            model.put(tokens, exact)
        else:
            hit, wanted = ours.find(tokens, exact=exact), model.find(tokens, exact)
            assert (hit is None) == (wanted is None)
            if hit is not None and wanted is not None:
                assert (hit.length, hit.exact) == (len(wanted[0]), wanted[1])
                assert equal(hit.snapshot, snapshot(wanted[0]))
                found[hit.exact] += 1
        stats = ours.stats()
        assert (stats.entries, stats.memory_bytes) == (len(model.held), model.bytes)
        assert stats.evictions == model.evictions
    stats = ours.stats()
    assert (stats.hits, stats.exact_hits) == (sum(found.values()), found[True])
    assert stats.hits + stats.misses == sum(step == "find" for step, *_ in steps)


@settings(max_examples=20, deadline=None)
@given(steps=STEPS)
def test_equal_digests_never_give_another_state(steps: list[tuple[str, Tokens, bool]]) -> None:
    """With digests of so few values that most tokens share theirs."""

    class Coarse:
        def __init__(self) -> None:
            self.sum = 0

        def update(self, data: Any) -> None:
            self.sum += bytes(data).count(1)

        def copy(self) -> Coarse:
            other = Coarse()
            other.sum = self.sum
            return other

        def digest(self) -> bytes:
            return bytes([self.sum % 2])

    with pytest.MonkeyPatch.context() as patch:
        for module in (prefixes, prefix_files):
            patch.setattr(module, "new_digest", Coarse)
        ours, put = index(), dict[Tokens, bool]()
        for step, tokens, exact in steps:
            if step == "put":
                ours.put(tokens, snapshot(tokens), exact=exact)
                put[tokens] = put.get(tokens, False) or exact
                hit = ours.find((*tokens, 7), exact=False)
                assert hit is not None and hit.length == len(tokens)
            else:
                hit = ours.find(tokens, exact=exact)
            if hit is not None:
                assert equal(hit.snapshot, snapshot(tokens[: hit.length]))
                assert put[tokens[: hit.length]] or not hit.exact


def test_an_exact_snapshot_takes_the_place_of_an_inexact_one_and_keeps_it() -> None:
    ours, tokens = index(), (5, 6, 7)
    rough, cold = snapshot(tokens, salt=1), snapshot(tokens, salt=2)
    ours.put(tokens, rough, exact=False)
    assert ours.find((*tokens, 8), exact=True) is None
    ours.put(tokens, cold, exact=True)
    ours.put(tokens, rough, exact=False)
    for exact in (True, False):
        hit = ours.find((*tokens, 8), exact=exact)
        assert hit is not None and hit.exact and hit.snapshot is cold


def test_at_least_one_token_is_left_to_feed() -> None:
    ours = index()
    ours.put([1, 2], snapshot([1, 2]), exact=True)
    assert ours.find([1, 2], exact=False) is None
    assert ours.find([1], exact=False) is None
    assert ours.find([], exact=False) is None
    hit = ours.find(np.array([1, 2, 3], np.int64), exact=True)
    assert hit is not None and hit.length == 2
    assert ours.stats().reused_tokens == 2 and ours.stats().misses == 3


def test_tokens_that_a_caller_changes_later_are_a_copy() -> None:
    ours, tokens = index(), np.array([1, 2, 3], np.int32)
    ours.put(tokens, snapshot([1, 2, 3]), exact=True)
    tokens[:] = 9
    assert ours.find([1, 2, 3, 4], exact=True) is not None
    assert ours.find([9, 9, 9, 4], exact=True) is None


def test_a_lookup_hashes_each_token_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many entries there are, and up to the longest of them only."""
    ours, prompt, hashed = index(), tuple(range(200)), list[int]()
    for length in range(1, 100, 3):
        ours.put(prompt[:length], snapshot(prompt[:length]), exact=True)
        ours.put((*prompt[1:length], 7), snapshot((*prompt[1:length], 7)), exact=True)

    class Counted:
        def __init__(self, inner: Any = None) -> None:
            self.inner = hashlib.blake2b(digest_size=16) if inner is None else inner

        def update(self, data: Any) -> None:
            hashed.append(len(data))
            self.inner.update(data)

        def copy(self) -> Counted:
            return Counted(self.inner.copy())

        def digest(self) -> bytes:
            return bytes(self.inner.digest())

    monkeypatch.setattr(prefixes, "new_digest", Counted)
    hit = ours.find(prompt, exact=True)
    assert hit is not None and hit.length == 97 == sum(hashed)


@pytest.mark.parametrize(
    ("tokens", "given_snapshot", "message"),
    [
        ([1, 2], snapshot([1, 2, 3]), "got 2 tokens for a snapshot of 3"),
        ([], snapshot([]), "at least one"),
        ([1, 2], replace(snapshot([1, 2]), pending=7), "token 7 pending"),
        ([1, 2], replace(snapshot([1, 2]), meaning=replace(MEANING, profile="served")), "served"),
        ([1, -2], snapshot([1, 2]), "must be a list of token ids"),
        ([1, 1 << 31], snapshot([1, 2]), "must be a list of token ids"),
        ([1.0, 2.0], snapshot([1, 2]), "must be a list of token ids"),
        ([[1, 2]], snapshot([1, 2]), "must be a list of token ids"),
        ("ab", snapshot([1, 2]), "must be a list of token ids"),
    ],
)
def test_a_wrong_snapshot_is_refused(tokens: Any, given_snapshot: Any, message: str) -> None:
    ours = index()
    with pytest.raises(InputError, match=message):
        ours.put(tokens, given_snapshot, exact=True)
    assert ours.stats().entries == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"memory_bytes": -1}, "memory_bytes must be"),
        ({"memory_bytes": 1.5}, "memory_bytes must be"),
        ({"memory_bytes": 1, "disk_bytes": True}, "disk_bytes must be"),
        ({"memory_bytes": 1, "disk_bytes": 5}, "Give both"),
        ({"memory_bytes": 1, "folder": "here"}, "Give both"),
    ],
)
def test_wrong_arguments_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        PrefixIndex(MEANING, producer="this", **options)


def test_a_closed_index_finds_and_keeps_nothing() -> None:
    with index() as ours:
        ours.put([1], snapshot([1]), exact=True)
    ours.put([2], snapshot([2]), exact=True)
    assert ours.find([1, 2], exact=False) is None and ours.find([2, 2], exact=False) is None
    assert (ours.stats().entries, ours.stats().memory_bytes) == (0, 0)
    ours.close()


def test_threads_share_an_index() -> None:
    most = 20 * size_of((0, 0, 0))
    ours = index(most)

    def use(worker: int) -> int:
        for number in range(100):
            tokens = (number, number % 7, worker % 2)
            ours.put(tokens, snapshot(tokens), exact=bool(number % 2))
            hit = ours.find((*tokens, 5), exact=False)
            assert hit is None or equal(hit.snapshot, snapshot(tokens))
            stats = ours.stats()
            assert stats.memory_bytes <= most and stats.exact_hits <= stats.hits
        return 100

    with ThreadPoolExecutor(4) as pool:
        assert sum(pool.map(use, range(4))) == 400
    stats = ours.stats()
    assert stats.hits + stats.misses == 400 and stats.hits > 300
    assert (stats.entries, stats.memory_bytes) == (20, most)
