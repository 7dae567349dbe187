"""A server that imitates vLLM, and an LM that uses it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from lmpipe.engines.server import ServerLM
from tests.engines.openai_server import FakeServer, client, serving


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with serving() as fake:
        yield fake


@pytest.fixture
def lm(server: FakeServer) -> Iterator[ServerLM]:
    with client(server.url) as server_lm:
        yield server_lm
