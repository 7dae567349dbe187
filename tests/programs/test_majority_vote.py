"""Majority vote: what is counted, how runs come to differ, and how an optimizer works on a program that votes."""

from __future__ import annotations

import pytest

from lmpipe import (
    ChainOfThought,
    EngineError,
    Module,
    ParseError,
    Predict,
    Prediction,
    Request,
    Sampling,
    ScriptedLM,
    Session,
    exact_match,
    initial_state,
    predictors,
)
from lmpipe.errors import ConfigError
from lmpipe.program.identity import identity
from lmpipe.runtime.trace import Step
from optimizers import BootstrapFewShotRandomSearch
from programs import MajorityVote, MultiHop
from tests.programs.arithmetic import EXAMPLES, adder, said, score, session, traces

QA = "question -> answer"


def test_a_vote_is_right_more_often_than_a_single_run() -> None:
    single, vote = score(adder()).mean, score(MajorityVote(adder(), 9)).mean
    assert single < 0.75
    assert vote > 0.85


def test_the_prediction_with_the_most_common_answer_is_returned_whole() -> None:
    answers = ["4", "5", "3", "5", "4"]
    texts = [f"reasoning: run {number}\nanswer: {answer}" for number, answer in enumerate(answers)]
    with said(*texts):
        prediction = MajorityVote(ChainOfThought(QA), 5)(question="?")
    assert prediction == {"reasoning": "run 0", "answer": "4"}  # as common as 5, and given first


@pytest.mark.parametrize("first", ["Paris", "the answer is paris"])
def test_answers_that_differ_only_in_how_they_are_written_are_one(first: str) -> None:
    texts = [f"answer: {text}" for text in (first, "Rome", "paris.", "Rome", " PARIS ")]
    with said(*texts):
        assert MajorityVote(Predict(QA), 5)(question="?").answer == ("Paris" if first == "Paris" else "Rome")
    with said(*texts):
        by_last_word = MajorityVote(Predict(QA), 5, normalize=lambda answer: answer.strip(".").lower().split()[-1])
        assert by_last_word(question="?").answer == first


def test_any_output_of_any_type_can_be_voted_on() -> None:
    with said("parts: [1, 2]", "parts: [2]", "parts: [2]"):
        assert MajorityVote(Predict("n: int -> parts: list[int]"), 3, "parts")(n=3).parts == [2]
    with said("label: 1"), pytest.raises(ConfigError, match=r"votes on 'answer', and Predict returns label; .*field="):
        MajorityVote(Predict("n: int -> label"), 1)(n=3)


def test_runs_are_sampled_although_the_session_is_greedy() -> None:
    program = MajorityVote(adder(), 3)
    steps = [step for trace in traces(program, session()) for step in trace.lm_steps]
    assert {step.request.sampling.temperature for step in steps} == {0.7}
    assert len({step.request.seed for step in steps}) == len(steps) == 3 * len(EXAMPLES)
    assert [(step.path, step.index) for step in steps[:3]] == [("program", 0), ("program", 1), ("program", 2)]


class Two(Module):
    """A program with a vote in it: the modules before and after it keep their temperature."""

    def __init__(self) -> None:
        self.before = Predict(QA)
        self.vote = MajorityVote(Predict(QA), 2)
        self.after = Predict(QA, sampling=Sampling(temperature=0.3))

    def forward(self, question: str) -> Prediction:
        self.before(question=question)
        self.vote(question=question)
        return self.after(question=question)


def temperatures(program: Module, temperature: float | None = None) -> list[float]:
    lm = ScriptedLM(lambda request: "answer: 1")
    traces(program, Session(lm=lm), temperature=temperature, examples=[EXAMPLES[0]])
    return [request.sampling.temperature for request in lm.requests]


def test_which_temperature_counts() -> None:
    warm = Predict("a: int, b: int -> answer: int", sampling=Sampling(temperature=0.3))
    assert temperatures(MajorityVote(warm, 2, temperature=0.5)) == [0.5, 0.5]
    assert temperatures(MajorityVote(warm, 2, temperature=None)) == [0.3, 0.3]
    assert temperatures(MajorityVote(adder(), 2, temperature=None)) == [0, 0]
    assert temperatures(MajorityVote(adder(), 2), temperature=1.0) == [1, 1]  # that of an optimizer
    nested = MajorityVote(MajorityVote(adder(), 2, temperature=0.2), 1, temperature=0.9)
    assert temperatures(nested) == [0.9, 0.9]
    lm = ScriptedLM(lambda request: "answer: 1")
    with Session(lm=lm):
        Two()(question="?")
    assert [request.sampling.temperature for request in lm.requests] == [0, 0.7, 0.7, 0.3]


def test_runs_that_fail_have_no_vote() -> None:
    def sometimes(request: Request) -> str:
        if not request.seed % 4:
            raise EngineError("the prompt does not fit")
        return "answer: many" if request.seed % 4 == 1 else "answer: 7"

    several = traces(MajorityVote(adder(), 20), Session(lm=ScriptedLM(sometimes)))
    assert {trace.prediction and trace.prediction.answer for trace in several} == {7}
    steps = [step for trace in several for step in trace.steps if isinstance(step, Step)]
    assert len(steps) == 20 * len(EXAMPLES)
    assert {step.text for step in steps} == {None, "answer: many", "answer: 7"}  # failed calls are in the trace too
    assert {step.error is None for step in steps if step.text == "answer: 7"} == {True}


def test_the_last_error_is_raised_if_all_runs_fail() -> None:
    with said("answer: many", "answer: few"), pytest.raises(ParseError, match="few"):
        MajorityVote(adder(), 2)(a=1, b=2)


def test_the_temperature_is_restored_after_a_failure() -> None:
    class Fallback(Module):
        def __init__(self) -> None:
            self.vote, self.plain = MajorityVote(adder(), 1), Predict("a: int, b: int -> answer: str")

        def forward(self, a: int, b: int) -> Prediction:
            try:
                return self.vote(a=a, b=b)
            except ParseError:
                return self.plain(a=a, b=b)

    lm = ScriptedLM(lambda request: "answer: many")
    with Session(lm=lm):
        assert Fallback()(a=1, b=2).answer == "many"
    assert [request.sampling.temperature for request in lm.requests] == [0.7, 0]


def test_a_program_that_votes_can_be_optimized_and_its_prompts_move_in_and_out() -> None:
    vote, single, used = MajorityVote(adder(), 3), adder(), session()
    assert list(predictors(vote)) == ["program"]
    search = BootstrapFewShotRandomSearch(exact_match, num_candidate_programs=2)
    result = search.optimize(vote, initial_state(vote, used), EXAMPLES[::2], EXAMPLES[1::2], used)
    assert result.state.prompts["program"].demos
    assert score(vote, result.state, used).mean > score(vote, in_session=used).mean
    outside = result.state.with_renamed_modules({"program": "self"})
    assert score(single, outside, used).mean > score(single, in_session=used).mean
    assert outside.with_renamed_modules({"self": "program"}) == result.state


def test_the_prompts_of_a_program_with_several_modules_move_into_a_vote_and_back() -> None:
    used, program = session(), MultiHop(hops=2)
    vote, state = MajorityVote(program, 3), initial_state(program, used)
    moved = state.with_renamed_modules({"query": "program.query", "answer": "program.answer"})
    assert moved == initial_state(vote, used)
    assert moved.with_renamed_modules({"program.query": "query", "program.answer": "answer"}) == state


def test_everything_that_decides_the_vote_is_part_of_its_identity() -> None:
    programs = [
        MajorityVote(adder(), 3),
        MajorityVote(adder(), 4),
        MajorityVote(adder(), 3, "sum"),
        MajorityVote(adder(), 3, temperature=1.0),
        MajorityVote(adder(), 3, normalize=lambda answer: answer % 2),
    ]
    assert len({identity(program=program) for program in programs}) == len(programs)
    assert identity(program=programs[0]) == identity(program=MajorityVote(adder(), 3))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n": 0}, "MajorityVote: n is 0; it must be greater than 0"),
        ({"program": MajorityVote}, r"program is .*; it must be of the type Module; write MajorityVote\(…\)"),
        ({"field": 3}, "field is 3; it must be text"),
        ({"temperature": 0.0}, "temperature is 0.0; it must be greater than 0"),
        ({"normalize": "lower"}, "normalize is 'lower'; it must be a function; write lower, the function itself"),
    ],
)
def test_invalid_arguments_are_named(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        MajorityVote(**{"program": adder(), "n": 2} | arguments)  # type: ignore[arg-type]
