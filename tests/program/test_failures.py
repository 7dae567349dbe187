"""What many runs failed of is counted by kind."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmpipe import EngineError, Example, Predict, Request, ScriptedLM, Session, evaluate, exact_match, initial_state
from lmpipe.program.failures import CommonFailure, FailureCounts, dominant_failure
from lmpipe.runtime.trace import Failure, Trace


def failed(message: str, kind: Failure = "program") -> Trace:
    return Trace(Example({}), "", 0, (), None, 0.0, kind, message)


def counted(*messages: str) -> list[tuple[str, int]]:
    counts = FailureCounts()
    counts.add(map(failed, messages))
    return [(failure.message, failure.count) for failure in counts.most_common()]


def test_messages_that_differ_in_numbers_and_quotations_alone_are_one_kind() -> None:
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
def test_every_failure_is_counted_and_counts_of_parts_can_be_joined(messages: list[str]) -> None:
    whole, parts = FailureCounts(), FailureCounts()
    whole.add(map(failed, messages))
    for message in messages:
        part = FailureCounts()
        part.add([failed(message)])
        parts.merge(part.most_common())
    assert parts.most_common() == whole.most_common()
    assert sum(failure.count for failure in whole.most_common()) <= len(messages)


@pytest.mark.parametrize(("count", "runs", "enough"), [(9, 10, True), (8, 10, False), (10, 10, True)])
def test_a_failure_explains_what_came_of_runs_if_nearly_all_had_it(count: int, runs: int, enough: bool) -> None:
    failure = CommonFailure(kind="parse", message="m", count=count)
    assert (dominant_failure([failure], runs) is not None) == enough
    assert dominant_failure([], 0) is None


def test_an_evaluation_says_what_its_runs_failed_of() -> None:
    def reply(request: Request) -> str:
        number = int(re.sub(r"\D", "", request.messages[-1].content))
        if number < 3:
            raise EngineError(f"request {number} timed out after 60 s")
        return "answer: yes" if number == 3 else f"no answer, {number}"

    program, session = Predict("number: int -> answer: bool"), Session(lm=ScriptedLM(reply))
    examples = [Example({"number": number}, {"answer": True}) for number in range(8)]
    found = evaluate(program, initial_state(program, session), examples, exact_match, session)
    parse, engine = found.common_failures
    assert (parse.kind, parse.count) == ("parse", 4)
    assert "no answer" not in parse.message
    assert (engine.kind, engine.message, engine.count) == ("engine", "EngineError: request … timed out after 60 s", 3)
    assert engine.summary(8) == "3 of 8 rollouts failed: EngineError: request … timed out after 60 s"
