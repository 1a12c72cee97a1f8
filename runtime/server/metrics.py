"""What a server counts and measures, for Prometheus. The names are vLLM's, with ``foldkv:`` in front.

What the engine counts is read from it when somebody asks. Times are those of answers as they leave the engine, in seconds.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TypeVar, get_args

from prometheus_client import CollectorRegistry, Counter, Histogram, Metric, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.registry import Collector

from ..buffers import plan_bytes
from ..completion import Completion, Finish, Usage
from ..serving.prefixes import PrefixStats
from .service import Service

CONTENT_TYPE = CONTENT_TYPE_LATEST
_Family = TypeVar("_Family", GaugeMetricFamily, CounterMetricFamily)
_FIRST = (
    0.001,
    0.005,
    0.01,
    0.02,
    0.04,
    0.06,
    0.08,
    0.1,
    0.25,
    0.5,
    0.75,
    1,
    2.5,
    5,
    7.5,
    10,
    20,
    40,
    80,
    160,
    640,
    2560,
)
_NEXT = (
    0.001,
    0.0025,
    0.005,
    0.01,
    0.025,
    0.05,
    0.075,
    0.1,
    0.15,
    0.2,
    0.3,
    0.4,
    0.5,
    0.75,
    1,
    2.5,
    5,
    7.5,
    10,
    20,
    40,
    80,
)
#: Tokens, as vLLM has them: 1, 2 and 5 of every power of ten.
_TOKENS = tuple(float(digit * 10**power) for power in range(7) for digit in (1, 2, 5))
_WHOLE = (0.05, 0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)


class Metrics:
    """The numbers of one server."""

    def __init__(self, service: Service) -> None:
        """``service`` is asked for its engine's numbers whenever somebody reads them."""
        self._registry = CollectorRegistry()
        self._model = service.name

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            made = Histogram(f"foldkv:{name}", text, ["model_name"], registry=self._registry, buckets=buckets)
            made.labels(self._model)  # so that what has not happened yet reads 0
            return made

        self._http = Counter(
            "foldkv:http_requests", "Requests of HTTP, by path and status.", ["model_name", "path", "status"],
            registry=self._registry,
        )  # fmt: skip
        self._first = histogram("time_to_first_token_seconds", "From a request to its first new token.", _FIRST)
        self._between = histogram("inter_token_latency_seconds", "From a new token to the next.", _NEXT)
        self._each = histogram(
            "request_time_per_output_token_seconds", "Mean time of an answer's tokens after the first.", _NEXT
        )
        self._whole = histogram("e2e_request_latency_seconds", "From a request to the end of an answer.", _WHOLE)
        self._queue = histogram(
            "request_queue_time_seconds",
            "From when the engine takes a prompt to its first slot. Further prompts of a request are taken one after the other.",
            _WHOLE,
        )
        self._prefill = histogram(
            "request_prefill_time_seconds", "From a prompt's first slot to its first token.", _WHOLE
        )
        self._decode = histogram("request_decode_time_seconds", "From an answer's first token to its last.", _WHOLE)
        self._prompts = histogram("request_prompt_tokens", "Tokens of a prompt.", _TOKENS)
        self._answers = histogram("request_generation_tokens", "New tokens of an answer.", _TOKENS)
        self._registry.register(_Engine(service))
        ProcessCollector(registry=self._registry)

    def text(self) -> bytes:
        """All numbers, as Prometheus reads them."""
        return generate_latest(self._registry)

    def answered(self, path: str, status: int) -> None:
        """A request of HTTP ended. ``path`` must be one of a few, whatever clients ask for."""
        self._http.labels(self._model, path, str(status)).inc()

    def clock(self) -> Clock:
        """What measures the answers to a request that begins now."""
        return Clock(self, self._model)


class Clock:
    """Measures the answers to one request."""

    def __init__(self, metrics: Metrics, model: str) -> None:
        """Starts now; gives times and tokens to the histograms."""
        self._to_first, self._between, self._each, self._whole, self._queue, self._prefill, self._decode, self._prompts, self._answers = (
            one.labels(model)
            for one in (
                metrics._first, metrics._between, metrics._each, metrics._whole, metrics._queue, metrics._prefill, metrics._decode,
                metrics._prompts, metrics._answers,
            )
        )  # fmt: skip
        self._begun = set[int]()
        self._start = time.monotonic()
        self._first: dict[tuple[int, int], float] = {}
        self._last: dict[tuple[int, int], float] = {}
        self._counts: dict[tuple[int, int], int] = {}

    def piece(self, prompt: int, piece: Completion) -> None:
        """Note a piece of an answer to a prompt, which is given by its number."""
        now, count, key = time.monotonic(), len(piece.token_ids), (prompt, piece.index)
        if count:
            if key not in self._first:
                self._to_first.observe(now - self._start)
                self._first[key] = self._last[key] = now
            # Tokens whose text was held back arrive together.
            known = self._counts.get(key, 0)
            for _ in range(count if known else count - 1):
                self._between.observe((now - self._last[key]) / count)
            self._last[key], self._counts[key] = now, known + count
        if piece.finish_reason is not None:
            self._whole.observe(now - self._start)
            if key in self._first:
                self._decode.observe(self._last[key] - self._first[key])
            if piece.usage is not None:
                self._ended(prompt, piece.usage)
            if self._counts.get(key, 0) > 1:
                self._each.observe((self._last[key] - self._first[key]) / (self._counts[key] - 1))

    def _ended(self, prompt: int, usage: Usage) -> None:
        self._answers.observe(usage.completion_tokens)
        if prompt in self._begun:  # what a prompt took counts once, however many answers it has
            return
        self._begun.add(prompt)
        self._prompts.observe(usage.prompt_tokens)
        self._queue.observe(usage.queue_seconds)
        if usage.prefill_seconds is not None:
            self._prefill.observe(usage.prefill_seconds)


class _Engine(Collector):
    """What the engine did and does, and the bytes that it holds."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._bytes = plan_bytes(service.engine.model.bundle.state, service.context, service.slots)

    def collect(self) -> Iterator[Metric]:
        """As Prometheus's client asks for it."""
        stats, model = self._service.engine.stats(), [self._service.name]

        def one(kind: type[_Family], name: str, text: str, value: float) -> _Family:
            family = kind(f"foldkv:{name}", text, labels=["model_name"])
            family.add_metric(model, value)
            return family

        yield one(GaugeMetricFamily, "num_requests_running", "Answers that have a slot.", stats.running)
        yield one(GaugeMetricFamily, "num_requests_waiting", "Requests that wait for a slot.", stats.waiting)
        room = self._service.slots * self._service.context
        yield one(
            GaugeMetricFamily, "kv_cache_usage_perc", "Tokens in all slots, of those that they have room for; 1 is full.",
            stats.held_tokens / room,
        )  # fmt: skip
        yield one(CounterMetricFamily, "prompt_tokens", "Tokens of prompts that were begun.", stats.prompt_tokens)
        yield one(CounterMetricFamily, "generation_tokens", "New tokens.", stats.new_tokens)
        yield one(
            CounterMetricFamily, "prefix_cache_queries", "Tokens (not requests, as vLLM has it) that were looked for in the prefix index.",
            stats.looked_up_tokens,
        )  # fmt: skip
        yield one(
            CounterMetricFamily, "prefix_cache_hits", "Tokens (not requests) whose state was taken from the prefix index.",
            stats.cached_tokens,
        )  # fmt: skip
        ended = CounterMetricFamily(
            "foldkv:request_success", "Answers that ended, by why.", labels=["model_name", "finished_reason"]
        )
        for reason in get_args(Finish):
            ended.add_metric([*model, reason], stats.finished.get(reason, 0))
        yield ended
        state = GaugeMetricFamily(
            "foldkv:state_bytes", "Bytes of the state's buffers, by kind of rows.", labels=["model_name", "group"]
        )
        for group, count in self._bytes.items():
            state.add_metric([*model, group], count)
        yield state
        if stats.prefixes is not None:
            yield from self._kept(stats.prefixes)

    def _kept(self, kept: PrefixStats) -> Iterator[Metric]:
        """The index of kept states."""
        model = self._service.name
        lookups = CounterMetricFamily(
            "foldkv:prefix_cache_lookups", "Lookups in the prefix index: exact hits, other hits, misses.", labels=["model_name", "result"]
        )  # fmt: skip
        for result, count in (
            ("exact_hit", kept.exact_hits),
            ("hit", kept.hits - kept.exact_hits),
            ("miss", kept.misses),
        ):
            lookups.add_metric([model, result], count)
        yield lookups
        for kind, name, text, value in (
            (GaugeMetricFamily, "snapshot_entries", "Kept states.", kept.entries),
            (GaugeMetricFamily, "snapshot_bytes", "Bytes of kept states in memory.", kept.memory_bytes),
            (GaugeMetricFamily, "snapshot_disk_bytes", "Bytes of kept states on disk.", kept.disk_bytes),
            (CounterMetricFamily, "snapshot_evictions", "States that left memory for lack of room.", kept.evictions),
            (CounterMetricFamily, "snapshot_disk_evictions", "States that left the disk for lack of room.", kept.disk_evictions),
            (CounterMetricFamily, "snapshot_damaged", "Files that were deleted because they were damaged.", kept.damaged),
            (CounterMetricFamily, "snapshot_unwritten", "States that were not written: no room, or the disk is too slow.", kept.unwritten),
        ):  # fmt: skip
            family = kind(f"foldkv:{name}", text, labels=["model_name"])
            family.add_metric([model], value)
            yield family
