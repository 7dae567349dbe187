"""Failures of many rollouts are counted by kind."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmpipe import (
    EngineError,
    Example,
    Module,
    Predict,
    Prediction,
    Request,
    ScriptedLM,
    Session,
    evaluate,
    exact_match,
)
from lmpipe.program.failures import CommonFailure, FailureCounts, dominant_failure
from lmpipe.runtime.trace import Failure, Trace


def failed(message: str, kind: Failure = "program") -> Trace:
    return Trace(Example({}), "", 0, (), None, 0.0, kind, message)


def counted(*messages: str) -> list[tuple[str, int]]:
    counts = FailureCounts()
    counts.add(map(failed, messages))
    return [(failure.message, failure.count) for failure in counts.most_common()]


def test_messages_that_differ_only_in_numbers_and_quotations_are_one_kind() -> None:
    assert counted("KeyError: 'a'", "KeyError: 'b'", "ZeroDivisionError", 'KeyError: "it\'s"') == [
        ("KeyError: …", 3),
        ("ZeroDivisionError", 1),
    ]
    assert counted("3,012 tokens of 2048", "17 tokens of 2048") == [("… tokens of 2048", 2)]
    assert counted("field 'a': it's 1 thing", "field 'a': it's 2 things") == [
        ("field 'a': it's 1 thing", 1),
        ("field 'a': it's 2 things", 1),
    ]


@given(st.lists(st.text(st.characters(categories=["L", "N", "P", "Z"]), max_size=40), max_size=12))
def test_every_failure_is_counted_and_counts_can_be_merged(messages: list[str]) -> None:
    whole, parts = FailureCounts(), FailureCounts()
    whole.add(map(failed, messages))
    for message in messages:
        part = FailureCounts()
        part.add([failed(message)])
        parts.merge(part.most_common())
    assert parts.most_common() == whole.most_common()
    assert sum(failure.count for failure in whole.most_common()) <= len(messages)


@pytest.mark.parametrize(("count", "total", "dominant"), [(9, 10, True), (8, 10, False), (10, 10, True)])
def test_a_failure_is_dominant_if_it_ended_nearly_all_rollouts(count: int, total: int, dominant: bool) -> None:
    failure = CommonFailure(kind="parse", message="m", count=count)
    assert (dominant_failure([failure], total) is not None) == dominant
    assert dominant_failure([], 0) is None


def test_a_failure_names_the_modules_whose_calls_failed() -> None:
    """A program of one predictor needs no name; both modules of the other one fail with the same message."""

    class Either(Module):
        def __init__(self) -> None:
            self.even, self.odd = Predict("number: int -> answer: bool"), Predict("number: int -> answer: bool")

        def forward(self, number: int) -> Prediction:
            return (self.odd if number % 2 else self.even)(number=number)

    session = Session(lm=ScriptedLM(lambda request: "answer: perhaps"))
    examples = [Example({"number": number}, {"answer": True}) for number in range(8)]
    for program, modules in ((Either(), " in even and odd"), (Predict("number: int -> answer: bool"), "")):
        (failure,) = evaluate(program, examples, exact_match, session).common_failures
        assert failure.summary(8).startswith(f"8 of 8 rollouts failed{modules}: ParseError: field 'answer'")


def test_an_evaluation_lists_its_most_common_failures() -> None:
    def reply(request: Request) -> str:
        number = int(re.sub(r"\D", "", request.messages[-1].content))
        if number < 3:
            raise EngineError(f"request {number} timed out after 60 s")
        return "answer: yes" if number == 3 else f"no answer, {number}"

    program, session = Predict("number: int -> answer: bool"), Session(lm=ScriptedLM(reply))
    examples = [Example({"number": number}, {"answer": True}) for number in range(8)]
    evaluation = evaluate(program, examples, exact_match, session)
    parse, engine = evaluation.common_failures
    assert (parse.kind, parse.count) == ("parse", 4)
    assert "no answer" not in parse.message
    assert (engine.kind, engine.message, engine.count) == ("engine", "EngineError: request … timed out after 60 s", 3)
    assert engine.summary(8) == "3 of 8 rollouts failed: EngineError: request … timed out after 60 s"
