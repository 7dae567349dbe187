"""Candidates are never selected by a score that is not finite, or by a mean over fewer examples than others have."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmpipe import (
    Budget,
    Evaluation,
    Example,
    Job,
    Optimizer,
    OptimizeResult,
    Predict,
    Prediction,
    Request,
    RunStore,
    ScriptedLM,
    Session,
    exact_match,
    initial_state,
    rollout,
)
from lmpipe.optimize_result import StageResult
from optimizers import GEPA, GRPO, BetterTogether, BootstrapFewShotRandomSearch, MIPROv2, Strategy
from optimizers.prompts.racing import race
from optimizers.prompts.tpe_sampler import TPESampler
from optimizers.schedule.diagnosis import Diagnosis
from optimizers.schedule.stage_diagnosis import paired_interval
from optimizers.selection import best_candidate, selection_result
from tests.optimizers.proposing import Student, Two, is_right, numbers
from tests.scripted import Colour, KeepingTrainer, examples, scripted

NAN = math.nan
PROGRAM = Predict("number: int -> answer")
ANY = [Example({"number": n}, {"answer": "x"}, id=str(n)) for n in range(4)]


def undefined_for_one(example: Example, prediction: Prediction) -> float:
    """0.9 for answers with demonstrations; without them NaN on the first example and 0.2 on the others."""
    if prediction["answer"] != "zero":
        return 0.9
    return NAN if example.id == "0" else 0.2


def demos_decide(request: Request) -> str:
    return "answer: " + ("zero" if len(request.messages) == 2 else "demo")


def of(scores: Sequence[float], prevented: int = 0) -> Evaluation:
    return Evaluation(
        scores={str(number): score for number, score in enumerate(scores)},
        failures={"budget": prevented} if prevented else {},
    )


@pytest.mark.parametrize("racing", [False, True])
def test_a_candidate_with_an_undefined_score_does_not_win_a_search(racing: bool) -> None:
    session = Session(lm=ScriptedLM(demos_decide))
    search = BootstrapFewShotRandomSearch(
        undefined_for_one, num_candidate_programs=3, metric_threshold=0.1, racing=racing
    )
    result = search.optimize(PROGRAM, initial_state(PROGRAM, session), ANY, ANY, session)
    assert result.details["chosen"] != "zero-shot"
    assert result.evaluation is not None
    assert result.evaluation.mean == pytest.approx(0.9)


def test_mipro_and_gepa_continue_after_an_undefined_score() -> None:
    for optimizer in (
        MIPROv2(undefined_for_one, num_candidates=3, num_trials=4, minibatch=False, metric_threshold=0.1),
        GEPA(undefined_for_one, max_metric_calls=40),
    ):
        session = Session(lm=ScriptedLM(demos_decide))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            result = optimizer.optimize(PROGRAM, initial_state(PROGRAM, session), ANY, ANY, session)
        if isinstance(optimizer, MIPROv2):
            assert result.evaluation is not None
            assert result.evaluation.mean == pytest.approx(0.9)


@given(st.lists(st.lists(st.sampled_from([NAN, 0.0, 0.5, 1.0]), max_size=4), min_size=1, max_size=6), st.data())
def test_the_winner_has_a_score_on_every_example(rows: list[list[float]], data: st.DataObject) -> None:
    prevented = data.draw(st.lists(st.integers(0, 1), min_size=len(rows), max_size=len(rows)))
    state = initial_state(PROGRAM, Session(lm=scripted()))
    scored = [(str(n), state, of(row, left)) for n, (row, left) in enumerate(zip(rows, prevented, strict=True))]
    eligible = [
        n
        for n, (_, _, evaluation) in enumerate(scored)
        if rows[n] and not prevented[n] and math.isfinite(evaluation.mean)
    ]
    winner = best_candidate(scored)
    assert (winner is None) == (not eligible)
    if winner is not None:
        assert winner in eligible
        assert scored[winner][2].mean == max(scored[n][2].mean for n in eligible)


def test_without_any_score_the_state_is_unchanged_and_the_reason_is_given() -> None:
    session = Session(lm=scripted()).limited(Budget(max_lm_calls=0))
    state = initial_state(PROGRAM, session)
    result = selection_result(state, [("a", state, of([], 4)), ("b", state, of([NAN]))], session, {}, winner=None)
    assert (result.state, result.status) == (state, "skipped")
    assert "no candidate was scored on all validation examples (max_lm_calls=0 is spent)" in result.reason


@pytest.mark.parametrize(
    "optimizer",
    [
        BootstrapFewShotRandomSearch(is_right),
        BootstrapFewShotRandomSearch(is_right, racing=True),
        MIPROv2(is_right),
        GEPA(is_right),
    ],
)
@pytest.mark.parametrize("calls", [0, 20])
def test_a_search_without_budget_to_score_leaves_the_state_unchanged_with_a_reason(
    optimizer: Optimizer, calls: int
) -> None:
    session = Session(lm=ScriptedLM(Student())).limited(Budget(max_lm_calls=calls))
    program = Two()
    state = initial_state(program, session)
    result = optimizer.optimize(program, state, numbers(8, 1), numbers(12, 50), session)
    assert (result.status, result.state, result.evaluation, result.candidates) == ("skipped", state, None, ())
    assert f"max_lm_calls={calls} is spent" in result.reason


def test_a_candidate_with_an_undefined_score_never_leads_a_race() -> None:
    def score(alive: Sequence[int], block: slice) -> list[list[float]]:
        table = [[NAN] + [1.0] * 49, [0.0] * 50, [0.5] * 50, [math.inf] * 50]
        return [table[number][block] for number in alive]

    ran = race(score, 4, 50)
    assert ran.winner == 2
    assert race(lambda alive, block: [[NAN] * (block.stop - block.start) for _ in alive], 3, 50).winner is None


def test_the_tpe_sampler_ignores_scores_that_are_not_finite() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sampler = TPESampler({"a": 3}, seed=0)
        sampler.add({"a": 1}, NAN)
        for _ in range(15):
            trials, choices = zip(*sampler.ask(2), strict=True)
            sampler.tell(trials, [NAN if choice["a"] == 2 else float(choice["a"]) for choice in choices])
    assert trials[0].study.best_params == {"a": 1}


def test_a_group_with_a_reward_that_is_not_finite_gives_no_rows(store: RunStore) -> None:
    program = Colour()
    session = Session(lm=scripted(), store=store)
    state = initial_state(program, session)
    jobs = [Job(state, example, sample) for example in examples(2) for sample in range(3)]
    all_traces = rollout(program, jobs, session, exact_match)
    traces = [replace(trace, failure=None, score=float(trace.sample == 0)) for trace in all_traces]
    grpo = GRPO(exact_match, KeepingTrainer(), group_size=3)
    every, _ = grpo.rows(program, traces)
    traces[0] = replace(traces[0], score=NAN)
    rows, taught = grpo.rows(program, traces)
    assert {trace.example.id for trace, _ in taught} == {"n1"}
    assert 0 < len(rows["lm"]) < len(every["lm"])
    assert all(row.advantage is not None and math.isfinite(row.advantage) for row in rows["lm"])


def test_a_stage_with_an_undefined_score_is_not_the_best() -> None:
    session = Session(lm=ScriptedLM(demos_decide))
    search = BootstrapFewShotRandomSearch(undefined_for_one, num_candidate_programs=1, metric_threshold=0.1)
    better = BetterTogether(undefined_for_one, {"p": search}, "p", select="best")
    result = better.optimize(PROGRAM, initial_state(PROGRAM, session), ANY, ANY, session)
    assert result.state == result.stages[0].result.state
    assert result.evaluation is not None
    assert result.evaluation.mean == pytest.approx(0.9)


def test_a_state_that_is_only_partly_scored_is_not_the_best() -> None:
    """Two of the four scoring runs are right and the budget is spent before the others."""
    session = Session(lm=ScriptedLM(demos_decide), max_concurrency=1).limited(Budget(max_lm_calls=2))
    search = BootstrapFewShotRandomSearch(undefined_for_one, num_candidate_programs=1)
    better = BetterTogether(undefined_for_one, {"p": search}, "p", select="best")
    state = initial_state(PROGRAM, session)
    result = better.optimize(PROGRAM, state, ANY, ANY, session)
    assert result.state == state
    findings = [finding for finding in result.findings if finding.kind == "no choice"]
    assert "no state was scored on all 4 validation examples" in findings[0].message


def test_intervals_leave_out_differences_that_are_not_finite() -> None:
    one, other = {"a": 1.0, "b": NAN, "c": 0.5}, {"a": 0.0, "b": 0.0, "c": 0.5, "d": 1.0}
    assert paired_interval(one, other) == paired_interval({"a": 1.0, "c": 0.5}, other)
    assert paired_interval({"a": NAN}, {"a": 1.0})[1:] == (-math.inf, math.inf)
    session, strategy, optimizer = Session(lm=scripted()), Strategy(("p",)), BootstrapFewShotRandomSearch(exact_match)
    state, empty = initial_state(PROGRAM, session), of([], prevented=4)
    result = OptimizeResult(state=state)
    stage = StageResult(name="p", result=result, evaluation=empty, cost=session.ledger.total)
    diagnosis = Diagnosis(strategy, {"p": optimizer}, PROGRAM, ANY, ANY, session)
    assert not list(diagnosis.of_stage(strategy, empty, state, empty, stage))
