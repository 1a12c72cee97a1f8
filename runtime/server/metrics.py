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
from ..completion import Completion, Finish
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
        return Clock(*(one.labels(self._model) for one in (self._first, self._between, self._each, self._whole)))


class Clock:
    """Measures the answers to one request."""

    def __init__(self, first: Histogram, between: Histogram, each: Histogram, whole: Histogram) -> None:
        """Starts now; gives the times to the histograms."""
        self._to_first, self._between, self._each, self._whole = first, between, each, whole
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
            if self._counts.get(key, 0) > 1:
                self._each.observe((self._last[key] - self._first[key]) / (self._counts[key] - 1))


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
        yield one(CounterMetricFamily, "prompt_tokens", "Tokens of prompts that were begun.", stats.prompt_tokens)
        yield one(CounterMetricFamily, "generation_tokens", "New tokens.", stats.new_tokens)
        yield one(
            CounterMetricFamily, "prefix_cache_queries", "Tokens of prompts that were looked for in the prefix index.",
            stats.looked_up_tokens,
        )  # fmt: skip
        yield one(
            CounterMetricFamily, "prefix_cache_hits", "Tokens of prompts whose state was taken from the prefix index.",
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
            yield one(
                GaugeMetricFamily, "snapshot_bytes", "Bytes of kept states in memory.", stats.prefixes.memory_bytes
            )
            yield one(
                GaugeMetricFamily, "snapshot_disk_bytes", "Bytes of kept states on disk.", stats.prefixes.disk_bytes
            )
            yield one(
                CounterMetricFamily,
                "snapshot_evictions",
                "States that left memory for lack of room.",
                stats.prefixes.evictions,
            )
