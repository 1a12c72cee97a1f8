"""Servers over a real model, on free ports, for tests."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import httpx2
from openai import OpenAI

from foldkv.runtime import Model, Tokenizer
from foldkv.runtime.chat import ChatFormat, chat_format
from foldkv.runtime.server.app import Application, Limits
from foldkv.runtime.server.serve import Address, Prefixes, Server
from foldkv.runtime.server.service import Service
from foldkv.runtime.serving.engine import Engine

#: Tokens of a prompt and its answer. A token is a byte here, and tools take many.
CONTEXT = 2048


@dataclass(frozen=True)
class Running:
    """A server that answers."""

    url: str
    service: Service
    application: Application
    server: Server

    def client(self, key: str = "none") -> OpenAI:
        return _client(f"{self.url}/v1", key)


@functools.cache
def http() -> httpx2.Client:
    """For everything that is asked while one server runs."""
    return httpx2.Client(timeout=60, verify=_trust())


@functools.cache
def _trust() -> ssl.SSLContext:
    """One for all: making one takes longer than most requests."""
    return httpx2.create_ssl_context()


@functools.cache
def _client(url: str, key: str) -> OpenAI:
    return OpenAI(base_url=url, api_key=key, max_retries=0, http_client=http())


@contextmanager
def answering(
    service: Service, limits: Limits | None = None, grace: float = 5, *, only_here: bool = False
) -> Iterator[Running]:
    """A server over a service, in a thread."""
    application = Application(service, limits or Limits(), only_here=only_here)
    began = threading.Event()
    server = Server(application, grace=grace, ready=began.set)
    with Address(port=0).socket() as listening:
        thread = threading.Thread(target=lambda: asyncio.run(server.run(listening)))
        thread.start()
        try:
            assert began.wait(30)
            http()  # now: several threads of a test would make several
            yield Running(f"http://127.0.0.1:{listening.getsockname()[1]}", service, application, server)
        finally:
            server.ask_to_stop()
            thread.join()
            application.close()
            _client.cache_clear()
            http().close()
            http.cache_clear()


@contextmanager
def serving(
    model: Model,
    *,
    slots: int = 2,
    max_queue: int = 8,
    timeout: float | None = 60,
    prefixes: int = 0,
    exact: bool = True,
    chat: ChatFormat | None = None,
) -> Iterator[Service]:
    """A service over an engine of its own, which keeps so many bytes of states."""
    tokenizer, chunk = Tokenizer.from_bundle(model.bundle), 128
    with contextlib.ExitStack() as stack:
        index = Prefixes(memory=prefixes or None).open(model, chunk)
        if index is not None:
            stack.enter_context(index)
        engine = stack.enter_context(
            Engine(
                model, tokenizer=tokenizer, slots=slots, context=CONTEXT, chunk=chunk, max_queue=max_queue, prefixes=index
            )
        )  # fmt: skip
        format = chat or chat_format("v4-0731")
        yield Service(engine, tokenizer, "tiny", CONTEXT, slots, format, timeout=timeout, prefixes=index, exact=exact)
