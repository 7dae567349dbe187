"""Best of n: which prediction a reward chooses, when the runs stop, and what happens to those that fail."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pytest

from lmpipe import Budget, ParseError, Predict, Prediction, ScriptedLM, Session, exact_match, initial_state
from lmpipe.errors import ConfigError
from lmpipe.program.identity import identity
from optimizers import BootstrapFewShotRandomSearch
from programs import BestOfN
from tests.programs.arithmetic import EXAMPLES, adder, said, score, session, traces


def same_parity(inputs: Mapping[str, Any], prediction: Prediction) -> float:
    """A check without labels, which one wrong answer in two passes."""
    return float(prediction.answer % 2 == (inputs["a"] + inputs["b"]) % 2)


def longest(inputs: Mapping[str, Any], prediction: Prediction) -> float:
    return len(prediction.answer)


QA = Predict("question -> answer")


def test_a_reward_without_labels_improves_the_answers() -> None:
    assert score(adder()).mean < 0.75
    assert score(BestOfN(adder(), 6, same_parity)).mean > 0.75


def test_the_first_of_the_best_predictions_is_returned() -> None:
    with said("answer: a", "answer: bbb", "answer: ccc", "answer: dd"):
        assert BestOfN(QA, 4, longest)(question="?").answer == "bbb"


def test_no_run_is_made_after_one_that_is_good_enough() -> None:
    with said("answer: a", "answer: bb"):  # a third call would fail
        assert BestOfN(QA, 5, longest, threshold=2)(question="?").answer == "bb"
    several = traces(BestOfN(adder(), 6, same_parity, threshold=1), session())
    assert 1 < sum(len(trace.steps) for trace in several) / len(several) < 3


def test_runs_that_fail_are_left_out() -> None:
    several = traces(BestOfN(adder(), 12, same_parity), session())
    assert all(trace.failure is None for trace in several)
    assert any(step.error for trace in several for step in trace.lm_steps)
    with said("answer: many", "answer: few"), pytest.raises(ParseError, match="few"):
        BestOfN(adder(), 2, same_parity)(a=1, b=2)


def test_rewards_that_are_not_finite_never_win() -> None:
    rewards = {"a": math.nan, "b": -1.0, "c": math.inf, "d": -2.0}
    with said("answer: a", "answer: b", "answer: c", "answer: d"):
        assert BestOfN(QA, 4, lambda inputs, prediction: rewards[prediction.answer])(question="?").answer == "b"
    with said("answer: a", "answer: b"):
        assert BestOfN(QA, 2, lambda inputs, prediction: math.nan)(question="?").answer == "a"


def test_runs_are_sampled_although_the_session_is_greedy() -> None:
    lm = ScriptedLM(lambda request: f"answer: {request.seed % 1000}")
    with Session(lm=lm):
        BestOfN(QA, 3, longest)(question="?")
        BestOfN(QA, 1, longest, temperature=None)(question="?")
    assert [request.sampling.temperature for request in lm.requests] == [0.7, 0.7, 0.7, 0]
    assert len({request.seed for request in lm.requests[:3]}) == 3


def test_it_can_be_optimized() -> None:
    program, used = BestOfN(adder(), 2, same_parity), session()
    search = BootstrapFewShotRandomSearch(exact_match, num_candidate_programs=2)
    result = search.optimize(program, initial_state(program, used), EXAMPLES[::2], EXAMPLES[1::2], used)
    assert result.state.prompts["program"].demos
    assert score(program, result.state, used).mean > score(program, in_session=used).mean


def test_its_reward_is_part_of_its_identity() -> None:
    programs = [BestOfN(QA, 2, same_parity), BestOfN(QA, 2, longest), BestOfN(QA, 2, longest, threshold=1)]
    assert len({identity(program=program) for program in programs}) == 3


def no_reward(inputs: Mapping[str, Any], prediction: Prediction) -> Any:
    return None


def test_a_reward_that_is_not_a_number_ends_the_evaluation() -> None:
    with pytest.raises(ConfigError, match="the reward of a prediction is None; return a number"):
        score(BestOfN(adder(), 2, no_reward))


def test_invalid_arguments_are_named() -> None:
    with pytest.raises(ConfigError, match="BestOfN: n is 0"):
        BestOfN(QA, 0, longest)
    with pytest.raises(ConfigError, match=r"BestOfN: reward is 0\.5; it must be a function"):
        BestOfN(QA, 2, 0.5)  # type: ignore[arg-type]


def test_a_spent_budget_ends_the_program() -> None:
    limited = session().limited(Budget(max_lm_calls=3))
    evaluation = score(BestOfN(adder(), 2, same_parity), in_session=limited)
    assert not evaluation.complete
