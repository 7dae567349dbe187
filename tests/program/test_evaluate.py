"""Evaluations and metrics."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmpipe import (
    EngineError,
    Example,
    Job,
    Module,
    Predict,
    Prediction,
    PromptState,
    Request,
    RunStore,
    ScriptedLM,
    Session,
    evaluate,
    exact_match,
    rollout,
)
from lmpipe.errors import ConfigError
from lmpipe.metrics import answer_f1, normalize_answer
from lmpipe.program.evaluate import evaluate_many
from lmpipe.program.predict import initial_state
from tests.scripted import examples as coloured

PROGRAM = Predict("n: int -> answer: int")
EXAMPLES = [Example({"n": n}, {"answer": n % 4}) for n in range(12)]


def modulo_three(request: Request) -> str:
    n = int(request.messages[-1].content.partition(": ")[2])
    return "answer: none" if n == 11 else f"answer: {n % 3}"


def test_mean_error_and_failures_are_counted_over_examples() -> None:
    session = Session(lm=ScriptedLM(modulo_three))
    result = evaluate(PROGRAM, EXAMPLES, exact_match, session)
    assert result.mean == pytest.approx(3 / 12)
    assert result.stderr == pytest.approx(math.sqrt(0.25 * 0.75 / 11))
    assert result.n == 12
    assert result.failures == {"parse": 1}
    assert "field 'answer': has no number" in (result.first_error or "")


def test_a_recorded_evaluation_is_not_repeated_but_its_cost_is_counted(store: RunStore) -> None:
    lm = ScriptedLM(modulo_three)
    first = Session(lm=lm, store=store)
    state = initial_state(PROGRAM, first)
    other = state.with_prompt("self", PromptState(instructions="Guess."))
    evaluation = evaluate(PROGRAM, EXAMPLES, exact_match, first, state=state)
    second = Session(lm=lm, store=store)
    recalled, _ = evaluate_many(PROGRAM, [state, other], EXAMPLES, exact_match, second)
    assert recalled == evaluation
    assert len(lm.requests) == 24
    assert second.ledger.total.lm_calls == 24


def test_changed_examples_or_a_changed_program_are_evaluated_again(store: RunStore) -> None:
    class Offset(Module):
        def __init__(self, by: int) -> None:
            self.by = by
            self.inner = PROGRAM

        def forward(self, n: int) -> Prediction:
            return Prediction(answer=self.inner(n=n).answer + self.by)

    session = Session(lm=ScriptedLM(modulo_three), store=store)
    right = [Example({"n": n}, {"answer": n % 3}, id=str(n)) for n in range(4)]
    wrong = [Example({"n": n}, {"answer": 99}, id=str(n)) for n in range(4)]

    def mean(examples: list[Example], by: int) -> float:
        program = Offset(by)
        return evaluate(program, examples, exact_match, session).mean

    assert [mean(right, 0), mean(wrong, 0), mean(right, 1), mean(right, 0)] == [1, 0, 0, 1]


def test_an_evaluation_with_engine_errors_is_not_recorded(store: RunStore) -> None:
    replies = ["timeout", "answer: 1"]

    def flaky(request: Request) -> str:
        if (reply := replies.pop(0)) == "timeout":
            raise EngineError(reply)
        return reply

    session = Session(lm=ScriptedLM(flaky), store=store)
    means = [evaluate(PROGRAM, EXAMPLES[1:2], exact_match, session).mean for _ in range(3)]
    assert means == [0, 1, 1]


def test_repeated_ids_are_refused() -> None:
    session = Session(lm=ScriptedLM(modulo_three))
    with pytest.raises(ConfigError, match="1 example ids are not unique"):
        evaluate(PROGRAM, [EXAMPLES[0], EXAMPLES[0]], exact_match, session)


def test_no_examples_are_refused() -> None:
    with pytest.raises(ConfigError, match="examples is empty, so there is nothing to score; pass at least one"):
        evaluate(PROGRAM, [], exact_match, Session(lm=ScriptedLM(modulo_three)))


@pytest.mark.parametrize(
    ("answer", "gold", "match", "f1"),
    [
        ("The  Eiffel-Tower!", "eiffeltower", 1, 1),
        ("Paris, France", "Paris", 0, 2 / 3),
        ("", "Paris", 0, 0),
        (4, "4", 1, 1),
    ],
)
def test_answers_are_compared_after_normalisation(answer: object, gold: str, match: float, f1: float) -> None:
    example = Example({}, {"answer": gold})
    assert exact_match(example, Prediction(answer=answer)) == match
    assert answer_f1(example, Prediction(answer=answer)) == pytest.approx(f1)


@given(st.text())
def test_normalising_twice_changes_nothing_more(text: str) -> None:
    once = normalize_answer(text)
    assert normalize_answer(once) == once


def with_reason(example: Example, prediction: Prediction) -> tuple[float, str]:
    right = prediction["answer"] == example.labels["answer"]
    return float(right), "" if right else f"it is {example.labels['answer']}"


def test_a_metric_may_return_feedback() -> None:
    program, session = Predict("number: int -> answer"), Session(lm=ScriptedLM(lambda request: "answer: red"))
    state = initial_state(program, session)
    first, second = rollout(program, [Job(state, example) for example in coloured(2)], session, with_reason)
    assert [(trace.score, trace.feedback) for trace in (first, second)] == [(1.0, ""), (0.0, "it is green")]
    assert evaluate(program, coloured(2), with_reason, session, state=state).mean == 0.5


def test_a_measure_that_fails_costs_its_value_and_nothing_else(caplog: pytest.LogCaptureFixture) -> None:
    session = Session(lm=ScriptedLM(modulo_three))
    state, few = initial_state(PROGRAM, session), EXAMPLES[:4]
    measures: dict[str, Any] = {
        "raises": lambda trace: 1 / trace.example.inputs["n"],
        "text": lambda trace: "high",
        "not a number": lambda trace: math.nan if trace.example.inputs["n"] else 2,
        "none": lambda trace: None,
    }
    values = evaluate(PROGRAM, few, exact_match, session, state=state, measures=measures).measures
    ids = [example.id for example in few]
    assert values == {
        "raises": {ids[1]: 1, ids[2]: 1 / 2, ids[3]: 1 / 3},
        "text": {},
        "not a number": {ids[0]: 2.0},
        "none": {},
    }
    assert f"measure raises failed on 1 of 4 rollouts: on example {ids[0]} it raised ZeroDivisionError" in caplog.text
    assert f"measure text failed on 4 of 4 rollouts: on example {min(ids)} it raised ValueError" in caplog.text
    assert "the measure none" not in caplog.text
