"""MIPROv2 proposes instructions from descriptions of the task, and finds the choice with the best validation score."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from lmpipe import Budget, Optimizer, OptimizeResult, Predict, RunStore, ScriptedLM, Session, initial_state
from lmpipe.errors import ConfigError, EngineError
from lmpipe.events import CandidateScored, Event
from lmpipe.ledger import Cost
from optimizers import BetterTogether, BootstrapFinetune, MIPROv2, Proposer
from tests.optimizers.proposing import WORD, Student, Two, anything, is_right, numbers
from tests.scripted import KeepingTrainer

SEARCH = MIPROv2(
    is_right,
    num_candidates=3,
    num_trials=6,
    minibatch_size=4,
    minibatch_full_eval_steps=3,
    num_parallel_trials=2,
    max_bootstrapped_demos=1,
    max_labeled_demos=1,
)


def optimize(session: Session, optimizer: MIPROv2 = SEARCH) -> OptimizeResult:
    program = Two()
    return optimizer.optimize(program, initial_state(program, session), numbers(8, 1), numbers(12, 50), session)


def test_it_finds_the_instruction_that_solves_the_task() -> None:
    """Only a summary of the data, which shows the labels, reveals the word."""
    session = Session(lm=ScriptedLM(Student()))
    result = optimize(session)
    assert WORD in result.state.prompts["answer"].instructions
    assert result.evaluation is not None
    assert (result.candidates[0].name, result.candidates[0].mean, result.evaluation.mean) == ("start", 0, 1)
    assert {candidate.n for candidate in result.candidates} == {12}
    assert [trial["n"] for trial in result.details["trials"]] == [4] * 6
    assert result.details["instructions"]["answer"][0] == "Given number, thought, produce answer."
    assert WORD in result.details["grounds"]["data"]


def test_the_proposer_sees_each_text_only_if_its_setting_is_on() -> None:
    fields = {"dataset_summary", "program_description", "module_description", "demonstrations", "tip"}
    for included in (True, False):
        lm = ScriptedLM(Student())
        flags = dict.fromkeys([f"{name}_aware_proposer" for name in ("program", "data", "tip", "fewshot")], included)
        optimize(Session(lm=lm), MIPROv2(is_right, num_candidates=2, num_trials=1, **flags))
        prompts = [r.messages[-1].content for r in lm.requests if "\ninstruction:" in r.messages[0].content]
        assert len(prompts) == 2
        assert all((f"{name}: " in text) == included for text in prompts for name in fields)
    assert lm.requests[0].messages[0].content.startswith("Given number, produce thought.")


def test_the_program_is_shown_with_its_source() -> None:
    lm = ScriptedLM(Student())
    optimize(Session(lm=lm), MIPROv2(is_right, num_candidates=2, num_trials=1))
    prompt = next(r.messages[-1].content for r in lm.requests if r.messages[-1].content.startswith("program: "))
    assert "def forward(self, number: int)" in prompt
    assert "answer: number: int, thought: str -> answer: str" in prompt


def test_another_lm_may_propose() -> None:
    program_lm, proposer_lm = ScriptedLM(Student(malformed=True)), ScriptedLM(Student(), name="other")
    result = optimize(
        Session(lm=program_lm), MIPROv2(is_right, num_candidates=2, num_trials=3, proposer=Proposer(proposer_lm))
    )
    assert WORD in result.state.prompts["answer"].instructions
    assert all(request.messages[-1].content.startswith("number: ") for request in program_lm.requests)
    assert {request.weights.base for request in proposer_lm.requests} == {"other"}
    assert [request.sampling.temperature for request in proposer_lm.requests] == [0.0] * 5 + [1.0] * 2
    with pytest.raises(ConfigError, match="belong to the session's LM"):
        Proposer(proposer_lm, weights="state")


def test_the_session_s_lm_proposes_on_base_weights_or_on_those_of_the_state(store: RunStore) -> None:
    program, lm = Two(), ScriptedLM(Student())
    stages: dict[str, Optimizer] = {
        "w": BootstrapFinetune(anything, KeepingTrainer()),
        "base": MIPROv2(anything, num_candidates=2, num_trials=1),
        "state": MIPROv2(anything, num_candidates=2, num_trials=1, proposer=Proposer(weights="state")),
    }
    session = Session(lm=lm, store=store)
    for name in ("base", "state"):
        better = BetterTogether(anything, stages, strategy=f"w -> {name}")
        result = better.optimize(program, initial_state(program, session), numbers(8, 1), numbers(8, 50), session)
        adapters = [r.weights.adapter for r in lm.requests if not r.messages[-1].content.startswith("number: ")]
        assert set(adapters) == {result.state.weights["lm"].adapter if name == "state" else None}
        lm.requests.clear()


def test_malformed_proposals_are_counted_and_the_state_is_never_worse() -> None:
    session = Session(lm=ScriptedLM(Student(malformed=True)))
    result = optimize(session)
    assert result.details["proposals"] == {"asked": 4, "unreadable": 4, "duplicates": 0}
    assert result.state == initial_state(Two(), session)
    assert result.details["chosen"] == "start"
    assert session.ledger.total.modules["proposal.write"].calls == 4


def test_duplicate_proposals_are_dropped() -> None:
    greedy = MIPROv2(is_right, num_candidates=12, num_trials=1)
    result = optimize(Session(lm=ScriptedLM(Student())), greedy)
    proposals = result.details["proposals"]
    texts = result.details["instructions"]
    assert proposals["duplicates"] >= 2 * (11 - 5)  # there are five manners
    assert sum(len(instructions) - 1 for instructions in texts.values()) == proposals["asked"] - proposals["duplicates"]
    assert all(len(set(instructions)) == len(instructions) for instructions in texts.values())


def test_the_same_seed_gives_the_same_trials_and_another_seed_gives_others() -> None:
    one, two, other = (optimize(Session(lm=ScriptedLM(Student()), seed=seed)) for seed in (1, 1, 2))
    assert one == two
    assert one.details["trials"] != other.details["trials"]


@pytest.mark.parametrize("fail_at", [5, 30, 60, 100])
def test_a_restarted_search_ends_with_the_same_result(fail_at: int, tmp_path: Path) -> None:
    undisturbed = Session(lm=ScriptedLM(Student()), store=RunStore(tmp_path / "one"))
    expected = optimize(undisturbed)
    with pytest.raises(EngineError, match="broke down"):
        optimize(Session(lm=ScriptedLM(Student(fail_at)), store=(store := RunStore(tmp_path / "two"))))
    store.close()
    lm = ScriptedLM(Student())
    resumed = Session(lm=lm, store=RunStore(tmp_path / "two"))
    assert optimize(resumed) == expected
    assert plain(resumed.ledger.total) == plain(undisturbed.ledger.total)
    assert fail_at < 60 or len(lm.requests) < undisturbed.ledger.total.lm_calls


def plain(cost: Cost) -> tuple[int, int, int]:
    return cost.lm_calls, cost.prompt_tokens, cost.completion_tokens


@pytest.mark.parametrize("calls", [3, 20, 60, 110])
def test_a_spent_budget_ends_the_search_with_the_best_state_so_far(calls: int) -> None:
    lm = ScriptedLM(Student())
    result = optimize(Session(lm=lm).limited(Budget(max_lm_calls=calls)))
    assert len(lm.requests) <= calls
    assert result.stopped == f"max_lm_calls={calls} is spent"
    means = [candidate.mean for candidate in result.candidates]
    assert (result.evaluation.mean if result.evaluation else None) == max(means, default=None)


def test_parallel_trials_share_a_wavefront_and_callbacks_get_all_of_them() -> None:
    told: list[Event] = []
    session = Session(lm=ScriptedLM(Student()), callbacks=(told.append,))
    result = optimize(session, MIPROv2(is_right, num_candidates=3, num_trials=4, minibatch=False))
    assert [event.name for event in told if isinstance(event, CandidateScored)] == ["start"] + [
        f"trial {number}" for number in range(1, 5)
    ]
    assert {trial["n"] for trial in result.details["trials"]} == {12}


def test_without_options_the_initial_state_is_scored() -> None:
    program, session = Predict("number: int -> answer"), Session(lm=ScriptedLM(Student(malformed=True)))
    search = MIPROv2(is_right, num_candidates=1)
    result = search.optimize(program, initial_state(program, session), numbers(4), numbers(4, 9), session)
    assert (result.details["trials"], result.details["chosen"], len(result.candidates)) == ([], "start", 1)


def test_it_can_be_a_stage_of_a_strategy() -> None:
    program, session = Two(), Session(lm=ScriptedLM(Student()))
    better = BetterTogether(is_right, {"i": SEARCH}, strategy="i -> i")
    result = better.optimize(program, initial_state(program, session), numbers(8, 1), numbers(12, 50), session)
    assert [stage.evaluation.mean for stage in result.stages] == [1, 1]


def test_without_optuna_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    monkeypatch.delitem(sys.modules, "optimizers.prompts.tpe_sampler", raising=False)
    lm = ScriptedLM(Student())
    with pytest.raises(ConfigError, match=r'pip install "lmpipe\[search\]"'):
        optimize(Session(lm=lm))
    assert lm.requests == []


def test_numbers_below_one_are_refused() -> None:
    with pytest.raises(ConfigError, match="minibatch_size is 0"):
        MIPROv2(is_right, minibatch_size=0)
