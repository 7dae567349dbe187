"""Commands that hang, to be ended by signals: ``python -m tests.endable HOW RUN`` prints "hanging" when it hangs.

``library`` is not a command but a user's script, which catches KeyboardInterrupt and goes on.
"""

from __future__ import annotations

import hashlib
import signal
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import final

from lmpipe import (
    LM,
    Completion,
    EngineError,
    Job,
    Module,
    Predict,
    Prediction,
    Request,
    RunStore,
    ScriptedLM,
    Session,
    initial_state,
    rollout,
)
from lmpipe.cli.interrupts import run_command
from lmpipe.cli.terminal import new_console
from tests.scripted import examples

_LONG = 600.0  # seconds


def hang() -> None:
    """Prints "hanging" and hangs."""
    sys.stdout.write("hanging\n")
    sys.stdout.flush()
    time.sleep(_LONG)


class Tool(Module):
    """Calls the LM, and on one example a tool that never returns, in a thread of the wavefront."""

    def __init__(self) -> None:
        self.answer = Predict("number: int -> answer")

    def forward(self, number: int) -> Prediction:
        prediction = self.answer(number=number)
        if number == 1:
            hang()
        return prediction


@final
class Hanging(LM):
    """An LM that never answers.

    Args:
        batched: Whether it is called in the main thread; otherwise it is called in the threads of the wavefront.
    """

    name = "hanging"

    def __init__(self, *, batched: bool) -> None:
        self._batched = batched

    @property
    def batched(self) -> bool:
        return self._batched

    def complete(self, requests: Sequence[Request]) -> list[Completion | EngineError]:
        hang()
        return []

    def register_adapter(self, adapter: str, folder: Path) -> None:
        """Ignores adapters."""


def _run(program: Module, lm: LM, store: RunStore) -> None:
    session = Session(lm=lm, store=store)
    state = initial_state(program, session)
    rollout(program, [Job(state, example) for example in examples(4)], session)


def tool(store: RunStore) -> None:
    _run(Tool(), ScriptedLM(lambda request: "answer: red"), store)


def batch(store: RunStore) -> None:
    _run(Predict("number: int -> answer"), Hanging(batched=True), store)


def server(store: RunStore) -> None:
    _run(Predict("number: int -> answer"), Hanging(batched=False), store)


def pool(store: RunStore) -> None:
    """Hangs in a thread pool: leaving the block waits for its threads, and so does the interpreter when it ends."""
    with ThreadPoolExecutor(2) as threads:
        threads.submit(hang)


def native(store: RunStore) -> None:
    """Hangs in native code, which does not return to Python, so no signal handler runs."""
    sys.stdout.write("hanging\n")
    sys.stdout.flush()
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)


def handled(store: RunStore) -> None:
    """Hangs with a signal handler of its own, so that it has ten seconds to end."""
    signal.signal(signal.SIGINT, lambda number, frame: None)
    hang()


def library(store: RunStore) -> None:
    try:
        tool(store)
    except KeyboardInterrupt:
        store.put({"interrupted": True})
        sys.stdout.write("went on\n")
    store.close()


HANGING = {command.__name__: command for command in (tool, batch, server, pool, native)}

if __name__ == "__main__":
    how, path = sys.argv[1:]
    if how == "library":
        library(RunStore(path))
    else:
        command = {**HANGING, "handled": handled}[how]
        run_command(lambda: command(RunStore(path)), new_console(errors=True))
