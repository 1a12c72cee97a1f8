"""An engine with many clients beside single sessions one after the other, and what a kept state saves.

``python benchmarks/serving.py BUNDLE -o benchmarks/results/serving-cpu.json``. Three questions:

- Tokens a second with 1, 8 and 32 clients that ask at once, beside a loop of sessions that answer the same requests one by one. The two
  take turns, several rounds; medians are quoted. And what the scheduler itself costs: the time of the steps that is not the model's, over the
  model's. Clients wait in one event loop, as those of a server do.
- How long a short request waits for its first token while a long prompt is fed, beside alone.
- The time to the first token of a long prompt, cold and after a kept state, and the bytes of that state beside what the planner says.

On a shared machine ratios mean more than times.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import platform
import statistics
import threading
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import numpy as np

import foldkv
from foldkv.runtime import Model, Session, plan_bytes
from foldkv.runtime.serving import Engine, Generation, PrefixIndex, Request

NEW_TOKENS = 48
LENGTHS = (20, 400)  # tokens of a prompt, from and to


def requests(count: int, seed: int) -> list[Request]:
    """Prompts of mixed lengths; every answer has the same number of tokens."""
    rng = np.random.default_rng(seed)
    return [
        Request(rng.integers(32, 127, int(length)).tolist(), max_new_tokens=NEW_TOKENS, stop_tokens=())
        for length in rng.integers(*LENGTHS, count)
    ]


async def answers(engine: Engine, asked: list[Request]) -> list[list[int]]:
    """The tokens of requests that are asked at once."""

    async def answer(request: Request) -> list[int]:
        return [token async for piece in engine.generate(request) for token in piece.token_ids]

    return await asyncio.gather(*map(answer, asked))


def throughput(model: Model, clients: int, rounds: int) -> dict[str, Any]:
    """Tokens a second of an engine and of single sessions, on the same requests, in turns."""
    engines, sessions, own = [], [], []
    for turn in range(rounds):
        asked = requests(clients, turn)
        with Engine(model, slots=clients, context=1024) as engine:
            start = time.perf_counter()
            together = asyncio.run(answers(engine, asked))
            engines.append(clients * NEW_TOKENS / (time.perf_counter() - start))
            stats = engine.stats()
            own.append(stats.seconds / stats.model_seconds - 1)
        start = time.perf_counter()
        with Session(model, context=1024) as session:
            alone = [
                session.generate([request.prompt], max_new_tokens=NEW_TOKENS, stop_tokens=())[0] for request in asked
            ]
        sessions.append(clients * NEW_TOKENS / (time.perf_counter() - start))
        assert together == alone, "every client gets what it gets alone"
    return {
        "clients": clients,
        "engine_tokens_s": statistics.median(engines),
        "sessions_tokens_s": statistics.median(sessions),
        "ratio": statistics.median(a / b for a, b in zip(engines, sessions, strict=True)),
        "scheduler_share": statistics.median(own),
    }


def first_token(engine: Engine, prompt: list[int], **more: Any) -> tuple[float, int]:
    """Seconds until the first token, and the tokens that were not fed."""
    start = time.perf_counter()
    with engine.submit(Request(prompt, max_new_tokens=1, stop_tokens=(), **more)) as generation:
        [piece] = [one for one in generation if one.finish_reason]
    assert piece.usage is not None
    return time.perf_counter() - start, piece.usage.cached_tokens


def note_arrivals(generation: Generation, arrivals: list[float]) -> None:
    """When every piece of an answer came."""
    arrivals.extend(time.perf_counter() for _ in generation)


def waiting(model: Model, long: int, rounds: int) -> dict[str, Any]:
    """How long a short request waits for its first token while a long prompt is fed."""
    rng = np.random.default_rng(3)
    short, alone, beside, gaps, fed = rng.integers(32, 127, 64).tolist(), [], [], [], []
    with Engine(model, slots=3, context=long + 512) as engine:
        for _ in range(rounds):
            alone.append(first_token(engine, short)[0])
            running = engine.submit(Request(short, max_new_tokens=400, stop_tokens=()))
            arrivals: list[float] = []
            reader = threading.Thread(target=note_arrivals, args=(running, arrivals))
            reader.start()
            while len(arrivals) < 4:
                time.sleep(0.001)
            feeding = engine.submit(Request(rng.integers(32, 127, long).tolist(), max_new_tokens=1, stop_tokens=()))
            start = time.perf_counter()
            beside.append(first_token(engine, short)[0])
            feeding.result()
            fed.append(time.perf_counter() - start)
            running.cancel()
            reader.join()
            gaps.append(max(after - before for before, after in itertools.pairwise(arrivals)))
    return {
        "long_prompt": long,
        "alone_s": statistics.median(alone),
        "while_a_long_prompt_is_fed_s": statistics.median(beside),
        "longest_gap_of_a_running_answer_s": statistics.median(gaps),
        "the_long_prompt_s": statistics.median(fed),
    }


def reuse(model: Model, length: int) -> dict[str, Any]:
    """Time to the first token of a prompt, cold and after a kept state; and the bytes of that state."""
    rng = np.random.default_rng(length)
    shared = rng.integers(32, 127, length).tolist()
    with PrefixIndex.of(model, memory_bytes=4 << 30) as prefixes, Engine(
        model, slots=1, context=length + 256, prefixes=prefixes
    ) as engine:  # fmt: skip
        cold, none = first_token(engine, shared)
        ends = [rng.integers(32, 127, 20).tolist() for _ in range(5)]
        hits = [first_token(engine, [*shared, *end]) for end in ends]
        assert none == 0 and all(cached == length // engine.chunk * engine.chunk for _, cached in hits)
        stats = prefixes.stats()
    with Session(model, context=length + 256) as session:
        session.forward([shared])
        snapshot = session.snapshot_slot(0)
    planned = sum(plan_bytes(model.bundle.state, length).values())
    return {
        "tokens": length,
        "cold_s": cold,
        "hit_s": statistics.median(seconds for seconds, _ in hits),
        "snapshot_bytes": snapshot.bytes,
        "planned_bytes": planned,
        "kept_bytes_of_the_prompt": stats.memory_bytes,
        "kept_states": stats.entries,
    }


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path, exists=True))
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True)
@click.option("--clients", default="1,8,32", show_default=True)
@click.option(
    "--contexts", default="1024,4096,16384,65536", show_default=True, help="Prompts that begin alike, in tokens."
)
@click.option("--long", default=8192, show_default=True, help="Tokens of the prompt that a short request waits for.")
@click.option("--rounds", default=5, show_default=True)
def main(bundle: Path, output: Path, clients: str, contexts: str, long: int, rounds: int) -> None:
    """Measure and write the results as JSON."""
    with Model(bundle) as model:
        content: dict[str, Any] = {
            "what": "an engine with many clients, and kept states; medians",
            "date": time.strftime("%Y-%m-%d"),
            "machine": f"{platform.machine()}, 2 processors, shared",
            "versions": {"onnxruntime": version("onnxruntime"), "foldkv": foldkv.__version__},
            "bundle": {
                "layers": len({t.layer for t in model.bundle.state.tensors}),
                "vocab_size": model.bundle.model.vocab_size,
            },
            "new_tokens": NEW_TOKENS,
            "prompt_tokens": list(LENGTHS),
            "throughput": [throughput(model, int(count), rounds) for count in clients.split(",")],
        }
        click.echo(json.dumps(content["throughput"]))
        content["waiting"] = waiting(model, long, rounds)
        click.echo(json.dumps(content["waiting"]))
        content["reuse"] = [reuse(model, int(length)) for length in contexts.split(",")]
        click.echo(json.dumps(content["reuse"]))
    output.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
