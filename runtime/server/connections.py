"""Connections that cannot stay open for nothing: uvicorn's, with a most of them and times in which something must come.

uvicorn closes a connection that is silent between two requests, but waits without end for the first head, for the rest of a head, and for the
rest of a body that was refused.
"""

from __future__ import annotations

import asyncio
import logging
import socket

from uvicorn.protocols.http.h11_impl import H11Protocol

_log = logging.getLogger(__name__)


def connection(most: int, head_timeout: float, send_timeout: float) -> type[H11Protocol]:
    """A protocol for ``uvicorn.Config(http=...)``.

    Args:
        most: connections that are open at once; further ones are closed at once.
        head_timeout: seconds in which the head of a request must be complete, from its first byte, or from the connection's start.
        send_timeout: seconds after which a client that takes nothing of what it is sent is cut off. Only Linux does this.
    """

    class Connection(H11Protocol):
        """One connection."""

        _closing: asyncio.TimerHandle | None = None
        _full = False  # whether the last connection was one too many; of all of them

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            """As asyncio calls it."""
            super().connection_made(transport)
            full, before = len(self.connections) > most, Connection._full
            Connection._full = full
            if full:
                if not before:  # one line for all of them
                    _log.warning("%d connections are open, as many as may; others are closed at once", most)
                transport.abort()
                return
            made = transport.get_extra_info("socket")
            if made is not None and hasattr(socket, "TCP_USER_TIMEOUT"):
                made.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, round(1000 * send_timeout))
            self._wait()

        def data_received(self, data: bytes) -> None:
            """As asyncio calls it."""
            super().data_received(data)
            if self.cycle is None or self.cycle.response_complete:
                self._wait()  # these bytes are of a head, or of a body that nobody wants
            else:
                self._wait_no_more()

        def connection_lost(self, exc: Exception | None) -> None:
            """As asyncio calls it."""
            self._wait_no_more()
            super().connection_lost(exc)

        def _wait(self) -> None:
            """Close it unless a request comes in time. More bytes of a head give it no more time."""
            if self._closing is None:
                self._closing = self.loop.call_later(head_timeout, self.transport.close)

        def _wait_no_more(self) -> None:
            if self._closing is not None:
                self._closing.cancel()
                self._closing = None

    return Connection
