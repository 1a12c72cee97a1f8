"""What a server counts and measures, for Prometheus. The names are vLLM's, with ``foldkv:`` in front.

Gauges are read from the engine when somebody asks for them. Times are those of answers as they leave the engine, in seconds.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.registry import Collector

from ..buffers import plan_bytes
from ..completion import Completion
from .service import Service

CONTENT_TYPE = CONTENT_TYPE_LATEST
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
        """``service`` is asked for what is running whenever somebody reads the numbers."""
        self._registry = CollectorRegistry()
        self._model, self._looks = service.name, service.prefixes is not None

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"foldkv:{name}", text, ["model_name", *labels], registry=self._registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(f"foldkv:{name}", text, ["model_name"], registry=self._registry, buckets=buckets)

        self._prompt = counter("prompt_tokens", "Tokens of prompts.")
        self._new = counter("generation_tokens", "New tokens.")
        self._ended = counter("request_success", "Answers that ended, by why.", "finished_reason")
        self._looked = counter("prefix_cache_queries", "Tokens of prompts that were looked for in the prefix index.")
        self._hit = counter("prefix_cache_hits", "Tokens of prompts whose state was taken from the prefix index.")
        self._http = counter("http_requests", "Requests of HTTP, by path and status.", "path", "status")
        self._first = histogram("time_to_first_token_seconds", "From a request to its first new token.", _FIRST)
        self._between = histogram("inter_token_latency_seconds", "From a new token to the next.", _NEXT)
        self._each = histogram(
            "request_time_per_output_token_seconds", "Mean time of an answer's tokens after the first.", _NEXT
        )
        self._whole = histogram("e2e_request_latency_seconds", "From a request to the end of an answer.", _WHOLE)
        self._registry.register(_Now(service))
        ProcessCollector(registry=self._registry)
        for one in (
            self._prompt,
            self._new,
            self._looked,
            self._hit,
            self._first,
            self._between,
            self._each,
            self._whole,
        ):
            one.labels(self._model)  # so that what has not happened yet reads 0
        for reason in ("stop", "length", "cancelled", "timeout", "error"):
            self._ended.labels(self._model, reason)

    def text(self) -> bytes:
        """All numbers, as Prometheus reads them."""
        return generate_latest(self._registry)

    def answered(self, path: str, status: int) -> None:
        """A request of HTTP ended. ``path`` must be one of a few, whatever clients ask for."""
        self._http.labels(self._model, path, str(status)).inc()

    def clock(self) -> Clock:
        """What measures the answers to a request that begins now."""
        return Clock(self)


class Clock:
    """Measures the answers to one request."""

    def __init__(self, metrics: Metrics) -> None:
        """Starts now."""
        self._metrics, self._start = metrics, time.monotonic()
        self._first: dict[tuple[int, int], float] = {}
        self._last: dict[tuple[int, int], float] = {}
        self._counts: dict[tuple[int, int], int] = {}

    def piece(self, prompt: int, piece: Completion) -> None:
        """Note a piece of an answer to a prompt, which is given by its number."""
        own, now, count, key = self._metrics, time.monotonic(), len(piece.token_ids), (prompt, piece.index)
        model = own._model
        if count:
            if key not in self._first:
                own._first.labels(model).observe(now - self._start)
                self._first[key] = now
            else:
                for _ in range(count):  # tokens whose text was held back arrive together
                    own._between.labels(model).observe((now - self._last[key]) / count)
            self._last[key] = now
            self._counts[key] = self._counts.get(key, 0) + count
            own._new.labels(model).inc(count)
        if piece.finish_reason is None:
            return
        own._ended.labels(model, piece.finish_reason).inc()
        own._whole.labels(model).observe(now - self._start)
        if self._counts.get(key, 0) > 1:
            own._each.labels(model).observe((self._last[key] - self._first[key]) / (self._counts[key] - 1))
        if piece.usage is not None and piece.index == 0:  # a prompt counts once, however many answers it has
            own._prompt.labels(model).inc(piece.usage.prompt_tokens)
            if own._looks:
                own._looked.labels(model).inc(piece.usage.prompt_tokens)
                own._hit.labels(model).inc(piece.usage.cached_tokens)


class _Now(Collector):
    """What the engine does at this moment, and the bytes that it holds."""

    def __init__(self, service: Service) -> None:
        self._service = service
        engine = service.engine
        self._bytes = plan_bytes(engine.bundle.state, service.context, service.slots)

    def collect(self) -> Iterator[Any]:
        """As Prometheus's client asks for it."""
        engine, model = self._service.engine, [self._service.name]
        stats = engine.stats()
        for name, text, value in (
            ("num_requests_running", "Sequences that hold a slot.", stats.running),
            ("num_requests_waiting", "Sequences that wait for a slot.", stats.waiting),
        ):
            gauge = GaugeMetricFamily(f"foldkv:{name}", text, labels=["model_name"])
            gauge.add_metric(model, value)
            yield gauge
        state = GaugeMetricFamily(
            "foldkv:state_bytes", "Bytes of the state's buffers, by kind of rows.", labels=["model_name", "group"]
        )
        for group, count in self._bytes.items():
            state.add_metric([*model, group], count)
        yield state
