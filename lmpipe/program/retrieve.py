"""Retrieval as a step of a program. This module knows nothing about indexes or batching."""

from __future__ import annotations

from typing import final

from lmpipe.data import Prediction
from lmpipe.errors import EngineError, SignatureError
from lmpipe.program.module import Module
from lmpipe.runtime.call_context import current_context
from lmpipe.runtime.trace import RetrievalStep
from lmpipe.text.cleaning import clean_text
from lmpipe.text.reprs import short_repr
from lmpipe.validation.arguments import check_whole_number


@final
class Retrieve(Module):
    """Searches passages for a query with the session's retriever.

    ``self.retrieve(query=…)`` returns a prediction with three lists, best first: the texts of the passages as
    ``passages``, their ``ids`` and their ``scores``. Programs that retrieve over several hops merge passages by id.

    Args:
        k: Largest number of passages for a query.

    Raises:
        ConfigError: If `k` is not a whole number above 0.
    """

    def __init__(self, k: int = 3) -> None:
        self.k = check_whole_number("k of Retrieve", k)

    def __repr__(self) -> str:
        return short_repr(self, k=self.k)

    def forward(self, query: str) -> Prediction:
        """Searches the query. A failed search stays in the trace as a step.

        Raises:
            SignatureError: If the query is not text.
            SessionError: If the session has no retriever.
            EngineError: If the query could not be answered.
        """
        if not isinstance(query, str):
            raise SignatureError(f"Retrieve needs a query that is text, not {query!r}")
        context = current_context()
        path, index, _ = context.next_call(self)
        query = clean_text(query)
        passages = context.search(query, self.k)
        if isinstance(passages, EngineError):
            context.steps.append(RetrievalStep(path, index, "retrieval", query, self.k, None, str(passages)))
            raise passages
        step = RetrievalStep(path, index, "retrieval", query, self.k, passages)
        context.steps.append(step)
        return Prediction(**step.outputs or {})
