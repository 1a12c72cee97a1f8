"""The endpoints.

``/v1/models``, ``/v1/completions`` and ``/v1/chat/completions`` are OpenAI's. ``/health`` says that the process lives, ``/ready`` that it takes
requests, ``/metrics`` is for Prometheus and ``/`` is a page to chat. Every error has OpenAI's shape, and nothing of the inside in it.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import ipaddress
import logging
import re
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..completion import Completion
from .answers import Answer
from .bodies import Body, ChatBody, CompletionBody, names_of, read_body
from .generations import Generations
from .keys import Keys
from .metrics import CONTENT_TYPE, Metrics
from .page import page, page_headers
from .pool import Pool
from .problems import Problem, problem_of, stopping, to_json, too_many
from .requests import Job, chat_job, completion_job
from .service import Service
from .structure import needs_grammar

_log = logging.getLogger(__name__)
#: Seconds after which a stream without news says that it lives, so that nobody between takes it for dead.
_SILENCE = 15.0
#: What whoever watches the server asks all the time.
_PROBES = frozenset({"/health", "/ready", "/metrics"})
#: What the log and the numbers say where the client left before there was an answer; nginx made it known.
_LEFT = 499
_JSON = "application/json"
#: Bodies that are read at once: parsed and encoded, much of it beside Python; and how many are read or wait for it, at most.
_READERS, _READING = 4, 64
#: The same of those whose grammars are compiled, which may take seconds: the others need not wait for them.
_COMPILERS, _COMPILING = 2, 16
#: Bytes of bodies that arrive or are read, all together, at most.
_HELD = 256 << 20
#: What needs no key, whatever the server was told.
_OPEN = frozenset({"/", "/health", "/ready"})
MakeJob = Callable[[Any, Service], Job]


@dataclass(frozen=True)
class Limits:
    """What a server takes, and from whom.

    Attributes:
        keys: who may ask; None for everybody.
        open_metrics: /metrics needs no key.
        max_body: bytes of a request, at most.
        body_timeout: seconds in which a body must arrive.
        head_timeout: seconds in which the head of a request must arrive.
        send_timeout: seconds after which a client that takes nothing of an answer is cut off.
        connections: that are open at once, at most.
        origins: of pages that may ask from a browser, as in ``https://example.com``; "*" for all.
        page: there is a page at /.
        any_host: requests may come under any name. Otherwise a server without keys that only this machine can reach answers requests
            to a name of this machine alone: the browser of somebody here may have been sent by a page whose name was made to lead here.
    """

    keys: Keys | None = None
    open_metrics: bool = False
    max_body: int = 4 << 20
    body_timeout: float = 30.0
    head_timeout: float = 10.0
    send_timeout: float = 60.0
    connections: int = 512
    origins: tuple[str, ...] = ()
    page: bool = True
    any_host: bool = False


class Application:
    """The endpoints over a service, as an application of ASGI.

    Attributes:
        asgi: the application.
        limits: what it takes.
    """

    def __init__(self, service: Service, limits: Limits = Limits(), *, only_here: bool = False) -> None:
        """Nothing is listened to yet. ``only_here``: no other machine will reach it."""
        self._service, self.limits = service, limits
        self._local = only_here and limits.keys is None and not limits.any_host
        self._readers = Pool("foldkv-bodies", _READERS, _READING)
        self._compilers = Pool("foldkv-grammars", _COMPILERS, _COMPILING)
        self._held = 0  # bytes of bodies
        self._metrics = Metrics(service)
        self._stopping = False
        self._running = set[Generations]()
        routes = [
            Route("/health", self._health),
            Route("/ready", self._ready),
            Route("/metrics", self._read_metrics),
            Route("/v1/models", self._models),
            Route("/v1/models/{name:path}", self._model),
            Route("/v1/completions", self._completions, methods=["POST"]),
            Route("/v1/chat/completions", self._chat, methods=["POST"]),
            *([Route("/", self._page)] if limits.page else []),
        ]
        middleware = [Middleware(_Watched, metrics=self._metrics, paths={route.path for route in routes})]
        if limits.origins:
            middleware.append(
                Middleware(
                    CORSMiddleware, allow_origins=limits.origins, allow_methods=["GET", "POST"],
                    allow_headers=["*"],  # OpenAI's client for browsers sends x-stainless-* and what it is told to
                    expose_headers=["x-request-id", "retry-after"],
                )
            )  # fmt: skip
        middleware.append(Middleware(_Guarded, refuse=self._refuse))
        self.asgi = Starlette(routes=routes, middleware=middleware, exception_handlers={HTTPException: _not_found})
        self.asgi.router.redirect_slashes = False

    def stop(self) -> None:
        """Take no more requests; those that run go on."""
        self._stopping = True
        self.close()

    def close(self) -> None:
        """Read no more bodies; who waits for one is told that the server stops."""
        self._readers.close()
        self._compilers.close()

    @property
    def running(self) -> int:
        """Requests that are being answered."""
        return len(self._running)

    def cancel(self) -> None:
        """End the answers that run; their clients are told that the server stops."""
        for generations in list(self._running):
            generations.cancel()

    # Who may ask

    def _refuse(self, scope: Scope) -> Problem | None:
        path = scope["path"]
        if self._local and not all(_is_local(value) for value in _headers(scope, b"host")):
            return Problem(
                403, "This server answers only requests to localhost or 127.0.0.1, because it asks for no key.", code="host_not_allowed"
            )  # fmt: skip
        free = path in _OPEN or (path == "/metrics" and self.limits.open_metrics)
        if not free and not self._knows(scope):
            return Problem(
                401, "This server needs a key: Authorization: Bearer KEY.", code="invalid_api_key",
                headers={"www-authenticate": "Bearer"},
            )  # fmt: skip
        return None

    def _knows(self, scope: Scope) -> bool:
        """Whether who asks has a key, or needs none."""
        keys, given = self.limits.keys, _headers(scope, b"authorization")
        return keys is None or keys.allow(given[0] if len(given) == 1 else None)

    # What the server is

    async def _health(self, _: HttpRequest) -> Response:
        return _json({"status": "ok"})

    async def _ready(self, request: HttpRequest) -> Response:
        reasons = ["the server is stopping"] if self._stopping else []
        if self._readers.full:
            reasons.append(f"{self._readers.count} requests wait to be read, as many as may")
        inside = self._service.engine.not_ready()
        if inside and not self._knows(request.scope):  # they name files, and what failed
            inside = ("the model cannot answer; who asks with a key is told why",)
        reasons += inside
        return _json({"ready": not reasons, "reasons": reasons}, 503 if reasons else 200)

    async def _read_metrics(self, _: HttpRequest) -> Response:
        return Response(self._metrics.text(), headers={"content-type": CONTENT_TYPE})

    async def _page(self, _: HttpRequest) -> Response:
        return Response(page(), media_type="text/html", headers=page_headers())

    async def _models(self, _: HttpRequest) -> Response:
        return _json({"object": "list", "data": [self._facts()]})

    async def _model(self, request: HttpRequest) -> Response:
        name = request.path_params["name"]
        if name != self._service.name:
            raise Problem(404, f"The model {name[:60]!r} is not here.", "model", "model_not_found")
        return _json(self._facts())

    def _facts(self) -> dict[str, Any]:
        service = self._service
        return {
            "id": service.name, "object": "model", "created": service.created, "owned_by": "foldkv",
            "max_model_len": service.context, "chat": service.chat is not None,
        }  # fmt: skip

    # What it answers

    async def _completions(self, request: HttpRequest) -> Response:
        return await self._answer(request, CompletionBody, completion_job)

    async def _chat(self, request: HttpRequest) -> Response:
        return await self._answer(request, ChatBody, chat_job)

    async def _answer(self, request: HttpRequest, kind: type[Body], make: MakeJob) -> Response:
        if self._stopping:
            raise stopping()
        clock, number, timeout = self._metrics.clock(), request.scope["request_id"], self._service.timeout
        deadline = None if timeout is None else request.scope["began"] + timeout
        try:
            async with asyncio.timeout_at(deadline) as limit:
                data = await self._read(request)
                try:
                    job = await self._job(kind, data, make, number)
                finally:
                    self._held -= len(data)
        except TimeoutError:
            if not limit.expired():
                raise
            raise self._late(close=True) from None  # the body may still be coming
        request.scope["facts"] = job.id  # until there is more to tell
        if self._stopping:  # since
            raise stopping()
        generations = Generations(self._service.engine, job.requests, deadline)  # the last step that can refuse
        answer = Answer(job, self._service)
        self._running.add(generations)

        def end() -> None:
            self._running.discard(generations)
            generations.cancel()

        async def pieces() -> AsyncGenerator[tuple[int, Completion]]:
            reasons = list[str]()
            try:
                async for prompt, piece in generations:
                    clock.piece(prompt, piece)
                    if piece.finish_reason is not None:
                        reasons.append(piece.finish_reason)
                    problem = self._broken_off(piece)
                    if problem is not None:  # OpenAI has no such reasons
                        yield prompt, dataclasses.replace(piece, finish_reason=None)
                        raise problem
                    yield prompt, piece
            finally:
                end()
                usage = answer.usage()
                request.scope["facts"] = (
                    f"{job.id} {usage['prompt_tokens']} tokens ({usage['prompt_tokens_details']['cached_tokens']} cached) "
                    f"+ {usage['completion_tokens']} new, {' '.join(reasons) or 'left'}"
                )

        if job.stream:
            return _Events(_events(job, answer, pieces(), number), end)
        async with contextlib.aclosing(pieces()) as running, _cancelled_without(request.receive, generations.cancel):
            async for prompt, piece in running:
                answer.feed(prompt, piece)
        return _json(answer.whole())

    async def _job(self, kind: type[Body], data: bytes, make: MakeJob, number: str) -> Job:
        """What a body asks for. Long prompts take a while to read and to encode; others go on meanwhile."""
        body = await self._readers.run(lambda: read_body(kind, data))
        pool = self._compilers if needs_grammar(body) else self._readers
        return await pool.run(lambda: _made(kind, body, make, self._service, number))

    def _broken_off(self, piece: Completion) -> Exception | None:
        """Why an answer ended before its end, or None."""
        if piece.finish_reason == "timeout":
            return self._late()
        if piece.finish_reason == "cancelled":
            return stopping() if self._stopping else ClientDisconnect()
        return None

    def _late(self, *, close: bool = False) -> Problem:
        # OpenAI's client would send the request again, which takes as long.
        headers = {"connection": "close"} if close else {}
        return Problem(
            504, f"The request took more than {self._service.timeout:g} s.", code="timeout",
            headers={"x-should-retry": "false", **headers},
        )  # fmt: skip

    async def _read(self, request: HttpRequest) -> bytes:
        """The body, if it is not too long and comes in time. Its bytes count as held from now on."""
        most, kind = self.limits.max_body, request.headers.get("content-type", "")
        if kind.split(";")[0].strip().lower() != _JSON:
            # A page of another site can send other types without asking the browser whether it may.
            raise Problem(
                415, f"The body must be JSON, with the header content-type: {_JSON}.", code="unsupported_type"
            )
        data, whole = bytearray(), False
        try:
            async with asyncio.timeout(self.limits.body_timeout):
                if int(request.headers.get("content-length", 0)) > most:
                    raise _too_long(most)
                async for part in request.stream():
                    data += part
                    self._held += len(part)
                    if len(data) > most:
                        raise _too_long(most)
                    if self._held > max(_HELD, most):
                        raise too_many("Bodies of requests have many bytes together")
            whole = True
        except TimeoutError:
            raise Problem(
                408, f"The body did not arrive within {self.limits.body_timeout:g} s.", code="timeout",
                headers={"connection": "close"},
            ) from None  # fmt: skip
        finally:
            if not whole:
                self._held -= len(data)
        return bytes(data)


def _made(kind: type[Body], body: Body, make: MakeJob, service: Service, number: str) -> Job:
    try:
        return make(body, service)
    except RecursionError:
        raise Problem(400, "The body is nested too deeply.", code="invalid_value") from None
    except Exception as error:
        raise problem_of(error, number, names_of(kind)) from error


def _too_long(most: int) -> Problem:
    return Problem(
        413, f"The body has more than {most} bytes, which is the limit here.", code="body_too_long",
        headers={"connection": "close"},
    )  # fmt: skip


def _json(facts: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(to_json(facts), status, headers, _JSON)


def _problem(problem: Problem) -> Response:
    return _json(problem.facts(), problem.status, dict(problem.headers))


async def _not_found(request: HttpRequest, error: Exception) -> Response:
    """What Starlette refuses: paths and methods that there are not."""
    assert isinstance(error, HTTPException)
    method, path = request.method[:20], request.url.path[:100]
    message = f"{method} {path!r} does not exist." if error.status_code == 404 else f"{path} does not take {method}."
    codes = {404: "not_found", 405: "method_not_allowed"}
    known = error.status_code in codes
    return _problem(
        Problem(error.status_code, message if known else error.detail, code=codes.get(error.status_code), headers=error.headers or {})
    )  # fmt: skip


# Streams


async def _events(
    job: Job, answer: Answer, pieces: AsyncGenerator[tuple[int, Completion]], number: str
) -> AsyncGenerator[bytes]:
    """The events of a stream. One that fails ends with an error, and not with what says that all came."""
    async with contextlib.aclosing(pieces):
        try:
            async for prompt, piece in pieces:
                for chunk in answer.feed(prompt, piece):
                    yield _event(chunk)
        except ClientDisconnect:
            return
        except Exception as error:  # noqa: BLE001 - the status has been sent, so it is told in the stream
            yield _event(problem_of(error, number).facts())
            return
    if job.usage:
        yield _event(answer.last_chunk())
    yield b"data: [DONE]\n\n"


def _event(facts: Any) -> bytes:
    return b"data: " + to_json(facts) + b"\n\n"


class _Events(Response):
    """Events of a stream as they come; ``left`` is called when the client has gone."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes], left: Callable[[], None]) -> None:
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._events, self._left = events, left

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As Starlette calls it."""
        following: asyncio.Task[bytes] | None = None
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            async with _cancelled_without(receive, self._left):
                while True:
                    following = asyncio.ensure_future(anext(self._events))
                    while not (await asyncio.wait({following}, timeout=_SILENCE))[0]:
                        await send({"type": "http.response.body", "body": b": waiting\n\n", "more_body": True})
                    try:
                        event = following.result()
                    except StopAsyncIteration:
                        break
                    await send({"type": "http.response.body", "body": event, "more_body": True})
        finally:
            if following is not None and not following.done():
                following.cancel()
                await asyncio.wait({following})
            await self._events.aclose()
            self._left()  # also where the first event was never asked for
        await send({"type": "http.response.body", "body": b"", "more_body": False})


@contextlib.asynccontextmanager
async def _cancelled_without(receive: Receive, left: Callable[[], None]) -> AsyncIterator[None]:
    """Calls ``left`` as soon as the client closes the connection."""

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        left()

    task = asyncio.create_task(watch())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait({task})


# Around all endpoints


class _Watched:
    """Gives every request an id and the time of its start, writes one line of log for it, and counts it."""

    def __init__(self, app: ASGIApp, metrics: Metrics, paths: set[str]) -> None:
        self._app, self._metrics, self._paths = app, metrics, paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI calls it."""
        if scope["type"] != "http":
            return
        number, start, status, counted = f"req-{secrets.token_hex(8)}", time.monotonic(), 0, False
        path = scope["path"] if scope["path"] in self._paths else "other"
        scope["request_id"], scope["began"] = number, start

        async def watched(message: Message) -> None:
            nonlocal status, counted
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", number.encode())]
            elif not message.get("more_body", False) and not counted:
                counted = True  # before it is sent, so that who has the answer finds it counted
                self._metrics.answered(path, status)
            await send(message)

        try:
            await self._app(scope, receive, watched)
        finally:
            if not counted:  # the client left before the end
                status = status or _LEFT
                self._metrics.answered(path, status)
            client, facts = scope.get("client") or ("?",), scope.get("facts", "")
            took = time.monotonic() - start
            quiet = path in _PROBES and status == 200
            _log.log(
                logging.DEBUG if quiet else logging.INFO, "%s %s %s %r %d %.3f s%s", number, client[0], scope["method"], scope["path"][:100], status, took,
                f" {facts}" if facts else "",
            )  # fmt: skip


class _Guarded:
    """Refuses who may not ask, and turns whatever is raised into an error of OpenAI's shape."""

    def __init__(self, app: ASGIApp, refuse: Callable[[Scope], Problem | None]) -> None:
        self._app, self._refuse = app, refuse

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI calls it."""
        begun = False

        async def watched(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        problem = self._refuse(scope)
        if problem is None:
            try:
                await self._app(scope, receive, watched)
                return
            except ClientDisconnect:
                return  # nobody is there to be told
            except Exception as error:  # noqa: BLE001 - the last resort of the server
                problem = problem_of(error, scope["request_id"])
        if not begun:
            await _problem(problem)(scope, receive, send)


def _headers(scope: Scope, name: bytes) -> list[str]:
    return [value.decode("latin-1") for key, value in scope["headers"] if key == name]


def _is_local(host: str) -> bool:
    """Whether a ``Host`` header names this machine as such. Any port will do: it may have been forwarded."""
    name = re.sub(r":\d*$", "", host.strip().lower())
    if name == "localhost":
        return True
    try:
        return ipaddress.ip_address(name.removeprefix("[").removesuffix("]")).is_loopback
    except ValueError:
        return False
