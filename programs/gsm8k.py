"""The GSM8K program of the paper: one chain of thought from a word problem to its answer."""

from __future__ import annotations

from typing import final

from lmpipe import ChainOfThought, Module, Prediction


@final
class GSM8K(Module):
    """Solves a grade school word problem: ``question`` → ``reasoning`` and ``answer``."""

    def __init__(self) -> None:
        self.solve = ChainOfThought("question -> answer")

    def forward(self, question: str) -> Prediction:
        return self.solve(question=question)
