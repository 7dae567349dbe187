"""Access control of a server: the hosts that requests may be addressed to, and the token that they must send."""

from __future__ import annotations

import hmac
import re
import socket
from collections.abc import Iterable
from dataclasses import dataclass, field
from ipaddress import ip_address
from typing import final

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from lmpipe.errors import ConfigError
from lmpipe.validation.arguments import check_items

_LOCAL = ("localhost", "127.0.0.1", "[::1]")


@final
@dataclass(frozen=True)
class AccessPolicy:
    """Rules that decide which requests a server accepts.

    Checking the Host header protects against DNS rebinding: a web page that makes its own name resolve to this machine.

    Args:
        hosts: Accepted names in the Host header, without ports; ``"*"`` accepts every name.
        any_address: Whether every IP address is accepted too. A page cannot make an address resolve to this machine.
        token: Token that requests must send as ``Authorization: Bearer TOKEN``; if empty, none is required.
    """

    hosts: frozenset[str] = frozenset(_LOCAL)
    any_address: bool = False
    token: str = field(default="", repr=False)

    @classmethod
    def for_host(cls, host: str, allowed: Iterable[str] = (), token: str | None = None) -> AccessPolicy:
        """Returns the policy of a server that listens on a host.

        Args:
            host: Host that the server listens on. This host is accepted; if it stands for all addresses of this
                machine, the machine's host name and every IP address are accepted instead.
            allowed: Further hosts to accept.
            token: Token that requests must send, or None if no token is required.

        Raises:
            ConfigError: If the token is empty or cannot be sent in a header, or if a host is empty.
        """
        if token is not None and not re.fullmatch(r"[!-~]+", token):
            raise ConfigError("the token is empty or has characters other than ASCII letters, digits and punctuation")
        all_interfaces = _is_address(host) and ip_address(host).is_unspecified
        names = [*_LOCAL, socket.gethostname() if all_interfaces else host, *check_items("allowed", allowed, str)]
        if not all(names):
            raise ConfigError("a host is empty; name an address to listen on, such as 127.0.0.1 or 0.0.0.0")
        return cls(frozenset(map(_as_in_header, names)), all_interfaces, token or "")

    def reject(self, headers: Headers) -> JSONResponse | None:
        """Returns the response to a request for another host or without the token; None if the request is accepted."""
        host = re.sub(r":\d*$", "", headers.get("host", "")).lower()
        if not ({host, "*"} & self.hosts or (self.any_address and _is_address(host.strip("[]")))):
            message = f"this server does not accept the host name {host!r}; to accept it, start it with --allow-host"
            return JSONResponse({"error": message}, status_code=400)
        scheme, _, token = headers.get("authorization", "").partition(" ")
        if self.token and not (
            scheme.lower() == "bearer" and hmac.compare_digest(token.strip().encode(), self.token.encode())
        ):
            message = "this server requires a token: send it as 'Authorization: Bearer TOKEN'"
            return JSONResponse({"error": message}, status_code=401, headers={"WWW-Authenticate": "Bearer"})
        return None


@final
class AccessMiddleware:
    """ASGI middleware that passes on the requests that a policy accepts, and answers the others."""

    def __init__(self, app: ASGIApp, policy: AccessPolicy) -> None:
        self._app, self._policy = app, policy

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        rejection = self._policy.reject(Headers(scope=scope)) if scope["type"] == "http" else None
        await (rejection or self._app)(scope, receive, send)


def _is_address(host: str) -> bool:
    try:
        ip_address(host)
    except ValueError:
        return False
    return True


def _as_in_header(host: str) -> str:
    return f"[{host}]" if ":" in host and host[0] != "[" else host.lower()
