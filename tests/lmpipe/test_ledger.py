"""Ledgers add up costs, and budgets limit them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmpipe import (
    LM,
    Budget,
    Completion,
    EngineError,
    Example,
    Job,
    Predict,
    Request,
    ScriptedLM,
    Session,
    evaluate,
    exact_match,
    initial_state,
    rollout,
)
from lmpipe.errors import BudgetSpent, ConfigError, StoreError
from lmpipe.ledger import MEASURED, Cost, Ledger, ModuleCost
from lmpipe.lm import Usage
from lmpipe.runtime.deadline import check_deadline, lock_before_deadline, seconds_left, set_deadline
from tests.scripted import Colour, colour_script, examples

costs = st.builds(
    Cost,
    lm_calls=st.integers(0, 9),
    training_tokens=st.integers(0, 9),
    peak_memory=st.integers(0, 9),
    modules=st.dictionaries(st.sampled_from("ab"), st.builds(ModuleCost, calls=st.integers(0, 9))),
)


@given(costs, costs, costs)
def test_costs_add_up_in_any_order_and_survive_json(one: Cost, two: Cost, three: Cost) -> None:
    assert (one + two) + three == one + (two + three) == three + two + one
    assert Cost.from_json(one.to_json()) == one
    assert (one + two).peak_memory == max(one.peak_memory, two.peak_memory)


def test_costs_of_a_child_are_costs_of_its_parents() -> None:
    run = Ledger()
    stage = run.child()
    stage.child().add(Cost(lm_calls=2, modules={"a": ModuleCost(calls=2)}))
    stage.add(Cost(lm_calls=1))
    assert (run.total.lm_calls, stage.total.lm_calls) == (3, 3)
    assert run.total.modules == {"a": ModuleCost(calls=2)}
    assert run.total.cpu_seconds >= 0
    assert run.total.peak_memory > 10_000_000


@pytest.mark.parametrize(
    ("budget", "cost", "reason"),
    [
        (Budget(), Cost(lm_calls=10**9), ""),
        (Budget(max_lm_calls=3), Cost(lm_calls=2), ""),
        (Budget(max_lm_calls=3), Cost(lm_calls=3), "max_lm_calls=3 is spent"),
        (
            Budget(max_tokens=10),
            Cost(prompt_tokens=4, completion_tokens=3, training_tokens=3),
            "max_tokens=10 is spent",
        ),
        (Budget(max_seconds=0.0), Cost(), "max_seconds=0.0 is spent"),
    ],
)
def test_a_limit_says_when_it_is_reached(budget: Budget, cost: Cost, reason: str) -> None:
    ledger = Ledger(limit=budget)
    within = ledger.child()
    within.add(cost)
    assert ledger.reached_limit() == within.reached_limit() == reason


@final
class AtOnce(LM):
    """An LM that, like a server, does not collect requests into batches."""

    batched = False

    def __init__(self, lm: LM) -> None:
        self.lm = lm

    @property
    def name(self) -> str:
        return self.lm.name

    def complete(self, requests: Sequence[Request]) -> list[Completion | EngineError]:
        return self.lm.complete(requests)

    def register_adapter(self, adapter: str, folder: Path) -> None:
        self.lm.register_adapter(adapter, folder)


@pytest.mark.parametrize("made", [lambda lm: lm, AtOnce])
@pytest.mark.parametrize("calls", [0, 1, 7, 30])
def test_no_call_is_made_beyond_the_budget(made: Callable[[LM], LM], calls: int) -> None:
    lm = ScriptedLM(colour_script)
    session = Session(lm=made(lm)).limited(Budget(max_lm_calls=calls))
    program = Colour()
    state = initial_state(program, session)
    traces = rollout(program, [Job(state, example) for example in examples(20)], session, exact_match)
    assert len(lm.requests) == session.ledger.total.lm_calls == calls
    assert session.ledger.total.modules.get("hint", ModuleCost()).calls <= calls
    assert len(traces) == 20
    for trace in traces:
        assert trace.failure == "budget" or len(trace.steps) == 3
    cut = [trace for trace in traces if trace.failure == "budget"]
    assert all(trace.error == f"BudgetSpent: max_lm_calls={calls} is spent" for trace in cut)


def test_the_batch_that_spends_the_tokens_is_the_last_one() -> None:
    lm = ScriptedLM(lambda request: "answer: yes")
    session = Session(lm=lm, max_concurrency=4).limited(Budget(max_tokens=1))
    program = Colour()
    state = initial_state(program, session)
    rollout(program, [Job(state, Example({"number": n})) for n in range(10)], session)
    assert lm.batch_sizes == [4]


def test_costs_are_kept_by_module() -> None:
    session, program = Session(lm=ScriptedLM(colour_script)), Colour()
    state = initial_state(program, session)
    rollout(program, [Job(state, example) for example in examples(4)], session, exact_match)
    modules = session.ledger.total.modules
    assert {path: (cost.calls, cost.parse_errors) for path, cost in modules.items()} == {
        "hint": (8, 0),
        "answer": (4, 4),
    }
    assert sum(cost.prompt_tokens for cost in modules.values()) == session.ledger.total.prompt_tokens
    assert set(MEASURED) <= set(session.ledger.total.to_json())


def test_seconds_of_gpus_are_those_of_all_calls() -> None:
    """An engine reports the GPU time of a call, which is 0 on a CPU."""

    class OnGPU(LM):
        name = "on a GPU"

        def complete(self, requests: Sequence[Request]) -> list[Completion | EngineError]:
            return [Completion("answer: yes", usage=Usage(1, gpu_seconds=6 / len(requests))) for _ in requests]

        def register_adapter(self, adapter: str, folder: Path) -> None:
            raise NotImplementedError

    program = Predict("question -> answer")
    examples = [Example({"question": str(n)}, {"answer": "yes"}) for n in range(3)]
    for lm, seconds in ((OnGPU(), 6.0), (ScriptedLM(lambda request: "answer: yes"), 0.0)):
        session = Session(lm=lm)
        evaluate(program, examples, exact_match, session)
        assert session.ledger.total.gpu_seconds == pytest.approx(seconds)


ODD = st.sampled_from([float("nan"), float("inf"), -5, -0.5])


@given(costs, ODD, st.sampled_from(["prompt_tokens", "completion_tokens", "lm_calls", "seconds", "gpu_seconds"]))
def test_invalid_figures_do_not_reduce_the_total_of_a_ledger(cost: Cost, odd: float, name: str) -> None:
    ledger = Ledger(limit=Budget(max_tokens=50, max_lm_calls=50))
    ledger.add(cost)
    before = (ledger.total.tokens, ledger.total.lm_calls)
    ledger.add(Cost(**{name: odd}))
    assert (ledger.total.tokens, ledger.total.lm_calls) == before
    ledger.add(Cost(prompt_tokens=50))
    assert ledger.reached_limit() == ledger.reached_limit(Cost(**{name: odd})) == "max_tokens=50 is spent"


@pytest.mark.parametrize("limit", [-1, float("nan"), float("inf"), True, "7", [7]])
@pytest.mark.parametrize("name", ["max_lm_calls", "max_tokens", "max_seconds"])
def test_an_impossible_limit_is_named(name: str, limit: object) -> None:
    with pytest.raises(ConfigError, match=rf"{name} is .*; it must be a (finite|whole) number, at least 0"):
        Budget(**{name: limit})  # type: ignore[arg-type]


def test_calls_and_tokens_are_counted_in_whole_numbers() -> None:
    for name in ("max_lm_calls", "max_tokens"):
        with pytest.raises(ConfigError, match="whole number"):
            Budget(**{name: 1.5})  # type: ignore[arg-type]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
KNOWN = Cost(lm_calls=1, modules={"a": ModuleCost(calls=1)}).to_json()


@given(st.dictionaries(st.sampled_from([*KNOWN, "more"]), JSON) | JSON)
def test_a_record_of_costs_is_read_or_refused(record: object) -> None:
    for known in (record, {**KNOWN, **record} if isinstance(record, dict) else KNOWN):
        try:
            cost = Cost.from_json(known)  # type: ignore[arg-type]
        except StoreError:
            continue
        assert 0 <= cost.tokens < float("inf")
    if type(record) not in (int, float) or not 0 <= record < float("inf"):  # type: ignore[operator]
        with pytest.raises(StoreError, match="is not a cost"):
            Cost.from_json({**KNOWN, "modules": {"a": {"calls": record}}})


def test_fields_that_an_older_version_did_not_count_are_zero() -> None:
    assert Cost.from_json({"lm_calls": 3, "modules": {}}) == Cost(lm_calls=3)


@given(st.floats(0, 1e300), st.floats(0, 1e300))
def test_the_time_that_is_left_is_that_of_the_narrowest_limit(outer: float, inner: float) -> None:
    ledger = Ledger(limit=Budget(max_seconds=outer)).child(Budget(max_seconds=inner))
    assert seconds_left() is None
    with set_deadline(ledger.seconds_left):
        left = seconds_left()
        assert left is not None
        assert 0 <= left <= min(outer, inner)
        assert left >= min(outer, inner, threading.TIMEOUT_MAX) - 60
        with set_deadline(Ledger().seconds_left):
            assert seconds_left() is None
        if not left:
            with pytest.raises(BudgetSpent):
                check_deadline()
        else:
            with lock_before_deadline(threading.Lock()):
                pass
    assert seconds_left() is None
