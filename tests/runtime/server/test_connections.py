"""Connections that say nothing, or say it slowly, over a real server; each must end, and others must not notice."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Iterator

import pytest
from served import Running, answering, http, serving

from foldkv.runtime import Model
from foldkv.runtime.server.app import Limits
from foldkv.runtime.server.keys import Keys

#: Seconds of a head here, and seconds in which whoever waits longer must have been cut off.
HEAD, SOON = 0.3, 3.0


@pytest.fixture(scope="module")
def quick(model: Model) -> Iterator[Running]:
    limits = Limits(head_timeout=HEAD, send_timeout=1, connections=24, keys=Keys(["key"]))
    with serving(model) as service, answering(service, limits) as running:
        yield running


@contextlib.contextmanager
def connected(running: Running, buffer: int | None = None) -> Iterator[socket.socket]:
    host, port = running.url.removeprefix("http://").split(":")
    with socket.socket() as made:
        if buffer is not None:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
        made.settimeout(SOON)
        made.connect((host, int(port)))
        yield made


def closed(connection: socket.socket) -> bytes:
    """What comes until the other side closes it."""
    with contextlib.suppress(ConnectionResetError):
        return b"".join(iter(lambda: connection.recv(1 << 16), b""))
    return b""


def trickle(connection: socket.socket, piece: bytes) -> None:
    """Send a piece after the other until the other side has closed it."""
    end = time.monotonic() + SOON
    with contextlib.suppress(OSError):
        while time.monotonic() < end:
            connection.sendall(piece)
            time.sleep(HEAD / 6)
        pytest.fail(f"the connection is open after {SOON} s")


def test_heads_that_do_not_come_and_bodies_that_nobody_wants_are_cut_off(quick: Running) -> None:
    head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\n"
    with contextlib.ExitStack() as stack:
        silent, half, slow, again, refused = (stack.enter_context(connected(quick)) for _ in range(5))
        half.sendall(head)
        again.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
        got = b""
        while not got.endswith(b'"}'):  # head and body may come in two parts
            got += again.recv(1 << 16)
        assert got.startswith(b"HTTP/1.1 200")
        again.sendall(head)  # the next one, not to its end
        refused.sendall(head + b"content-type: application/json\r\ncontent-length: 99999\r\n\r\n{")
        assert refused.recv(1 << 16).startswith(b"HTTP/1.1 401")
        trickle(slow, b"G")
        trickle(refused, b" ")
        assert [closed(one) for one in (silent, half, again)] == [b"", b"", b""]


def test_an_answer_takes_longer_than_a_head_may(quick: Running) -> None:
    before, last = time.monotonic(), 0.0
    stream = quick.client("key").completions.create(
        model="tiny", prompt="x", max_tokens=2000, temperature=0, stream=True
    )
    while last < 2 * HEAD:
        next(stream)
        last = time.monotonic() - before
    stream.close()


def test_connections_above_the_most_are_closed_at_once_and_others_are_answered(quick: Running) -> None:
    with contextlib.ExitStack() as stack:
        most = [stack.enter_context(connected(quick)) for _ in range(quick.application.limits.connections + 4)]
        before = time.monotonic()
        assert closed(most[-1]) == b"" and time.monotonic() - before < HEAD / 2
    end = time.monotonic() + SOON
    while len(quick.server.server_state.connections) > 4 and time.monotonic() < end:
        time.sleep(0.01)
    assert http().get(f"{quick.url}/health").status_code == 200


@pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="only Linux cuts off who takes nothing")
def test_who_takes_nothing_of_an_answer_is_cut_off(quick: Running) -> None:
    ask = b"GET / HTTP/1.1\r\nhost: x\r\n\r\n"
    with connected(quick, buffer=4096) as connection:
        end = time.monotonic() + 10
        with pytest.raises(OSError):
            while time.monotonic() < end:
                with contextlib.suppress(TimeoutError):
                    connection.settimeout(0.2)
                    connection.sendall(ask * 200)
