"""Refine: what the critic and the reviser read, when the revisions stop, and which answer is returned."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from lmpipe import (
    ChainOfThought,
    Module,
    ParseError,
    Predict,
    Prediction,
    Request,
    ScriptedLM,
    Session,
    exact_match,
    initial_state,
    predictors,
)
from lmpipe.errors import ConfigError, SignatureError
from lmpipe.program.identity import identity
from optimizers import BootstrapFewShotRandomSearch
from programs import Refine
from tests.programs.arithmetic import ADD, EXAMPLES, adder, said, score, session, traces

QA = "question -> answer"


def longest(inputs: Mapping[str, Any], prediction: Prediction) -> float:
    return len(prediction.answer)


def is_sum(inputs: Mapping[str, Any], prediction: Prediction) -> float:
    return float(prediction.answer == inputs["a"] + inputs["b"])


def requests(session: Session) -> list[Request]:
    assert isinstance(session.lm, ScriptedLM)
    return session.lm.requests


def test_feedback_improves_the_answers() -> None:
    assert score(adder()).mean < 0.75
    assert score(Refine(adder(), ADD, 2)).mean > 0.8


def test_the_critic_reads_the_answer_and_the_reviser_reads_both() -> None:
    session = said("answer: 5", "feedback: too low", "answer: 6", "feedback: one more", "answer: 7")
    program = Refine(Predict(QA), QA, 3)
    assert list(predictors(program)) == ["program", "critic", "reviser"]
    with session:
        assert program(question="3 + 4?") == {"answer": "7"}
    first, critic, reviser, *_, last = [request.messages for request in requests(session)]
    assert first[-1].content == "question: 3 + 4?"
    assert critic[-1].content == "question: 3 + 4?\nanswer: 5"
    assert reviser[-1].content == "question: 3 + 4?\nprevious_answer: 5\nfeedback: too low"
    assert last[-1].content == "question: 3 + 4?\nprevious_answer: 6\nfeedback: one more"
    assert "Given question, produce answer." in critic[0].content
    assert "Given question, produce answer." in reviser[0].content


def test_the_calls_are_in_the_trace_by_module() -> None:
    trace = traces(Refine(adder(), ADD, 2), Session(lm=ScriptedLM(lambda _: "answer: 1\nfeedback: no")))[0]
    assert [(step.path, step.index) for step in trace.steps] == [("program", 0), ("critic", 0), ("reviser", 0)]


def test_an_answer_that_is_good_enough_is_not_revised() -> None:
    several = traces(Refine(adder(), ADD, 4, is_sum, threshold=1), session())
    assert {len(trace.steps) for trace in several} >= {1, 3}
    assert all(trace.score == 1 for trace in several if len(trace.steps) == 1)


def test_with_a_reward_the_best_answer_is_returned_and_without_one_the_last() -> None:
    texts = ["answer: a", "feedback: longer", "answer: bbb", "feedback: shorter", "answer: cc"]
    with said(*texts):
        assert Refine(Predict(QA), QA, 3, longest)(question="?").answer == "bbb"
    with said(*texts):
        assert Refine(Predict(QA), QA, 3)(question="?").answer == "cc"


def test_attempts_that_fail_count_and_lose_nothing() -> None:
    add = Refine(adder(), ADD, 3)
    with said("answer: many", "answer: 4", "feedback: no", "answer: 5"):  # the first answer cannot be read
        assert add(a=2, b=3).answer == 5
    with said("answer: 4", "feedback: no", "answer: some", "feedback: no", "answer: none"):
        assert add(a=2, b=3).answer == 4
    with said("answer: many", "answer: some", "answer: few"), pytest.raises(ParseError, match="few"):
        add(a=2, b=3)


def test_reasoning_is_criticized_and_revised_if_the_task_has_it() -> None:
    session = said("reasoning: a guess\nanswer: 5", "feedback: add", "reasoning: 3 + 4 = 7\nanswer: 7")
    with session:
        prediction = Refine(ChainOfThought(QA), "question -> reasoning, answer", 2)(question="3 + 4?")
    assert prediction == {"reasoning": "3 + 4 = 7", "answer": "7"}
    assert "reasoning: a guess" in requests(session)[1].messages[-1].content


def test_reasoning_for_an_older_answer_is_not_returned_with_a_newer_one() -> None:
    with said("reasoning: a guess\nanswer: 5", "feedback: add", "answer: 7"):
        assert Refine(ChainOfThought(QA), QA, 2)(question="3 + 4?") == {"answer": "7"}


class Lookup(Module):
    def __init__(self) -> None:
        self.answer = Predict("context: list[str], question -> answer")

    def forward(self, question: str) -> Prediction:
        context = [f"a passage on {question}"]
        return Prediction(context=context, answer=self.answer(context=context, question=question).answer)


def test_outputs_of_the_program_that_the_task_reads_are_kept() -> None:
    session = said("answer: a sea", "feedback: which one?", "answer: the Channel")
    with session:
        prediction = Refine(Lookup(), "question, context: list[str] -> answer", 2)(question="the Seine")
    assert prediction == {"context": ["a passage on the Seine"], "answer": "the Channel"}
    assert all("a passage on the Seine" in request.messages[-1].content for request in requests(session))


def test_all_of_its_predictors_can_be_optimized() -> None:
    program, used = Refine(adder(), ADD, 2), session()
    search = BootstrapFewShotRandomSearch(exact_match, num_candidate_programs=2, max_labeled_demos=0)
    result = search.optimize(program, initial_state(program, used), EXAMPLES[::2], EXAMPLES[1::2], used)
    assert {path for path, prompt in result.state.prompts.items() if prompt.demos} == {"program", "critic", "reviser"}
    assert score(program, result.state, used).mean > score(program, in_session=used).mean


def test_its_task_and_reward_are_part_of_its_identity() -> None:
    programs = [
        Refine(Predict(QA), QA, 2),
        Refine(Predict(QA), QA, 2, longest),
        Refine(Predict(QA), "question -> answer: str | None", 2),
    ]
    assert len({identity(program=program) for program in programs}) == 3


def test_a_task_with_fields_that_the_program_does_not_have_is_refused() -> None:
    program = Refine(Predict(QA), "question, context -> summary", 2)
    message = "the task of Refine has context, summary, and Predict has the inputs question and returns answer"
    with said("answer: 5"), pytest.raises(ConfigError, match=message):
        program(question="3 + 4?")


def test_invalid_arguments_are_named() -> None:
    with pytest.raises(ConfigError, match="Refine: n is 0"):
        Refine(Predict(QA), QA, 0)
    with pytest.raises(ConfigError, match=r"threshold=0\.5 has no effect without a reward"):
        Refine(Predict(QA), QA, 2, threshold=0.5)
    with pytest.raises(SignatureError, match="'feedback' appears twice"):
        Refine(Predict(QA), "question, feedback -> answer", 2)


def echo(request: Request) -> str:
    return "answer: 1\nfeedback: none"


def test_it_samples_as_its_predictors_do() -> None:
    lm = ScriptedLM(echo)
    with Session(lm=lm):
        Refine(Predict(QA), QA, 2)(question="?")
    assert {request.sampling.temperature for request in lm.requests} == {0}
