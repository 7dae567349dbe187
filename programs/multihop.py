"""The multi-hop question answering program of the paper: it searches several times, then answers."""

from __future__ import annotations

from typing import final

from lmpipe import ChainOfThought, Module, Prediction, Retrieve
from lmpipe.extend import ConfigError


@final
class MultiHop(Module):
    """Searches several times for a question; returns the ``answer`` and the ``context`` of passages.

    This is the HotPotQA program of Soylu et al. 2024 (arXiv 2407.10930), after Baleen (Khattab et al. 2021, arXiv
    2101.00436). Each hop has its own query module, since the first one has no context yet. A passage that several hops
    find is in the context once. The trace holds the passages of each hop.

    Args:
        hops: Number of searches.
        k: Number of passages of each search.

    Raises:
        ConfigError: If `hops` or `k` is below 1.
    """

    def __init__(self, hops: int = 2, k: int = 3) -> None:
        if hops < 1:
            raise ConfigError(f"MultiHop(hops={hops}): hops must be at least 1")
        self.query = [ChainOfThought("context: list[str], question -> search_query") for _ in range(hops)]
        self.retrieve = Retrieve(k)
        self.answer = ChainOfThought("context: list[str], question -> answer")

    def forward(self, question: str) -> Prediction:
        context: dict[str, str] = {}  # passage id → text, in the order of retrieval
        for query in self.query:
            search_query = query(context=list(context.values()), question=question).search_query
            retrieved = self.retrieve(query=search_query)
            context |= dict(zip(retrieved.ids, retrieved.passages, strict=True))
        passages = list(context.values())
        return Prediction(answer=self.answer(context=passages, question=question).answer, context=passages)
