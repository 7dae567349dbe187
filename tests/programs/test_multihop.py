"""The multi-hop program: its modules and their inputs, and how its searches are batched, traced and cached."""

from __future__ import annotations

import re

import pytest

from lmpipe import Example, Job, Request, ScriptedLM, Session, Trace, exact_match, initial_state, predictors, rollout
from lmpipe.errors import ConfigError
from lmpipe.program.identity import identity
from lmpipe.runtime.trace import RetrievalStep
from programs import MultiHop
from tests.rivers import CITIES, CORPUS, SEAS, WordOverlap


def reader(request: Request) -> str:
    """Searches for the city, then for its river, and answers with the sea if a passage names it."""
    prompt = request.messages[-1].content
    city = prompt.rpartition("The sea of ")[2].rstrip("?")
    river = re.search(rf"{city} lies on the (\w+)", prompt)
    if "\nanswer:" in request.messages[0].content:
        sea = re.search(rf"The {river[1]} flows into the (.+)\.", prompt) if river else None
        return f"answer: {sea[1] if sea else 'unknown'}"
    return f"reasoning: step by step\nsearch_query: {f'{river[1]} flows' if river else f'{city} lies'}"


EXAMPLES = [Example({"question": f"The sea of {city}?"}, {"answer": SEAS[CITIES[city]]}, id=city) for city in CITIES]


def run(program: MultiHop, session: Session) -> list[Trace]:
    state = initial_state(program, session)
    return rollout(program, [Job(state, example) for example in EXAMPLES], session, exact_match)


def test_two_hops_find_passages_that_one_does_not() -> None:
    for hops, scores in ((1, [0] * 4), (2, [1] * 4), (3, [1] * 4)):
        session = Session(lm=ScriptedLM(reader), retriever=WordOverlap())
        assert [trace.score for trace in run(MultiHop(hops, k=2), session)] == scores
        assert session.ledger.total.retrievals == 4 * hops


def test_each_hop_has_its_own_query_module() -> None:
    program = MultiHop(hops=3)
    assert list(predictors(program)) == ["query.0.predict", "query.1.predict", "query.2.predict", "answer.predict"]
    signature = predictors(program)["query.1.predict"].signature
    assert [field.name for field in signature.inputs] == ["context", "question"]
    assert [field.name for field in signature.outputs] == ["reasoning", "search_query"]
    assert len({identity(program=MultiHop(hops, k)) for hops in (1, 2) for k in (3, 4)}) == 4


def test_a_passage_that_several_hops_find_is_in_the_context_once() -> None:
    trace = run(MultiHop(hops=2, k=2), Session(lm=ScriptedLM(reader), retriever=WordOverlap()))[0]
    searches = [step for step in trace.steps if isinstance(step, RetrievalStep)]
    assert [[passage.id for passage in step.passages or ()] for step in searches] == [["0", "1"], ["4", "0"]]
    read = [step.inputs["context"] for step in trace.lm_steps]
    assert read == [[], CORPUS[:2], [*CORPUS[:2], CORPUS[4]]]
    assert trace.prediction == {"answer": "Channel", "context": read[-1]}


def test_the_hops_of_all_examples_are_searched_together_and_traced() -> None:
    retriever, lm = WordOverlap(), ScriptedLM(reader)
    session = Session(lm=lm, retriever=retriever)
    traces = run(MultiHop(k=2), session)
    assert lm.batch_sizes == [4, 4, 4]
    assert retriever.searches == [
        (2, [f"{city} lies" for city in CITIES]),
        (2, [f"{river} flows" for river in CITIES.values()]),
    ]
    for trace, river in zip(traces, CITIES.values(), strict=True):
        step = trace.steps[3]
        assert isinstance(step, RetrievalStep)
        assert (step.path, step.index, step.query, step.k) == ("retrieve", 1, f"{river} flows", 2)
        assert (step.outputs or {})["scores"][0] == 1
    assert run(MultiHop(k=2), session) == traces
    assert len(retriever.searches) == 2  # the second run sends the same queries, which are cached


def test_a_query_without_results_does_not_fail() -> None:
    lm = ScriptedLM(lambda request: "search_query: " if "search_query" in request.messages[0].content else "answer: 1")
    trace = run(MultiHop(), Session(lm=lm, retriever=WordOverlap()))[0]
    assert trace.failure is None
    assert trace.prediction == {"answer": "1", "context": []}


@pytest.mark.parametrize(("hops", "k"), [(0, 3), (2, 0)])
def test_numbers_below_one_are_refused(hops: int, k: int) -> None:
    with pytest.raises(ConfigError, match="at least 1"):
        MultiHop(hops, k)
