"""A task that a scripted LM learns step by step, so that the report of a run has content in every section."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import final

from benchmarks.experiments.task import Task
from lmpipe import Example, Metric, Module, Request, Trace, exact_match
from lmpipe.program.evaluate import Measure
from lmpipe.runtime.trace import RetrievalStep
from programs import MultiHop
from tests.rivers import CITIES, SEAS

MARKUP = "<script>alert('no')</script>"


@final
@dataclass(frozen=True)
class RecallAt:
    """Share of the two passages that are found up to and including a hop."""

    hop: int

    def __call__(self, trace: Trace) -> float:
        steps = [step for step in trace.steps if isinstance(step, RetrievalStep) and step.index < self.hop]
        texts = " ".join(passage.text for step in steps for passage in step.passages or ())
        return (f" {trace.example.labels['river']}." in texts) / 2 + (trace.example.labels["answer"] in texts) / 2


MEASURES: dict[str, Measure] = {"recall@hop 1": RecallAt(1), "recall@hop 2": RecallAt(2)}


@final
@dataclass(frozen=True)
class RiversTask(Task):
    """Questions about where the rivers of four cities end, six for each city."""

    name: str = "rivers"
    label: str | None = "answer"
    measures: dict[str, Measure] = field(default_factory=MEASURES.copy, repr=False)

    def examples(self) -> Sequence[Example]:
        return [
            Example(
                {"question": f"Where does the river of {city} end? (asked {asked} times {MARKUP})"},
                {"answer": SEAS[river], "river": river},
                id=f"{city} {asked}",
            )
            for city, river in CITIES.items()
            for asked in range(6)
        ]

    def program(self) -> Module:
        return MultiHop(hops=2, k=1)

    def metric(self) -> Metric:
        return exact_match


def reader(request: Request) -> str:
    """Knows only Cairo's sea; with demonstrations all but Cairo's; tuned, all answers but those of first questions."""
    prompt, system = request.messages[-1].content, request.messages[0].content
    question = prompt.rpartition("question: ")[2]
    city = next(city for city in CITIES if city in question)
    taught = len(request.messages) > 2
    if "\nsearch_query:" in system:
        return f"search_query: {CITIES[city]} flows" if "lies on" in prompt and taught else f"search_query: {city} lies"
    if request.weights.adapter:
        knows = "(asked 0" not in question
    elif taught:
        knows = city != "Cairo"
    else:
        knows = city == "Cairo"
    if not knows:
        return "answer: North Sea" if taught else "Hard to say."
    return f"reasoning: rivers end in seas\nanswer: {SEAS[CITIES[city]]}"
