"""The bundled LM is a real model."""

from __future__ import annotations

from lmpipe import Completion, Request, Sampling, WeightState
from lmpipe.engines import load_lm
from lmpipe.lm import Message


def test_it_answers_a_question() -> None:
    lm = load_lm("bundled")
    chat = (Message("system", "Answer the question briefly."), Message("user", "What is the capital of France?"))
    answer = lm.complete([Request(chat, Sampling(max_tokens=12), WeightState(base=lm.name))])[0]
    assert isinstance(answer, Completion)
    assert "Paris" in answer.text
