"""Retrieval as a step of a program. Knows nothing of indexes or of batching."""

from __future__ import annotations

from typing import final

from lmpipe.data import Prediction
from lmpipe.errors import EngineError, SignatureError
from lmpipe.program.module import Module
from lmpipe.runtime.call_context import required_context
from lmpipe.runtime.trace import RetrievalStep
from lmpipe.text.cleaning import clean_text
from lmpipe.validation.arguments import check_whole_number


@final
class Retrieve(Module):
    """Finds passages for a query, with the session's retriever.

    ``self.retrieve(query=…)`` gives a prediction with three lists, best first: the texts as ``passages``, their
    ``ids`` and their ``scores``. Programs that retrieve over several hops join them by id.

    Args:
        k: Most passages for one query.

    Raises:
        ConfigError: If `k` is no whole number above 0.
    """

    def __init__(self, k: int = 3) -> None:
        self.k = check_whole_number("k of Retrieve", k)

    def forward(self, query: str) -> Prediction:
        """Raises:
        SignatureError: If the query is not text.
        SessionError: If the session has no retriever.
        EngineError: If the query could not be answered; a step with the error stays in the trace.
        """
        if not isinstance(query, str):
            raise SignatureError(f"Retrieve takes a query that is text, and got {query!r}")
        run = required_context()
        path, index, _ = run.locate(self)
        query = clean_text(query)
        found = run.search(query, self.k)
        if isinstance(found, EngineError):
            run.steps.append(RetrievalStep(path, index, "retrieval", query, self.k, None, str(found)))
            raise found
        step = RetrievalStep(path, index, "retrieval", query, self.k, found)
        run.steps.append(step)
        return Prediction(**step.outputs or {})
