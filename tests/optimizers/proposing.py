"""LMs that answer correctly only if an instruction contains a certain word, and that propose instructions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from lmpipe import Example, Module, Predict, Prediction, Request

WORD = "abracadabra"


class Two(Module):
    """Thinks of a number's sign, then answers with it."""

    def __init__(self) -> None:
        self.think = Predict("number: int -> thought")
        self.answer = Predict("number: int, thought -> answer")

    def forward(self, number: int) -> Prediction:
        return self.answer(number=number, thought=self.think(number=number).thought)


class Sides(Module):
    """Answers even and odd numbers with modules of their own."""

    def __init__(self) -> None:
        self.even = Predict("number: int -> answer")
        self.odd = Predict("number: int -> answer")

    def forward(self, number: int) -> Prediction:
        return self.odd(number=number) if number % 2 else self.even(number=number)


def numbers(count: int, start: int = 0) -> list[Example]:
    return [Example({"number": n}, {"answer": str(-n)}, id=f"n{n}") for n in range(start, start + count)]


def says_why(example: Example, prediction: Prediction) -> tuple[float, str]:
    """A metric whose feedback tells the word."""
    right = prediction["answer"] == example.labels["answer"]
    return float(right), "" if right else f"The answer must be {example.labels['answer']}: say {WORD} first."


def is_right(example: Example, prediction: Prediction) -> float:
    """The same metric without feedback."""
    return says_why(example, prediction)[0]


def anything(example: Example, prediction: Prediction) -> float:
    """A metric that every answer passes."""
    return 1.0


@final
@dataclass
class Student:
    """Answers the calls of `Two` and of optimizers from what their prompts say.

    Args:
        fail_at: Number of the call that raises an error, counted from 1; 0 for none.
        malformed: Whether the completions for optimizers are empty.
    """

    fail_at: int = 0
    malformed: bool = False
    calls: int = 0

    def __call__(self, request: Request) -> str:
        self.calls += 1
        if self.calls == self.fail_at:
            raise RuntimeError("the LM broke down")
        system, prompt = request.messages[0].content, request.messages[-1].content
        if prompt.startswith("number: "):
            return self._answer(system, int(prompt.partition("\n")[0].partition(": ")[2]))
        return "" if self.malformed else self._propose(system, prompt, request)

    def _answer(self, system: str, number: int) -> str:
        if "\nthought: " in system:
            return f"thought: {number} has a sign"
        return f"answer: {-number}" if WORD in system else "answer: I do not know"

    def _propose(self, system: str, prompt: str, request: Request) -> str:
        if "\ninstruction: " not in system and "new instruction" not in system:  # a summary or description
            return f"It is all about {WORD}." if "answer: -" in prompt or WORD in prompt else "Nothing to see."
        text = f"Say {WORD}, then answer, " if WORD in prompt else "Answer, "
        return f"{text}in the manner number {request.seed % 5}."
