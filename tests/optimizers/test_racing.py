"""A race finds the winner of the exhaustive search without most of its rollouts."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.performance.racing import FAMILIES, REALISTIC, SAME_GOAL, SHARE_GOAL, measure, race_on_table, simulated
from lmpipe import Budget, Example, OptimizeResult, Predict, Request, RunStore, ScriptedLM, Session, initial_state
from lmpipe.metrics import exact_match
from optimizers import BootstrapFewShotRandomSearch
from optimizers.prompts.racing import EliminationRule, race


def test_simulated_races_find_the_exhaustive_winner_with_less_than_half_of_the_rollouts() -> None:
    outcome = measure(simulated(FAMILIES[REALISTIC], 300, seed=11), EliminationRule())
    assert outcome.same >= SAME_GOAL
    assert outcome.share <= SHARE_GOAL


def test_equal_candidates_cost_more_and_the_wrong_winner_hardly_matters() -> None:
    outcome, realistic = (
        measure(simulated(FAMILIES[name], 100, seed=3), EliminationRule()) for name in ("all alike", REALISTIC)
    )
    assert outcome.share > realistic.share
    assert outcome.loss < 0.005


@given(st.integers(0, 1000))
def test_blocks_cover_all_examples_once(examples: int) -> None:
    blocks = EliminationRule().blocks(examples)
    assert [number for block in blocks for number in range(examples)[block]] == list(range(examples))


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=40), st.integers(0, 200))
def test_leading_candidates_are_never_dropped_and_beaten_ones_always(
    pairs: list[tuple[float, float]], left: int
) -> None:
    low, high = [min(pair) for pair in pairs], [max(pair) for pair in pairs]
    assert not EliminationRule().eliminates(high, low, len(pairs) + left)
    if sum(high) - sum(low) > left + 1e-6:
        assert EliminationRule().eliminates(low, high, len(pairs) + left)


def test_the_earliest_of_equal_candidates_wins_and_none_is_dropped() -> None:
    ran = race(lambda alive, block: [[1.0] * 5 for _ in alive], candidates=3, examples=5)
    assert (ran.winner, ran.rollouts, ran.blocks) == (0, 15, 1)


def test_a_race_that_is_cut_short_is_decided_by_the_blocks_before() -> None:
    def score(alive: Sequence[int], block: slice) -> list[list[float]] | None:
        length = block.stop - block.start
        return (
            None if block.start else [[float(number == 1)] * (length // 2) + [0.0] * (length // 2) for number in alive]
        )

    ran = race(score, candidates=2, examples=1000, rule=EliminationRule(boundary=100))
    assert (ran.winner, ran.blocks, ran.rollouts) == (1, 1, 24)
    assert race(lambda alive, block: None, candidates=2, examples=1000).winner is None


def test_a_race_on_a_table_reads_it_only_where_candidates_are_left() -> None:
    rng = random.Random(0)
    table = next(simulated(FAMILIES["spread 10 points"], 1, seed=rng.randrange(100)))
    ran = race_on_table(table, EliminationRule())
    for row, seen in zip(table, ran.scores, strict=True):
        assert list(seen) == row[: len(seen)].tolist()
    assert len(ran.scores[ran.winner or 0]) == max(map(len, ran.scores))


def skilled(request: Request) -> str:
    """Is right on some questions; the demos decide on how many."""
    demos = " ".join(message.content for message in request.messages[1:-1])
    skill = random.Random(demos).random()
    right = random.Random(request.messages[-1].content).random() < skill
    return f"answer: {'yes' if right else 'no'}"


PROGRAM = Predict("number: int -> answer")


def search(session: Session, *, racing: bool) -> OptimizeResult:
    train, val = (
        [Example({"number": n}, {"answer": "yes"}, id=f"n{n}") for n in range(start, start + count)]
        for start, count in ((0, 30), (100, 150))
    )
    optimizer = BootstrapFewShotRandomSearch(exact_match, num_candidate_programs=6, racing=racing)
    return optimizer.optimize(PROGRAM, initial_state(PROGRAM, session), train, val, session)


@pytest.mark.parametrize("seed", range(3))
def test_a_racing_search_chooses_what_the_exhaustive_one_chooses(seed: int) -> None:
    lm = ScriptedLM(skilled)
    exhaustive = search(Session(lm=lm, seed=seed), racing=False)
    calls = len(lm.requests)
    racing = search(Session(lm=lm, seed=seed), racing=True)
    assert racing.state == exhaustive.state
    assert racing.details["chosen"] == exhaustive.details["chosen"]
    means = {candidate.name: candidate.mean for candidate in exhaustive.candidates}
    assert [candidate.name for candidate in racing.candidates] == list(means)
    figures = racing.details["racing"]
    runs = {candidate.state: candidate.n for candidate in racing.candidates}
    assert figures["rollouts"] == sum(runs.values()) == len(lm.requests) - calls - racing.details["tried"]
    assert figures["exhaustive"] == 150 * len(runs)
    assert figures["rollouts"] <= figures["exhaustive"] / 2


def test_a_race_stops_at_a_budget_with_the_leader_so_far_and_can_continue(store: RunStore) -> None:
    lm = ScriptedLM(skilled)
    whole = search(Session(lm=ScriptedLM(skilled)), racing=True)
    session = Session(lm=lm, store=store)
    short = search(session.limited(Budget(max_lm_calls=30 + 250)), racing=True)
    assert "max_lm_calls" in short.stopped
    assert 0 < short.details["racing"]["rollouts"] < whole.details["racing"]["rollouts"]
    assert short.evaluation is not None
    before = len(lm.requests)
    resumed = search(session, racing=True)
    assert resumed == whole
    assert len(lm.requests) - before < 30 + whole.details["racing"]["rollouts"]


def test_a_race_without_any_budget_leaves_the_state_as_it_is() -> None:
    result = search(Session(lm=ScriptedLM(skilled)).limited(Budget(max_lm_calls=35)), racing=True)
    assert result.state == initial_state(PROGRAM, Session(lm=ScriptedLM(skilled)))
    assert result.candidates == ()
