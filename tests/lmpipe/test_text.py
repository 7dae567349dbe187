"""What is no text is replaced where it comes in, counted, and nothing downstream fails on it."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from lmpipe import (
    Example,
    Module,
    Predict,
    Prediction,
    ProgramState,
    PromptState,
    Request,
    RunStore,
    ScriptedLM,
    Session,
    evaluate,
    initial_state,
)
from lmpipe.data import snapshot
from lmpipe.text import clean, count_unclean
from lmpipe.tracelog import records_of

HALF = json.loads('"\\ud83d"')  # half an emoji, as truncated messages hold it
ANY = st.text(st.characters(), max_size=20)  # hypothesis leaves surrogates out unless they are asked for
UNCLEAN = st.lists(st.sampled_from(["a", "é", "\n", "\t", "\x00", "\x1b", "\x7f", "\x9b", HALF, "\udc00", "😀"])).map(
    "".join
)


@given(ANY | UNCLEAN)
def test_clean_text_can_be_encoded_and_commands_no_terminal(text: str) -> None:
    cleaned = clean(text)
    cleaned.encode()
    assert len(cleaned) == len(text)
    assert clean(cleaned) == cleaned
    assert count_unclean(text) == sum(one != other for one, other in zip(text, cleaned, strict=True))
    assert not any(ord(char) < 32 and char not in "\t\r\n" for char in cleaned)


@given(
    st.recursive(
        UNCLEAN | st.integers(), lambda inner: st.lists(inner) | st.tuples(inner) | st.dictionaries(UNCLEAN, inner)
    )
)
def test_an_example_is_text_at_any_depth(value: Any) -> None:
    counts: list[int] = []
    cleaned = snapshot(value, counts.append)
    json.dumps(cleaned, ensure_ascii=False).encode()
    example = Example({"value": value}, {"answer": value})
    assert example.inputs == {"value": cleaned}
    assert example.labels == {"answer": cleaned}
    assert example.replaced == 2 * sum(counts)
    assert example.id == Example({"value": cleaned}, {"answer": cleaned}).id


def test_something_that_contains_itself_is_no_example() -> None:
    cycle: list[Any] = []
    cycle.append(cycle)
    with pytest.raises(ValueError, match="contains itself"):
        Example({"value": cycle})


class Note(BaseModel):
    text: str


class Ask(Module):
    """Asks with something of its own that is no text, and answers likewise."""

    def __init__(self) -> None:
        self.ask = Predict("question, note: Any -> answer")

    def forward(self, question: str) -> Prediction:
        asked = self.ask(question=question + HALF, note=Note(text="a\x00b"))
        return Prediction(answer=asked.answer, more=[HALF])


def one_of(example: Example, prediction: Prediction) -> tuple[float, str]:
    return float("ok" in prediction.answer), f"half {HALF}"


def test_a_run_replaces_and_counts_it_and_costs_nobody_else(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def script(request: Request) -> str:
        json.dumps([message.content for message in request.messages], ensure_ascii=False).encode()
        return f"answer: ok {HALF}\x1b[31m" if "bad" in request.messages[-1].content else "answer: ok"

    program, store = Ask(), RunStore(tmp_path)
    session = Session(lm=ScriptedLM(script), store=store)
    examples = [Example({"question": "bad\x00"}, id="1"), Example({"question": "good"}, id="2")]
    with caplog.at_level(logging.WARNING):
        evaluation = evaluate(program, initial_state(program, session), examples, one_of, session, keep_traces=True)
    assert evaluation.mean == 1
    assert session.ledger.total.replaced == 4  # two inputs of calls, and two characters of a completion
    assert session.ledger.total.modules["ask"].replaced == 4
    assert "replaced by U+FFFD: 1 in examples, 4 in" in caplog.text
    records = list(records_of(store.path / "blobs" / str(evaluation.traces)))
    assert [record.prediction for record in records] == [
        {"answer": "ok \ufffd\ufffd[31m", "more": ["\ufffd"]},
        {"answer": "ok", "more": ["\ufffd"]},
    ]
    assert records[0].feedback == "half \ufffd"
    store.close()
    again = Session(lm=ScriptedLM(lambda request: "never asked"), store=RunStore(tmp_path))
    assert evaluate(program, initial_state(program, again), examples, one_of, again, keep_traces=True) == evaluation


@given(ANY)
def test_instructions_are_text(text: str) -> None:
    state = ProgramState(prompts={"self": PromptState(instructions=text)}, weights={})
    assert state.prompts["self"].instructions == clean(text)
    assert ProgramState.model_validate_json(state.model_dump_json()) == state


def test_what_json_spells_is_text_too() -> None:
    program, lm = Predict("question -> names: list[str]"), ScriptedLM(lambda request: r'names: ["a\u0000b", "\u001b"]')
    with Session(lm=lm) as session:
        assert program(question="?").names == ["a\ufffdb", "\ufffd"]
    assert session.ledger.total.replaced == 2


def test_an_error_that_is_no_text_is_data_as_any_other() -> None:
    class Fails(Ask):
        def forward(self, question: str) -> Prediction:
            raise KeyError(HALF + "\x00")

    program, session = Fails(), Session(lm=ScriptedLM(str))
    evaluation = evaluate(program, initial_state(program, session), [Example({"question": "a"})], one_of, session)
    assert evaluation.failures == {"program": 1}
    evaluation.model_dump_json().encode()
