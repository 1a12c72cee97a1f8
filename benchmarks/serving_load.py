"""A server under load: many clients, mixed kinds and lengths, some that leave; then a kill in the middle of it, and a restart.

``python benchmarks/serving_load.py BUNDLE -o benchmarks/results/serving-load.json``. Clients ask for continued texts, also several of one
prompt, for chats, for calls of tools, and for JSON of a schema. Every answer is compared with the one that the same request got alone, token by
token. Whoever leaves does so in the middle of a stream, or closes the connection before an answer comes. The server's memory is read every
second, from a third of the time on.

Then clients ask what nobody asked before, so that states are being written when the process is killed. Every file that it left is read and
checked. A server that is started on them must give the same answers as before, to these requests too.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import platform
import random
import signal
import ssl
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
from foldkv.runtime import Model
from foldkv.runtime.serving.prefix_files import PrefixFolder

#: Making one takes 0.1 s, and every client would make its own.
TLS = ssl.create_default_context()
#: The tokens of every completion of an answer, in words of the vocabulary, by its number.
Tokens = dict[int, list[str]]
SCHEMA = {"type": "object", "properties": {"x": {"type": "integer"}, "name": {"enum": ["a", "b"]}}, "required": ["x"]}
TOOL = {"type": "function", "function": {"name": "find", "parameters": SCHEMA}}


@dataclass(frozen=True)
class Asked:
    """A request: what for, where to, and its body."""

    kind: str
    path: str
    body: dict[str, Any]


@dataclass
class Seen:
    """What clients saw: how requests ended, by kind too, and which answers were not those that they should be."""

    ended: Counter[str] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    tokens: int = 0
    answers: list[tuple[int, Tokens]] = field(default_factory=list)
    over: bool = False  # what comes from now on does not count: the server was killed


@contextmanager
def server(bundle: Path, folder: Path, *options: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """A server in a process of its own, with states on disk, and its address."""
    process = subprocess.Popen(
        [sys.executable, "-m", "foldkv", "serve", str(bundle), "--port", "0", "--json", "--prefix-memory", "32MiB", "--prefix-folder",
         str(folder), "--chat-format", "v4-0731", *options],
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


def requests(count: int, longest: int, seed: int) -> list[Asked]:
    """Requests of all kinds and of mixed lengths; a third of the continued texts begin alike."""
    rng = random.Random(seed)
    shared = "".join(rng.choices("abcdefgh \n", k=longest // 2))
    kinds = ("text", "chat", "texts", "tools", "schema", "text", "text", "text")
    return [_request(kinds[number % len(kinds)], number, shared if number % 3 == 0 else "", longest, rng) for number in range(count)]  # fmt: skip


def _request(kind: str, number: int, shared: str, longest: int, rng: random.Random) -> Asked:
    text = "".join(rng.choices("abcdefgh \n", k=rng.randint(1, longest)))
    body = {"max_tokens": rng.randint(1, 48), "temperature": rng.choice([0, 0.7, 1.1]), "seed": number}
    if kind.startswith("text"):
        more = {"n": rng.randint(2, 4)} if kind == "texts" else {}
        return Asked(kind, "/v1/completions", body | more | {"prompt": shared + text, "logprobs": 0})
    body |= {"messages": [{"role": "user", "content": text}], "logprobs": True}
    if kind == "tools":
        body |= {"tools": [TOOL], "tool_choice": "required"}
    elif kind == "schema":
        body |= {"response_format": {"type": "json_schema", "json_schema": {"name": "point", "schema": SCHEMA}}}
    return Asked(kind, "/v1/chat/completions", body)


def tokens_of(chunks: list[dict[str, Any]]) -> Tokens:
    """The tokens of an answer that came in one piece or in several."""
    found: Tokens = {}
    for choice in itertools.chain.from_iterable(chunk["choices"] for chunk in chunks):
        if rows := choice.get("logprobs"):
            tokens = rows["tokens"] if "tokens" in rows else [one["token"] for one in rows["content"] or ()]
            found.setdefault(choice["index"], []).extend(tokens)
    return found


async def whole(client: httpx2.AsyncClient, asked: Asked) -> Tokens:
    """The tokens of an answer that comes at once."""
    answer = await client.post(asked.path, json=asked.body)
    answer.raise_for_status()
    return tokens_of([answer.json()])


async def streamed(client: httpx2.AsyncClient, asked: Asked, leave_after: int | None) -> Tokens | None:
    """The tokens of a stream; None if the client left after so many events."""
    chunks = []
    async with client.stream("POST", asked.path, json=asked.body | {"stream": True}) as answer:
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


def client_of(url: str) -> httpx2.AsyncClient:
    """A client with connections of its own."""
    return httpx2.AsyncClient(base_url=url, timeout=120, verify=TLS)


async def one_client(url: str, number: int, asked: list[Asked], end: float, seen: Seen) -> None:
    """Ask one request after the other until the time is over."""
    rng = random.Random(number)
    async with client_of(url) as client:
        while time.monotonic() < end and not seen.over:
            which, way = rng.randrange(len(asked)), rng.random()
            try:
                got: Tokens | None
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
                if not seen.over:
                    seen.ended[f"error: {type(error).__name__}"] += 1
                    seen.wrong.append(f"{which}, {asked[which].kind}: {error!r}")
                    await asyncio.sleep(0.05)
                continue
            if got is None:
                seen.ended["left"] += 1
                continue
            seen.ended["answered"] += 1
            seen.kinds[asked[which].kind] += 1
            seen.tokens += sum(map(len, got.values()))
            seen.answers.append((which, got))


def note_wrong(seen: Seen, asked: list[Asked], expected: list[Tokens]) -> None:
    """Compare every answer with the one that it should be."""
    for which, got in seen.answers:
        if got != expected[which]:
            seen.wrong.append(f"{which}, {asked[which].kind}: {got} is not {expected[which]}")


def memory(pid: int) -> int:
    """Bytes of a process that are its own."""
    status = Path(f"/proc/{pid}/status").read_text()
    return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith("RssAnon")))


async def load(
    url: str, pid: int, clients: int, seconds: float, asked: list[Asked], alone: list[Tokens]
) -> dict[str, Any]:
    """What many clients see, and what the server's memory does meanwhile."""
    seen, end, grown = Seen(), time.monotonic() + seconds, list[int]()
    start = time.monotonic()

    async def watch() -> None:
        while time.monotonic() < end:
            await asyncio.sleep(min(1.0, seconds / 12))
            if time.monotonic() - start > seconds / 3:
                grown.append(memory(pid))

    await asyncio.gather(watch(), *(one_client(url, number, asked, end, seen) for number in range(clients)))
    took = time.monotonic() - start
    note_wrong(seen, asked, alone)
    async with client_of(url) as client:
        for _ in range(200):  # those whose clients have left leave at their next step
            text = (await client.get("/metrics")).text
            running, waiting = (
                float(next(line.rsplit(" ", 1)[1] for line in text.splitlines() if line.startswith(f"foldkv:{name}")))
                for name in ("num_requests_running", "num_requests_waiting")
            )
            if not running and not waiting:
                break
            await asyncio.sleep(0.05)
        again = [await whole(client, one) for one in asked[:5]]
    return {
        "clients": clients, "seconds": round(took, 1), "ended": dict(seen.ended), "answered_by_kind": dict(seen.kinds), "wrong": seen.wrong[:5], "wrong_count": len(seen.wrong),
        "tokens_a_second": round(seen.tokens / took, 1), "left_in_the_engine": running + waiting,
        "memory_bytes": {"first": grown[0], "last": grown[-1], "most": max(grown)} if grown else {},
        "same_afterwards": again == alone[:5],
    }  # fmt: skip


async def answers_alone(url: str, asked: list[Asked]) -> list[Tokens]:
    """What every request gets while nobody else asks."""
    async with client_of(url) as client:
        return [await whole(client, one) for one in asked]


async def killed(url: str, process: subprocess.Popen[str], clients: int, seconds: float, asked: list[Asked]) -> Seen:
    """Kill the server while clients ask, and at least one has its answer; returns what they saw before."""
    seen, start = Seen(), time.monotonic()
    asking = [asyncio.create_task(one_client(url, number, asked, start + 120, seen)) for number in range(clients)]
    while time.monotonic() < start + seconds or (not seen.answers and time.monotonic() < start + 60):
        await asyncio.sleep(0.02)
    seen.over = True
    os.kill(process.pid, signal.SIGKILL)
    await asyncio.gather(*asking)
    return seen


def left_on_disk(bundle: Path, kept: Path) -> dict[str, int]:
    """What a killed server left: how many states, how many of them are damaged, and how many were being written."""
    half = len(list((kept / "new").glob("prefix-*")))
    with Model(bundle) as model:
        meaning = model.bundle.meaning
    folder = PrefixFolder(kept, meaning, producer="none", most_bytes=1 << 40, waiting_bytes=0)
    try:
        keys = folder.keys()
        unread = sum(folder.read(key) is None for key in keys)
        return {"files": len(keys), "damaged": max(folder.damaged, unread), "being_written": half}
    finally:
        folder.close()


async def after_kill(url: str, asked: list[Asked], alone: list[Tokens]) -> tuple[dict[str, Any], list[Tokens]]:
    """Whether a restarted server gives the same answers to the first requests, how much it had not to feed, and all answers."""
    async with client_of(url) as client:
        cached, got = 0, list[Tokens]()
        for one in asked:
            answer = (await client.post(one.path, json=one.body)).raise_for_status().json()
            cached += answer["usage"]["prompt_tokens_details"]["cached_tokens"]
            got.append(tokens_of([answer]))
    return {"same": got[: len(alone)] == alone, "tokens_from_before": cached}, got


def measure(
    bundle: Path, clients: int, seconds: float, *, kill_after: float, count: int, longest: int, invariant: bool
) -> dict[str, Any]:
    """All of it: alone, under load, killed, restarted."""
    asked, new = requests(count, longest, 1), requests(count, longest, 2)
    with tempfile.TemporaryDirectory() as folder:
        kept = Path(folder) / "prefixes"
        options = ("--slots", "8", "--context", "4096", "--chunk", "64", "--max-queue", str(5 * clients))
        options += ("--batch-invariant",) if invariant else ()
        with server(bundle, kept, *options) as (url, process):
            alone = asyncio.run(answers_alone(url, asked))
            under_load = asyncio.run(load(url, process.pid, clients, seconds, asked, alone))
            before = asyncio.run(killed(url, process, clients, kill_after, new))
            process.wait()
        left = left_on_disk(bundle, kept)
        with server(bundle, kept, *options) as (url, process):
            restarted, again = asyncio.run(after_kill(url, [*asked, *new], alone))
        note_wrong(before, new, again[count:])
    kill = {"answered_before": len(before.answers), "wrong": before.wrong[:5], **left, **restarted}
    return {"load": under_load, "kill": kill, "exit_code": process.returncode}


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
            name: measure(bundle, clients, seconds, kill_after=5.0, count=60, longest=400, invariant=invariant)
            for name, invariant in (("batch_invariant", True), ("shared_steps", False))
        },
    }
    click.echo(json.dumps(content, indent=2))
    output.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
