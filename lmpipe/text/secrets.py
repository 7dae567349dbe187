"""Secrets stay out of texts: credentials in URLs, keys that were given, and keys that stand in the environment.

What is shown, logged, written or raised goes through `redact` where it can hold a URL or the words of a server. Knows
nothing of who uses it.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from urllib.parse import parse_qsl, quote, unquote

REDACTED = "***"
"""What stands in the place of a secret."""

_URL = re.compile(r"(?<![\w+.-])([A-Za-z][\w+.-]*://)(\S+?)(?=,\s*[A-Za-z][\w+.-]*://|\s|$)")
_LOGIN = re.compile(r"(?<![^\s:@])[^\s:@/]+:[^\s@]*@(?!https?://)")
_CLOSING = re.compile(r"[\"'`)\]}>,;:.]*$")  # what closes a clause around a URL
_NAMES = ("KEY", "TOKEN", "PASSWORD", "SECRET")  # how names of environment variables end that hold secrets
_LONG = 8  # characters; a shorter secret is hidden where it stands as a word, since any text can hold its letters


def redact(text: str, secrets: Iterable[str] = ()) -> str:
    """A text without secrets.

    Args:
        text: Any text, such as an error message or a command.
        secrets: What must not be seen, beside the credentials and queries of URLs and beside the values of environment
            variables whose names end in KEY, TOKEN, PASSWORD or SECRET.
    """
    forms = _all_forms(secrets)
    if forms:
        text = re.sub("|".join(map(_as_pattern, forms)), REDACTED, text)
    return _URL.sub(lambda found: found[1] + _shown(found[2]), text)


def redact_and_truncate(text: str, length: int, secrets: Iterable[str] = ()) -> str:
    """The beginning of a text that may be very long, without secrets, and without the first part of one at its end."""
    secrets = tuple(secrets)
    shown = redact(text[: 16 * length], secrets)
    if len(text) > 16 * length:
        shown = shown[: max(0, len(shown) - max(map(len, _all_forms(secrets)), default=0))]
    return shown if len(shown) <= length and len(text) <= 16 * length else shown[:length] + " …"


def redact_spec(spec: str) -> str:
    """A short text that should name an LM or the like, without secrets, also if its URL lacks ``http://``."""
    return _LOGIN.sub(f"{REDACTED}@", redact(spec))


def strip_credentials(url: str) -> str:
    """A URL without what stands before its ``@`` and without its query; any other text as it is."""
    scheme, separator, rest = url.partition("://")
    return f"{scheme}://{_parts(rest)[1]}" if separator else url


def secrets_in_url(url: str) -> tuple[str, ...]:
    """What must not be seen of a URL: its password, or its user where there is none, and the values of its query."""
    credentials, _, query = _parts(url.partition("://")[2] or url)
    user, _, password = credentials.partition(":")
    named = [credentials, password] if password else [user]
    values = [value or name for name, value in parse_qsl(query, keep_blank_values=True)]
    return tuple(form for part in (*named, *values) if part for form in (part, unquote(part)))


def _shown(rest: str) -> str:
    """What follows ``scheme://`` in a text, with marks where something was hidden."""
    closing = _CLOSING.search(rest)
    end = closing[0] if closing else ""
    credentials, place, query = _parts(rest.removesuffix(end))
    return f"{REDACTED}@{place}" * bool(credentials) + place * (not credentials) + f"?{REDACTED}" * bool(query) + end


def _parts(rest: str) -> tuple[str, str, str]:
    """Credentials, host and path, and query of what follows ``scheme://``.

    Passwords that should have been quoted, with ``/``, ``?`` or ``@`` in them, count as credentials to their end.
    """
    head = re.split(r"[?#]", rest, maxsplit=1)[0]
    authority = head.partition("/")[0]
    if "@" in authority:
        at = head.rindex("@")
    elif re.search(r":(?!\d*$)", authority) and not authority.startswith("["):  # no port, so it is a password
        at = rest.rfind("@")
    else:
        at = -1
    place = re.split(r"[?#]", rest[at + 1 :], maxsplit=1)
    return rest[: max(at, 0)], place[0], "".join(place[1:])


def _of_environment() -> Iterable[str]:
    return (value for name, value in os.environ.items() if name.upper().endswith(_NAMES) and len(value) >= _LONG)


def _all_forms(secrets: Iterable[str]) -> list[str]:
    """In all their forms, the longest first."""
    forms = {form for secret in (*secrets, *_of_environment()) if secret.strip() for form in _forms(secret)}
    return sorted(forms, key=len, reverse=True)


def _forms(secret: str) -> Iterable[str]:
    """How a secret can stand in a text: as it is, quoted for a URL, or within JSON."""
    return {secret, secret.strip(), quote(secret, safe="", errors="replace"), json.dumps(secret)[1:-1]}


def _as_pattern(secret: str) -> str:
    return re.escape(secret) if len(secret) >= _LONG else rf"(?<!\w){re.escape(secret)}(?!\w)"
