"""Keeps secrets out of text: credentials in URLs, keys that the caller names, and keys in environment variables.

Text that is shown, logged, written or raised goes through `redact` if it can contain a URL or a server's reply. Knows
nothing about its callers.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from urllib.parse import parse_qsl, quote, unquote

_REDACTED = "***"
"""Replaces every secret."""

_URL = re.compile(r"(?<![\w+.-])([A-Za-z][\w+.-]*://)(\S+?)(?=,\s*[A-Za-z][\w+.-]*://|\s|$)")
_LOGIN = re.compile(r"(?<![^\s:@])[^\s:@/]+:[^\s@]*@(?!https?://)")
_CLOSING = re.compile(r"[\"'`)\]}>,;:.]*$")  # punctuation after a URL
_SECRET_SUFFIXES = ("KEY", "TOKEN", "PASSWORD", "SECRET")  # of names of environment variables
_LONG = 8  # characters; a shorter secret is only redacted as a whole word, since its letters can occur in any word


def redact(text: str, secrets: Iterable[str] = ()) -> str:
    """Returns a text with its secrets replaced by ``***``.

    Args:
        text: Any text, such as an error message or a command.
        secrets: Secrets to replace in addition to the credentials and queries of URLs, and to the values of environment
            variables whose names end in KEY, TOKEN, PASSWORD or SECRET.
    """
    forms = _all_forms(secrets)
    if forms:
        text = re.sub("|".join(map(_as_pattern, forms)), _REDACTED, text)
    return _URL.sub(lambda match: match[1] + _redacted_rest(match[2]), text)


def redact_and_truncate(text: str, length: int, secrets: Iterable[str] = ()) -> str:
    """Returns the beginning of a possibly very long text, without secrets and without a cut-off secret at its end."""
    secrets = tuple(secrets)
    redacted = redact(text[: 16 * length], secrets)
    if len(text) > 16 * length:
        redacted = redacted[: max(0, len(redacted) - max(map(len, _all_forms(secrets)), default=0))]
    return redacted if len(redacted) <= length and len(text) <= 16 * length else redacted[:length] + " …"


def redact_spec(spec: str) -> str:
    """Redacts a short text that should name an LM or a similar component, even if its URL lacks ``http://``."""
    return _LOGIN.sub(f"{_REDACTED}@", redact(spec))


def strip_credentials(url: str) -> str:
    """Removes the credentials and the query of a URL; returns any other text as it is."""
    scheme, separator, rest = url.partition("://")
    return f"{scheme}://{_split_url(rest)[1]}" if separator else url


def secrets_in_url(url: str) -> tuple[str, ...]:
    """Returns the secrets of a URL: its password, or its user if it has no password, and the values of its query."""
    credentials, _, query = _split_url(url.partition("://")[2] or url)
    user, _, password = credentials.partition(":")
    login = [credentials, password] if password else [user]
    values = [value or name for name, value in parse_qsl(query, keep_blank_values=True)]
    return tuple(form for part in (*login, *values) if part for form in (part, unquote(part)))


def _redacted_rest(rest: str) -> str:
    """Redacts the part of a URL after ``scheme://``."""
    closing = _CLOSING.search(rest)
    end = closing[0] if closing else ""
    credentials, address, query = _split_url(rest.removesuffix(end))
    login = f"{_REDACTED}@" if credentials else ""
    return login + address + f"?{_REDACTED}" * bool(query) + end


def _split_url(rest: str) -> tuple[str, str, str]:
    """Splits the part of a URL after ``scheme://`` into credentials, host with path, and query.

    A password with ``/``, ``?`` or ``@``, which should have been percent-encoded, still counts as credentials.
    """
    head = re.split(r"[?#]", rest, maxsplit=1)[0]
    authority = head.partition("/")[0]
    if "@" in authority:
        at = head.rindex("@")
    elif re.search(r":(?!\d*$)", authority) and not authority.startswith("["):  # not a port, so it is a password
        at = rest.rfind("@")
    else:
        at = -1
    address = re.split(r"[?#]", rest[at + 1 :], maxsplit=1)
    return rest[: max(at, 0)], address[0], "".join(address[1:])


def _all_forms(secrets: Iterable[str]) -> list[str]:
    """All forms of these secrets and of those in the environment, the longest first."""
    variables = os.environ.items()
    environment = [text for name, text in variables if name.upper().endswith(_SECRET_SUFFIXES) and len(text) >= _LONG]
    forms = {form for secret in (*secrets, *environment) if secret.strip() for form in _forms(secret)}
    return sorted(forms, key=len, reverse=True)


def _forms(secret: str) -> Iterable[str]:
    """The forms in which a secret can occur in a text: as it is, percent-encoded for a URL, or escaped for JSON."""
    return {secret, secret.strip(), quote(secret, safe="", errors="replace"), json.dumps(secret)[1:-1]}


def _as_pattern(secret: str) -> str:
    return re.escape(secret) if len(secret) >= _LONG else rf"(?<!\w){re.escape(secret)}(?!\w)"
