"""Runs an application with uvicorn, so that neither a silent client nor many clients can block the server.

Does not depend on the application.
"""

from __future__ import annotations

import asyncio
import socket
from typing import Any, final

from starlette.types import ASGIApp
from uvicorn import Config, Server
from uvicorn.protocols.http.h11_impl import H11Protocol

from lmpipe.errors import ConfigError

_MAX_CONNECTIONS = 512  # at the same time; further connections are closed at once
_SHUTDOWN_SECONDS = 3  # time for requests in progress after the server has been told to stop


def bind_socket(host: str, port: int) -> socket.socket:
    """Returns a listening socket.

    Args:
        host: Address of this machine, or a name that resolves to one.
        port: Port number; 0 for any free port.

    Raises:
        ConfigError: If the host and port cannot be bound.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)  # asyncio sets TCP_NODELAY only for TCP
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen()
    except (OSError, OverflowError, ValueError) as error:
        listener.close()
        raise ConfigError(f"cannot listen on {host}, port {port} ({error}); choose another host or port") from error
    return listener


def make_server(app: ASGIApp, idle: int) -> Server:
    """Returns a server, to be run with ``sockets=[bind_socket(…)]``.

    On SIGTERM or SIGINT the server accepts no further requests, and stops when the requests in progress are answered,
    or after 3 seconds.

    Args:
        app: Application that answers the requests.
        idle: Seconds after which a connection without activity is closed. A client that takes more than twice as long
            to send a request, or that does not read its answer, is disconnected too.
    """
    settings: dict[str, Any] = {"http": _Connection, "ws": "none", "lifespan": "off"}
    return Server(
        Config(
            app,
            **settings,
            log_config=None,
            log_level="warning",
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=idle,
            timeout_graceful_shutdown=_SHUTDOWN_SECONDS,
        )
    )


@final
class _Connection(H11Protocol):
    """A connection that is closed if the server waits for the client and nothing has changed since the last check."""

    _timer: asyncio.TimerHandle | None = None
    _last_state: tuple[object, int] = (None, 0)

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > _MAX_CONNECTIONS:
            transport.abort()
            return
        self._timer = self.loop.call_later(self.timeout_keep_alive, self._check)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        super().connection_lost(exc)

    def _check(self) -> None:
        waiting = self.cycle is None or self.cycle.response_complete or self.cycle.more_body
        state = (self.cycle if waiting else self, self.transport.get_write_buffer_size())  # bytes not sent yet
        if waiting and state == self._last_state:
            self.transport.abort()
            return
        self._last_state = state
        self._timer = self.loop.call_later(self.timeout_keep_alive, self._check)
