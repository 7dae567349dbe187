"""The multi-hop question answering program of the paper: retrieve, read, ask again, answer."""

from __future__ import annotations

from typing import final

from lmpipe import ChainOfThought, Module, Prediction, Retrieve
from lmpipe.extend import ConfigError


@final
class MultiHop(Module):
    """A question → ``answer``, and the ``context`` it was answered from, by way of several searches.

    The program for HotPotQA of Soylu et al. 2024 (arXiv 2407.10930), after Baleen (Khattab et al. 2021, arXiv
    2101.00436). Each hop has a query module of its own, since the first one has nothing to read yet; a passage that
    several hops find is read once. What each hop found is in the trace.

    Args:
        hops: How many searches.
        k: Passages of each.

    Raises:
        ConfigError: If either is below 1.
    """

    def __init__(self, hops: int = 2, k: int = 3) -> None:
        if hops < 1:
            raise ConfigError(f"MultiHop(hops={hops}): hops must be at least 1")
        self.query = [ChainOfThought("context: list[str], question -> search_query") for _ in range(hops)]
        self.retrieve = Retrieve(k)
        self.answer = ChainOfThought("context: list[str], question -> answer")

    def forward(self, question: str) -> Prediction:
        context: dict[str, str] = {}  # id → text, in the order in which they were found
        for query in self.query:
            found = self.retrieve(query=query(context=list(context.values()), question=question).search_query)
            context |= dict(zip(found.ids, found.passages, strict=True))
        passages = list(context.values())
        return Prediction(answer=self.answer(context=passages, question=question).answer, context=passages)
