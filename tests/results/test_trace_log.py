"""Trace logs in a run directory."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import date
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmpipe import Example, Module, Passage, Predict, Retrieve, Retriever, RunStore, ScriptedLM, Session, evaluate
from lmpipe import exact_match as exact
from lmpipe.errors import CorruptBlob
from lmpipe.program.predict import initial_state
from lmpipe.program.rollout import Job, rollout
from lmpipe.results.trace_log import read_trace_log, trace_log_chunks


class Library(Retriever):
    name = "library"

    def search(self, queries: Sequence[str], k: int) -> list[list[Passage]]:
        return [[Passage("p1", f"about {query}", 0.5)] for query in queries]


class Searching(Module):
    def __init__(self) -> None:
        self.search = Retrieve(1)
        self.answer = Predict("question, passages -> answer: Literal['yes', 'no']")

    def forward(self, question: str, day: date) -> Module:
        return self.answer(question=question, passages=self.search(query=question).passages)


EXAMPLES = [Example({"question": f"q{n}", "day": date(2024, 7, n)}, {"answer": "yes"}, id=f"e{n}") for n in (2, 1)]


def session(store: RunStore | None = None) -> Session:
    lm = ScriptedLM(lambda request: "answer: yes" if "q1" in request.messages[-1].content else "hm")
    return Session(lm=lm, retriever=Library(), store=store)


def test_an_evaluation_keeps_messages_passages_completions_and_outputs(tmp_path: Path) -> None:
    here = session(RunStore(tmp_path))
    program = Searching()
    state = initial_state(program, here)
    assert evaluate(program, EXAMPLES, exact, here, state=state).traces is None
    kept = evaluate(program, EXAMPLES, exact, here, state=state, keep_traces=True)
    assert kept.modules["answer"].calls == kept.modules["search"].retrievals == 2
    assert kept.modules["answer"].parse_errors == 1
    right, wrong = read_trace_log(tmp_path / "blobs" / str(kept.traces))
    assert (right.example, right.score, right.prediction) == ("e1", 1, {"answer": "yes"})
    assert right.inputs == {"question": "q1", "day": "2024-07-01"}
    found, answered = right.steps
    assert (found.kind, found.outputs) == ("retrieval", {"passages": ["about q1"], "ids": ["p1"], "scores": [0.5]})
    assert answered.messages[-1] == ("user", "question: q1\npassages: \n[1] about q1")
    assert (answered.text, answered.outputs) == ("answer: yes", {"answer": "yes"})
    assert (wrong.failure, wrong.steps[1].text, wrong.steps[1].outputs) == ("parse", "hm", None)
    assert "field 'answer'" in str(wrong.steps[1].error)
    again = session(here.store)
    assert evaluate(program, EXAMPLES, exact, again, state=state, keep_traces=True) == kept
    assert again.ledger.total.lm_calls == 2, "what is recalled has its cost"


def test_a_damaged_log_is_named(tmp_path: Path) -> None:
    here = session(RunStore(tmp_path))
    traces = rollout(Searching(), [Job(initial_state(Searching(), here), one) for one in EXAMPLES], here, exact)
    name = here.store.put_chunks(trace_log_chunks(traces)) if here.store else ""
    (tmp_path / "blobs" / name).write_bytes(b"".join(trace_log_chunks(traces[:1])))
    with pytest.raises(CorruptBlob, match=name):
        list(read_trace_log(tmp_path / "blobs" / name))
    with pytest.raises(CorruptBlob, match="absent"):
        list(read_trace_log(tmp_path / "blobs" / "absent"))


@given(st.lists(st.text(), min_size=1, max_size=4))
def test_logs_are_the_same_for_the_same_runs_in_any_order(texts: list[str]) -> None:
    program = Predict("question -> answer")
    here = Session(lm=ScriptedLM(lambda request: f"answer: {request.messages[-1].content}"))
    examples = [Example({"question": text}, id=str(number)) for number, text in enumerate(texts)]
    traces = rollout(program, [Job(initial_state(program, here), one) for one in examples], here)
    assert [*trace_log_chunks(traces)] == [*trace_log_chunks(traces[::-1])]
