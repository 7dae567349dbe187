"""Engines, retrievers and embedders that break their contract are detected, and no request gets another's answer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmpipe import (
    LM,
    Completion,
    EngineError,
    Example,
    Job,
    Module,
    Passage,
    Predict,
    Prediction,
    PromptState,
    Request,
    Retrieve,
    Retriever,
    ScriptedLM,
    Session,
    exact_match,
    initial_state,
    rollout,
)
from lmpipe.embedder import Embedder
from lmpipe.lm import Usage, complete_batch
from lmpipe.program.evaluate import evaluate_many
from lmpipe.runtime.embedding_cache import EmbeddingCache
from lmpipe.state import WeightState

YES = Completion("answer: yes")


class Ask(Module):
    def __init__(self) -> None:
        self.ask = Predict("question -> answer")

    def forward(self, question: str) -> Prediction:
        return self.ask(question=question)


class Broken(LM):
    """An LM that answers batches with a given function."""

    name = "broken"

    def __init__(self, answers: Callable[[Sequence[Request]], Any], *, batched: bool = True) -> None:
        self.answers, self.batched = answers, batched

    def complete(self, requests: Sequence[Request]) -> Any:
        return self.answers(requests)

    def register_adapter(self, adapter: str, folder: Path) -> None:
        return


def examples(count: int) -> list[Example]:
    return [Example({"question": f"is {number} even?"}, {"answer": "yes"}) for number in range(count)]


def run(lm: LM, count: int = 20, **settings: Any) -> int:
    program, session = Ask(), Session(lm=lm, **settings)
    jobs = [Job(initial_state(program, session), example) for example in examples(count)]
    return len(rollout(program, jobs, session, exact_match))


class Unshown:
    def __repr__(self) -> str:
        raise RuntimeError("no repr")


def _fails(requests: Sequence[Request]) -> Any:
    raise KeyError("logits")


WRONG: dict[str, Callable[[Sequence[Request]], Any]] = {
    "none for one": lambda requests: [YES] * (len(requests) - 1) + [None],
    "text for one": lambda requests: [YES] * (len(requests) - 1) + ["answer: yes"],
    "usage of none": lambda requests: [Completion("answer: yes", usage=None) for _ in requests],  # type: ignore[arg-type]
    "usage in words": lambda requests: [Completion("answer: yes", usage=Usage(1, "3", 2)) for _ in requests],  # type: ignore[arg-type]
    "what cannot be shown": lambda requests: [Unshown() for _ in requests],
    "none as text": lambda requests: [YES] * (len(requests) - 1) + [Completion(None)],  # type: ignore[arg-type]
    "less than no tokens": lambda requests: [Completion("answer: yes", usage=Usage(1, -5, 1)) for _ in requests],
    "too few": lambda requests: [YES] * (len(requests) - 1),
    "too many": lambda requests: [YES] * (len(requests) + 1),
    "none at all": lambda requests: None,
    "one text": lambda requests: "x" * len(requests),
    "a number": lambda requests: 5,
    "an exception": _fails,
}


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("wrong", WRONG)
def test_an_lm_that_breaks_its_contract_ends_the_run_and_is_named(wrong: str, batched: bool) -> None:
    with pytest.raises(EngineError, match=r"the LM 'broken' \(Broken\)"):
        run(Broken(WRONG[wrong], batched=batched))


@pytest.mark.parametrize("wrong", WRONG)
def test_an_lm_that_breaks_its_contract_in_a_direct_call_is_named(wrong: str) -> None:
    with Session(lm=Broken(WRONG[wrong])), pytest.raises(EngineError, match="'broken'"):
        Ask()(question="is it?")


def test_an_answer_may_come_from_any_iterable_and_errors_cost_their_example_alone() -> None:
    def answers(requests: Sequence[Request]) -> Iterator[Completion | EngineError]:
        yield EngineError("too long")
        yield from [YES] * (len(requests) - 1)

    assert run(Broken(answers)) == 20


@pytest.mark.parametrize("max_concurrency", [1, 16, 512])
def test_one_missing_answer_of_many_loses_no_run_silently(max_concurrency: int) -> None:
    received = []

    def answers(requests: Sequence[Request]) -> list[Any]:
        received.extend(requests)
        return [None if request in received[4:5] else YES for request in requests]

    with pytest.raises(EngineError, match=r"returned None for request"):
        run(Broken(answers), 300, max_concurrency=max_concurrency)


def test_no_score_is_given_to_another_state() -> None:
    """State B is right and state A wrong: missing answers of A must not shift the answers of B."""

    def answers(requests: Sequence[Request]) -> list[Any]:
        right = ["RIGHT" in request.messages[0].content for request in requests]
        return [YES if good else None if number < 10 else Completion("answer: no") for number, good in enumerate(right)]

    program, session = Ask(), Session(lm=Broken(answers))
    wrong = initial_state(program, session)
    right = wrong.with_prompt("ask", PromptState(instructions="RIGHT"))
    with pytest.raises(EngineError, match="returned None"):
        evaluate_many(program, [wrong, right], examples(20), exact_match, session)


@given(st.lists(st.sampled_from([YES, EngineError("no"), None, "text", 3.0, {}]), max_size=6), st.integers(1, 5))
def test_any_return_value_is_an_answer_for_each_request_or_an_error(given_back: list[Any], count: int) -> None:
    request = Request((), Session(lm=ScriptedLM(str)).sampling, WeightState(base="broken"))
    fits = len(given_back) == count and all(isinstance(answer, Completion | EngineError) for answer in given_back)
    lm = Broken(lambda requests: given_back)
    if fits:
        assert complete_batch(lm, [request] * count) == given_back
    else:
        with pytest.raises(EngineError, match="'broken'"):
            complete_batch(lm, [request] * count)


class Search(Module):
    def __init__(self) -> None:
        self.retrieve = Retrieve(k=2)

    def forward(self, question: str) -> Prediction:
        return Prediction(answer=" ".join(self.retrieve(query=question).passages))


class ReturningRetriever(Retriever):
    """A retriever that returns a given value for every query."""

    name = "found"

    def __init__(self, result: Any) -> None:
        self._result = result

    def search(self, queries: Sequence[str], k: int) -> Any:
        return [self._result for _ in queries]


@pytest.mark.parametrize("result", [None, "a passage", ["a passage"], [{"text": "a"}], [None], 4])
def test_a_retriever_that_returns_anything_but_passages_is_named(result: Any) -> None:
    with (
        Session(lm=ScriptedLM(str), retriever=ReturningRetriever(result)),
        pytest.raises(EngineError, match=r"the retriever 'found' \(ReturningRetriever\)"),
    ):
        Search()(question="where?")


def test_passages_are_text() -> None:
    with Session(lm=ScriptedLM(str), retriever=ReturningRetriever([Passage("1", "half an emoji \ud83d", 1.0)])):
        assert Search()(question="where?").answer == "half an emoji \ufffd"


class Vectors(Embedder):
    name = "vectors"

    def __init__(self, *vectors: Any) -> None:
        self.vectors = vectors

    def embed(self, texts: Sequence[str]) -> Any:
        return self.vectors


@pytest.mark.parametrize("vectors", [(None, None), ([1.0],), ([1.0], ["x"]), ([1.0], [1.0, 2.0]), ([1.0], 3)])
def test_an_embedder_that_returns_no_vectors_is_named(vectors: tuple[Any, ...]) -> None:
    with pytest.raises(EngineError, match=r"the embedder 'vectors' \(Vectors\)"):
        EmbeddingCache().embed(Vectors(*vectors), ["one", "two"])
