"""Retrieval: the protocol, the step of a program, its batches and its traces."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from lmpipe import (
    LM,
    Budget,
    Completion,
    EngineError,
    Module,
    Passage,
    Predict,
    Prediction,
    Request,
    Retrieve,
    Retriever,
    RunStore,
    ScriptedLM,
    Session,
    evaluate,
    exact_match,
)
from lmpipe.errors import ConfigError, SessionError, SignatureError
from lmpipe.program.identity import identity
from lmpipe.runtime.search_cache import SearchCache
from lmpipe.runtime.trace import RetrievalStep
from tests.rivers import CITIES, CORPUS, EXAMPLES, ToTheSea, WordOverlap, reader, run


def test_a_program_retrieves_when_it_is_called() -> None:
    retriever = WordOverlap()
    with Session(lm=ScriptedLM(reader), retriever=retriever) as session:
        assert ToTheSea()(city="Rome").answer == "Tyrrhenian Sea"
    assert [queries for _, queries in retriever.searches] == [["Rome lies"], ["Tiber flows"]]
    cost = session.ledger.total
    assert (cost.lm_calls, cost.retrievals) == (3, 2)


def test_passages_come_best_first_with_their_ids_and_scores() -> None:
    with Session(lm={}, retriever=WordOverlap()):
        result = Retrieve(k=2)(query="Where does the Nile flow?")
        assert result == {
            "passages": ["Cairo lies on the Nile.", "The Nile flows into the Mediterranean."],
            "ids": ["3", "7"],
            "scores": [0.4, 0.4],
        }
        assert len(Retrieve(k=100)(query="Nile").ids) == len(CORPUS)
        assert Retrieve()(query=" ") == {"passages": [], "ids": [], "scores": []}


def test_without_a_retriever_the_error_says_what_to_write() -> None:
    session = Session(lm=ScriptedLM(reader))
    with session, pytest.raises(SessionError, match=r"Session\(…, retriever=load_retriever"):
        Retrieve()(query="Nile")
    with pytest.raises(SessionError, match=r"Session\(…, retriever=load_retriever"):
        run(session)


def test_invalid_k_and_queries_are_refused() -> None:
    for k in (0, True, 1.5, "3"):
        with pytest.raises(ConfigError, match=r"k of Retrieve is .*; it must be a whole number, at least 1"):
            Retrieve(k=k)  # type: ignore[arg-type]
    with Session(lm={}, retriever=WordOverlap()), pytest.raises(SignatureError, match=r"text, not \['a'\]"):
        Retrieve()(query=["a"])


def test_waiting_queries_are_searched_together_in_the_order_of_the_jobs() -> None:
    retriever, lm = WordOverlap(), ScriptedLM(reader)
    traces = run(Session(lm=lm, retriever=retriever))
    assert [trace.score for trace in traces] == [1] * 4
    assert retriever.searches == [
        (2, [f"{city} lies" for city in CITIES]),
        (2, [f"{river} flows" for river in CITIES.values()]),
    ]
    assert lm.batch_sizes == [4, 4, 4]


def test_calls_of_several_kinds_that_wait_together_go_out_together() -> None:
    class Mixed(Module):
        def __init__(self) -> None:
            self.near, self.far = Retrieve(1), Retrieve(3)
            self.answer = Predict("city -> answer")

        def forward(self, city: str) -> Prediction:
            if city == "London":
                return Prediction(answer=self.answer(city=city).answer)
            result = (self.near if city == "Rome" else self.far)(query=city)
            return Prediction(answer=" ".join(result.passages))

    retriever, lm = WordOverlap(), ScriptedLM(lambda _: "answer: North Sea")
    traces = run(Session(lm=lm, retriever=retriever), program=Mixed())
    assert retriever.searches == [(1, ["Rome"]), (3, ["Paris", "Cairo"])]
    assert lm.batch_sizes == [1]
    assert [step.kind for trace in traces for step in trace.steps] == ["retrieval", "lm", "retrieval", "retrieval"]


@pytest.mark.parametrize("max_concurrency", [1, 3, 64])
def test_traces_do_not_depend_on_the_number_of_threads(max_concurrency: int) -> None:
    cities = [*CITIES, *CITIES]
    traces = run(Session(lm=ScriptedLM(reader), retriever=WordOverlap(), max_concurrency=max_concurrency), cities)
    assert traces == run(Session(lm=ScriptedLM(reader), retriever=WordOverlap()), cities)


def test_a_query_is_searched_once() -> None:
    retriever = WordOverlap()
    session = Session(lm=ScriptedLM(reader), retriever=retriever)
    once = run(session.for_stage("first"), ["Rome", "Rome", "Paris"])
    assert retriever.searches == [(2, ["Rome lies", "Paris lies"]), (2, ["Tiber flows", "Seine flows"])]
    again = run(session.for_stage("second"), ["Rome", "Cairo"])
    assert retriever.searches[2:] == [(2, ["Cairo lies"]), (2, ["Nile flows"])]
    assert [step.outputs for step in again[0].steps] == [step.outputs for step in once[0].steps]
    assert session.ledger.total.retrievals == 10
    run(session, ["Rome"], ToTheSea(k=3))
    assert retriever.searches[4:] == [(3, ["Rome lies"]), (3, ["Tiber flows"])]


def test_the_least_recently_used_query_is_forgotten_first() -> None:
    searches, retriever = SearchCache(size=2), WordOverlap()
    for query in ("Rome", "Paris", "Rome", "Cairo", "Rome", "Paris"):
        assert searches.search(retriever, [query], 1) == [tuple(WordOverlap().search([query], 1)[0])]
    assert [queries for _, queries in retriever.searches] == [["Rome"], ["Paris"], ["Cairo"], ["Paris"]]


def test_another_retriever_is_not_answered_from_the_memory_of_the_first() -> None:
    searches = SearchCache()
    assert searches.search(WordOverlap(), ["Rome"], 1) != searches.search(WordOverlap(["Rome"]), ["Rome"], 1)


def test_a_query_that_fails_costs_its_example_alone_and_is_asked_again() -> None:
    retriever = WordOverlap()
    session = Session(lm=ScriptedLM(lambda request: reader(request).replace("Rome", "broken")), retriever=retriever)
    traces = run(session)
    assert [trace.failure for trace in traces] == [None, None, "engine", None]
    failed = traces[2].steps[-1]
    assert failed == RetrievalStep("retrieve", 0, "retrieval", "broken lies", 2, None, "the index is damaged")
    assert failed.outputs is None
    assert "the index is damaged" in (traces[2].error or "")
    cost = session.ledger.total
    assert (cost.lm_calls, cost.retrievals, cost.engine_errors) == (10, 7, 1)
    assert cost.modules["retrieve"].retrievals == 7
    assert cost.modules["retrieve"].calls == 0
    run(session, ["Rome"])
    assert retriever.searches[-1] == (2, ["broken lies"])


def test_an_lm_that_asks_for_nothing_gets_no_passages() -> None:
    def silent(request: Request) -> str:
        return "query:" if "produce query" in request.messages[0].content else "answer: somewhere"

    trace = run(Session(lm=ScriptedLM(silent), retriever=WordOverlap()), ["Paris"])[0]
    assert [step.outputs for step in trace.steps if isinstance(step, RetrievalStep)] == [
        {"passages": [], "ids": [], "scores": []}
    ] * 2
    assert trace.failure is None


class Broken(Retriever):
    """Fails for the whole batch, or returns one result too few."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error

    @property
    def name(self) -> str:
        return "broken"

    def search(self, queries: Sequence[str], k: int) -> list[list[Passage]]:
        if self.error:
            raise self.error
        return [[] for _ in queries[1:]]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (EngineError("connection refused"), "connection refused"),
        (ValueError("a bug of the retriever"), "a bug"),
        (None, "'broken' .Broken. returned 3 answers for 4"),
    ],
)
def test_a_retriever_that_fails_as_a_whole_ends_the_run(error: Exception | None, message: str) -> None:
    with pytest.raises(EngineError, match=message):
        run(Session(lm=ScriptedLM(reader), retriever=Broken(error)))


def test_a_trace_contains_queries_and_passages() -> None:
    trace = run(Session(lm=ScriptedLM(reader), retriever=WordOverlap()), ["Paris"])[0]
    assert [(step.path, step.index, step.kind) for step in trace.steps] == [
        ("query", 0, "lm"),
        ("retrieve", 0, "retrieval"),
        ("query", 1, "lm"),
        ("retrieve", 1, "retrieval"),
        ("answer", 0, "lm"),
    ]
    first = trace.steps[1]
    assert isinstance(first, RetrievalStep)
    assert first.inputs == {"query": "Paris lies"}
    assert first.passages is not None
    assert first.passages[0] == Passage("0", "Paris lies on the Seine.", 1.0)
    assert [step.path for step in trace.lm_steps] == ["query", "query", "answer"]


def test_a_budget_limits_lm_calls_and_not_retrievals() -> None:
    retriever = WordOverlap()
    session = Session(lm=ScriptedLM(reader), retriever=retriever).limited(Budget(max_lm_calls=4))
    traces = run(session)
    assert [trace.failure for trace in traces] == ["budget"] * 4
    assert [len(queries) for _, queries in retriever.searches] == [4]
    assert (session.ledger.total.lm_calls, session.ledger.total.retrievals) == (4, 4)


class Server(LM):
    """A slow LM that schedules requests itself."""

    batched = False

    @property
    def name(self) -> str:
        return "server"

    def complete(self, requests: Sequence[Request]) -> list[Completion | EngineError]:
        time.sleep(0.005)
        return [Completion("answer: x") for _ in requests]

    def register_adapter(self, adapter: str, folder: Path) -> None:
        return


def test_with_a_server_a_query_does_not_wait_until_all_others_wait() -> None:
    retrieved, deadline = threading.Event(), time.monotonic() + 5

    class Busy(Module):
        def __init__(self) -> None:
            self.retrieve = Retrieve()
            self.answer = Predict("city -> answer")

        def forward(self, city: str) -> Prediction:
            if city == "London":
                self.retrieve(query=city)
                retrieved.set()
            while not retrieved.is_set() and time.monotonic() < deadline:
                self.answer(city=city)
            return Prediction(answer=retrieved.is_set())

    traces = run(Session(lm=Server(), retriever=WordOverlap()), ["Paris", "London", "Rome"], Busy())
    assert [trace.prediction for trace in traces] == [{"answer": True}] * 3


def test_recorded_work_is_looked_up_by_the_collection_and_by_k(store: RunStore) -> None:
    program, lm = ToTheSea(), ScriptedLM(reader)

    def mean(retriever: Retriever, program: Module) -> float:
        session = Session(lm=lm, retriever=retriever, store=store)
        return evaluate(program, EXAMPLES, exact_match, session).mean

    assert mean(WordOverlap(), program) == 1
    assert mean(WordOverlap(CORPUS[:5]), program) == 0.25
    calls = len(lm.requests)
    assert mean(WordOverlap(), program) == 1
    assert len(lm.requests) == calls
    assert identity(program=ToTheSea(2)) != identity(program=ToTheSea(3))
