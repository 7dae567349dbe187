"""A metric must return a number in [0, 1]; anything else is a failure of the kind "metric", or ends the run."""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from typing import Any

import pytest

from lmpipe import Example, Module, Predict, Prediction, ScriptedLM, Session, evaluate, exact_match
from lmpipe.errors import EngineError, MetricError, ModuleError
from lmpipe.metrics import Metric, score_prediction
from lmpipe.program.evaluate import Evaluation


class Ask(Module):
    def __init__(self) -> None:
        self.ask = Predict("question -> answer")

    def forward(self, question: str) -> Prediction:
        return self.ask(question=question)


def questions(count: int) -> list[Example]:
    return [Example({"question": f"q{number}"}, id=str(number)) for number in range(count)]


def scored(metric: Metric, count: int = 20) -> tuple[Evaluation, ScriptedLM]:
    program, lm = Ask(), ScriptedLM(lambda request: "answer: ok")
    session = Session(lm=lm, max_concurrency=4)
    return evaluate(program, questions(count), metric, session), lm


async def coroutine(example: Example, prediction: Prediction) -> float:
    return 1.0


def forgot_return(example: Example, prediction: Prediction) -> Any:
    bool(prediction.answer == "ok")


def raises(example: Example, prediction: Prediction) -> float:
    return float(example.labels["gold"] == prediction.answer)


def raises_in_a_library(example: Example, prediction: Prediction) -> float:
    return float(json.loads(prediction.answer))


WRONG: dict[str, tuple[Any, str]] = {
    "nan": (lambda e, p: math.nan, "returned nan"),
    "inf": (lambda e, p: math.inf, "returned inf"),
    "negative": (lambda e, p: -5, "returned -5"),
    "percent": (lambda e, p: 7, "returned 7"),
    "a dict": (lambda e, p: {"score": 1.0}, r"returned \{'score': 1.0\}"),
    "text": (lambda e, p: "1.0", "returned '1.0'"),
    "three": (lambda e, p: (1.0, "good", "more"), "returned .1.0, 'good', 'more'."),
    "nothing": (forgot_return, "forgot_return: it returned None; it must return a number"),
    "a coroutine": (coroutine, "coroutine: it is async.*write `def`"),
    "an exception": (raises, r"raises: it raised KeyError: 'gold' \(test_scoring.py, line \d+\)"),
    "an exception of a library": (raises_in_a_library, r"JSONDecodeError: .*\(test_scoring.py, line \d+\)"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_metric_that_always_fails_ends_the_run_after_ten_predictions(wrong: str) -> None:
    metric, message = WRONG[wrong]
    with pytest.raises(MetricError, match=message):
        scored(metric, count=1000)
    with pytest.raises(MetricError, match=message):
        scored(metric, count=1)


def test_a_metric_that_always_fails_costs_few_calls() -> None:
    lm = ScriptedLM(lambda request: "answer: ok")
    program, session = Ask(), Session(lm=lm, max_concurrency=4)
    examples = [Example({"question": f"q{number}"}) for number in range(500)]
    with pytest.raises(MetricError, match=r"it failed on \d+ of \d+ predictions, so the run ends"):
        evaluate(program, examples, forgot_return, session)
    assert len(lm.requests) < 30


@pytest.mark.parametrize("wrong", WRONG)
def test_a_metric_that_fails_on_few_examples_costs_only_these(wrong: str, caplog: pytest.LogCaptureFixture) -> None:
    broken, _ = WRONG[wrong]

    def metric(example: Example, prediction: Prediction) -> Any:
        return broken(example, prediction) if int(example.id) % 3 == 0 else 1.0

    with caplog.at_level(logging.WARNING):
        evaluation, _ = scored(metric)
    assert evaluation.failures == {"metric": 7}
    assert evaluation.mean == 13 / 20
    assert "the metric failed in 7 of 20 rollouts: metric metric: it " in caplog.text
    assert "example 0" in str(evaluation.first_error)


def test_a_metric_that_fails_on_most_examples_ends_the_run() -> None:
    with pytest.raises(MetricError, match="failed on"):
        scored(lambda e, p: math.nan if int(e.id) % 3 else 1.0)


def test_an_engine_error_in_a_metric_counts_as_an_engine_failure() -> None:
    def metric(example: Example, prediction: Prediction) -> float:
        raise EngineError("the judge is gone")

    evaluation, _ = scored(metric)
    assert evaluation.failures == {"engine": 20}


@pytest.mark.parametrize(
    ("value", "score"),
    [(True, 1.0), (0, 0.0), (Fraction(1, 2), 0.5), (Decimal("0.25"), 0.25), (1 + 1e-9, 1.0), (-1e-9, 0.0)],
)
def test_any_kind_of_number_is_a_score(value: Any, score: float) -> None:
    example, prediction = Example({}), Prediction(answer="x")
    assert score_prediction(lambda e, p: value, example, prediction) == (score, "")
    assert score_prediction(lambda e, p: (value, "why"), example, prediction) == (score, "why")


def test_a_metric_that_the_program_calls_is_part_of_the_program() -> None:
    class Checks(Ask):
        def forward(self, question: str) -> Prediction:
            exact_match(Example({}), self.ask(question=question))
            return Prediction(answer="never")

    program, session = Checks(), Session(lm=ScriptedLM(lambda request: "answer: ok"))
    examples = [Example({"question": f"q{number}"}) for number in range(12)]
    evaluation = evaluate(program, examples, exact_match, session)
    assert evaluation.failures == {"program": 12}


@pytest.mark.parametrize("size", [12, 300])
def test_a_bug_that_ends_every_rollout_ends_the_run(size: int) -> None:
    class Misspelt(Ask):
        def forward(self, question: str) -> Prediction:
            self.ask(question=question)
            return anwser  # type: ignore[name-defined,no-any-return]  # noqa: F821

    session = Session(lm=ScriptedLM(lambda request: "answer: ok"))
    with pytest.raises(ModuleError, match=r"raised NameError: name 'anwser' is not defined .* on all of the first 10"):
        evaluate(Misspelt(), questions(size), exact_match, session)


@pytest.mark.parametrize(
    ("fails", "count"),
    [(lambda number: number != 3, 11), (lambda number: number < 9, 9)],
    ids=["all but one of the first ten", "the first nine"],
)
def test_a_bug_that_ends_some_rollouts_is_data(fails: Callable[[int], bool], count: int) -> None:
    class Sometimes(Ask):
        def forward(self, question: str) -> Prediction:
            if fails(int(question.removeprefix("q"))):
                raise TypeError("cannot be added")
            return self.ask(question=question)

    session = Session(lm=ScriptedLM(lambda request: "answer: ok"))
    assert evaluate(Sometimes(), questions(12), lambda e, p: 1.0, session).failures == {"program": count}


def test_what_an_untuned_lm_gets_wrong_everywhere_is_data() -> None:
    """A value that the program cannot use is what tuning can mend, so it is no bug of the program."""

    class Reads(Ask):
        def forward(self, question: str) -> Prediction:
            return Prediction(answer=int(self.ask(question=question).answer))

    class Finds(Ask):
        def forward(self, question: str) -> Prediction:
            return Prediction(answer=re.search("[0-9]", self.ask(question=question).answer).group())  # type: ignore[union-attr]

    session = Session(lm=ScriptedLM(lambda request: "answer: ok"))
    for program in (Reads(), Finds()):
        assert evaluate(program, questions(12), exact_match, session).failures == {"program": 12}
