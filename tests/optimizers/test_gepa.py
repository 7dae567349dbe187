"""GEPA rewrites instructions from the metric's feedback on rollouts."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from lmpipe import Budget, EngineError, OptimizeResult, Request, RunStore, ScriptedLM, Session, initial_state
from lmpipe.errors import ConfigError
from lmpipe.events import CandidateScored, Event
from optimizers import GEPA, BetterTogether, Proposer
from tests.optimizers.proposing import WORD, Sides, Student, Two, is_right, numbers, says_why

EVOLVE = GEPA(says_why, max_metric_calls=60)


def optimize(session: Session, optimizer: GEPA = EVOLVE) -> OptimizeResult:
    program = Two()
    return optimizer.optimize(program, initial_state(program, session), numbers(8, 1), numbers(6, 50), session)


def test_reflection_learns_from_the_feedback_of_the_metric() -> None:
    session = Session(lm=ScriptedLM(Student()))
    result = optimize(session)
    assert WORD in result.state.prompts["answer"].instructions
    assert result.evaluation is not None
    assert result.evaluation.mean == 1
    assert (result.candidates[0].name, result.candidates[0].mean) == ("start", 0)
    assert {candidate.n for candidate in result.candidates} == {6}
    assert result.details["parents"] == {"start": [], "candidate 1": ["start"]}
    assert session.ledger.total.modules["reflection"].calls == result.details["rewritten"]["asked"] > 0


def test_without_feedback_reflection_sees_the_labels() -> None:
    lm = ScriptedLM(Student())
    result = optimize(Session(lm=lm), GEPA(is_right, max_metric_calls=30, module_selector="all"))
    prompts = [request.messages[-1].content for request in lm.requests if is_reflection(request)]
    assert all("The run scored 0. Right for the whole run is answer: -" in text for text in prompts)
    assert result.state == initial_state(Two(), Session(lm=lm))


def is_reflection(request: Request) -> bool:
    return len(request.messages) == 1


def test_a_call_that_failed_is_shown_to_all_modules_of_the_run() -> None:
    """The second module writes nothing."""

    def script(request: Request) -> str:
        if is_reflection(request):
            return "```\nTry again.\n```"
        return "thought: hm" if request.messages[0].content.endswith("\nthought:") else ""

    lm = ScriptedLM(script)
    optimize(Session(lm=lm), GEPA(says_why, max_metric_calls=12, module_selector="all"))
    think, answer = (request.messages[0].content for request in lm.requests if is_reflection(request))
    assert think.count("The run failed after this call. ParseError: field 'answer': is absent") == 3
    assert answer.count("## Generated Outputs\nnone that could be read") == 3
    assert answer.count("This call failed, and the run with it. field 'answer': is absent") == 3


def test_malformed_and_unchanged_instructions_are_counted() -> None:
    malformed = optimize(Session(lm=ScriptedLM(Student(malformed=True))))
    rewritten = malformed.details["rewritten"]
    assert rewritten["asked"] == rewritten["unreadable"] > 3
    session = Session(lm=ScriptedLM(lambda r: "Given number, produce thought." if is_reflection(r) else "thought: x"))
    same = optimize(session).details["rewritten"]
    assert same["unchanged"] == (same["asked"] + 1) // 2  # of every second step, which is about that module


def test_engine_errors_in_reflections_do_not_end_the_search() -> None:
    def script(request: Request) -> str:
        if is_reflection(request):
            raise EngineError("too long")
        return student(request)

    student = Student()
    session = Session(lm=ScriptedLM(script))
    result = optimize(session)
    assert result.details["rewritten"]["unreadable"] == result.details["rewritten"]["asked"] > 3
    assert result.details["chosen"] == "start"
    assert session.ledger.total.engine_errors == result.details["rewritten"]["asked"]


def test_another_lm_may_reflect_with_another_prompt_template() -> None:
    program_lm, reflection_lm = ScriptedLM(Student(malformed=True)), ScriptedLM(Student(), name="other")
    template = "A new instruction, please. Now: <curr_param> Seen: <side_info>"
    optimizer = GEPA(
        says_why, 60, reflection_prompt_template=template, proposer=Proposer(reflection_lm, temperature=0.5)
    )
    result = optimize(Session(lm=program_lm), optimizer)
    assert WORD in result.state.prompts["answer"].instructions
    assert not any(map(is_reflection, program_lm.requests))
    assert all(
        request.messages[0].content.startswith("A new instruction, please.") for request in reflection_lm.requests
    )
    assert {(request.sampling.temperature, request.weights.base) for request in reflection_lm.requests} == {
        (0.5, "other")
    }


def test_nothing_is_printed_or_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    optimize(Session(lm=ScriptedLM(Student()), quiet=True))
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr() == ("", "")


MERGING = GEPA(says_why, max_metric_calls=200, use_merge=True, acceptance_criterion="improvement_or_equal")


def evolve_sides(seed: int) -> OptimizeResult:
    """The two modules improve independently, and one example is solved only while one of them is not improved."""

    def script(request: Request) -> str:
        if request.messages[-1].content == "number: 50":
            return "answer: 50" if WORD in request.messages[0].content else "answer: -50"
        return student(request)

    student = Student()
    program, session = Sides(), Session(lm=ScriptedLM(script), seed=seed)
    return MERGING.optimize(program, initial_state(program, session), numbers(8, 1), numbers(10, 50), session)


def merged(result: OptimizeResult) -> list[str]:
    return [name for name, parents in result.details["parents"].items() if len(parents) == 2]


def test_candidates_that_improve_different_modules_are_merged() -> None:
    """Tries several seeds, since the candidates to merge are drawn at random."""
    candidates = [(result, name) for result in map(evolve_sides, range(3)) for name in merged(result)]
    assert candidates
    for result, name in candidates:
        assert {candidate.name: candidate.mean for candidate in result.candidates}[name] == 0.9
        assert all(WORD in text for text in result.details["instructions"][name].values())


def test_the_ancestor_of_merged_candidates_may_have_solved_nothing() -> None:
    """gepa draws an ancestor in proportion to its score, which is 0 here."""
    optimizer = replace(MERGING, candidate_selection_strategy="epsilon_greedy")
    program, results = Sides(), []
    for seed in range(40):  # on as many examples as gepa tries merged candidates on
        session = Session(lm=ScriptedLM(Student()), seed=seed)
        results.append(
            optimizer.optimize(program, initial_state(program, session), numbers(8, 1), numbers(5, 50), session)
        )
    assert any(map(merged, results))
    assert {result.candidates[0].mean for result in results} == {0}
    assert all(len({candidate.name for candidate in result.candidates}) == len(result.candidates) for result in results)


def test_the_same_seed_gives_the_same_result_in_every_process() -> None:
    code = (
        "from tests.optimizers.test_gepa import *\n"
        "print(*(evolve_sides(seed).model_dump_json(exclude={'cost'}) for seed in range(2)))"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(outputs) == 1
    assert evolve_sides(0).details["instructions"] != evolve_sides(1).details["instructions"]


@pytest.mark.parametrize("fail_at", [3, 19, 20, 26, 60])
def test_a_restarted_evolution_ends_with_the_same_result(fail_at: int, tmp_path: Path) -> None:
    """Call 19 is a reflection."""
    undisturbed = Session(lm=ScriptedLM(Student()), store=RunStore(tmp_path / "one"))
    expected = optimize(undisturbed, MERGING)
    broken = ScriptedLM(Student(fail_at))
    with pytest.raises(EngineError, match="broke down"):
        optimize(Session(lm=broken, store=(store := RunStore(tmp_path / "two"))), MERGING)
    assert is_reflection(broken.requests[-1]) == (fail_at == 19)
    store.close()
    lm = ScriptedLM(Student())
    resumed = Session(lm=lm, store=RunStore(tmp_path / "two"))
    assert optimize(resumed, MERGING) == expected
    expected, total = undisturbed.ledger.total, resumed.ledger.total
    assert (total.lm_calls, total.tokens) == (expected.lm_calls, expected.tokens)
    assert fail_at < 19 or len(lm.requests) < expected.lm_calls


@pytest.mark.parametrize("calls", [3, 18, 19, 27, 40])
def test_a_spent_budget_ends_the_search_with_the_best_state_so_far(calls: int) -> None:
    lm = ScriptedLM(Student())
    result = optimize(Session(lm=lm).limited(Budget(max_lm_calls=calls)))
    assert len(lm.requests) <= calls
    assert result.stopped == f"max_lm_calls={calls} is spent"
    means = [candidate.mean for candidate in result.candidates]
    assert (result.evaluation.mean if result.evaluation else None) == max(means, default=None)


def test_callbacks_get_candidates_and_metric_calls_are_limited() -> None:
    told: list[Event] = []
    result = optimize(Session(lm=ScriptedLM(Student()), callbacks=(told.append,)))
    names = [event.name for event in told if isinstance(event, CandidateScored)]
    assert names == [candidate.name for candidate in result.candidates] == ["start", "candidate 1"]
    assert result.details["metric_calls"] == 6 + 2 * (3 + 3) + 6  # nothing is left to improve
    limited = optimize(Session(lm=ScriptedLM(Student(malformed=True))))
    assert 60 <= limited.details["metric_calls"] < 60 + 2 * 3 + 6


def test_it_can_be_a_stage_of_a_strategy() -> None:
    program, session = Two(), Session(lm=ScriptedLM(Student()))
    better = BetterTogether(is_right, {"g": EVOLVE}, strategy="g")
    result = better.optimize(program, initial_state(program, session), numbers(8, 1), numbers(6, 50), session)
    assert [stage.evaluation.mean for stage in result.stages] == [1]


def test_without_gepa_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gepa.api", None)
    monkeypatch.delitem(sys.modules, "optimizers.prompts.gepa_adapter", raising=False)
    lm = ScriptedLM(Student())
    with pytest.raises(ConfigError, match=r'pip install "lmpipe\[search\]"'):
        optimize(Session(lm=lm))
    assert lm.requests == []


def test_invalid_settings_are_refused() -> None:
    with pytest.raises(ConfigError, match="max_metric_calls is 0"):
        GEPA(says_why, max_metric_calls=0)
    with pytest.raises(ConfigError, match="lacks the placeholder <side_info>"):
        GEPA(says_why, reflection_prompt_template="<curr_param>")
