"""A server under load: many clients, mixed lengths, some that leave; then a kill in the middle of it, and a restart.

``python benchmarks/serving_load.py BUNDLE -o benchmarks/results/serving-load.json``. Every answer is compared with the one that the same request got
alone, token by token. Whoever leaves does so in the middle of a stream, or closes the connection before an answer comes. The server's
memory is read every second, from a third of the time on.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import platform
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import httpx2

import foldkv


@dataclass
class Seen:
    """What clients saw: how requests ended, and which answers were not those that they should be."""

    ended: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    tokens: int = 0


@contextmanager
def server(bundle: Path, folder: Path, *options: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """A server in a process of its own, with states on disk, and its address."""
    process = subprocess.Popen(
        [sys.executable, "-m", "foldkv", "serve", str(bundle), "--port", "0", "--json", "--prefix-memory", "32MiB", "--prefix-folder",
         str(folder), *options],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        text = ""
        for line in process.stdout:
            text += line
            try:
                yield json.loads(text)["url"], process
                break
            except json.JSONDecodeError:
                continue
        else:
            raise click.ClickException(f"the server ended with the code {process.wait()}: {text}")
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)


def bodies(count: int, longest: int) -> list[dict[str, Any]]:
    """Requests of mixed lengths; a third of them begin alike."""
    rng = random.Random(1)
    shared = "".join(rng.choices("abcdefgh \n", k=longest // 2))
    return [
        {
            "prompt": (shared if number % 3 == 0 else "") + "".join(rng.choices("abcdefgh \n", k=rng.randint(1, longest))),
            "max_tokens": rng.randint(1, 48), "temperature": rng.choice([0, 0.7, 1.1]), "seed": number, "logprobs": 0,
        }
        for number in range(count)
    ]  # fmt: skip


def tokens_of(chunks: list[dict[str, Any]]) -> list[str]:
    """The tokens of an answer, in words of the vocabulary."""
    found = (choice["logprobs"]["tokens"] for chunk in chunks for choice in chunk["choices"] if choice.get("logprobs"))
    return list(itertools.chain.from_iterable(found))


async def whole(client: httpx2.AsyncClient, body: dict[str, Any]) -> list[str]:
    """The tokens of an answer that comes at once."""
    answer = await client.post("/v1/completions", json=body)
    answer.raise_for_status()
    return tokens_of([answer.json()])


async def streamed(client: httpx2.AsyncClient, body: dict[str, Any], leave_after: int | None) -> list[str] | None:
    """The tokens of a stream; None if the client left after so many events."""
    chunks = []
    async with client.stream("POST", "/v1/completions", json=body | {"stream": True}) as answer:
        answer.raise_for_status()
        async for line in answer.aiter_lines():
            if line == "data: [DONE]":
                return tokens_of(chunks)
            if line.startswith("data: "):
                chunks.append(json.loads(line.removeprefix("data: ")))
                if "error" in chunks[-1]:
                    raise RuntimeError(str(chunks[-1]))
                if leave_after is not None and len(chunks) > leave_after:
                    return None
    raise RuntimeError("the stream ended before its end")


async def one_client(
    url: str, number: int, asked: list[dict[str, Any]], alone: list[list[str]], end: float, seen: Seen
) -> None:
    """Ask one request after the other until the time is over."""
    rng = random.Random(number)
    async with httpx2.AsyncClient(base_url=url, timeout=120) as client:
        while time.monotonic() < end:
            which, way = rng.randrange(len(asked)), rng.random()
            try:
                got: list[str] | None
                if way < 0.4:
                    got = await whole(client, asked[which])
                elif way < 0.8:
                    got = await streamed(client, asked[which], None)
                elif way < 0.9:
                    got = await streamed(client, asked[which], rng.randint(0, 3))
                else:
                    try:
                        async with asyncio.timeout(rng.uniform(0.01, 1.0)):
                            got = await whole(client, asked[which])
                    except TimeoutError:
                        got = None
            except (httpx2.HTTPError, RuntimeError) as error:
                seen.ended[f"error: {type(error).__name__}"] += 1
                seen.wrong.append(f"{which}: {error!r}")
                await asyncio.sleep(0.05)
                continue
            if got is None:
                seen.ended["left"] += 1
                continue
            seen.ended["answered"] += 1
            seen.tokens += len(got)
            if got != alone[which]:
                seen.wrong.append(f"{which}: {len(got)} tokens, {len(alone[which])} alone, not the same")


def memory(pid: int) -> int:
    """Bytes of a process that are its own."""
    status = Path(f"/proc/{pid}/status").read_text()
    return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith("RssAnon")))


async def load(
    url: str, pid: int, clients: int, seconds: float, asked: list[dict[str, Any]], alone: list[list[str]]
) -> dict[str, Any]:
    """What many clients see, and what the server's memory does meanwhile."""
    seen, end, grown = Seen(), time.monotonic() + seconds, list[int]()
    start = time.monotonic()

    async def watch() -> None:
        while time.monotonic() < end:
            await asyncio.sleep(min(1.0, seconds / 12))
            if time.monotonic() - start > seconds / 3:
                grown.append(memory(pid))

    await asyncio.gather(watch(), *(one_client(url, number, asked, alone, end, seen) for number in range(clients)))
    took = time.monotonic() - start
    async with httpx2.AsyncClient(base_url=url, timeout=60) as client:
        for _ in range(200):  # those whose clients have left leave at their next step
            text = (await client.get("/metrics")).text
            running, waiting = (
                float(next(line.rsplit(" ", 1)[1] for line in text.splitlines() if line.startswith(f"foldkv:{name}")))
                for name in ("num_requests_running", "num_requests_waiting")
            )
            if not running and not waiting:
                break
            await asyncio.sleep(0.05)
        again = [await whole(client, body) for body in asked[:5]]
    return {
        "clients": clients, "seconds": round(took, 1), "ended": dict(seen.ended), "wrong": seen.wrong[:5], "wrong_count": len(seen.wrong),
        "tokens_a_second": round(seen.tokens / took, 1), "left_in_the_engine": running + waiting,
        "memory_bytes": {"first": grown[0], "last": grown[-1], "most": max(grown)} if grown else {},
        "same_afterwards": again == alone[:5],
    }  # fmt: skip


async def answers_alone(url: str, asked: list[dict[str, Any]]) -> list[list[str]]:
    """What every request gets while nobody else asks."""
    async with httpx2.AsyncClient(base_url=url, timeout=60) as client:
        return [await whole(client, body) for body in asked]


async def killed(
    url: str,
    process: subprocess.Popen[str],
    clients: int,
    seconds: float,
    asked: list[dict[str, Any]],
    alone: list[list[str]],
) -> int:
    """Kill the server while clients ask; returns how many had been answered rightly."""
    seen, end = Seen(), time.monotonic() + seconds + 0.5
    asking = [asyncio.create_task(one_client(url, number, asked, alone, end, seen)) for number in range(clients)]
    await asyncio.sleep(seconds)
    os.kill(process.pid, signal.SIGKILL)
    await asyncio.gather(*asking)
    return seen.ended["answered"]


async def after_kill(url: str, asked: list[dict[str, Any]], alone: list[list[str]]) -> dict[str, Any]:
    """Whether a restarted server gives the same answers, and how much it had not to feed."""
    async with httpx2.AsyncClient(base_url=url, timeout=60) as client:
        cached, same = 0, True
        for body, expected in zip(asked, alone, strict=True):
            answer = (await client.post("/v1/completions", json=body)).json()
            cached += answer["usage"]["prompt_tokens_details"]["cached_tokens"]
            same &= tokens_of([answer]) == expected
    return {"same": same, "tokens_from_before": cached}


def measure(
    bundle: Path, clients: int, seconds: float, *, kill_after: float, requests: int, longest: int, invariant: bool
) -> dict[str, Any]:
    """All of it: alone, under load, killed, restarted."""
    asked = bodies(requests, longest)
    with tempfile.TemporaryDirectory() as folder:
        kept = Path(folder) / "prefixes"
        options = ("--slots", "8", "--context", "4096", "--chunk", "64", "--max-queue", str(2 * clients))
        options += ("--batch-invariant",) if invariant else ()
        with server(bundle, kept, *options) as (url, process):
            alone = asyncio.run(answers_alone(url, asked))
            under_load = asyncio.run(load(url, process.pid, clients, seconds, asked, alone))
            answered = asyncio.run(killed(url, process, clients, kill_after, asked, alone))
            process.wait()
        with server(bundle, kept, *options) as (url, process):
            restarted = asyncio.run(after_kill(url, asked, alone))
    return {"load": under_load, "kill": {"answered_before": answered, **restarted}, "exit_code": process.returncode}


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path, exists=True))
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True)
@click.option("--clients", default=64, show_default=True)
@click.option("--seconds", default=120.0, show_default=True)
def main(bundle: Path, output: Path, clients: int, seconds: float) -> None:
    """Measure and write the results as JSON."""
    content = {
        "what": "a server under load, killed and restarted; every answer beside the one given alone",
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{platform.machine()}, 2 processors, shared with the clients",
        "versions": {name: version(name) for name in ("onnxruntime", "starlette", "uvicorn")}
        | {"foldkv": foldkv.__version__},
        **{
            name: measure(bundle, clients, seconds, kill_after=5.0, requests=60, longest=400, invariant=invariant)
            for name, invariant in (("batch_invariant", True), ("shared_steps", False))
        },
    }
    click.echo(json.dumps(content, indent=2))
    output.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
