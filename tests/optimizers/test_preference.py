"""A preference is between calls of a module on the same inputs, in a successful and in a failing rollout."""

from __future__ import annotations

from typing import Any

import pytest

from lmpipe import OptimizeResult, Predict, Request, RunStore, ScriptedLM, Session, exact_match, initial_state
from lmpipe.errors import ConfigError
from lmpipe.trainer import DPOLoss
from optimizers import BetterTogether, PreferenceFinetune, Teacher
from tests.scripted import COLOURS, Colour, KeepingTrainer, examples


def guessing(request: Request) -> str:
    """Guesses hints and answers what the first hint says; one answer in four is unreadable."""
    prompt = request.messages[-1].content
    if "hints: " not in prompt:
        return f"hint: it is {COLOURS[request.seed % 3]}"
    return "Hard to say." if request.seed % 4 == 0 else f"answer: {prompt.split('[1] it is ')[1].split()[0]}"


def prefer(store: RunStore, **settings: Any) -> tuple[OptimizeResult, KeepingTrainer]:
    program, trainer, session = Colour(), KeepingTrainer(), Session(lm=ScriptedLM(guessing), store=store, seed=1)
    optimizer = PreferenceFinetune(exact_match, trainer, **{"rollouts_per_example": 30, **settings})
    return optimizer.optimize(program, initial_state(program, session), examples(3), [], session), trainer


def test_a_pair_is_a_right_and_a_wrong_answer_to_the_same_prompt(store: RunStore) -> None:
    result, trainer = prefer(store, adapters="module", beta=0.3)
    (hints, _), (answers, _) = trainer.calls
    assert trainer.objectives == [DPOLoss(beta=0.3)] * 2
    assert {row.rejected for row in answers} == {"Hard to say."}
    for row in answers:
        first = row.messages[-1].content.split("[1] it is ")[1].split()[0]
        assert row.completion == f"answer: {first}"
    completions = {}
    for row in hints:
        assert row.completion != row.rejected
        completions.setdefault(row.messages[-1].content, set()).add(row.completion)
    assert completions["number: 0"] == {"hint: it is red"}, (
        "number 0 is only asked for as a first hint, which must be right"
    )
    pairs = result.details["pairs"]
    assert pairs["hint"]["pairs"] == len(hints)
    assert pairs["answer"]["pairs"] == len(answers)


def test_calls_without_a_pair_are_counted(store: RunStore) -> None:
    """A failing answer follows a wrong hint, which no successful rollout has; the second hint has no effect."""
    result, _ = prefer(store)
    hint, answer = (result.details["pairs"][path] for path in ("hint", "answer"))
    tried, kept = result.details["tried"], result.details["kept"]
    assert tried == 90
    assert hint["failing"] == 2 * (tried - kept)
    assert hint["same_completion"] > 0
    assert hint["not_at_fault"] > 0
    assert hint["other_inputs"] == 0
    assert answer["other_inputs"] > 0
    assert answer["not_at_fault"] == 0


def test_unreadable_completions_are_rejected_as_they_are_or_not_at_all(store: RunStore) -> None:
    _, trainer = prefer(store, reject_unreadable=False)
    assert "Hard to say." not in {row.rejected for row in trainer.calls[0][0]}


def test_pairs_of_one_prompt_are_limited_and_drawn_at_random(store: RunStore) -> None:
    rows = [prefer(store, max_pairs_per_prompt=most)[1].calls[0][0] for most in (1, 100)]
    prompts = [row.messages for row in rows[0]]
    assert len(set(prompts)) == len(prompts)
    assert set(rows[0]) < set(rows[1])


def wrong(request: Request) -> str:
    return "answer: black"


def right(request: Request) -> str:
    return f"answer: {COLOURS[int(request.messages[-1].content.partition(': ')[2]) % 3]}"


def test_a_teacher_gives_the_preferred_side_where_the_program_never_succeeds(store: RunStore) -> None:
    program, trainer = Predict("number: int -> answer"), KeepingTrainer()
    session = Session(lm=ScriptedLM(wrong), store=store)
    state = initial_state(program, session)
    alone = PreferenceFinetune(exact_match, trainer).optimize(program, state, examples(4), [], session)
    assert (alone.status, trainer.calls) == ("skipped", [])
    assert "of 16 rollouts on 4 training examples 0 scored 1.0 or more" in alone.reason
    assert alone.details["pairs"]["self"]["other_inputs"] == 16
    taught = PreferenceFinetune(exact_match, trainer, teacher=Teacher(lm=ScriptedLM(right, name="expert")))
    result = taught.optimize(program, state, examples(4), [], session)
    ((rows, start),) = trainer.calls
    assert [(row.completion, row.rejected) for row in rows] == [
        (f"answer: {COLOURS[n % 3]}", "answer: black") for n in range(4)
    ]
    assert start == state.weights["lm"]
    assert result.details["tried"] == 32


def test_a_preference_stage_continues_from_the_weights_of_the_stage_before(store: RunStore) -> None:
    program, trainer = Colour(), KeepingTrainer()
    session = Session(lm=ScriptedLM(guessing), store=store, seed=2)
    stages = {"d": PreferenceFinetune(exact_match, trainer, rollouts_per_example=20, adapters="module")}
    scheduler = BetterTogether(exact_match, stages, "d -> d")
    state = initial_state(program, session)
    result = scheduler.optimize(program, state, examples(3), examples(3, start=6), session)
    assert [stage.result.status for stage in result.stages] == ["done", "done"]
    first, second = (stage.result.state.weights for stage in result.stages)
    starts = [start.adapter for _, start in trainer.calls]
    assert starts == [None, None, first["lm/hint"].adapter, first["lm/answer"].adapter]
    assert second["lm/hint"] != first["lm/hint"]


def test_bad_settings_are_named(store: RunStore) -> None:
    with pytest.raises(ConfigError, match="beta is -1; it must be greater than 0"):
        prefer(store, beta=-1)
