"""The scheduler shares stages, limits budgets and reports findings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import final

from lmpipe import (
    Budget,
    EngineError,
    Example,
    LmpipeError,
    Module,
    OptimizeResult,
    ProgramState,
    Request,
    RunStore,
    ScriptedLM,
    Session,
    WeightOptimizer,
    WeightState,
    exact_match,
    initial_state,
)
from lmpipe.events import CandidateScored, Event, FindingMade, StageEnded, StageStarted
from lmpipe.optimize_result import Finding
from optimizers import BetterTogether, BootstrapFewShotRandomSearch, BootstrapFinetune
from tests.scripted import COLOURS, Colour, KeepingTrainer, colour_script, examples, scheduler, scripted

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
    assert [finding.kind for finding in result.findings if finding.stage == "p"] == ["budget"]


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


def findings(result: OptimizeResult, kind: str) -> list[Finding]:
    return [finding for finding in result.findings if finding.kind == kind]


def test_too_few_successful_runs_are_reported_by_class_and_module(store: RunStore) -> None:
    def never_blue(request: Request) -> str:
        text = colour_script(request)
        return "answer: red" if text == "answer: blue" else text

    program, session = Colour(), Session(lm=ScriptedLM(never_blue), store=store)
    better = scheduler(KeepingTrainer(), "p -> w")
    result = better.optimize(program, initial_state(program, session), TRAIN, VAL, session)
    reported = findings(result, "few traces")
    assert reported[-1].stage == "p -> w"
    assert "8 of 24 rollouts succeeded, on 8 of 24 examples" in reported[-1].message
    assert "none for" in reported[-1].message
    assert "answer = blue" in reported[-1].message
    alone = all_strategies(Session(lm=scripted(), store=store), ["w"])["w"]
    assert findings(alone, "few traces")[0].message.startswith("0 of 24 rollouts succeeded, on 0 of 24 examples: ")


def test_a_failure_that_all_runs_share_is_reported_with_figures_and_advice(store: RunStore) -> None:
    """Numbers that differ between runs are left out of the message; numbers that do not are part of it."""

    def too_long(request: Request) -> str:
        tokens = 2000 + len(request.messages[-1].content) + request.seed % 100
        raise EngineError(f"{tokens} prompt tokens do not fit the context of 2048 tokens of scripted")

    program, session = Colour(), Session(lm=ScriptedLM(too_long), store=store)
    better = BetterTogether(exact_match, {"w": BootstrapFinetune(exact_match, KeepingTrainer())}, "w")
    result = better.optimize(program, initial_state(program, session), TRAIN, VAL, session)
    told = "24 of 24 rollouts failed: EngineError: … prompt tokens do not fit the context of 2048 tokens of scripted"
    assert told in result.reason
    few, failing = findings(result, "few traces")[0], findings(result, "failing")
    assert few.message == f"0 of 24 rollouts succeeded, on 0 of 24 examples: {told}"
    assert "rollouts" not in few.advice
    assert [(finding.stage, finding.message) for finding in failing] == [("vanilla", f"on validation examples {told}")]


def test_failures_of_the_scoring_runs_after_a_stage_are_reported(store: RunStore) -> None:
    """With tuned weights the LM's completions are unreadable."""

    def spoiled(request: Request) -> str:
        return "mumble" if request.weights.adapter else "hint: none\nanswer: red"

    program, session = Colour(), Session(lm=ScriptedLM(spoiled), store=store)
    better = BetterTogether(exact_match, {"a": Adapt("x")}, "a")
    result = better.optimize(program, initial_state(program, session), TRAIN, VAL, session)
    failing = findings(result, "failing")
    assert [finding.stage for finding in failing] == ["a"]
    assert "24 of 24 rollouts failed: ParseError: field 'answer'" in failing[0].message
    assert "structured completions" in failing[0].advice


def test_equal_answers_of_all_runs_are_reported_as_class_collapse(store: RunStore) -> None:
    program, session = Colour(), Session(lm=ScriptedLM(lambda request: "answer: red\nhint: red"), store=store)
    better = BetterTogether(exact_match, {"w": BootstrapFinetune(exact_match, KeepingTrainer())}, "w")
    result = better.optimize(program, initial_state(program, session), TRAIN, VAL, session)
    assert "all 8 successful rollouts give the same answer" in findings(result, "class collapse")[0].message


@final
@dataclass(frozen=True)
class Adapt(WeightOptimizer):
    """Sets the adapter of the LM."""

    name: str

    def search(
        self, program: Module, state: ProgramState, train: Sequence[Example], val: Sequence[Example], session: Session
    ) -> OptimizeResult:
        if session.store is None:
            raise LmpipeError("no store")
        folder = session.store.new_folder()
        (folder / "adapter.json").write_text(self.name)
        return OptimizeResult(
            state=state.with_weights("lm", WeightState(base="scripted", adapter=session.store.put_folder(folder)))
        )


def adapted(store: RunStore, right: dict[str, range], strategy: str) -> OptimizeResult:
    """Runs a strategy on an LM that is right on the given numbers with each adapter, and on even ones without any."""

    def reply(request: Request) -> str:
        prompt = request.messages[-1].content
        number = int(prompt.partition("\n")[0].partition(": ")[2])
        adapter = request.weights.adapter
        name = (store.folder(adapter) / "adapter.json").read_text() if adapter else ""
        known = number in right[name] if name else number % 2 == 0
        return f"hint: none\nanswer: {COLOURS[number % 3] if known else 'unknown'}"

    program, session = Colour(), Session(lm=ScriptedLM(reply), store=store)
    stages = {name: Adapt(name) for name in right} | {"p": scheduler(KeepingTrainer()).optimizers["p"]}
    better = BetterTogether(exact_match, stages, strategy, num_train_scored=24)
    return better.optimize(program, initial_state(program, session), TRAIN, VAL, session)


def test_a_stage_that_lowers_the_score_significantly_is_reported(store: RunStore) -> None:
    right = {"good": range(100), "slightly worse": range(73), "bad": range(50, 55)}
    reported = findings(adapted(store, right, "good -> slightly worse -> good -> bad"), "worse")
    assert [finding.stage for finding in reported] == ["good -> slightly worse -> good -> bad"]
    assert "the score fell by 79.2 points (95 % interval 62.6 to 95.8)" in reported[0].message


def test_over_fitting_is_reported_from_the_training_score(store: RunStore) -> None:
    result = adapted(store, {"rote": range(24)}, "rote")
    assert result.stages[0].train_evaluation is not None
    assert "100.0 % on training examples and 0.0 % on validation examples" in findings(result, "over-fit")[0].message
    assert not findings(adapted(store, {"sound": range(100)}, "sound"), "over-fit")


def test_no_gain_from_alternating_is_reported(store: RunStore) -> None:
    without = adapted(store, {"none": range(50, 74, 2)}, "p -> none")
    assert "after p alone 50.0 %, after all stages 50.0 %" in findings(without, "no gain")[0].message
    assert not findings(adapted(store, {"much": range(100)}, "p -> much"), "no gain")
