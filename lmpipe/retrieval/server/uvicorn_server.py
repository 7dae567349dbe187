"""Runs a service on a port with uvicorn, so that no client can hold it up: not by silence, not by being many.

Knows nothing of what is served.
"""

from __future__ import annotations

import asyncio
import socket
from typing import Any, final

from starlette.types import ASGIApp
from uvicorn import Config, Server
from uvicorn.protocols.http.h11_impl import H11Protocol

from lmpipe.errors import ConfigError

_CONNECTIONS = 512  # at the same time; others are closed at once
_ENDING = 3  # seconds that requests under way have to end when the server is told to stop


def listening(host: str, port: int) -> socket.socket:
    """A socket that accepts connections.

    Args:
        host: An address of this machine, or a name of one.
        port: 0 for any that is free.

    Raises:
        ConfigError: If there can be none.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    accepting = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)  # asyncio sets TCP_NODELAY if it says TCP
    try:
        accepting.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        accepting.bind((host, port))
        accepting.listen()
    except (OSError, OverflowError, ValueError) as error:
        accepting.close()
        raise ConfigError(f"cannot listen on {host}, port {port} ({error}); choose another host or port") from error
    return accepting


def server(application: ASGIApp, idle: int) -> Server:
    """A server to be run with ``sockets=[listening(…)]``.

    On SIGTERM or SIGINT it takes no more requests and ends when those under way are answered, or after 3 seconds.

    Args:
        application: What answers.
        idle: Seconds after which a connection is closed on which nothing happens. A client that takes more than twice
            as long to send a request, or that does not take its answer, is cut off too.
    """
    settings: dict[str, Any] = {"http": _Connection, "ws": "none", "lifespan": "off"}
    return Server(
        Config(
            application,
            **settings,
            log_config=None,
            log_level="warning",
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=idle,
            timeout_graceful_shutdown=_ENDING,
        )
    )


@final
class _Connection(H11Protocol):
    """A connection that ends if its client is what is waited for, and nothing has changed since the last look."""

    _watch: asyncio.TimerHandle | None = None
    _seen: tuple[object, int] = (None, 0)

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > _CONNECTIONS:
            transport.abort()
            return
        self._watch = self.loop.call_later(self.timeout_keep_alive, self._look)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._watch is not None:
            self._watch.cancel()
        super().connection_lost(exc)

    def _look(self) -> None:
        waits = self.cycle is None or self.cycle.response_complete or self.cycle.more_body
        now = (self.cycle if waits else self, self.transport.get_write_buffer_size())  # not taken by the client yet
        if waits and now == self._seen:
            self.transport.abort()
            return
        self._seen = now
        self._watch = self.loop.call_later(self.timeout_keep_alive, self._look)
