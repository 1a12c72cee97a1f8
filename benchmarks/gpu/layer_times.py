"""How long each call of a cut model takes in a session, and the bytes that it must read. See ``step_layers.py``."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import lcm
from pathlib import Path
from typing import Any

import numpy as np
from checks import Notes
from marks import Marks

from foldkv.export.contract.chain import STEP
from foldkv.export.contract.engine_set import ENGINES, EngineTable
from foldkv.export.contract.geometry import ModelSpec
from foldkv.export.contract.lock import LOCK, WeightsLock
from foldkv.manifests import BundleManifest, read
from foldkv.optimize.floor import state_floor, stored_read
from foldkv.runtime.session import Session
from foldkv.runtime.snapshots import Snapshot


@dataclass(frozen=True)
class Sizes:
    """What is measured.

    Attributes:
        contexts: tokens that a sequence can hold; steps are at the end of it.
        batches: sequences of a decode step.
        prefilled: tokens of the prefill whose rows are repeated.
        compared: steps whose bits are compared, enqueued and captured.
        enqueued: steps that are timed when enqueued.
        captured: steps that are timed when replayed: a multiple of the tokens of an HCA window, so that every kind of step counts
            as often as it comes.
        chunk: tokens of a prefill chunk.
        chunks: chunks that are timed.
    """

    contexts: tuple[int, ...] = (1 << 20, 8192)
    batches: tuple[int, ...] = (1, 8)
    prefilled: int = 1024
    compared: int = 4
    enqueued: int = 16
    captured: int = 128
    chunk: int = 256
    chunks: int = 3

    def held(self, context: int, unit: int) -> int:
        """Tokens that a sequence holds before everything else is measured: the most, but a multiple of ``unit``."""
        steps = self.compared + max(self.enqueued, self.captured)
        return (context - max(steps, self.chunk * self.chunks)) // unit * unit


class Floors:
    """The bytes that a decode step must read in each segment of a bundle, as the planner counts them (optimize/floor.py).

    Attributes:
        layout: of the cache rows.
    """

    def __init__(self, bundle: Path, spec: ModelSpec) -> None:
        """Args: bundle: folder of an engine bundle; spec: of its model."""
        self._spec = spec
        self._manifest, self._table = read(BundleManifest, bundle), EngineTable.read(bundle / ENGINES)
        self._lock = WeightsLock.read(bundle / LOCK)
        self.layout = self._manifest.layout

    def of_segment(self, segment: str, context: int, batch: int) -> dict[str, int]:
        """Bytes of "weights" as stored and of "state" that a step of ``batch`` sequences after ``context`` tokens reads."""
        if segment == STEP:
            return {"weights": 0, "state": 0}
        call = next(call for call in self._table.calls if call.segment == segment)  # every one of a kind has as many
        stored, spec = self._lock.weights[call.owner], self._spec
        weights = sum(stored_read(spec, role, stored[role].bytes, batch) for role in self._table.weights[segment])
        dtype = self._manifest.target.precision
        rows = 0 if call.layer is None else state_floor(spec, self.layout, context, dtype, layer=call.layer)
        return {"weights": weights, "state": batch * rows}


def unit(spec: ModelSpec) -> int:
    """Tokens after which every ring of the state and every window begins anew."""
    return lcm(spec.sliding_window, *(ratio for ratio in spec.ratios if ratio))


def deepened(session: Session, snapshot: Snapshot, tokens: int) -> Snapshot:
    """A snapshot of sequences that hold ``tokens`` tokens: every slot has the first slot's rows, repeated.

    Rings and open windows are as they were: so ``tokens``, and the tokens of the snapshot, are multiples of :func:`unit`.
    """
    rows = tuple(
        np.resize(row, (tensor.used_rows(tokens), tensor.width)) if tensor.ratio else row
        for tensor, row in zip(session.bundle.state.tensors, snapshot.rows[0], strict=True)
    )
    batch = session.batch
    return Snapshot(snapshot.meaning, snapshot.context, (tokens,) * batch, (None,) * batch, (rows,) * batch)


class LayerTimes:
    """Measures one session of a cut model."""

    def __init__(self, notes: Notes, session: Session, marks: Marks, case: Mapping[str, Any], sizes: Sizes) -> None:
        """Args: notes: know what is done; session: empty; marks: of its engines; case: what was prepared (prepare_layers.py)."""
        self._notes, self._session, self._marks, self._case, self._sizes = notes, session, marks, case, sizes
        self._engines: Any = session.model._loaded  # of no concern to services: whether steps are captured
        self._captures: bool = self._engines.captures
        self._where = f"context {session.context}, batch {session.batch}"
        self._random = np.random.default_rng(0)
        self.held = 0

    def begin(self, spec: ModelSpec) -> Snapshot:
        """Prefill one sequence, and repeat its rows up to the context in all of them; the state to begin with."""
        session, every = self._session, unit(spec)
        self._at("prefilling")
        session.forward([self._tokens(self._sizes.prefilled), *[[]] * (session.batch - 1)])
        self.held = self._sizes.held(session.context, every)
        if self._sizes.prefilled % every or not self._sizes.prefilled <= self.held:
            raise ValueError(f"{self._sizes.prefilled} tokens cannot be repeated up to {self.held} in units of {every}")
        self._at("repeating rows")
        return deepened(session, session.snapshot(), self.held)

    def decode(self, start: Snapshot, floors: Floors, bandwidth: float) -> tuple[dict[str, Any], list[str]]:
        """A row of decode steps, enqueued and captured, and what failed.

        Args:
            start: the state before each of both.
            floors: of the bundle.
            bandwidth: of copies, in bytes per second.
        """
        sizes, session = self._sizes, self._session
        tokens = [self._step() for _ in range(sizes.compared + max(sizes.enqueued, sizes.captured))]
        self._engines.captures = False
        plain = self._run(start, tokens, sizes.enqueued, "enqueued")
        self._engines.captures = self._captures
        captured = self._run(start, tokens, sizes.captured, "captured")
        same = all(np.array_equal(a, b) for a, b in zip(plain.compared, captured.compared, strict=True))
        finite = all(bool(np.isfinite(one).all()) for one in (*plain.compared, *captured.compared, captured.last))
        failures = [] if captured.replayed else ["steps were not captured"]
        failures += [] if same else ["captured steps give other bits than enqueued ones"]
        failures += [] if finite else ["logits are not finite"]
        counts = {STEP: 1, "embed": 1, "head": 1} | self._case["counts"]
        segments: dict[str, dict[str, Any]] = {}
        for segment, times in captured.times.items():
            floor = floors.of_segment(segment, self.held, session.batch)
            floor_ms = 1e3 * sum(floor.values()) / bandwidth
            median = statistics.median(times)
            segments[segment] = {
                "kind": self._case["kinds"].get(segment, ""), "ms": median, "mean_ms": statistics.mean(times),
                "enqueued_ms": statistics.median(plain.times[segment]), "floor_bytes": floor, "floor_ms": floor_ms,
                "share_of_floor": floor_ms / median, "in_model": counts[segment],
            }  # fmt: skip
        whole = {
            key: sum(one["in_model"] * one[key] for one in segments.values()) for key in ("ms", "mean_ms", "floor_ms")
        }
        row = {
            "step": "decode", "held": self.held, "captured": captured.replayed, "same_bits": same, "finite": finite,
            "segments": segments, "wall_ms": captured.wall_ms, "enqueued_wall_ms": plain.wall_ms,
            "extrapolated": {"layers": self._case["layers"], **whole},
        }  # fmt: skip
        return row, failures

    def chunk(self, start: Snapshot) -> dict[str, Any]:
        """A row of the first sequence's prefill chunks, which are never captured."""
        self._at("prefilling a chunk")
        self._session.restore(start)
        times: list[dict[str, float]] = []
        for _ in range(self._sizes.chunks):
            self._session.forward([self._tokens(self._sizes.chunk), *[[]] * (self._session.batch - 1)])
            times.append(self._marks.milliseconds())
        each = {segment: statistics.median(one[segment] for one in times) for segment in times[0]}
        counts = {STEP: 1, "embed": 1, "head": 1} | self._case["counts"]
        whole = sum(counts[segment] * ms for segment, ms in each.items())
        return {
            "step": "chunk", "held": self.held, "chunk": self._sizes.chunk, "captured": False,
            "segments": {segment: {"ms": ms, "in_model": counts[segment]} for segment, ms in each.items()},
            "extrapolated": {"layers": self._case["layers"], "ms": whole},
        }  # fmt: skip

    def _run(self, start: Snapshot, tokens: Sequence[list[int]], timed: int, how: str) -> _Steps:
        """Steps whose logits are kept, then steps that are timed."""
        session, marks, compared = self._session, self._marks, self._sizes.compared
        self._at(f"decoding, {how}")
        session.restore(start)
        kept = [session.decode(step) for step in tokens[:compared]]
        self._at(f"timing steps, {how}")
        before, times, wall = marks.enqueued, list[dict[str, float]](), list[float]()
        last = kept[-1]
        for step in tokens[compared : compared + timed]:
            begun = time.perf_counter()
            last = session.decode(step)  # the logits come back to the host, so it has waited for them
            wall.append(1e3 * (time.perf_counter() - begun))
            times.append(marks.milliseconds())
        by_segment = {segment: [one[segment] for one in times] for segment in times[0]}
        return _Steps(kept, last, by_segment, statistics.median(wall), marks.enqueued == before)

    def _at(self, stage: str) -> None:
        self._notes.at(f"{self._where}: {stage}")

    def _tokens(self, count: int) -> list[int]:
        found: list[int] = self._random.integers(0, self._session.vocab_size, count).tolist()
        return found

    def _step(self) -> list[int]:
        return self._tokens(self._session.batch)


@dataclass(frozen=True)
class _Steps:
    """Decode steps: logits of the first ones and of the last, milliseconds by segment, those of a call of the session, and whether the
    timed ones were replayed from a graph."""

    compared: list[Any]
    last: Any
    times: dict[str, list[float]]
    wall_ms: float
    replayed: bool
