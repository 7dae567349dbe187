"""Findings say what went wrong in which stage and module, and advise settings that the stage's own optimizer has."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, final, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmpipe import (
    Budget,
    EngineError,
    Example,
    LmpipeError,
    LocalTrainer,
    Module,
    Optimizer,
    OptimizeResult,
    Predict,
    Prediction,
    ProgramState,
    PromptOptimizer,
    Request,
    RunStore,
    Sampling,
    ScriptedLM,
    Session,
    Trainer,
    TuningConfig,
    WeightOptimizer,
    WeightState,
    exact_match,
    initial_state,
)
from lmpipe.engines.local import LocalLM
from lmpipe.errors import TrainingDiverged
from lmpipe.extend import Finding
from lmpipe.runtime.trace import Failure
from lmpipe.trainer import Objective, SFTLoss, TrainingResult, TrainingRow
from optimizers import (
    GEPA,
    GRPO,
    BetterTogether,
    BootstrapFewShot,
    BootstrapFewShotRandomSearch,
    BootstrapFinetune,
    KNNFewShot,
    LabeledFewShot,
    MIPROv2,
    PreferenceFinetune,
    Teacher,
)
from optimizers.schedule.advice import settings_of
from optimizers.schedule.loss_curve import loss_curve
from tests.optimizers.proposing import Two
from tests.scripted import COLOURS, Colour, KeepingTrainer, NumberLine, colour_script, examples, scheduler, scripted

Script = Callable[[Request], str]
CONSTRAINED = "an engine that supports structured=True or a simpler signature"
TRAIN, VAL = examples(24), examples(24, start=50)
TUNED_ANYWHERE = {"Session", "structured", "max_tokens", "select", "prompts_from", "teacher", "lm"}


def run(
    session: Session,
    stages: dict[str, Optimizer],
    strategy: str,
    program: Module | None = None,
    train: Sequence[Example] = TRAIN,
    **settings: Any,
) -> OptimizeResult:
    program = program or Colour()
    better = BetterTogether(exact_match, stages, strategy, **settings)
    return better.optimize(program, initial_state(program, session), train, VAL, session)


def findings(result: OptimizeResult, kind: str, stage: str = "") -> list[Finding]:
    return [finding for finding in result.findings if finding.kind == kind and stage in ("", finding.stage)]


def number_of(request: Request) -> int:
    """The number that a prompt asks about; 0 in the prompts of optimizers."""
    return int(["0", *re.findall(r"number: (\d+)", request.messages[-1].content)][-1])


def scripted_as(script: Script) -> ScriptedLM:
    """An LM with the name of its script, so that a store keeps the work of several apart."""
    return ScriptedLM(script, script.__qualname__)


def read(request: Request) -> str:
    """Reads every number and is wrong about every colour but red."""
    return "hint: none\nanswer: red"


def unreadable(request: Request) -> str:
    return "I would rather not say"


@final
@dataclass(frozen=True)
class LosingTrainer(Trainer):
    """Trains with the given losses; the settings may be those of the local engine."""

    losses: tuple[float, ...]
    tuning: TuningConfig | None = None
    eval_losses: tuple[float, ...] = ()
    diverges: str = ""

    def train(
        self, rows: Sequence[TrainingRow], start: WeightState, session: Session, objective: Objective = SFTLoss()
    ) -> TrainingResult:
        if self.diverges and self.diverges in rows[0].messages[0].content:
            raise TrainingDiverged("the loss of step 3 is nan", 3, self.losses)
        kept = KeepingTrainer().train(rows, start, session, objective)
        return replace(kept, steps=len(self.losses), losses=self.losses, eval_losses=self.eval_losses)


def test_too_few_successful_runs_are_reported_by_class_and_module(store: RunStore) -> None:
    def never_blue(request: Request) -> str:
        text = colour_script(request)
        return "answer: red" if text == "answer: blue" else text

    stages = scheduler(KeepingTrainer()).optimizers
    result = run(Session(lm=ScriptedLM(never_blue), store=store), dict(stages), "p -> w")
    reported = findings(result, "few traces")[-1]
    assert reported.stage == "p -> w"
    assert "8 of 24 rollouts succeeded, on 8 of 24 examples; none for answer = blue" in reported.message


def test_a_stage_gets_advice_on_its_own_settings_only(store: RunStore) -> None:
    """A module that lacks demonstrations and labels answers nothing right."""
    session = Session(lm=ScriptedLM(lambda request: "hint: none\nanswer: none"), store=store, structured=True)
    stages: dict[str, Optimizer] = {
        "p": BootstrapFewShot(exact_match, max_labeled_demos=0),
        "w": BootstrapFinetune(exact_match, KeepingTrainer()),
        "warm": BootstrapFinetune(exact_match, KeepingTrainer(), max_rollouts_per_example=8, temperature=1.0),
    }
    program = Two()
    numbers = [Example({"number": n}, {"answer": str(n)}) for n in range(8)]
    result = run(session, stages, "w -> p -> warm", program, numbers)
    cold, prompts, warm = [
        findings(result, kind, stage)[0].advice
        for kind, stage in [("skipped", "w"), ("few traces", "w -> p"), ("skipped", "w -> p -> warm")]
    ]
    teacher = "a teacher with a stronger LM (teacher=Teacher(lm=...))"
    assert (
        cold == f"max_rollouts_per_example above 1, temperature above 0.0, a prompt stage before this one or {teacher}"
    )
    assert prompts == f"max_labeled_demos above 0, max_rounds above 1 or {teacher}"
    assert warm == f"max_idle_rounds above 3 or {teacher}"


def test_the_limit_that_ended_the_rollouts_is_advised(store: RunStore) -> None:
    """Three idle rounds end the rollouts long before the maximum number, so a higher maximum would change nothing."""
    session = Session(lm=ScriptedLM(always_wrong), store=store, structured=True)
    optimizer = BootstrapFinetune(exact_match, KeepingTrainer(), max_rollouts_per_example=8, temperature=1.0)

    def stage(optimizer: BootstrapFinetune, **settings: Any) -> tuple[object, str]:
        result = run(session, {"w": optimizer}, "w", **settings)
        return result.stages[0].result.details["ended"], result.findings[0].advice

    ended, advice = stage(optimizer)
    assert (ended, advice.split(",")[0]) == ("idle", "max_idle_rounds above 3")
    assert "max_rollouts_per_example" not in advice
    ended, advice = stage(replace(optimizer, max_idle_rounds=64))
    assert (ended, advice.split(",")[0]) == ("limit", "max_rollouts_per_example above 8")
    assert stage(replace(optimizer, max_idle_rounds=64), stage_budget=Budget(max_lm_calls=100)) == (
        "budget",
        "a larger budget, or a comparison of all strategies at this one",
    )


def test_a_lower_threshold_and_other_demos_are_advised_where_they_can_help(store: RunStore) -> None:
    def half(example: Example, prediction: Prediction) -> float:
        return 0.5

    program, session = Predict("number: int -> answer"), Session(lm=ScriptedLM(read), store=store, structured=True)
    stages: dict[str, Optimizer] = {
        "p": LabeledFewShot(k=2),
        "w": BootstrapFinetune(half, KeepingTrainer(), teacher=Teacher(lm=ScriptedLM(read, "expert"))),
    }
    better = BetterTogether(half, stages, "p -> w")
    result = better.optimize(program, initial_state(program, session), TRAIN, VAL, session)
    assert findings(result, "skipped")[0].advice == (
        "metric_threshold below 1.0, max_rollouts_per_example above 1, temperature above 0.0 or vary_demos=True"
    )


def test_a_failure_that_all_runs_share_is_reported_with_figures_and_advice(store: RunStore) -> None:
    """Numbers that differ between runs are left out of the message; numbers that do not are part of it."""

    def too_long(request: Request) -> str:
        tokens = 2000 + len(request.messages[-1].content) + request.seed % 100
        raise EngineError(f"{tokens} prompt tokens do not fit the context of 2048 tokens of scripted")

    session = Session(lm=ScriptedLM(too_long), store=store)
    result = run(session, {"w": BootstrapFinetune(exact_match, KeepingTrainer())}, "w")
    told = "24 of 24 rollouts failed in hint: EngineError: … prompt tokens do not fit the context of 2048 tokens of"
    (skipped,), (failing,) = findings(result, "skipped"), findings(result, "failing")
    assert skipped.message == result.reason
    assert told in skipped.message
    assert (failing.stage, told in failing.message) == ("vanilla", True)
    assert (
        skipped.advice
        == failing.advice
        == ("what the LM's error message says; nothing can be learned until the LM answers")
    )


def test_a_module_that_cannot_be_read_is_named_and_the_advice_depends_on_the_session(store: RunStore) -> None:
    """The hints can be read, so the other module is at fault; its completions of 5 words are cut off at 5 tokens."""

    def half_read(request: Request) -> str:
        asked = request.messages[-1].content
        return "hint: none" if "hints: " not in asked else unreadable(request)

    def advised(session: Session) -> str:
        result = run(session, {"w": BootstrapFinetune(exact_match, KeepingTrainer())}, "w")
        (failing,), (skipped,) = findings(result, "failing"), findings(result, "skipped")
        assert "on validation examples all 24 calls of answer could not be read: ParseError: field" in failing.message
        assert "24 of 24 rollouts failed in answer: ParseError: field" in skipped.message
        assert failing.advice == skipped.advice
        return failing.advice

    session = Session(lm=ScriptedLM(half_read), store=store)
    assert advised(session) == "Session(structured=True) or a simpler signature"
    assert advised(replace(session, sampling=Sampling(max_tokens=5))) == (
        "Session(structured=True), max_tokens above 5 or a simpler signature"
    )
    assert advised(replace(session, structured=True)) == CONSTRAINED


def test_a_module_is_reported_if_half_of_its_calls_cannot_be_read(store: RunStore) -> None:
    def even(request: Request) -> str:
        number = number_of(request)
        return read(request) if number % 2 else "hint: none"

    result = run(Session(lm=ScriptedLM(even), store=store), {}, "vanilla")
    assert "on validation examples 12 of 24 calls of answer could not be read" in findings(result, "failing")[0].message
    alone = run(Session(lm=ScriptedLM(even), store=store), {}, "vanilla", Predict("number: int -> answer: int"))
    assert "all 24 calls of the program could not be read" in findings(alone, "failing")[0].message


def test_failures_of_the_scoring_runs_after_a_stage_are_reported(store: RunStore) -> None:
    """With tuned weights the LM's completions are unreadable."""

    def spoiled(request: Request) -> str:
        return unreadable(request) if request.weights.adapter else read(request)

    result = run(Session(lm=ScriptedLM(spoiled), store=store), {"a": Adapt("x")}, "a")
    assert [finding.stage for finding in findings(result, "failing")] == ["a"]


def test_a_failure_that_a_prompt_stage_does_not_mend_is_reported_once(store: RunStore) -> None:
    session = Session(lm=scripted_as(unreadable), store=store)
    result = run(session, {"p": BootstrapFewShot(exact_match)}, "p -> p")
    assert [(finding.kind, finding.stage) for finding in result.findings] == [("failing", "vanilla")]


def test_equal_answers_of_all_runs_are_reported_as_class_collapse(store: RunStore) -> None:
    session = Session(lm=ScriptedLM(read), store=store, sampling=Sampling(temperature=1.0))
    result = run(session, {"w": BootstrapFinetune(exact_match, KeepingTrainer(), adapters="module")}, "w")
    (collapse,) = findings(result, "class collapse")
    assert "all 8 successful rollouts give the same answer" in collapse.message
    assert collapse.advice.startswith(
        "max_rollouts_per_example above 1, a prompt stage before this one, adapters='role' or a teacher"
    )


def test_a_prompt_stage_is_not_blamed_for_its_demonstrations_if_it_did_well(store: RunStore) -> None:
    """The LM answers red, so all demonstrations that are bootstrapped do; any demonstration may make it right."""

    def reply(request: Request) -> str:
        return always_right(request) if len(request.messages) > 2 and taught else read(request)

    def found(name: str) -> list[tuple[str, str]]:
        session = Session(lm=ScriptedLM(reply, name), store=store)
        result = run(session, {"p": BootstrapFewShot(exact_match, max_labeled_demos=0)}, "p")
        return [(finding.kind, finding.message) for finding in result.findings]

    taught = True
    assert found("taught") == []
    taught = False
    assert ("class collapse", "all bootstrapped demonstrations show the same answer") in found("untaught")


def skipped_advice(optimizer: Optimizer, script: Script, store: RunStore, **settings: Any) -> str:
    session = Session(lm=scripted_as(script), store=store, embedder=NumberLine(), **settings)
    (finding,) = findings(run(session, {"s": optimizer}, "s"), "skipped")
    assert finding.message
    return finding.advice


def test_a_skipped_stage_gets_its_reason_and_advice_on_its_own_settings(store: RunStore) -> None:
    trainer = KeepingTrainer()
    grpo, preference = GRPO(exact_match, trainer, group_size=2), PreferenceFinetune(exact_match, trainer)
    teacher = "a teacher with a stronger LM (teacher=Teacher(lm=...))"

    assert skipped_advice(grpo, lambda request: "hint: none\nanswer: red", store) == (
        "group_size above 2 or a prompt stage before this one"
    )
    assert skipped_advice(grpo, unreadable, store) == "Session(structured=True) or a simpler signature"
    wrong = replace(preference, reject_unreadable=False, temperature=0.5)
    assert skipped_advice(wrong, lambda request: "hint: none\nanswer: none", store, structured=True) == (CONSTRAINED)
    knn = KNNFewShot(exact_match, max_labeled_demos=0, num_train=4)
    assert skipped_advice(knn, unreadable, store, structured=True) == CONSTRAINED
    assert skipped_advice(replace(knn, max_bootstrapped_demos=0), unreadable, store, structured=True) == (
        "max_bootstrapped_demos above 0, max_labeled_demos above 0, max_rounds above 1 or num_train above 4"
    )
    assert skipped_advice(Nothing(), read, store) == "a prompt stage before this one"
    assert teacher in skipped_advice(preference, always_wrong, store, structured=True)


def always_wrong(request: Request) -> str:
    """Reads every number and is wrong about every colour."""
    number = number_of(request)
    return f"hint: none\nanswer: {COLOURS[(number + 1) % 3]}"


def always_right(request: Request) -> str:
    number = number_of(request)
    return f"hint: none\nanswer: {COLOURS[number % 3]}"


def test_where_every_rollout_is_right_harder_examples_are_advised(store: RunStore) -> None:
    trainer = KeepingTrainer()
    for optimizer in (GRPO(exact_match, trainer, group_size=2), PreferenceFinetune(exact_match, trainer)):
        advice = skipped_advice(optimizer, always_right, store)
        assert advice == "training examples that the program does not always solve"


@final
@dataclass(frozen=True)
class Nothing(WeightOptimizer):
    """A user's optimizer that finds nothing to learn from; its details have names and types of their own."""

    rate: float = 0.1

    def search(
        self, program: Module, state: ProgramState, train: Sequence[Example], val: Sequence[Example], session: Session
    ) -> OptimizeResult:
        details = {"steps": 3, "training": "none", "kept": [], "solved": 0}
        return OptimizeResult(state=state, status="skipped", reason="there was nothing to do", details=details)


@final
@dataclass(frozen=True)
class Schedules(PromptOptimizer):
    """A user's optimizer whose settings have the names of others and values of other kinds."""

    metric_threshold: float | None = None
    temperature: tuple[float, float] = (0.5, 1.0)
    num_train: str = "half"
    max_rounds: str = "many"

    def search(
        self, program: Module, state: ProgramState, train: Sequence[Example], val: Sequence[Example], session: Session
    ) -> OptimizeResult:
        return OptimizeResult(state=state, status="skipped", reason="there was nothing to do")


def test_settings_that_are_no_numbers_are_advised_without_them(store: RunStore) -> None:
    session = Session(lm=ScriptedLM(read), store=store, quiet=True)
    better = BetterTogether(lambda example, prediction: 0.5, {"p": Schedules()}, "p")
    (finding,) = better.optimize(Colour(), None, TRAIN, VAL, session).findings
    assert finding.advice == "a higher max_rounds"


@pytest.mark.parametrize("reply", [read, always_wrong, unreadable], ids=lambda reply: reply.__name__)
def test_only_settings_that_exist_are_advised(reply: Script, store: RunStore) -> None:
    """Each word of an advice that names a setting is a field of the stage's optimizer or of its trainer's settings."""
    trainer = LosingTrainer((3.0,) * 8, TuningConfig())
    search = {"num_candidates": 3, "num_trials": 2, "num_val": 4, "num_train": 4, "max_rounds": 2}
    stages: dict[str, Optimizer] = {
        "few": BootstrapFewShot(exact_match),
        "search": BootstrapFewShotRandomSearch(exact_match, num_candidate_programs=1, num_train=4, num_val=4),
        "mipro": MIPROv2(exact_match, **search),  # type: ignore[arg-type]
        "gepa": GEPA(exact_match, max_metric_calls=20, num_val=4),
        "knn": KNNFewShot(exact_match, num_train=4),
        "tune": BootstrapFinetune(exact_match, trainer),
        "prefer": PreferenceFinetune(exact_match, trainer),
        "grpo": GRPO(exact_match, trainer, steps=1, group_size=2),
        "own": Nothing(),
    }
    session = Session(lm=ScriptedLM(reply), store=store, embedder=NumberLine())
    named = set()
    for name, optimizer in stages.items():
        names = {field.name for field in fields(optimizer)} | TUNED_ANYWHERE  # type: ignore[arg-type]
        names |= {field.name for field in fields(TuningConfig)} if "trainer" in names else set()
        result = run(session, {name: optimizer}, name, num_train_scored=4)
        for finding in result.findings:
            settings = set(re.findall(r"([A-Za-z_]+)(?:=| above| below)", finding.advice))
            assert settings <= names, (name, finding)
            named |= settings
    assert named


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


def adapted(store: RunStore, right: dict[str, range], strategy: str, **settings: Any) -> OptimizeResult:
    """Runs a strategy on an LM that is right on the given numbers with each adapter, and on even ones without any."""

    def reply(request: Request) -> str:
        prompt = request.messages[-1].content
        number = int(prompt.partition("\n")[0].partition(": ")[2])
        adapter = request.weights.adapter
        name = (store.folder(adapter) / "adapter.json").read_text() if adapter else ""
        known = number in right[name] if name else number % 2 == 0
        return f"hint: none\nanswer: {COLOURS[number % 3] if known else 'unknown'}"

    stages = {name: Adapt(name) for name in right} | {"p": scheduler(KeepingTrainer()).optimizers["p"]}
    return run(Session(lm=ScriptedLM(reply), store=store), stages, strategy, num_train_scored=24, **settings)


def test_a_stage_that_lowers_the_score_significantly_is_reported(store: RunStore) -> None:
    right = {"good": range(100), "slightly worse": range(73), "bad": range(50, 55)}
    strategy = "good -> slightly worse -> good -> bad"
    (worse,) = findings(adapted(store, right, strategy), "worse")
    assert worse.stage == strategy
    assert "the score fell by 79 (63 to 96) points" in worse.message
    keep, prompts = "select='best' (which can keep the state before)", "a prompt stage after it (tuned weights"
    assert worse.advice.startswith(f"{keep} or {prompts}")
    (selected,) = findings(adapted(store, right, strategy, select="best"), "worse")
    assert selected.advice.startswith(prompts)
    followed = findings(adapted(store, right, "good -> bad -> p", select="best"), "worse")[0]
    assert followed.advice == "another optimizer for this stage, or none"


def test_over_fitting_is_reported_from_the_training_score(store: RunStore) -> None:
    result = adapted(store, {"rote": range(24)}, "rote")
    assert result.stages[0].train_evaluation is not None
    (finding,) = findings(result, "over-fit")
    assert "100 % (86–100) on training examples and 0 % (0–14) on validation examples" in finding.message
    assert finding.advice == "more training examples"
    assert not findings(adapted(store, {"sound": range(100)}, "sound"), "over-fit")


def test_no_gain_from_alternating_is_reported(store: RunStore) -> None:
    without = adapted(store, {"none": range(50, 74, 2)}, "p -> none")
    assert (
        "after p alone 50 % (31–69), after all stages 50 % (31–69)"
        in findings(without, "no gain", "p -> none")[0].message
    )
    assert not findings(adapted(store, {"much": range(100)}, "p -> much"), "no gain", "p -> much")


def test_prompts_that_do_not_matter_are_reported(store: RunStore) -> None:
    (finding,) = findings(adapted(store, {}, "p"), "no gain")
    assert (finding.stage, finding.advice) == ("p", "a weight stage or num_val above 8")
    assert finding.message == (
        "all 6 candidates scored 75 %, and the validation score is the same as before, so the prompts that were "
        "tried do not matter to this LM"
    )
    (followed,) = findings(adapted(store, {"good": range(100)}, "p -> good"), "no gain")
    assert followed.advice == "a prompt stage after the weight stage or num_val above 8"
    right = findings(adapted(store, {"good": range(100)}, "good -> p"), "no gain")
    assert not [finding for finding in right if "candidates" in finding.message]
    unread = Session(lm=scripted_as(unreadable), store=store)
    assert not findings(run(unread, {"p": scheduler(KeepingTrainer()).optimizers["p"]}, "p"), "no gain")


def trained(store: RunStore, trainer: Trainer, script: Script = read, **settings: Any) -> list[Finding]:
    """Returns the findings about learning and over-fitting of a fine-tuning stage."""
    session = Session(lm=scripted_as(script), store=store)
    result = run(session, {"w": BootstrapFinetune(exact_match, trainer, **settings)}, "w", num_train_scored=24)
    return findings(result, "no learning") + findings(result, "over-fit")


def test_training_that_moves_nothing_is_reported_with_its_learning_rate(store: RunStore) -> None:
    losses = (3.02, 3.0, 2.99, 2.98, 2.97, 2.97, 2.96, 2.95, 2.93, 2.93)
    (finding,) = trained(store, LosingTrainer(losses, TuningConfig(warmup_steps=10)))
    assert finding.message == "the loss of lm fell only from 3.01 to 2.93 in 10 steps at a learning rate of 1e-05"
    assert finding.advice == (
        "warmup_steps below 10, learning_rate above 1e-05, epochs above 5 or max_rollouts_per_example above 1"
    )
    (unknown,) = trained(store, LosingTrainer(losses))
    assert unknown.message == "the loss of lm fell only from 3.01 to 2.93 in 10 steps"
    assert unknown.advice.startswith("a higher learning rate, more steps of training or ")
    (rising,) = trained(store, LosingTrainer((*losses[::-1], 4.0, 5.0, 6.0), TuningConfig()))
    assert "the loss of lm did not fall: it went from 2.94 to 5 in 13 steps" in rising.message
    assert rising.advice == "learning_rate below 1e-05"


def test_training_after_which_nothing_is_answered_otherwise_is_reported(store: RunStore) -> None:
    losses = tuple(3.0 / step for step in range(1, 9))
    (finding,) = trained(store, LosingTrainer(losses, TuningConfig()))
    assert finding.message == (
        "after 8 training steps the scores and the lengths of completions are the same as before on all 24 validation "
        "examples"
    )
    assert finding.advice.startswith("learning_rate above 1e-05, ")

    def learned(request: Request) -> str:
        return always_right(request) if request.weights.adapter else read(request)

    assert not trained(store, LosingTrainer(losses), learned)
    assert not trained(store, LosingTrainer((3.0,) * 8), learned)  # the score shows that something was learned


def test_weights_that_never_score_better_are_reported(store: RunStore) -> None:
    def spoiled(request: Request) -> str:
        number = number_of(request)
        tossed = request.seed % 2 == 0
        return unreadable(request) if request.weights.adapter else f"hint: x\nanswer: {COLOURS[(number + tossed) % 3]}"

    grpo = GRPO(exact_match, LosingTrainer((0.1,), TuningConfig()), steps=1, group_size=4)
    result = run(Session(lm=ScriptedLM(spoiled), store=store), {"g": grpo}, "g")
    (finding,) = findings(result, "no learning")
    assert finding.message == "after training the stage returned the weights that it started from"
    assert "group_size above 4" in finding.advice


def test_weights_of_one_module_that_diverged_are_reported(store: RunStore) -> None:
    losses = tuple(3.0 / step for step in range(1, 9))
    (finding,) = trained(store, LosingTrainer(losses, TuningConfig(), diverges="produce hint"), adapters="module")
    assert finding.message == "lm/hint keeps its weights: the loss of step 3 is nan"
    assert finding.advice == "learning_rate below 1e-05"
    result = run(
        Session(lm=ScriptedLM(read), store=store),
        {"w": BootstrapFinetune(exact_match, LosingTrainer((3.0,), TuningConfig(), diverges="hint"))},
        "w",
    )
    (skipped,) = findings(result, "skipped")
    assert (skipped.message, skipped.advice) == ("lm: the loss of step 3 is nan", "learning_rate below 1e-05")


def test_over_fitting_is_reported_from_the_loss_on_held_out_rows(store: RunStore) -> None:
    losses = tuple(3.0 / step for step in range(1, 9))

    def learned(request: Request) -> str:
        number = number_of(request)
        return always_right(request) if request.weights.adapter and number < 50 else read(request)

    tuning = TuningConfig(epochs=3, rank=8)
    found = trained(store, LosingTrainer(losses, tuning, (2.0, 1.0, 1.5)), learned)
    by_score, by_loss = [finding for finding in found if finding.kind == "over-fit"]
    assert by_score.advice == (
        "epochs below 3, eval_fraction above 0 (which keeps the best epoch), rank below 8 or more training examples"
    )
    assert by_loss.message == "the loss of lm on held-out rows rose from 1.000 to 1.500"
    assert by_loss.advice == "epochs=2; the weights after epoch 2 were kept, and later epochs only took time"


def test_a_local_lm_that_is_trained_too_little_is_told_its_learning_rate(tiny_lm: LocalLM, store: RunStore) -> None:
    def answered(example: Example, prediction: Prediction) -> float:
        return float(example.labels["answer"] in "abcdef")

    trainer = LocalTrainer(tiny_lm, TuningConfig(learning_rate=1e-9, batch_size=4, epochs=4))
    session = Session(lm=tiny_lm, store=store, sampling=Sampling(max_tokens=4))
    letters = [Example({"letter": letter}, {"answer": letter}, id=letter) for letter in "abcdefgh"]
    program = Predict("letter -> answer")
    better = BetterTogether(answered, {"w": BootstrapFinetune(answered, trainer)}, "w")
    result = better.optimize(program, initial_state(program, session), letters, letters, session)
    (finding,) = findings(result, "no learning")
    assert re.search(r"the loss of lm .*in 8 steps at a learning rate of 1e-09", finding.message)
    assert finding.advice.startswith("learning_rate above 1e-09, epochs above 4")


@given(st.lists(st.floats(-0.1, 0.1), min_size=16, max_size=60), st.floats(0.5, 5.0))
def test_noise_alone_is_no_learning_and_a_halved_loss_is(noise: list[float], level: float) -> None:
    """The noise is far below the level, and the fall far above it."""
    quiet = loss_curve([level + 0.1 * level * value for value in noise])
    falling = loss_curve([level * (2 - number / len(noise)) + 0.1 * value for number, value in enumerate(noise)])
    assert quiet is not None
    assert quiet.flat
    assert falling is not None
    assert not falling.flat
    assert not falling.rising


def test_a_curve_needs_losses_that_show_a_trend() -> None:
    assert loss_curve([3.0, 2.9, float("nan"), 2.8]) is None
    assert loss_curve([0.1, -0.2, 0.1, 0.0]) is None
    noisy = loss_curve([3.0, 1.0, 3.2, 0.9, 3.1, 0.8, 3.0, 0.9])
    assert noisy is not None
    assert noisy.flat


def test_a_spent_budget_is_one_finding_for_each_stage(store: RunStore) -> None:
    stages = dict(scheduler(KeepingTrainer()).optimizers)
    result = run(
        Session(lm=scripted(), store=store, max_concurrency=1), stages, "p -> w", budget=Budget(max_lm_calls=110)
    )
    first, second = findings(result, "budget")
    assert "max_lm_calls=110 is spent, so the stage ended early" in first.message
    assert "the budget was spent before the stage began" in second.message
    assert not findings(result, "skipped")


def test_the_page_on_troubleshooting_lists_every_finding_and_every_failure() -> None:
    page = (Path(__file__).parents[2] / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    section = page.partition("## Findings")[2].partition("\n## ")[0]
    listed = re.findall(r"^\| ([a-z -]+) \|", section, re.MULTILINE)
    kinds = get_args(Finding.model_fields["kind"].annotation)
    assert listed == ["finding", *kinds, "failure", *get_args(Failure)]


def test_settings_of_values_without_fields_are_none() -> None:
    assert settings_of(3) == settings_of(TuningConfig) == {}
    assert settings_of(Adapt("x")) == {"name": "x"}
