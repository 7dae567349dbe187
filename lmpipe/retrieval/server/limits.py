"""What a server of an index takes upon itself. Knows nothing of how it serves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from pydantic import PositiveInt

from lmpipe.validation.checks import check_settings


@final
@dataclass(frozen=True)
class Limits:
    """What a server takes upon itself.

    Args:
        body: Most bytes of a request's body.
        queries: Most queries of a request.
        characters: Most characters of a query.
        k: Most passages for a query.
        passages: Most passages for all queries of a request together.
        seconds: In which a request must have come and be answered.
        requests: Most requests that are answered, or wait, at the same time.
        searches: Most of them that search at the same time.
        idle: Seconds after which a connection is closed on which nothing happens, or whose client takes as long to send
            a request.

    Raises:
        ConfigError: If one is no whole number above 0.
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
