"""Limits of a server. Does not depend on how the server works."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from pydantic import PositiveInt

from lmpipe.validation.checks import check_settings


@final
@dataclass(frozen=True)
class ServerLimits:
    """Limits on the requests that a server answers.

    Args:
        body: Maximum size of a request body in bytes.
        queries: Maximum number of queries in a request.
        characters: Maximum length of a query in characters.
        k: Maximum number of passages for a query.
        passages: Maximum number of passages for all queries of a request together.
        seconds: Seconds within which a request must be received and answered.
        requests: Maximum number of requests in progress, waiting ones included.
        searches: Maximum number of searches at the same time.
        idle: Seconds after which a connection is closed if nothing is sent on it, or if the client takes that long to
            send a request.

    Raises:
        ConfigError: If a limit is not a whole number above 0.
    """

    body: PositiveInt = 1 << 20
    queries: PositiveInt = 1024
    characters: PositiveInt = 8192
    k: PositiveInt = 1000
    passages: PositiveInt = 20_000
    seconds: PositiveInt = 60
    requests: PositiveInt = 64
    searches: PositiveInt = 8
    idle: PositiveInt = 15

    def __post_init__(self) -> None:
        check_settings(self)
