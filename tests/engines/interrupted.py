"""A user's script that requests several completions from a server: ``python -m tests.engines.interrupted URL``."""

from __future__ import annotations

import sys

from tests.engines.openai_server import client, request

if __name__ == "__main__":
    with client(sys.argv[1], dialect="vllm") as lm:
        lm.complete([request(str(number)) for number in range(4)])
