"""The scheduler's contracts: what must hold when prompt and weight stages alternate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar, Literal, final

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmpipe import (
    EngineError,
    Example,
    Module,
    Optimizer,
    OptimizeResult,
    ProgramState,
    PromptState,
    Request,
    RunStore,
    ScriptedLM,
    Session,
    exact_match,
    initial_state,
)
from lmpipe.errors import StrategyError
from optimizers import BetterTogether, Strategy
from tests.scripted import Colour, KeepingTrainer, colour_script, examples, scheduler, scripted

TRAIN, VAL = examples(24), examples(24, start=50)


def optimize(
    store: RunStore, strategy: str = "p -> w -> p", lm: ScriptedLM | None = None, **settings: Any
) -> OptimizeResult:
    program, session = Colour(), Session(lm=lm or scripted(), store=store)
    better = scheduler(KeepingTrainer(), strategy, **settings)
    return better.optimize(program, initial_state(program, session), TRAIN, VAL, session)


def test_alternating_prompt_and_weight_stages_teaches_more_than_either_alone(store: RunStore) -> None:
    means = {
        strategy: result.evaluation.mean
        for strategy in ("vanilla", "p", "w", "p -> w", "p -> w -> p")
        if (result := optimize(store, strategy)).evaluation
    }
    assert means == {"vanilla": 0, "p": 0.5, "w": 0, "p -> w": 1, "p -> w -> p": 1}


def test_after_a_weight_stage_every_call_of_the_next_prompt_stage_runs_on_the_tuned_weights(store: RunStore) -> None:
    before = scripted()
    adapter = optimize(store, "p -> w", before).state.weights["lm"].adapter
    after = scripted()
    optimize(store, "p -> w -> p", after)
    assert adapter is not None
    assert after.requests
    assert {request.weights.adapter for request in after.requests} == {adapter}
    assert after.adapters == {adapter: store.folder(adapter)}


@final
@dataclass(frozen=True)
class Shout(Optimizer):
    """A custom optimizer, which adds an exclamation mark to the instruction of the hint module."""

    tunes: ClassVar[Literal["prompts", "weights", "both"]] = "prompts"

    def search(
        self, program: Module, state: ProgramState, train: Sequence[Example], val: Sequence[Example], session: Session
    ) -> OptimizeResult:
        louder = state.prompts["hint"].instructions + "!"
        return OptimizeResult(state=state.with_prompt("hint", PromptState(instructions=louder)))


@pytest.mark.parametrize(("prompts_from", "shouts"), [("original", 1), ("current", 3)])
def test_a_prompt_stage_starts_from_the_original_prompts_or_from_the_current_ones(
    prompts_from: Literal["original", "current"], shouts: int
) -> None:
    program, session = Colour(), Session(lm=scripted())
    better = BetterTogether(exact_match, {"s": Shout()}, "s -> s -> s", prompts_from=prompts_from)
    result = better.optimize(program, initial_state(program, session), TRAIN, VAL, session)
    assert result.state.prompts["hint"].instructions == program.hint.initial_prompt.instructions + "!" * shouts


def test_strategies_share_their_common_first_stages(store: RunStore) -> None:
    optimize(store, "p")
    lm = scripted()
    result = optimize(store, "p -> w", lm)
    assert result.stages[0].cost.lm_calls > 0
    first = optimize(store, "p").stages[0]
    assert result.stages[0].result == first.result
    tuned = result.state.weights["lm"].adapter
    assert {request.weights.adapter for request in lm.requests} == {None, tuned}
    assert len(lm.requests) == 3 * (len(TRAIN) + len(VAL))


def test_a_stage_with_nothing_to_learn_from_is_skipped_and_the_run_continues(store: RunStore) -> None:
    alone = optimize(store, "w")
    assert (alone.status, alone.state.weights["lm"].adapter) == ("skipped", None)
    assert "nothing to train on" in alone.reason
    assert alone.stages[0].cost.lm_calls == 3 * len(TRAIN)
    followed = optimize(store, "w -> p")
    assert [stage.result.status for stage in followed.stages] == ["skipped", "done"]
    assert followed.evaluation is not None
    assert followed.evaluation.mean == 0.5


def test_the_best_or_the_last_stage_is_selected(store: RunStore) -> None:
    def spoiled(request: Request) -> str:
        return "answer: unknown" if request.weights.adapter else colour_script(request)

    last = optimize(store, "p -> w", ScriptedLM(spoiled, "spoiled"), select="last")
    best = optimize(store, "p -> w", ScriptedLM(spoiled, "spoiled"), select="best")
    assert last.state.weights["lm"].adapter is not None
    assert best.state == best.stages[0].result.state
    assert best.evaluation is not None
    assert best.evaluation.mean == 0.5


def test_optimizing_does_not_change_program_or_state(store: RunStore) -> None:
    program, session = Colour(), Session(lm=scripted(), store=store)
    state = initial_state(program, session)
    text, structure = state.model_dump_json(), sorted(vars(program.answer))
    result = scheduler(KeepingTrainer()).optimize(program, state, TRAIN, VAL, session)
    assert result.state != state
    assert state.model_dump_json() == text
    assert sorted(set(vars(program.answer)) - {"_frozen_mark"}) == structure
    assert program.answer.initial_prompt == state.prompts["answer"]


def test_malformed_completions_and_engine_errors_change_the_score_and_the_count_and_nothing_else(
    tmp_path: Path,
) -> None:
    """One completion in ten is unreadable and one request in ten fails: the same stages end with a lower score."""

    def faulty(request: Request) -> str:
        number = int(request.messages[-1].content.partition("\n")[0].partition(": ")[2])
        if number % 10 == 3 and "hints" in request.messages[-1].content:
            return "%%%"
        if number % 10 == 7:
            raise EngineError("timeout")
        return colour_script(request)

    store = RunStore(tmp_path)
    program, session = Colour(), Session(lm=ScriptedLM(faulty), store=store)
    better = scheduler(KeepingTrainer())
    result = better.optimize(program, initial_state(program, session), TRAIN, VAL, session)
    store.close()
    assert [stage.result.status for stage in result.stages] == ["done", "done", "done"]
    assert result.evaluation is not None
    failed = {name for name, score in result.evaluation.scores.items() if not score}
    assert failed == {f"n{n}" for n in range(50, 74) if n % 10 in (3, 6, 7)}
    assert result.evaluation.failures == {"parse": 3, "engine": 4}
    assert session.ledger.total.engine_errors > 0


def test_an_unknown_stage_is_refused_before_anything_runs() -> None:
    with pytest.raises(StrategyError, match="no stage is called 'q'; the stages are p, w"):
        scheduler(KeepingTrainer(), "p -> q")


@given(st.lists(st.sampled_from(["p", "w"]), min_size=1, max_size=4))
@settings(deadline=None, max_examples=12)
def test_any_strategy_runs_its_stages_in_order_and_shares_its_beginning(names: list[str]) -> None:
    with TemporaryDirectory() as folder:
        store = RunStore(folder)
        whole, beginning = optimize(store, " -> ".join(names)), optimize(store, " -> ".join(names[:-1]) or "vanilla")
        store.close()
    assert [stage.name for stage in whole.stages] == names
    assert [stage.result for stage in whole.stages[:-1]] == [stage.result for stage in beginning.stages]
    assert (whole.state, whole.evaluation) == (whole.stages[-1].result.state, whole.stages[-1].evaluation)
    assert (whole.status == "skipped") == all(stage.result.status == "skipped" for stage in whole.stages)


def test_a_strategy_is_held_as_a_value_and_compares_by_its_stages() -> None:
    text, value = scheduler(KeepingTrainer(), "(p->w)*1 -> p"), scheduler(KeepingTrainer(), Strategy(("p", "w", "p")))
    assert text.strategy == value.strategy == Strategy(("p", "w", "p"))
    assert str(text.strategy) == "p -> w -> p"


def test_a_strategy_of_unknown_stages_is_refused() -> None:
    with pytest.raises(StrategyError, match="no stage is called 'q'; the stages are p, w"):
        scheduler(KeepingTrainer(), Strategy(("p", "q")))


def test_several_strategies_may_be_texts_or_values(store: RunStore) -> None:
    program, session = Colour(), Session(lm=scripted(), store=store)
    value = Strategy(("p",))
    results = scheduler(KeepingTrainer()).optimize_all(
        ["p", value], program, initial_state(program, session), TRAIN, VAL, session
    )
    assert list(results) == ["p", value]
    assert results["p"] == results[value]
