"""A small collection of passages, a retriever, a two-hop program, and an LM that answers from passages."""

from __future__ import annotations

import re
from collections.abc import Sequence

from lmpipe import (
    EngineError,
    Example,
    Job,
    Module,
    Passage,
    Predict,
    Prediction,
    Request,
    Retrieve,
    Retriever,
    Session,
    Trace,
    exact_match,
    initial_state,
    rollout,
)
from lmpipe.storage.hashing import digest

CITIES = {"Paris": "Seine", "London": "Thames", "Rome": "Tiber", "Cairo": "Nile"}
SEAS = {"Seine": "Channel", "Thames": "North Sea", "Tiber": "Tyrrhenian Sea", "Nile": "Mediterranean"}
CORPUS = [
    *(f"{city} lies on the {river}." for city, river in CITIES.items()),
    *(f"The {river} flows into the {sea}." for river, sea in SEAS.items()),
]


class WordOverlap(Retriever):
    """Scores a passage by the share of the query's words in it; queries with the word ``broken`` fail."""

    def __init__(self, texts: Sequence[str] = CORPUS) -> None:
        self._passages = {str(number): text for number, text in enumerate(texts)}
        self.searches: list[tuple[int, list[str]]] = []

    @property
    def name(self) -> str:
        return digest(["word overlap", self._passages])

    def search(self, queries: Sequence[str], k: int) -> list[list[Passage] | EngineError]:
        self.searches.append((k, list(queries)))
        return [
            EngineError("the index is damaged") if "broken" in query else self._search(words(query), k)
            for query in queries
        ]

    def _search(self, query: set[str], k: int) -> list[Passage]:
        if not query:
            return []
        scored = [Passage(key, text, len(query & words(text)) / len(query)) for key, text in self._passages.items()]
        return sorted(scored, key=lambda passage: -passage.score)[:k]


def words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text.lower()))


class ToTheSea(Module):
    """Answers which sea the river of a city reaches, in two hops."""

    def __init__(self, k: int = 2) -> None:
        self.query = Predict("context: list[str], city -> query")
        self.retrieve = Retrieve(k)
        self.answer = Predict("context: list[str], city -> answer")

    def forward(self, city: str) -> Prediction:
        context: dict[str, str] = {}
        for _ in range(2):
            query = self.query(context=list(context.values()), city=city).query
            retrieved = self.retrieve(query=query)
            context |= dict(zip(retrieved.ids, retrieved.passages, strict=True))
        return self.answer(context=list(context.values()), city=city)


def reader(request: Request) -> str:
    """Searches for the city, then for its river, and then answers with the sea."""
    question = request.messages[-1].content
    city = question.rpartition("city: ")[2].split()[0]
    river = re.search(rf"{city} lies on the (\w+)", question)
    sea = re.search(rf"The {river[1]} flows into the (.+)\.", question) if river else None
    if sea:
        return f"answer: {sea[1]}"
    return f"query: {river[1]} flows" if river else f"query: {city} lies"


def example(city: str) -> Example:
    return Example({"city": city}, {"answer": SEAS[CITIES[city]]}, id=city)


EXAMPLES = [example(city) for city in CITIES]


def run(session: Session, cities: Sequence[str] = tuple(CITIES), program: Module | None = None) -> list[Trace]:
    program = program or ToTheSea()
    state = initial_state(program, session)
    jobs = [Job(state, Example({"city": city}, {"answer": SEAS[CITIES.get(city, "Nile")]})) for city in cities]
    return rollout(program, jobs, session, exact_match)
