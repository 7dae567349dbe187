"""A program of two modules: one reads facts out of a text, the other decides by the facts alone."""

from __future__ import annotations

from typing import final

from lmpipe import ChainOfThought, Module, Predict, Prediction


@final
class ExtractDecide(Module):
    """Extracts the facts of a text, and decides by them; returns the outputs of both modules.

    Args:
        extract: Signature of the first module, a text or a class.
        decide: Signature of the second module, whose inputs are outputs of the first one.
    """

    def __init__(self, extract: str | type, decide: str | type) -> None:
        self.extract = Predict(extract)
        self.decide = ChainOfThought(decide)

    def forward(self, text: str) -> Prediction:
        facts = self.extract(text=text)
        return Prediction(**facts, **self.decide(**facts))
