"""LMs that answer right only where an instruction holds a word, and propose instructions from what they are shown."""

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
    """A metric that tells the word to whoever reads its feedback."""
    right = prediction["answer"] == example.labels["answer"]
    return float(right), "" if right else f"The answer must be {example.labels['answer']}: say {WORD} first."


def is_right(example: Example, prediction: Prediction) -> float:
    """The same without a word."""
    return says_why(example, prediction)[0]


def anything(example: Example, prediction: Prediction) -> float:
    """A metric that every answer passes."""
    return 1.0


@final
@dataclass
class Student:
    """Answers `Two`, and everything that optimizers ask, by what it reads.

    Args:
        fail_at: Number of the call with which the LM breaks down, counted from 1; 0 is never.
        malformed: Whether what optimizers ask is answered with nothing.
    """

    fail_at: int = 0
    malformed: bool = False
    calls: int = 0

    def __call__(self, request: Request) -> str:
        self.calls += 1
        if self.calls == self.fail_at:
            raise RuntimeError("the LM broke down")
        system, asked = request.messages[0].content, request.messages[-1].content
        if asked.startswith("number: "):
            return self._answer(system, int(asked.partition("\n")[0].partition(": ")[2]))
        return "" if self.malformed else self._propose(system, asked, request)

    def _answer(self, system: str, number: int) -> str:
        if "\nthought: " in system:
            return f"thought: {number} has a sign"
        return f"answer: {-number}" if WORD in system else "answer: I do not know"

    def _propose(self, system: str, asked: str, request: Request) -> str:
        if "\ninstruction: " not in system and "new instruction" not in system:  # grounds
            return f"It is all about {WORD}." if "answer: -" in asked or WORD in asked else "Nothing to see."
        text = f"Say {WORD}, then answer, " if WORD in asked else "Answer, "
        return f"{text}in the manner number {request.seed % 5}."
