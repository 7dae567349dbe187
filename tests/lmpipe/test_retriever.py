"""Retrieval: the protocol, the step of a program, its batches and its traces, in and below optimizers."""

from __future__ import annotations

import re
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
    Example,
    Job,
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
    Trace,
    evaluate,
    exact_match,
    initial_state,
    predictors,
    rollout,
)
from lmpipe.errors import ConfigError, SessionError, SignatureError
from lmpipe.evaluate import program_digest
from lmpipe.hashing import digest
from lmpipe.retriever import Searches
from lmpipe.trace import RetrievalStep
from optimizers import BetterTogether, BootstrapFewShot, BootstrapFewShotRandomSearch, BootstrapFinetune
from tests.scripted import KeepingTrainer

CITIES = {"Paris": "Seine", "London": "Thames", "Rome": "Tiber", "Cairo": "Nile"}
SEAS = {"Seine": "Channel", "Thames": "North Sea", "Tiber": "Tyrrhenian Sea", "Nile": "Mediterranean"}
CORPUS = [
    *(f"{city} lies on the {river}." for city, river in CITIES.items()),
    *(f"The {river} flows into the {sea}." for river, sea in SEAS.items()),
]


class WordOverlap(Retriever):
    """Scores a passage by the share of the query's words that it has; queries with the word ``broken`` fail."""

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
    """Which sea does the river of a city reach? Two hops; a passage is read once."""

    def __init__(self, k: int = 2) -> None:
        self.query = Predict("context: list[str], city -> query")
        self.retrieve = Retrieve(k)
        self.answer = Predict("context: list[str], city -> answer")

    def forward(self, city: str) -> Prediction:
        context: dict[str, str] = {}
        for _ in range(2):
            query = self.query(context=list(context.values()), city=city).query
            found = self.retrieve(query=query)
            context |= dict(zip(found.ids, found.passages, strict=True))
        return self.answer(context=list(context.values()), city=city)


def reader(request: Request) -> str:
    """Follows the passages: asks for the city, then for its river, then for the sea."""
    asked = request.messages[-1].content
    city = asked.rpartition("city: ")[2].split()[0]
    river = re.search(rf"{city} lies on the (\w+)", asked)
    sea = re.search(rf"The {river[1]} flows into the (.+)\.", asked) if river else None
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


def test_a_program_retrieves_when_it_is_called() -> None:
    retriever = WordOverlap()
    with Session(lm=ScriptedLM(reader), retriever=retriever) as session:
        assert ToTheSea()(city="Rome").answer == "Tyrrhenian Sea"
    assert [queries for _, queries in retriever.searches] == [["Rome lies"], ["Tiber flows"]]
    cost = session.ledger.total
    assert (cost.lm_calls, cost.retrievals) == (3, 2)


def test_passages_come_best_first_with_their_ids_and_scores() -> None:
    with Session(lm={}, retriever=WordOverlap()):
        found = Retrieve(k=2)(query="Where does the Nile flow?")
        assert found == {
            "passages": ["Cairo lies on the Nile.", "The Nile flows into the Mediterranean."],
            "ids": ["3", "7"],
            "scores": [0.4, 0.4],
        }
        assert len(Retrieve(k=100)(query="Nile").ids) == len(CORPUS)
        assert Retrieve()(query=" ") == {"passages": [], "ids": [], "scores": []}


def test_without_a_retriever_the_error_says_what_to_write() -> None:
    session = Session(lm=ScriptedLM(reader))
    with session, pytest.raises(SessionError, match=r"Session\(lm=\.\.\., retriever=\.\.\.\)"):
        Retrieve()(query="Nile")
    with pytest.raises(SessionError, match=r"Session\(lm=\.\.\., retriever=\.\.\.\)"):
        run(session)


def test_what_cannot_be_searched_for_is_refused() -> None:
    with pytest.raises(ConfigError, match="k must be at least 1"):
        Retrieve(k=0)
    with Session(lm={}, retriever=WordOverlap()), pytest.raises(SignatureError, match=r"text, and got \['a'\]"):
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
            found = (self.near if city == "Rome" else self.far)(query=city)
            return Prediction(answer=" ".join(found.passages))

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
    once = run(session.child("first"), ["Rome", "Rome", "Paris"])
    assert retriever.searches == [(2, ["Rome lies", "Paris lies"]), (2, ["Tiber flows", "Seine flows"])]
    again = run(session.child("second"), ["Rome", "Cairo"])
    assert retriever.searches[2:] == [(2, ["Cairo lies"]), (2, ["Nile flows"])]
    assert [step.outputs for step in again[0].steps] == [step.outputs for step in once[0].steps]
    assert session.ledger.total.retrievals == 10
    run(session, ["Rome"], ToTheSea(k=3))
    assert retriever.searches[4:] == [(3, ["Rome lies"]), (3, ["Tiber flows"])]


def test_what_was_not_asked_for_longest_is_forgotten_first() -> None:
    searches, retriever = Searches(size=2), WordOverlap()
    for query in ("Rome", "Paris", "Rome", "Cairo", "Rome", "Paris"):
        assert searches.search(retriever, [query], 1) == [tuple(retriever._search(words(query), 1))]
    assert [queries for _, queries in retriever.searches] == [["Rome"], ["Paris"], ["Cairo"], ["Paris"]]


def test_another_retriever_is_not_answered_from_the_memory_of_the_first() -> None:
    searches = Searches()
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
    """Fails as a whole, or loses an answer."""

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
        (None, "'broken' gave 3 answers to 4 queries"),
    ],
)
def test_a_retriever_that_fails_as_a_whole_ends_the_run(error: Exception | None, message: str) -> None:
    with pytest.raises(type(error) if error else EngineError, match=message):
        run(Session(lm=ScriptedLM(reader), retriever=Broken(error)))


def test_a_trace_says_what_was_searched_and_found() -> None:
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
    """Schedules requests by itself and takes its time."""

    batched = False

    @property
    def name(self) -> str:
        return "server"

    def complete(self, requests: Sequence[Request]) -> list[Completion | EngineError]:
        time.sleep(0.005)
        return [Completion("answer: x") for _ in requests]

    def register_adapter(self, adapter: str, folder: Path) -> None:
        return


def test_beside_a_server_a_query_does_not_wait_until_the_others_wait_too() -> None:
    found, deadline = threading.Event(), time.monotonic() + 5

    class Busy(Module):
        def __init__(self) -> None:
            self.retrieve = Retrieve()
            self.answer = Predict("city -> answer")

        def forward(self, city: str) -> Prediction:
            if city == "London":
                self.retrieve(query=city)
                found.set()
            while not found.is_set() and time.monotonic() < deadline:
                self.answer(city=city)
            return Prediction(answer=found.is_set())

    traces = run(Session(lm=Server(), retriever=WordOverlap()), ["Paris", "London", "Rome"], Busy())
    assert [trace.prediction for trace in traces] == [{"answer": True}] * 3


def test_recorded_work_is_looked_up_by_the_collection_and_by_k(store: RunStore) -> None:
    program, lm = ToTheSea(), ScriptedLM(reader)

    def mean(retriever: Retriever, program: Module) -> float:
        session = Session(lm=lm, retriever=retriever, store=store)
        return evaluate(program, initial_state(program, session), EXAMPLES, exact_match, session).mean

    assert mean(WordOverlap(), program) == 1
    assert mean(WordOverlap(CORPUS[:5]), program) == 0.25
    made = len(lm.requests)
    assert mean(WordOverlap(), program) == 1
    assert len(lm.requests) == made
    assert program_digest(ToTheSea(2)) != program_digest(ToTheSea(3))


def coy(request: Request) -> str:
    """Reads like `reader`, and answers on other cities than Paris only if it was shown how or is tuned."""
    text = reader(request)
    taught = len(request.messages) > 2 or request.weights.adapter
    return text if taught or text.startswith("query") or "city: Paris" in request.messages[-1].content else "No idea"


STAGES = {
    "few": BootstrapFewShot(exact_match, max_labeled_demos=0),
    "p": BootstrapFewShotRandomSearch(exact_match, num_candidate_programs=2, max_labeled_demos=0),
    "w": BootstrapFinetune(exact_match, KeepingTrainer()),
}


@pytest.mark.parametrize("strategy", ["few", "p", "w", "p -> w -> p"])
def test_a_program_that_retrieves_is_optimized_like_any_other(store: RunStore, strategy: str) -> None:
    program = ToTheSea()
    session = Session(lm=ScriptedLM(coy), retriever=WordOverlap(), store=store)
    state = initial_state(program, session)
    assert set(state.prompts) == set(predictors(program)) == {"query", "answer"}
    better = BetterTogether(exact_match, STAGES, strategy)
    result = better.optimize(program, state, EXAMPLES[:2], EXAMPLES[2:], session)
    assert result.evaluation is not None
    assert result.evaluation.mean == 1
    assert set(result.state.prompts) == {"query", "answer"}
    assert result.stages[0].result.details["kept_by_module"] == {"query": 2, "answer": 1}
    modules = session.ledger.total.modules
    assert modules["retrieve"].kept == 0
    assert modules["retrieve"].retrievals == modules["query"].calls > 0


def test_demos_and_training_rows_are_made_of_lm_calls_alone(store: RunStore) -> None:
    program, trainer = ToTheSea(), KeepingTrainer()
    session = Session(lm=ScriptedLM(coy), retriever=WordOverlap(), store=store)
    state = initial_state(program, session)
    shown = STAGES["few"].optimize(program, state, EXAMPLES[:2], [], session).state
    assert {path: [set(demo.outputs) for demo in prompt.demos] for path, prompt in shown.prompts.items()} == {
        "query": [{"query"}],
        "answer": [{"answer"}],
    }
    BootstrapFinetune(exact_match, trainer).optimize(program, shown, EXAMPLES[:2], [], session)
    rows, _ = trainer.calls[0]
    assert [row.completion.partition(":")[0] for row in rows] == ["query", "query", "answer"] * 2
