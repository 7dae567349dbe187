"""A time limit ends calls that hang: a batch, a call of a server, a tool, a search."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from time import monotonic

import pytest

from lmpipe import (
    LM,
    Budget,
    Completion,
    EngineError,
    Example,
    Module,
    Passage,
    Predict,
    Prediction,
    Request,
    Retrieve,
    Retriever,
    ScriptedLM,
    Session,
    evaluate,
)
from lmpipe.errors import BudgetSpent
from lmpipe.runtime.deadline import check_deadline

HANGS = 600.0  # seconds, far beyond the test
LIMIT = 0.5


class Ask(Module):
    def __init__(self) -> None:
        self.ask = Predict("question -> answer")

    def forward(self, question: str) -> Prediction:
        return self.ask(question=question)


class Hanging(LM):
    """An LM that never answers a batch with a slow question.

    Args:
        batched: Whether the wavefront batches its requests.
        obedient: Whether it checks the deadline while it hangs.
    """

    name = "hanging"

    def __init__(self, *, batched: bool, obedient: bool) -> None:
        self.batched, self.obedient, self.over = batched, obedient, threading.Event()

    def complete(self, requests: Sequence[Request]) -> list[Completion | EngineError]:
        until = monotonic() + HANGS
        while any("slow" in request.messages[-1].content for request in requests) and monotonic() < until:
            if self.over.wait(0.05):
                break
            if self.obedient:
                check_deadline()
        return [Completion("answer: yes") for _ in requests]

    def register_adapter(self, adapter: str, folder: Path) -> None:
        return


class Tool(Module):
    """A program that waits for something other than an LM call."""

    over = threading.Event()

    def forward(self, question: str) -> Prediction:
        if "slow" in question:
            self.over.wait(HANGS)
        return Prediction(answer="yes")


class Searching(Module):
    def __init__(self) -> None:
        self.retrieve = Retrieve()

    def forward(self, question: str) -> Prediction:
        return Prediction(answer=self.retrieve(query=question).passages[0])


class HangingRetriever(Retriever):
    name = "hanging"
    over = threading.Event()

    def search(self, queries: Sequence[str], k: int) -> list[list[Passage]]:
        self.over.wait(HANGS)
        return [[Passage("1", "yes", 1.0)] for _ in queries]


def right(example: Example, prediction: Prediction) -> float:
    return float(prediction.answer == "yes")


def evaluate_in_time(program: Module, session: Session) -> tuple[dict[str, float], float]:
    """Returns the scores of the examples that were done in time, and the seconds that the evaluation took."""
    limited = session.limited(Budget(max_seconds=LIMIT))
    examples = [Example({"question": text}, id=text) for text in ("quick 1", "quick 2", "slow")]
    started = monotonic()
    evaluation = evaluate(program, examples, right, limited)
    assert evaluation.failures["budget"] == 3 - evaluation.n
    assert not evaluation.complete
    return dict(evaluation.scores), monotonic() - started


QUICK = {"quick 1": 1.0, "quick 2": 1.0}


@pytest.mark.parametrize("obedient", [True, False])
@pytest.mark.parametrize(("batched", "scores"), [(False, QUICK), (True, {})])
def test_a_call_that_hangs_ends_at_the_deadline(batched: bool, obedient: bool, scores: dict[str, float]) -> None:
    lm = Hanging(batched=batched, obedient=obedient)
    scored, seconds = evaluate_in_time(Ask(), Session(lm=lm))
    assert scored == scores  # if batched, the quick questions were in one batch with the slow one
    assert seconds < LIMIT + 5
    lm.over.set()


def test_a_tool_that_hangs_ends_at_the_deadline() -> None:
    scored, seconds = evaluate_in_time(Tool(), Session(lm=ScriptedLM(str)))
    assert scored == QUICK
    assert seconds < LIMIT + 5
    Tool.over.set()


def test_a_search_that_hangs_ends_at_the_deadline() -> None:
    scored, seconds = evaluate_in_time(Searching(), Session(lm=ScriptedLM(str), retriever=HangingRetriever()))
    assert scored == {}
    assert seconds < LIMIT + 5
    HangingRetriever.over.set()


@pytest.mark.parametrize("obedient", [True, False])
def test_a_program_called_directly_ends_at_the_deadline(obedient: bool) -> None:
    lm, started = Hanging(batched=True, obedient=obedient), monotonic()
    with Session(lm=lm).limited(Budget(max_seconds=LIMIT)), pytest.raises(BudgetSpent, match="max_seconds"):
        Ask()(question="slow")
    assert monotonic() - started < LIMIT + 5
    lm.over.set()


def test_an_engine_that_fails_late_is_not_taken_for_one_that_hangs() -> None:
    class Fails(LM):
        name = "fails"

        def complete(self, requests: Sequence[Request]) -> list[Completion | EngineError]:
            raise TimeoutError("the device does not answer")

        def register_adapter(self, adapter: str, folder: Path) -> None:
            return

    with pytest.raises(EngineError, match=r"'fails' .* the device does not answer"):
        evaluate_in_time(Ask(), Session(lm=Fails()))
