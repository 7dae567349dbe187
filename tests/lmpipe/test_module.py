"""Programs: structure, paths, and calling them."""

from __future__ import annotations

import pytest

from lmpipe import ChainOfThought, Module, Predict, Prediction, ScriptedLM, Session, initial_state, predictors
from lmpipe.errors import ModuleError, SessionError, SignatureError


class Nested(Module):
    def __init__(self) -> None:
        self.hops = [ChainOfThought("question -> query"), {"deep": Predict("question -> note")}]
        self.answer = Predict("question -> answer")
        self.same = self.answer

    def forward(self, question: str) -> Prediction:
        return self.answer(question=question)


def echo() -> ScriptedLM:
    return ScriptedLM(lambda request: f"answer: {request.messages[-1].content.partition(': ')[2]}")


def test_paths_follow_attributes_lists_and_dicts_and_name_each_module_once() -> None:
    assert list(predictors(Nested())) == ["hops.0.predict", "hops.1.deep", "answer"]


def test_a_program_is_called_in_a_session() -> None:
    with Session(lm=echo()):
        assert Nested()(question="Why?").answer == "Why?"


def test_a_single_predictor_is_a_program() -> None:
    with Session(lm=echo()):
        assert Predict("question -> answer")(question="Why?") == {"answer": "Why?"}


def test_outside_a_session_the_error_says_what_to_write() -> None:
    with pytest.raises(SessionError, match=r"with Session\(lm=\.\.\.\)"):
        Nested()(question="Why?")


def test_a_module_is_frozen_from_its_first_run() -> None:
    program = Nested()
    program.hops = []
    with Session(lm=echo()):
        program(question="Why?")
    with pytest.raises(ModuleError, match=r"Nested\.hops cannot be set"):
        program.hops = [Predict("a -> b")]


def test_a_module_made_on_the_fly_is_refused() -> None:
    class Careless(Module):
        def forward(self, question: str) -> Prediction:
            return Predict("question -> answer")(question=question)

    with Session(lm=echo()), pytest.raises(ModuleError, match="make it in __init__"):
        Careless()(question="Why?")


def test_wrong_inputs_are_named() -> None:
    with Session(lm=echo()), pytest.raises(SignatureError, match="missing question; it takes question"):
        Predict("question -> answer")(questoin="Why?")


def test_reasoning_may_be_left_out_by_the_lm() -> None:
    with Session(lm=ScriptedLM(lambda request: "answer: 4")):
        assert ChainOfThought("question -> answer")(question="2 + 2?") == {"reasoning": "", "answer": "4"}


def test_each_role_is_answered_by_its_lm() -> None:
    class Two(Module):
        def __init__(self) -> None:
            self.draft = Predict("question -> draft", role="small")
            self.judge = Predict("draft -> answer", role="large")

        def forward(self, question: str) -> Prediction:
            return self.judge(draft=self.draft(question=question).draft)

    small, large = ScriptedLM(lambda _: "draft: d", "small"), ScriptedLM(lambda _: "answer: a", "large")
    with Session(lm={"small": small, "large": large}) as session:
        assert Two()(question="?").answer == "a"
        assert initial_state(Two(), session).weights["large"].base == "large"
    assert [len(lm.requests) for lm in (small, large)] == [1, 1]
    with Session(lm=small), pytest.raises(SessionError, match="asks for an LM of role 'small'; there is one for lm"):
        Two()(question="?")


def test_a_prediction_is_a_read_only_mapping() -> None:
    prediction = Prediction(answer="4")
    with pytest.raises(AttributeError, match="no field 'anwser'; it has answer"):
        _ = prediction.anwser
    with pytest.raises(AttributeError, match="cannot be changed"):
        prediction.answer = "5"
