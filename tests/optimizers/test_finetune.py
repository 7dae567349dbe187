"""Training rows for fine-tuning are a program's own successful calls."""

from __future__ import annotations

from typing import Any, final

import pytest

from lmpipe import (
    Budget,
    Demo,
    Example,
    Job,
    Module,
    OptimizeResult,
    Predict,
    Prediction,
    ProgramState,
    PromptState,
    Request,
    RunStore,
    ScriptedLM,
    Session,
    WeightState,
    exact_match,
    initial_state,
    rollout,
)
from lmpipe.trainer import TrainingRow
from optimizers import BootstrapFinetune, Teacher
from tests.scripted import COLOURS, Colour, KeepingTrainer, examples, scripted


def prompted(program: Colour, session: Session) -> ProgramState:
    """A state whose hint module has a demo, so that rollouts on even numbers succeed."""
    demo = Demo(inputs={"number": 1}, outputs={"hint": "it is green"})
    state = initial_state(program, session)
    return state.with_prompt("hint", PromptState(instructions="Give a hint.", demos=(demo,)))


def tune(store: RunStore, **settings: Any) -> tuple[OptimizeResult, KeepingTrainer, ScriptedLM]:
    program, trainer, lm = Colour(), KeepingTrainer(), scripted()
    session = Session(lm=lm, store=store)
    optimizer = BootstrapFinetune(exact_match, trainer, **settings)
    return optimizer.optimize(program, prompted(program, session), examples(6), [], session), trainer, lm


def last(row: TrainingRow) -> str:
    return row.messages[-1].content.partition("\n")[0]


def test_each_module_gets_exactly_the_rows_of_its_own_calls(store: RunStore) -> None:
    """Numbers 0, 2 and 4 succeed; each rollout calls the hint module twice and the answer module once."""
    _, trainer, _ = tune(store, adapters="module")
    (hints, _), (answers, _) = trainer.calls
    assert [(last(row), row.completion) for row in hints] == [
        (f"number: {n}", f"hint: {'hard to say' if n % 2 else 'it is ' + COLOURS[n % 3]}") for n in range(6)
    ]
    assert [(last(row), row.completion) for row in answers] == [
        (f"number: {n}", f"answer: {COLOURS[n % 3]}") for n in (0, 2, 4)
    ]


def test_one_pooled_set_trains_one_adapter_per_role_and_a_module_can_have_its_own(store: RunStore) -> None:
    pooled, trainer, _ = tune(store)
    assert [len(rows) for rows, _ in trainer.calls] == [9]
    assert pooled.state.weights["lm"].adapter is not None
    assert pooled.details["kept"] == 3
    result, trainer, _ = tune(store, adapters="module")
    assert set(result.state.weights) == {"lm", "lm/hint", "lm/answer"}
    assert result.state.weights["lm"].adapter is None
    assert result.state.weights_of("lm", "hint") != result.state.weights_of("lm", "answer")


def knowing(request: Request) -> str:
    """Answers correctly with any prompt, so that the inputs of later modules are always the same."""
    prompt = request.messages[-1].content
    colour = COLOURS[int(prompt.partition("\n")[0].partition(": ")[2]) % 3]
    return f"answer: {colour}" if "hints: " in prompt else f"hint: {colour}"


@pytest.mark.parametrize("include_demos", [False, True])
def test_rows_are_byte_for_byte_what_inference_sends_for_the_same_inputs(store: RunStore, include_demos: bool) -> None:
    program, trainer, lm = Colour(), KeepingTrainer(), ScriptedLM(knowing)
    session = Session(lm=lm, store=store, max_concurrency=1)
    vanilla, current = initial_state(program, session), prompted(program, session)
    optimizer = BootstrapFinetune(exact_match, trainer, include_demos=include_demos)
    optimizer.optimize(program, current, examples(6), [], session)
    lm.requests.clear()
    rollout(program, [Job(current if include_demos else vanilla, example) for example in examples(6)], session)
    rows = trainer.calls[0][0]
    assert [row.messages for row in rows] == [request.messages for request in lm.requests]
    assert [row.completion for row in rows] == [knowing(request) for request in lm.requests]


def test_training_starts_from_the_base_or_from_the_current_weights(store: RunStore) -> None:
    program, trainer = Colour(), KeepingTrainer()
    session = Session(lm=scripted(), store=store)
    first = BootstrapFinetune(exact_match, trainer).optimize(
        program, prompted(program, session), examples(6), [], session
    )
    for init in ("base", "current"):
        BootstrapFinetune(exact_match, trainer, init=init).optimize(program, first.state, examples(6), [], session)
    assert [start.adapter for _, start in trainer.calls] == [None, None, first.state.weights["lm"].adapter]


def test_without_a_successful_run_nothing_is_trained_and_the_reason_is_given(store: RunStore) -> None:
    program, trainer = Colour(), KeepingTrainer()
    session = Session(lm=scripted(), store=store)
    state = initial_state(program, session)
    optimizer = BootstrapFinetune(exact_match, trainer, rollouts_per_example=2)
    result = optimizer.optimize(program, state, examples(6), [], session)
    assert (result.status, result.state, trainer.calls) == ("skipped", state, [])
    assert "none of 12 rollouts on 6 training examples scored 1.0 or more" in result.reason
    assert "12 of 12 rollouts failed in answer: ParseError: field 'answer': names none of" in result.reason


def test_examples_are_run_until_one_run_succeeds_or_the_limit_is_reached(store: RunStore) -> None:
    program = Predict("number: int -> answer")
    tries: dict[str, int] = {}

    def third_time_lucky(request: Request) -> str:
        prompt = request.messages[-1].content
        tries[prompt] = tries.get(prompt, 0) + 1
        return "answer: yes" if tries[prompt] >= 3 and "9" not in prompt else "answer: no"

    train = [Example({"number": n}, {"answer": "yes"}) for n in (1, 2, 9)]
    trainer, session = KeepingTrainer(), Session(lm=ScriptedLM(third_time_lucky), store=store)
    optimizer = BootstrapFinetune(exact_match, trainer, max_rollouts_per_example=5, max_idle_rounds=3, temperature=1.0)
    result = optimizer.optimize(program, initial_state(program, session), train, [], session)
    assert (result.details["tried"], result.details["kept"]) == (3 + 3 + 5, 2)
    tries.clear()
    impatient = BootstrapFinetune(exact_match, trainer, max_rollouts_per_example=5, max_idle_rounds=2, temperature=1.0)
    assert impatient.optimize(program, initial_state(program, session), train, [], session).details["tried"] == 6


@pytest.mark.parametrize(("each", "most", "tried"), [(2, 3, 3), (2, 4, 4), (4, 4, 4), (2, None, 2)])
def test_no_example_is_run_more_often_than_the_limit(store: RunStore, each: int, most: int | None, tried: int) -> None:
    program = Predict("number: int -> answer")
    session = Session(lm=ScriptedLM(lambda request: "answer: no"), store=store)
    train = [Example({"number": 1}, {"answer": "yes"})]
    optimizer = BootstrapFinetune(
        exact_match, KeepingTrainer(), rollouts_per_example=each, max_rollouts_per_example=most, temperature=1.0
    )
    assert optimizer.optimize(program, initial_state(program, session), train, [], session).details["tried"] == tried


def test_varied_demos_replace_those_of_the_prompt_after_the_first_round(store: RunStore) -> None:
    program = Predict("number: int -> answer: Literal['red', 'green', 'blue']")
    state = ProgramState(
        prompts={
            "self": PromptState(
                instructions="Name it.", demos=(Demo(inputs={"number": 77}, outputs={"answer": "red"}),)
            )
        },
        weights=Session(lm=scripted()).untuned_weights(),
    )
    lm = ScriptedLM(lambda request: "answer: none")
    session = Session(lm=lm, store=store)
    optimizer = BootstrapFinetune(exact_match, KeepingTrainer(), max_rollouts_per_example=3, vary_demos=True)
    optimizer.optimize(program, state, examples(4), [], session)
    shown = [request.messages[1].content for request in lm.requests if len(request.messages) == 4]
    assert set(shown[:4]) == {"number: 77"}
    assert set(shown[4:]) <= {f"number: {n}" for n in range(4)}


def test_rows_are_deduplicated_and_balanced_on_request(store: RunStore) -> None:
    program = Predict("number: int -> answer")
    lm = ScriptedLM(lambda request: "answer: red")
    train = [Example({"number": n}, {"answer": colour}) for n, colour in enumerate(["red", "red", "red", "Red."])]
    trainer, session = KeepingTrainer(), Session(lm=lm, store=store)
    settings = {"rollouts_per_example": 2, "temperature": 1.0, "deduplicate": True, "balance_by": "answer"}
    result = BootstrapFinetune(exact_match, trainer, **settings).optimize(  # type: ignore[arg-type]
        program, initial_state(program, session), train, [], session
    )
    rows = trainer.calls[0][0]
    assert [row.group for row in rows].count("red") == [row.group for row in rows].count("Red.") == 3
    assert len(set(rows)) == 4
    assert result.details["kept_by_label"] == {"answer": {"Red.": 2, "red": 6}}


def test_of_many_successes_the_distinct_ones_are_kept_first(store: RunStore) -> None:
    program = Predict("number: int -> thought, answer")
    thoughts = iter(["a", "a", "b", "a", "c", "a"])
    lm = ScriptedLM(lambda request: f"thought: {next(thoughts)}\nanswer: red")
    trainer, session = KeepingTrainer(), Session(lm=lm, store=store, max_concurrency=1)
    optimizer = BootstrapFinetune(exact_match, trainer, rollouts_per_example=6, max_kept_per_example=4)
    train = [Example({"number": 1}, {"answer": "red"})]
    result = optimizer.optimize(program, initial_state(program, session), train, [], session)
    assert [row.completion[9] for row in trainer.calls[0][0]] == ["a", "b", "c", "a"]
    assert (result.details["tried"], result.details["kept"]) == (6, 4)


def test_without_budget_to_train_the_state_is_unchanged_and_the_reason_is_given(store: RunStore) -> None:
    program, trainer = Colour(), KeepingTrainer()
    session = Session(lm=scripted(), store=store).limited(Budget(max_lm_calls=18))
    state = prompted(program, session)
    result = BootstrapFinetune(exact_match, trainer).optimize(program, state, examples(6), [], session)
    assert (result.status, result.state, result.details["kept"], trainer.calls) == ("skipped", state, 3, [])
    assert result.reason == "there was no budget left to train with (max_lm_calls=18 is spent)"


@final
class Expert(Module):
    """Answers like `Colour`, with a hint module of another signature, which has more outputs."""

    def __init__(self) -> None:
        self.hint = Predict("number: int -> shade, certainty: float")
        self.answer = Predict("number: int, hints: list[str] -> answer: Literal['red', 'green', 'blue']")

    def forward(self, number: int) -> Prediction:
        return self.answer(number=number, hints=[f"it is {self.hint(number=number).shade}"])


def expert_script(request: Request) -> str:
    prompt = request.messages[-1].content
    colour = COLOURS[int(prompt.partition("\n")[0].partition(": ")[2]) % 3]
    return f"answer: {colour}" if "hints: " in prompt else f"shade: {colour}\ncertainty: 1.0"


def learn(store: RunStore, teacher: Teacher, state: ProgramState | None = None) -> tuple[Any, KeepingTrainer, Session]:
    program, trainer = Colour(), KeepingTrainer()
    session = Session(lm=scripted(), store=store)
    optimizer = BootstrapFinetune(exact_match, trainer, adapters="module", teacher=teacher)
    state = state or initial_state(program, session)
    return optimizer.optimize(program, state, examples(6), [], session), trainer, session


def test_a_teacher_program_teaches_the_modules_that_it_shares_with_the_student(store: RunStore) -> None:
    """The teacher's hint module has another signature, so only its answers become rows."""
    result, trainer, _ = learn(store, Teacher(program=Expert(), lm=ScriptedLM(expert_script)))
    ((rows, start),) = trainer.calls
    assert [row.completion for row in rows] == [f"answer: {COLOURS[n % 3]}" for n in range(6)]
    assert "hints: \n[1] it is red" in rows[0].messages[-1].content
    assert start == WeightState(base="scripted")
    assert set(result.state.weights) == {"lm", "lm/answer"}
    assert result.details["kept_by_module"] == {"hint": 0, "answer": 6}


def test_a_teacher_state_provides_prompts_and_weights_for_the_runs_only(store: RunStore) -> None:
    """The student alone never succeeds; its rows show its own vanilla prompt, training starts from its own weights."""
    folder = store.new_folder()
    (folder / "adapter.json").write_text("of the teacher")
    session = Session(lm=scripted(), store=store)
    teaching = initial_state(Colour(), session).with_weights(
        "lm", WeightState(base="scripted", adapter=store.put_folder(folder))
    )
    result, trainer, session = learn(store, Teacher(state=teaching))
    assert [start.adapter for _, start in trainer.calls] == [None, None]
    assert result.details["kept"] == 6
    assert result.state.prompts == initial_state(Colour(), session).prompts
    assert teaching.weights["lm"].adapter not in {weights.adapter for weights in result.state.weights.values()}


def test_a_teacher_lm_runs_without_the_adapters_of_the_student(store: RunStore) -> None:
    folder = store.new_folder()
    (folder / "adapter.json").write_text("of the student")
    weights = WeightState(base="scripted", adapter=store.put_folder(folder))
    student = initial_state(Colour(), Session(lm=scripted())).with_weights("lm", weights)
    expert = ScriptedLM(knowing, name="expert")
    result, trainer, session = learn(store, Teacher(lm=expert), student)
    assert {request.weights for request in expert.requests} == {WeightState(base="expert")}
    assert [start for _, start in trainer.calls] == [WeightState(base="scripted")] * 2
    assert {weights.base for weights in result.state.weights.values()} == {"scripted"}
    session.register_adapters(result.state)


def test_the_titles_of_rounds_count_the_solved_examples(store: RunStore) -> None:
    titles: list[str] = []

    class Titles:
        def add_task(self, description: str, *, total: float | None = None) -> None:
            titles.append(description)

        def advance(self, task_id: object, advance: float = 1) -> None: ...
        def remove_task(self, task_id: object) -> None: ...

    lm = ScriptedLM(lambda request: "answer: red")
    session = Session(lm=lm, store=store, progress=Titles())
    tuner = BootstrapFinetune(exact_match, KeepingTrainer(), max_rollouts_per_example=2, temperature=1.0)
    tuner.optimize(Predict("number: int -> answer"), None, examples(2), [], session)
    assert [title for title in titles if "solved" in title] == ["traces, 0 examples solved", "traces, 1 example solved"]
