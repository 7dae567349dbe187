"""Base URLs of servers, and the credentials that a URL may contain.

Knows nothing about requests.
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
    """A base URL, separated from its credentials, which are sent with requests but never displayed.

    Credentials before the ``@`` are sent as Basic authentication and take precedence over a key; the query is sent
    with each request.

    Args:
        url: ``http://host:port/path`` or ``https://…``.
        key: API key, sent as a Bearer token; an empty key is not sent.

    Attributes:
        url: The URL without credentials and query.
        path: The path of the URL, without a trailing slash.
        headers: The Authorization header, if there are credentials.
        query: The query of the URL, sent with each request.
        secrets: Strings that must not be displayed.

    Raises:
        ConfigError: If the URL or the key is invalid.
    """

    def __init__(self, url: str, key: str = "") -> None:
        parts = _split(url.strip())
        self.url = urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))
        self.path = httpx2.URL(self.url).raw_path.decode().rstrip("/")
        self.query = parts.query
        user, password = unquote(parts.username or ""), unquote(parts.password or "")
        self.headers = _authorization(user, password, _validated_key(key))
        credentials = self.headers.get("Authorization", "").partition(" ")[2]
        self.secrets = (*secrets_in_url(url.strip()), credentials, key.strip())

    def __repr__(self) -> str:
        return f"Address({self.url!r})"


def _authorization(user: str, password: str, key: str) -> dict[str, str]:
    if user or password:
        return {"Authorization": "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()}
    return {"Authorization": f"Bearer {key}"} if key else {}


def _validated_key(key: str) -> str:
    if not re.fullmatch("[!-~]*", key.strip()):
        raise ConfigError("the API key contains spaces or non-ASCII characters; copy it again")
    return key.strip()


def _split(url: str) -> SplitResult:
    """Splits the URL of a server.

    Raises:
        ConfigError: If the text is not the URL of a server, or is ambiguous.
    """
    try:
        parts = urlsplit(url)
        httpx2.URL(urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", "")))
        usable = parts.scheme in ("http", "https") and parts.port != 0  # reading the port checks it
        if usable and re.fullmatch(r"[^\s,\\]+", parts.hostname or "") and "@" not in f"{parts.path}{parts.query}":
            return parts
    except (ValueError, httpx2.InvalidURL):
        pass
    redacted = redact_spec(strip_credentials(url).rpartition("@")[2])
    raise ConfigError(
        f"{redacted!r} is not a URL of the form http://host:8000/path; write special characters of a password as %XX"
    )
