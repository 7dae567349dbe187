"""Base URLs of servers, and the credentials that may stand in them.

Knows nothing of requests.
"""

from __future__ import annotations

import base64
import re
from typing import final
from urllib.parse import SplitResult, unquote, urlsplit, urlunsplit

import httpx2

from lmpipe.errors import ConfigError
from lmpipe.text.secrets import redact_spec, secrets_in_url, strip_credentials


@final
class Address:
    """A base URL, apart from the credentials in it, which requests carry and nothing shows.

    Credentials before the ``@`` are sent as Basic authentication and count more than a key; a query goes with each
    request.

    Args:
        url: ``http://host:port/path`` or ``https://…``.
        key: Sent as a Bearer token; none if empty.

    Attributes:
        url: The URL without credentials and query.
        path: The path of the URL, without a slash at the end.
        headers: What proves who asks.
        query: Goes with each request.
        secrets: What must not be shown.

    Raises:
        ConfigError: If the URL or the key cannot be used.
    """

    def __init__(self, url: str, key: str = "") -> None:
        parts = _split(url.strip())
        self.url = urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))
        self.path = httpx2.URL(self.url).raw_path.decode().rstrip("/")
        self.query = parts.query
        user, password = unquote(parts.username or ""), unquote(parts.password or "")
        self.headers = _authorization(user, password, _checked(key))
        proof = self.headers.get("Authorization", "").partition(" ")[2]
        self.secrets = (*secrets_in_url(url.strip()), proof, key.strip())

    def __repr__(self) -> str:
        return f"Address({self.url!r})"


def _authorization(user: str, password: str, key: str) -> dict[str, str]:
    if user or password:
        return {"Authorization": "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()}
    return {"Authorization": f"Bearer {key}"} if key else {}


def _checked(key: str) -> str:
    if not re.fullmatch("[!-~]*", key.strip()):
        raise ConfigError("the API key holds spaces or characters beyond ASCII; copy it again")
    return key.strip()


def _split(url: str) -> SplitResult:
    """Raises:
    ConfigError: If it is no URL of a server, or can be read in two ways.
    """
    try:
        parts = urlsplit(url)
        httpx2.URL(urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", "")))
        usable = parts.scheme in ("http", "https") and parts.port != 0  # reading the port checks it
        if usable and re.fullmatch(r"[^\s,\\]+", parts.hostname or "") and "@" not in f"{parts.path}{parts.query}":
            return parts
    except (ValueError, httpx2.InvalidURL):
        pass
    shown = redact_spec(strip_credentials(url).rpartition("@")[2])
    raise ConfigError(
        f"{shown!r} is no URL of the form http://host:8000/path; special characters of a password are written as %XX"
    )
