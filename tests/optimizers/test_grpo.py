"""GRPO compares the calls of a group of rollouts, and a tiny real LM learns what is rewarded."""

from __future__ import annotations

import statistics
from typing import Any

import pytest

from lmpipe import (
    Budget,
    Example,
    OptimizeResult,
    Predict,
    Prediction,
    Request,
    RunStore,
    Sampling,
    ScriptedLM,
    Session,
    exact_match,
    initial_state,
)
from lmpipe.engines.local import LocalLM
from lmpipe.engines.training import LocalTrainer, TuningConfig
from lmpipe.errors import ConfigError
from lmpipe.events import CandidateScored, Event
from lmpipe.trainer import PolicyGradientLoss
from optimizers import GRPO, BetterTogether
from tests.optimizers.test_preference import guessing
from tests.scripted import Colour, KeepingTrainer, examples


def improve(
    store: RunStore, trainer: KeepingTrainer, lm: ScriptedLM, max_lm_calls: int | None = None, **settings: Any
) -> OptimizeResult:
    program, session = Colour(), Session(lm=lm, store=store, seed=5).limited(Budget(max_lm_calls))
    optimizer = GRPO(exact_match, trainer, **{"steps": 3, "examples_per_step": 2, "group_size": 8, **settings})
    state = initial_state(program, session)
    return optimizer.optimize(program, state, examples(6), examples(4, start=20), session)


def test_a_call_has_the_advantage_of_its_run_among_the_same_calls(store: RunStore) -> None:
    trainer, lm = KeepingTrainer(), ScriptedLM(guessing)
    result = improve(store, trainer, lm, steps=1, adapters="module", format_score=-0.5)
    assert trainer.objectives == [PolicyGradientLoss(clip=0.2, temperature=1.0)] * 2
    (hints, _), (answers, _) = trainer.calls
    sent = {request.messages for request in lm.requests}
    groups: dict[Any, list[float]] = {}
    for row in hints:
        assert row.messages in sent, "rows show what was sent"
        assert row.completion.startswith("hint: it is "), "and what was answered, as it was"
        groups.setdefault(row.messages, []).append(row.advantage or 0)
    for advantages in groups.values():
        assert statistics.fmean(advantages) == pytest.approx(0, abs=1e-9)
        assert statistics.pstdev(advantages) == pytest.approx(1)
    for number in {row.messages[-1].content.partition("\n")[0] for row in answers}:
        group = [row for row in answers if row.messages[-1].content.startswith(number)]
        worst = min(row.advantage or 0 for row in group)
        assert all((row.advantage == worst) == (row.completion == "Hard to say.") for row in group)
    (step,) = result.details["steps"]
    assert step["runs"] == 16
    assert step["calls"] == {"hint": len(hints), "answer": len(answers)}
    assert step["unreadable"] > 0


def test_each_step_starts_from_the_weights_of_the_previous_step(store: RunStore) -> None:
    trainer = KeepingTrainer()
    result = improve(store, trainer, ScriptedLM(guessing))
    trained = [step["training"]["lm"]["rows"] for step in result.details["steps"]]
    assert trained == [len(rows) for rows, _ in trainer.calls]
    starts = [start.adapter for _, start in trainer.calls]
    assert starts[0] is None
    assert len(set(starts)) == 3


def test_the_best_state_on_validation_examples_is_kept(store: RunStore) -> None:
    """The scripted LM is right on tuned weights, which it has from the first step on."""
    right = {20: "blue", 21: "red", 22: "green", 23: "blue"}

    def script(request: Request) -> str:
        prompt = request.messages[-1].content
        number = int(prompt.partition("\n")[0].partition(": ")[2])
        if request.weights.adapter and number in right and "hints: " in prompt:
            return f"answer: {right[number]}"
        return guessing(request)

    events: list[Event] = []
    program, session = Colour(), Session(lm=ScriptedLM(script), store=store, seed=5, callbacks=(events.append,))
    optimizer = GRPO(exact_match, KeepingTrainer(), steps=4, group_size=8, eval_every=2)
    result = optimizer.optimize(program, initial_state(program, session), examples(6), examples(4, start=20), session)
    assert [event.name for event in events if isinstance(event, CandidateScored)] == ["step 0", "step 2", "step 4"]
    assert [candidate.mean for candidate in result.candidates][1:] == [1.0, 1.0]
    assert result.details["chosen"] == "step 2"
    assert result.state.digest == result.candidates[1].state
    assert result.evaluation is not None
    assert result.evaluation.mean == 1.0


def test_a_stopped_run_continues_after_its_last_step(store: RunStore) -> None:
    """A search with more steps recalls those that were made before."""
    trainer, lm = KeepingTrainer(), ScriptedLM(guessing)
    first = improve(store, trainer, lm)
    calls = len(lm.requests)
    longer = improve(store, trainer, lm, steps=4)
    assert longer.details["steps"][:3] == first.details["steps"]
    assert len(trainer.calls) == 4
    assert len(lm.requests) - calls < calls
    assert improve(store, trainer, lm, steps=4) == longer


def test_a_spent_budget_ends_the_search_with_the_best_state_so_far(store: RunStore) -> None:
    trainer = KeepingTrainer()
    result = improve(store, trainer, ScriptedLM(guessing), max_lm_calls=100, steps=50, eval_every=1)
    assert result.stopped == "max_lm_calls=100 is spent"
    assert 0 < len(result.details["steps"]) < 5
    assert result.evaluation is not None


def test_groups_with_equal_rewards_give_no_rows(store: RunStore) -> None:
    trainer = KeepingTrainer()
    result = improve(store, trainer, ScriptedLM(lambda request: "hint: none\nanswer: red"))
    assert (result.status, trainer.calls) == ("skipped", [])
    assert "all rollouts of each example had the same reward" in result.reason
    unreadable = improve(store, trainer, ScriptedLM(lambda request: "hint: none", "unreadable"))
    assert "rollouts failed in answer: ParseError: field 'answer'" in unreadable.reason
    program, session = Colour(), Session(lm=ScriptedLM(guessing), store=store)
    state = initial_state(program, session)
    with pytest.raises(ConfigError, match="no training examples to learn from"):
        GRPO(exact_match, trainer).optimize(program, state, [], examples(2), session)
    with pytest.raises(ConfigError, match=r"no validation examples to choose by.*num_val=0"):
        GRPO(exact_match, trainer).optimize(program, state, examples(2), [], session)
    with pytest.raises(ConfigError, match="group_size is 1; it must be at least 2"):
        GRPO(exact_match, trainer, group_size=1)
    with pytest.raises(ConfigError, match="temperature is 0; it must be greater than 0"):
        GRPO(exact_match, trainer, temperature=0)


def share_of_letters(example: Example, prediction: Prediction) -> float:
    """The share of ASCII letters in an answer."""
    return sum(letter.isascii() and letter.isalpha() for letter in prediction.answer) / max(len(prediction.answer), 1)


def test_a_real_lm_learns_what_is_rewarded(tiny_lm: LocalLM, store: RunStore) -> None:
    tuning = TuningConfig(target_modules="all-linear", rank=8, alpha=16, learning_rate=0.01, epochs=2, batch_size=16)
    optimizer = GRPO(share_of_letters, LocalTrainer(tiny_lm, tuning), steps=6, examples_per_step=4, eval_every=6)
    program = Predict("letter -> answer")
    session = Session(lm=tiny_lm, store=store, sampling=Sampling(temperature=1.0, max_tokens=6))
    data = [Example({"letter": letter}, {}) for letter in "abcdefgh"]
    scheduler = BetterTogether(share_of_letters, {"g": optimizer}, "g")
    result = scheduler.optimize(program, initial_state(program, session), data[:4], data[4:], session)
    rewards = [step["mean_reward"] for step in result.stages[0].result.details["steps"]]
    assert rewards[-1] > rewards[0] + 0.15
    assert result.evaluation is not None
    assert result.evaluation.mean > result.stages[0].result.candidates[0].mean
