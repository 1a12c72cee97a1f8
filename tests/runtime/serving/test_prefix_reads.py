"""Kept states that are read from disk for several answers at once."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from slot_snapshots import MEANING, snapshot

from foldkv.runtime.serving.prefix_files import PrefixFolder
from foldkv.runtime.serving.prefix_reads import PrefixReads
from foldkv.runtime.serving.prefixes import PrefixIndex


class Asker:
    """An answer, as far as reads know one."""

    group = SimpleNamespace(id="r")


def test_answers_that_share_a_read_get_a_state_of_their_own_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A longer state of the one that asked first may be kept before a thread is free."""
    shared = list(range(8))
    prompts = {"a": [*shared, *range(100, 109)], "b": [*shared, 200, 201]}
    others = [[50 + number] * 6 for number in range(4)]
    free, load = threading.Event(), PrefixFolder._load
    make: Any = {"producer": "p", "memory_bytes": 10, "folder": tmp_path, "disk_bytes": 1 << 24}

    def slow(self: PrefixFolder, *given: Any) -> Any:
        assert free.wait(30)
        return load(self, *given)

    with PrefixIndex(MEANING, **make) as index:
        for tokens in (shared, *others):
            index.put(tokens, snapshot(tokens), exact=True)
        index.flush()
        monkeypatch.setattr(PrefixFolder, "_load", slow)
        reads = PrefixReads(index, lambda: None)
        for tokens in others:  # all threads
            assert reads.begin(Asker(), np.array([*tokens, 1]), exact=True)  # type: ignore[arg-type]
        askers = {name: Asker() for name in prompts}
        for name, asker in askers.items():
            assert reads.begin(asker, np.array(prompts[name]), exact=True)  # type: ignore[arg-type]
        longer = prompts["a"][:16]
        index.put(longer, snapshot(longer), exact=True)
        free.set()
        while any(reads.waits(asker) for asker in askers.values()):  # type: ignore[arg-type]
            time.sleep(0.01)
        found = {id(asker): hit for asker, hit in reads.done()}
        for asker in askers.values():
            hit = found[id(asker)]
            assert hit is not None and hit.length == len(shared)
        reads.close()
