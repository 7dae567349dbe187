"""Characters that are not valid text are replaced on entry and counted, and no later step fails on them."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from lmpipe import (
    Demo,
    Example,
    Module,
    Passage,
    Predict,
    Prediction,
    ProgramState,
    PromptState,
    Request,
    Retrieve,
    Retriever,
    RunStore,
    ScriptedLM,
    Session,
    evaluate,
    initial_state,
)
from lmpipe.results.trace_log import read_trace_log
from lmpipe.text.cleaning import clean_text, clean_value, count_unclean

HALF = json.loads('"\\ud83d"')  # half an emoji, as in truncated messages
ANY = st.text(st.characters(), max_size=20)  # with surrogates, which hypothesis excludes by default
UNCLEAN = st.lists(st.sampled_from(["a", "é", "\n", "\t", "\x00", "\x1b", "\x7f", "\x9b", HALF, "\udc00", "😀"])).map(
    "".join
)


@given(ANY | UNCLEAN)
def test_clean_text_can_be_encoded_and_commands_no_terminal(text: str) -> None:
    cleaned = clean_text(text)
    cleaned.encode()
    assert len(cleaned) == len(text)
    assert clean_text(cleaned) == cleaned
    assert count_unclean(text) == sum(one != other for one, other in zip(text, cleaned, strict=True))
    assert not any(ord(char) < 32 and char not in "\t\r\n" for char in cleaned)


@given(
    st.recursive(
        UNCLEAN | st.integers(), lambda inner: st.lists(inner) | st.tuples(inner) | st.dictionaries(UNCLEAN, inner)
    )
)
def test_an_example_is_text_at_any_depth(value: Any) -> None:
    counts: list[int] = []
    cleaned = clean_value(value, counts.append)
    json.dumps(cleaned, ensure_ascii=False).encode()
    example = Example({"value": value}, {"answer": value})
    assert example.inputs == {"value": cleaned}
    assert example.labels == {"answer": cleaned}
    assert example.replaced == 2 * sum(counts)
    assert example.id == Example({"value": cleaned}, {"answer": cleaned}).id


def test_a_value_that_contains_itself_is_refused_in_an_example() -> None:
    cycle: list[Any] = []
    cycle.append(cycle)
    with pytest.raises(ValueError, match="contains itself"):
        Example({"value": cycle})


class Note(BaseModel):
    text: str


class Ask(Module):
    """Adds invalid characters to its calls and to its answer."""

    def __init__(self) -> None:
        self.ask = Predict("question, note: Any -> answer")

    def forward(self, question: str) -> Prediction:
        reply = self.ask(question=question + HALF, note=Note(text="a\x00b"))
        return Prediction(answer=reply.answer, more=[HALF])


def one_of(example: Example, prediction: Prediction) -> tuple[float, str]:
    return float("ok" in prediction.answer), f"half {HALF}"


def test_an_evaluation_replaces_and_counts_invalid_characters_and_other_examples_are_unaffected(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def script(request: Request) -> str:
        json.dumps([message.content for message in request.messages], ensure_ascii=False).encode()
        return f"answer: ok {HALF}\x1b[31m" if "bad" in request.messages[-1].content else "answer: ok"

    program, store = Ask(), RunStore(tmp_path)
    session = Session(lm=ScriptedLM(script), store=store)
    examples = [Example({"question": "bad\x00"}, id="1"), Example({"question": "good"}, id="2")]
    with caplog.at_level(logging.WARNING):
        evaluation = evaluate(program, examples, one_of, session, keep_traces=True)
    assert evaluation.mean == 1
    assert session.ledger.total.replaced == 4  # two inputs of calls, and two characters of a completion
    assert session.ledger.total.modules["ask"].replaced == 4
    assert "replaced by U+FFFD: 1 in examples, 4 in" in caplog.text
    records = list(read_trace_log(store.path / "blobs" / str(evaluation.traces)))
    assert [record.prediction for record in records] == [
        {"answer": "ok \ufffd\ufffd[31m", "more": ["\ufffd"]},
        {"answer": "ok", "more": ["\ufffd"]},
    ]
    assert records[0].feedback == "half \ufffd"
    store.close()
    again = Session(lm=ScriptedLM(lambda request: "never asked"), store=RunStore(tmp_path))
    assert evaluate(program, examples, one_of, again, keep_traces=True) == evaluation


@given(ANY)
def test_instructions_are_text(text: str) -> None:
    state = ProgramState(prompts={"self": PromptState(instructions=text)}, weights={})
    assert state.prompts["self"].instructions == clean_text(text)
    assert ProgramState.model_validate_json(state.model_dump_json()) == state


def test_strings_within_an_input_are_cleaned_too() -> None:
    program = Predict("facts: dict[str, str] -> answer")
    sent: list[str] = []
    with Session(lm=ScriptedLM(lambda request: sent.append(request.messages[-1].content) or "answer: ok")) as session:
        program(facts={"a": "x\x00y"})
    assert sent == ['facts: {"a": "x\ufffdy"}']
    assert session.ledger.total.replaced == 1


def test_characters_that_json_escapes_are_cleaned_too() -> None:
    program, lm = Predict("question -> names: list[str]"), ScriptedLM(lambda request: r'names: ["a\u0000b", "\u001b"]')
    with Session(lm=lm) as session:
        assert program(question="?").names == ["a\ufffdb", "\ufffd"]
    assert session.ledger.total.replaced == 2


class Rough(str):
    """A subclass of str."""


class Odd(Module):
    """Returns a value that a trace log cannot hold as it is."""

    def __init__(self, answer: Any) -> None:
        self.answer, self.retrieve = answer, Retrieve()

    def forward(self, question: str) -> Prediction:
        return Prediction(answer=self.answer, ids=self.retrieve(query=question + HALF).ids)


class Halves(Retriever):
    name = "halves"

    def search(self, queries: Sequence[str], k: int) -> list[list[Passage]]:
        assert all(query.encode() for query in queries)
        return [[Passage(f"1{HALF}", "text", 1.0)] for _ in queries]


ANSWERS = [Rough(HALF), b"\xff", Note(text="a\x00"), KeyError(HALF), {HALF: [object()]}, 10**5000]


@pytest.mark.parametrize("answer", ANSWERS, ids=lambda answer: type(answer).__name__)
def test_any_prediction_can_be_logged(answer: Any, store: RunStore) -> None:
    program, session = Odd(answer), Session(lm=ScriptedLM(str), store=store, retriever=Halves())
    examples = [Example({"question": "a"}, {"answer": b"\xff"})]
    state = initial_state(program, session)
    evaluation = evaluate(program, examples, lambda e, p: 1.0, session, state=state, keep_traces=True)
    [record] = read_trace_log(store.path / "blobs" / str(evaluation.traces))
    assert record.prediction is not None
    assert record.prediction["ids"] == ["1\ufffd"]
    assert record.steps[0].inputs == {"query": "a\ufffd"}


def test_prompts_are_text() -> None:
    prompt = PromptState(instructions=HALF, demos=(Demo(inputs={"a": HALF}, outputs={"b": [HALF]}),))
    assert "\\ufffd" not in prompt.model_dump_json()
    assert PromptState.model_validate_json(prompt.model_dump_json()) == prompt
    assert prompt.instructions == "\ufffd"


class Silent(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no message")


def test_an_exception_that_cannot_be_shown_costs_its_example() -> None:
    class Fails(Ask):
        def forward(self, question: str) -> Prediction:
            raise Silent

    program, session = Fails(), Session(lm=ScriptedLM(str))
    evaluation = evaluate(program, [Example({"question": "a"})], one_of, session)
    assert "Silent: its message cannot be shown" in str(evaluation.first_error)


def test_an_error_that_is_not_text_is_data_like_any_other() -> None:
    class Fails(Ask):
        def forward(self, question: str) -> Prediction:
            raise KeyError(HALF + "\x00")

    program, session = Fails(), Session(lm=ScriptedLM(str))
    evaluation = evaluate(program, [Example({"question": "a"})], one_of, session)
    assert evaluation.failures == {"program": 1}
    evaluation.model_dump_json().encode()
