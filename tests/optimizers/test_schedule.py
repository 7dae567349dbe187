"""The scheduler shares stages and limits budgets."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lmpipe import (
    Budget,
    OptimizeResult,
    RunStore,
    ScriptedLM,
    Session,
    exact_match,
    initial_state,
)
from lmpipe.events import CandidateScored, Event, FindingMade, StageEnded, StageStarted
from optimizers import BetterTogether, BootstrapFewShotRandomSearch
from tests.scripted import Colour, KeepingTrainer, examples, scheduler, scripted

TRAIN, VAL = examples(24), examples(24, start=50)
EIGHT = ["vanilla", "p", "w", "p*2", "w*2", "p -> w", "w -> p", "p -> w -> p"]


def all_strategies(session: Session, strategies: Sequence[str] = EIGHT) -> dict[str, OptimizeResult]:
    program = Colour()
    better = scheduler(KeepingTrainer())
    return better.optimize_all(strategies, program, initial_state(program, session), TRAIN, VAL, session)


def test_the_eight_rows_of_the_paper_run_seven_stages(store: RunStore, tmp_path: Path) -> None:
    ended: list[Event] = []
    lm = scripted()
    together = all_strategies(Session(lm=lm, store=store, callbacks=(ended.append,)))
    stages = {event.stage for event in ended if isinstance(event, StageEnded)}
    assert stages == {"p", "w", "p -> p", "w -> w", "p -> w", "w -> p", "p -> w -> p"}
    called = len(lm.requests)
    alone: dict[str, OptimizeResult] = {}
    for number, text in enumerate(EIGHT):
        own_store = RunStore(tmp_path / str(number))
        alone[text] = all_strategies(Session(lm=scripted(), store=own_store), [text])[text]
        own_store.close()
        shared, single = together[text], alone[text]
        assert (shared.status, shared.evaluation) == (single.status, single.evaluation)
        assert [stage.cost.lm_calls for stage in shared.stages] == [stage.cost.lm_calls for stage in single.stages]
    vanilla = 3 * len(VAL)
    separately = sum(sum(stage.cost.lm_calls for stage in result.stages) + vanilla for result in alone.values())
    assert called < 0.7 * separately


def test_without_a_store_strategies_share_stages_in_the_session() -> None:
    lm = scripted()
    session = Session(lm=lm)
    first = all_strategies(session, ["p"])["p"]
    called = len(lm.requests)
    assert all_strategies(session, ["vanilla", "p"])["p"] == first
    assert len(lm.requests) == called


def test_a_stage_with_a_spent_budget_ends_with_its_best_state_so_far(store: RunStore) -> None:
    """Bootstrapping takes 36 calls and a candidate 24: 110 are enough for three of six candidates."""
    lm, program = scripted(), Colour()
    session = Session(lm=lm, store=store, max_concurrency=1)
    search = BootstrapFewShotRandomSearch(exact_match, num_candidate_programs=3, num_train=12, num_val=8)
    start = initial_state(program, session)
    result = search.optimize(program, start, TRAIN, VAL, session.limited(Budget(max_lm_calls=110)))
    assert len(lm.requests) == 110
    assert result.stopped == "max_lm_calls=110 is spent"
    assert [candidate.name for candidate in result.candidates] == ["zero-shot", "labelled", "bootstrapped"]
    assert result.evaluation is not None
    assert result.evaluation.mean == max(candidate.mean for candidate in result.candidates) > 0
    whole = search.optimize(program, start, TRAIN, VAL, session)
    assert (whole.stopped, len(whole.candidates)) == ("", 6)


def test_stages_after_a_spent_budget_are_skipped_and_the_result_is_fully_scored(store: RunStore) -> None:
    stages = scheduler(KeepingTrainer()).optimizers
    better = BetterTogether(exact_match, stages, "p -> w -> p", budget=Budget(max_lm_calls=110))
    program, session = Colour(), Session(lm=scripted(), store=store, max_concurrency=1)
    result = better.optimize(program, initial_state(program, session), TRAIN, VAL, session)
    assert [stage.result.status for stage in result.stages] == ["done", "skipped", "skipped"]
    assert "before the stage began (max_lm_calls=110 is spent)" in result.stages[1].result.reason
    assert result.stopped == "max_lm_calls=110 is spent"
    assert result.evaluation is not None
    assert result.evaluation.n == len(VAL)
    assert [finding.stage for finding in result.findings if finding.kind == "budget"] == ["p", "p -> w", "p -> w -> p"]


def test_a_stage_budget_does_not_stop_the_next_stage(store: RunStore) -> None:
    stages = scheduler(KeepingTrainer()).optimizers
    better = BetterTogether(exact_match, stages, "p -> w", stage_budget=Budget(max_lm_calls=110))
    program, session = Colour(), Session(lm=scripted(), store=store, max_concurrency=1)
    result = better.optimize(program, initial_state(program, session), TRAIN, VAL, session)
    assert [bool(stage.result.stopped) for stage in result.stages] == [True, False]
    assert result.stages[1].cost.traces_kept == result.stages[1].result.details["kept"] > 0


def test_callbacks_get_candidates_and_stages(store: RunStore) -> None:
    events: list[Event] = []
    result = all_strategies(Session(lm=scripted(), store=store, callbacks=(events.append,)), ["p -> w"])["p -> w"]
    start, *candidates = [event for event in events if isinstance(event, CandidateScored)]
    assert start == CandidateScored("vanilla", "initial state", result.initial.mean if result.initial else -1, len(VAL))
    assert [(event.stage, event.name, event.score) for event in candidates] == [
        ("p", candidate.name, candidate.mean) for candidate in result.stages[0].result.candidates
    ]
    stages = [event for event in events if isinstance(event, StageEnded)]
    assert [(event.stage, event.score) for event in stages] == [
        ("p", result.stages[0].evaluation.mean),
        ("p -> w", result.stages[1].evaluation.mean),
    ]
    assert [(event.stage, event.interval, event.n) for event in stages] == [
        (name, stage.evaluation.interval, len(VAL)) for name, stage in zip(["p", "p -> w"], result.stages, strict=True)
    ]
    started = [event for event in events if isinstance(event, StageStarted)]
    assert started == [
        StageStarted("p", "BootstrapFewShotRandomSearch", 1, 2, 0),
        StageStarted("p -> w", "BootstrapFinetune", 2, 2, 0),
    ]
    findings_made = [(event.stage, event.kind) for event in events if isinstance(event, FindingMade)]
    assert findings_made == [(finding.stage, finding.kind) for finding in result.findings]
    order = [type(event).__name__ for event in events if isinstance(event, (StageStarted, StageEnded))]
    assert order == ["StageStarted", "StageEnded"] * 2


def test_a_skipped_stage_is_told_with_its_reason(store: RunStore) -> None:
    events: list[Event] = []
    session = Session(lm=ScriptedLM(lambda request: "?"), store=store, callbacks=(events.append,))
    result = all_strategies(session, ["w"])["w"]
    (ended,) = [event for event in events if isinstance(event, StageEnded)]
    assert (ended.status, ended.reason) == ("skipped", result.reason)
    assert result.reason
