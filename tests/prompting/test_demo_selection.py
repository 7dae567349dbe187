"""A prompt can show the demonstrations of a pool that are nearest to the input."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import final

import pytest

from lmpipe import Demo, EngineError, Example, Job, Predict, PromptState, ScriptedLM, Session, initial_state, rollout
from lmpipe.embedder import Embedder
from lmpipe.errors import SessionError
from lmpipe.runtime.embedding_cache import EmbeddingCache
from lmpipe.state import DemoSelection, ProgramState
from tests.scripted import NumberLine

PROGRAM = Predict("number: int -> answer")


def pool(*numbers: int, k: int = 2, embedder: str = "number line") -> PromptState:
    demos = tuple(Demo(inputs={"number": n}, outputs={"answer": f"{n} it is"}) for n in numbers)
    return PromptState(instructions="Answer.", demos=demos, nearest=DemoSelection(k=k, embedder=embedder))


def shown(prompt: PromptState, number: int) -> list[str]:
    """The questions of the demonstrations and of the input, in the order of the prompt."""
    session = Session(lm=ScriptedLM(lambda request: "answer: yes"), embedder=NumberLine())
    messages = session.render_messages(PROGRAM.signature, prompt, {"number": number})
    return [message.content.removeprefix("number: ") for message in messages if message.role == "user"]


def test_the_k_nearest_are_shown_the_nearest_last() -> None:
    assert shown(pool(10, 90, 30, 50, k=2), 35) == ["50", "30", "35"]
    assert shown(pool(10, 90, 30, 50, k=3), 85) == ["30", "50", "90", "85"]


def test_a_small_pool_is_shown_as_a_whole() -> None:
    assert shown(pool(10, 20, k=5), 19) == ["10", "20", "19"]


def test_of_equally_near_demos_the_earlier_one_counts_as_nearer() -> None:
    twins = tuple(Demo(inputs={"number": 7}, outputs={"answer": word}) for word in ("one", "two", "three"))
    session = Session(lm=ScriptedLM(lambda request: ""), embedder=NumberLine())
    prompt = pool(k=2).model_copy(update={"demos": twins})
    messages = session.render_messages(PROGRAM.signature, prompt, {"number": 8})
    assert [message.content for message in messages if message.role == "assistant"] == ["answer: two", "answer: one"]


def test_a_demo_of_the_same_inputs_is_never_shown() -> None:
    assert shown(pool(10, 20, 50, k=2), 20) == ["50", "10", "20"]
    assert shown(pool(20, k=2), 20) == ["20"]


def test_a_program_runs_with_it_and_every_text_is_embedded_once() -> None:
    lm, embedder = ScriptedLM(lambda request: "answer: " + request.messages[-2].content), NumberLine()
    session = Session(lm=lm, embedder=embedder)
    state = initial_state(PROGRAM, session).with_prompt("self", pool(*range(0, 100, 10), k=1))
    jobs = [Job(state, Example({"number": number})) for number in range(3, 100, 10)]
    traces = rollout(PROGRAM, jobs, session) + rollout(PROGRAM, jobs, session)
    assert [trace.prediction and trace.prediction.answer for trace in traces[:2]] == [
        "answer: 0 it is",
        "answer: 10 it is",
    ]
    assert len(embedder.texts) == len(set(embedder.texts)) == 20
    assert traces[:10] == traces[10:]


def test_a_session_without_the_embedder_of_a_state_refuses_it() -> None:
    state = ProgramState(prompts={"self": pool(1)}, weights={})
    lm = ScriptedLM(lambda request: "answer: yes")
    with pytest.raises(SessionError, match=r"'number line', but this session has none"):
        Session(lm=lm).register_adapters(state)
    with pytest.raises(SessionError, match=r"'number line', but this session has 'another'"):
        Session(lm=lm, embedder=NumberLine("another")).register_adapters(state)
    Session(lm=lm, embedder=NumberLine()).register_adapters(state)


def test_a_selection_is_part_of_the_state() -> None:
    prompt = pool(1, 2)
    assert PromptState.model_validate_json(prompt.model_dump_json()) == prompt
    assert (
        len({prompt, pool(1, 2, k=3), pool(1, 2, embedder="other"), prompt.model_copy(update={"nearest": None})}) == 4
    )


class Short(Embedder):
    """Returns too few vectors."""

    @property
    def name(self) -> str:
        return "short"

    def embed(self, texts: Sequence[str]) -> list[list[float]]:
        return [[1.0]] * (len(texts) - 1)


def test_an_embedder_that_returns_too_few_vectors_is_named() -> None:
    with pytest.raises(EngineError, match="returned 1 answers for 2"):
        EmbeddingCache().embed(Short(), ["one", "two"])


class Slow(Embedder):
    """Takes some time for each batch."""

    def __init__(self) -> None:
        self.batches: list[list[str]] = []

    @property
    def name(self) -> str:
        return "number line"

    def embed(self, texts: Sequence[str]) -> list[list[float]]:
        self.batches.append(list(texts))
        time.sleep(0.02)
        return [[3.0, 4.0] for _ in texts]


def test_texts_requested_while_a_batch_is_computed_are_computed_together() -> None:
    embedder = Slow()
    session = Session(lm=ScriptedLM(lambda request: "answer: yes"), embedder=embedder)
    state = initial_state(PROGRAM, session).with_prompt("self", pool(1, 2))
    rollout(PROGRAM, [Job(state, Example({"number": number})) for number in range(10, 40)], session)
    assert len(embedder.batches) < 30
    texts = [text for batch in embedder.batches for text in batch]
    assert sorted(texts) == sorted({f"number: {number}" for number in (1, 2, *range(10, 40))})


def test_vectors_have_length_1() -> None:
    assert EmbeddingCache().embed(Slow(), ["one"]) == [(0.6, 0.8)]


@final
class Odd(Embedder):
    """Returns invalid vectors for some texts."""

    @property
    def name(self) -> str:
        return "odd"

    def embed(self, texts: Sequence[str]) -> list[list[float]]:
        vectors = {"nan": [math.nan, 1.0], "inf": [math.inf, 1.0], "zero": [0.0, 0.0], "long": [1.0, 2.0, 3.0]}
        return [vectors.get(text, [3.0, 4.0]) for text in texts]


def test_a_vector_that_is_not_finite_fails_only_the_calls_that_need_it() -> None:
    embeddings = EmbeddingCache()
    for text in ("nan", "inf"):
        with pytest.raises(
            EngineError, match=f"embedder 'odd' returned a vector with NaN or infinite values for the text '{text}'"
        ):
            embeddings.embed(Odd(), ["fine", text])
    assert embeddings.embed(Odd(), ["fine", "zero"]) == [(0.6, 0.8), (0.0, 0.0)]
    with pytest.raises(EngineError, match="vectors of 2 and of 3 numbers"):
        embeddings.embed(Odd(), ["another", "long"])
