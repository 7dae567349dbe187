"""Demonstrations chosen for each input by its nearest neighbours."""

from __future__ import annotations

from typing import Any

import pytest

from lmpipe import (
    Budget,
    Example,
    Job,
    OptimizeResult,
    Predict,
    Request,
    RunStore,
    ScriptedLM,
    Session,
    exact_match,
    initial_state,
    rollout,
)
from lmpipe.errors import ConfigError, SessionError
from lmpipe.state import DemoSelection
from optimizers import BetterTogether, BootstrapFinetune, KNNFewShot, LabeledFewShot
from tests.scripted import COLOURS, Colour, KeepingTrainer, NumberLine, examples, scripted


def knn(session: Session, program: Any = None, **settings: Any) -> OptimizeResult:
    program = program or Colour()
    return KNNFewShot(exact_match, **settings).optimize(
        program, initial_state(program, session), examples(12), [], session
    )


def test_every_module_with_demos_gets_a_pool_and_nearest_demos() -> None:
    session = Session(lm=scripted(), embedder=NumberLine())
    result = knn(session, k=2, num_train=None)
    hints, answers = (result.state.prompts[path] for path in ("hint", "answer"))
    assert hints.nearest == DemoSelection(k=2, embedder="number line")
    assert len(hints.demos) == result.details["pool"]["hint"] > 3
    assert answers.nearest == hints.nearest
    assert {demo.outputs["answer"] for demo in answers.demos} == set(COLOURS)


def test_a_pool_of_labels_needs_no_run_and_modules_without_demos_show_none() -> None:
    lm = scripted()
    result = knn(Session(lm=lm, embedder=NumberLine()), max_bootstrapped_demos=0, max_labeled_demos=50)
    assert lm.requests == []
    assert result.details["pool"] == {"hint": 12, "answer": 0}
    assert result.state.prompts["answer"].nearest is None
    assert {path: len(prompt.demos) for path, prompt in result.state.prompts.items()} == {"hint": 12, "answer": 0}


def neighbour(request: Request) -> str:
    """Repeats the answer of the last demo, which is right only if the demo has the same class."""
    return request.messages[-2].content if len(request.messages) > 2 else "answer: small"


def sizes(numbers: range) -> list[Example]:
    return [Example({"number": n}, {"answer": "small" if n < 500 else "large"}, id=f"n{n}") for n in numbers]


def test_a_new_input_is_answered_like_its_neighbours() -> None:
    program, session = Predict("number: int -> answer"), Session(lm=ScriptedLM(neighbour), embedder=NumberLine())
    optimizer = KNNFewShot(exact_match, max_bootstrapped_demos=0, max_labeled_demos=100, k=1)
    start = initial_state(program, session)
    result = optimizer.optimize(program, start, sizes(range(0, 1000, 20)), [], session)
    questions = sizes(range(7, 1000, 31))
    before, after = (
        sum(
            trace.score
            for trace in rollout(program, [Job(state, question) for question in questions], session, exact_match)
        )
        for state in (start, result.state)
    )
    assert before < after == len(questions)


def test_no_training_example_is_shown_its_own_label() -> None:
    program, lm = Predict("number: int -> answer"), ScriptedLM(neighbour)
    session = Session(lm=lm, embedder=NumberLine())
    train = sizes(range(0, 1000, 50))
    optimizer = KNNFewShot(exact_match, max_bootstrapped_demos=0, max_labeled_demos=100)
    state = optimizer.optimize(program, initial_state(program, session), train, [], session).state
    rollout(program, [Job(state, example) for example in train], session, exact_match)
    assert len(lm.requests) == len(train)
    for request in lm.requests:
        assert len(request.messages) == 2 + 2 * 3
        assert request.messages[-1].content not in [message.content for message in request.messages[:-1]]


def test_fine_tuning_rows_show_what_inference_shows(store: RunStore) -> None:
    program, lm, trainer = Predict("number: int -> answer"), ScriptedLM(neighbour), KeepingTrainer()
    session = Session(lm=lm, embedder=NumberLine(), store=store)
    train = sizes(range(0, 1000, 50))
    optimizer = KNNFewShot(exact_match, max_bootstrapped_demos=0, max_labeled_demos=100)
    state = optimizer.optimize(program, initial_state(program, session), train, [], session).state
    BootstrapFinetune(exact_match, trainer, include_demos=True).optimize(program, state, train, [], session)
    sent = {request.messages for request in lm.requests}
    rows, _ = trainer.calls[0]
    assert len(rows) > 10
    assert {row.messages for row in rows} <= sent
    assert {len(row.messages) for row in rows} == {2 + 2 * 3}


def test_it_is_a_stage_before_and_after_weights_and_is_recalled(store: RunStore) -> None:
    program, trainer, lm = Colour(), KeepingTrainer(), scripted()
    session = Session(lm=lm, embedder=NumberLine(), store=store)
    stages = {"k": KNNFewShot(exact_match, k=2), "w": BootstrapFinetune(exact_match, trainer)}
    better = BetterTogether(exact_match, stages, "k -> w -> k")
    data = initial_state(program, session), examples(12), examples(12, start=100)
    first = better.optimize(program, *data, session)
    assert [stage.result.status for stage in first.stages] == ["done"] * 3
    assert first.state.prompts["answer"].nearest is not None
    assert first.state.weights["lm"].adapter is not None
    assert first.evaluation is not None
    assert first.evaluation.mean == 1
    calls = len(lm.requests)
    assert better.optimize(program, *data, session).state == first.state
    assert len(lm.requests) == calls
    assert len(trainer.calls) == 1


def test_another_embedder_is_another_search(store: RunStore) -> None:
    results = [knn(Session(lm=scripted(), embedder=NumberLine(name), store=store)) for name in ("one", "other")]
    assert [result.state.prompts["hint"].nearest for result in results] == [
        DemoSelection(k=3, embedder=name) for name in ("one", "other")
    ]


def test_demos_that_replace_a_pool_are_all_shown() -> None:
    session = Session(lm=scripted(), embedder=NumberLine())
    chosen = LabeledFewShot(k=5).optimize(Colour(), knn(session, k=2).state, examples(12), [], session)
    assert chosen.state.prompts["hint"].nearest is None
    assert len(chosen.state.prompts["hint"].demos) == 5


def test_without_demos_it_is_skipped_and_says_why() -> None:
    session = Session(lm=ScriptedLM(lambda request: "no"), embedder=NumberLine())
    result = knn(session, max_labeled_demos=0)
    assert result.status == "skipped"
    assert "no demonstration could be made from 12 training examples" in result.reason
    assert result.state == initial_state(Colour(), session)


def test_a_spent_budget_keeps_the_demos_so_far() -> None:
    session = Session(lm=scripted(), embedder=NumberLine()).limited(Budget(max_lm_calls=20))
    result = knn(session)
    assert "max_lm_calls" in result.stopped
    assert 0 < result.details["pool"]["hint"] <= 12


def test_invalid_settings_and_sessions_are_refused() -> None:
    with pytest.raises(SessionError, match="Session\\(embedder="):
        knn(Session(lm=scripted()))
    with pytest.raises(ConfigError, match="k is 0"):
        KNNFewShot(exact_match, k=0)
