"""Labels that no output of a program can be are named before or while a program is scored."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import final

import pytest

from lmpipe import Example, Module, Predict, Prediction, RunStore, ScriptedLM, Session, evaluate, exact_match
from lmpipe.errors import ConfigError
from optimizers import LabeledFewShot

QUEUE = "text -> answer: Literal['billing', 'technical', 'shiping']"


@final
class Triage(Module):
    """A text → its queue."""

    def __init__(self) -> None:
        self.queue = Predict(QUEUE)

    def forward(self, text: str) -> Prediction:
        return self.queue(text=text)


def labelled(*answers: object) -> list[Example]:
    return [Example({"text": str(number)}, {"answer": answer}) for number, answer in enumerate(answers)]


def session(store: RunStore | None = None) -> Session:
    return Session(lm=ScriptedLM(lambda request: "answer: billing"), store=store, quiet=True)


def warnings(program: Module, examples: Sequence[Example], caplog: pytest.LogCaptureFixture) -> list[str]:
    caplog.clear()
    with caplog.at_level(logging.WARNING, "lmpipe.program.labels"):
        evaluate(program, examples, exact_match, session())
    return caplog.messages


def test_an_optimizer_refuses_a_label_that_its_predictor_can_never_answer(store: RunStore) -> None:
    message = "the label answer = 'shipping' of 2 examples is not among the choices of answer: billing, technical, shi"
    with pytest.raises(ConfigError, match=message):
        LabeledFewShot().optimize(Predict(QUEUE), None, labelled("billing", "shipping", "shipping"), [], session(store))
    LabeledFewShot().optimize(Predict(QUEUE), None, labelled("billing", "Technical."), [], session(store))


def test_a_label_outside_the_choices_of_a_program_is_a_warning_once(caplog: pytest.LogCaptureFixture) -> None:
    """The program's own code may turn what its module answers into another value, so it is not refused."""
    told = warnings(Triage(), labelled("billing", "refund"), caplog)
    assert told == [
        "the label answer = 'refund' of an example is not among the choices of answer: billing, technical, shiping; "
        "is one of them misspelt?"
    ]
    assert not warnings(Triage(), labelled("billing", "refund"), caplog)
    LabeledFewShot().optimize(Triage(), None, labelled("refund"), [], session())


def test_labels_of_outputs_without_choices_are_not_checked(caplog: pytest.LogCaptureFixture) -> None:
    assert not warnings(Predict("text -> answer"), labelled("anything"), caplog)
    assert not warnings(Triage(), labelled(["billing", "anything"]), caplog)
