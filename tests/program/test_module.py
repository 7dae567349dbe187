"""Programs: structure, paths, and calling them."""

from __future__ import annotations

import copy
import functools
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from contextvars import copy_context
from threading import Thread
from typing import Any

import pytest

from lmpipe import (
    ChainOfThought,
    Demo,
    Example,
    Job,
    Module,
    Predict,
    Prediction,
    ProgramState,
    PromptState,
    ScriptedLM,
    Session,
    evaluate,
    initial_state,
    predictors,
    rollout,
)
from lmpipe.errors import ConfigError, ModuleError, SessionError, SignatureError


class Nested(Module):
    def __init__(self) -> None:
        self.hops = [ChainOfThought("question -> query"), {"deep": Predict("question -> note")}]
        self.answer = Predict("question -> answer")
        self.same = self.answer

    def forward(self, question: str) -> Prediction:
        return self.answer(question=question)


def echo() -> ScriptedLM:
    return ScriptedLM(lambda request: f"answer: {request.messages[-1].content.partition(': ')[2]}")


def test_paths_follow_attributes_lists_and_dicts_and_name_each_module_once() -> None:
    assert list(predictors(Nested())) == ["hops.0.predict", "hops.1.deep", "answer"]


def test_a_program_is_called_in_a_session() -> None:
    with Session(lm=echo()):
        assert Nested()(question="Why?").answer == "Why?"


def test_a_single_predictor_is_a_program() -> None:
    with Session(lm=echo()):
        assert Predict("question -> answer")(question="Why?") == {"answer": "Why?"}


def test_outside_a_session_the_error_says_what_to_write() -> None:
    with pytest.raises(SessionError, match=r"with Session\(lm=lm\)"):
        Nested()(question="Why?")


def test_a_module_is_frozen_from_its_first_run() -> None:
    program = Nested()
    program.hops = []
    with Session(lm=echo()):
        program(question="Why?")
    with pytest.raises(ModuleError, match=r"Nested\.hops cannot be set"):
        program.hops = [Predict("a -> b")]


def test_a_module_made_in_forward_is_refused() -> None:
    class Careless(Module):
        def forward(self, question: str) -> Prediction:
            return Predict("question -> answer")(question=question)

    with Session(lm=echo()), pytest.raises(ModuleError, match="make it in __init__"):
        Careless()(question="Why?")


def test_wrong_inputs_are_named() -> None:
    with Session(lm=echo()), pytest.raises(SignatureError, match="takes the inputs question; 'questoin' is not one"):
        Predict("question -> answer")(questoin="Why?")


def test_the_lm_may_leave_out_the_reasoning() -> None:
    with Session(lm=ScriptedLM(lambda request: "answer: 4")):
        assert ChainOfThought("question -> answer")(question="2 + 2?") == {"reasoning": "", "answer": "4"}


def test_each_role_is_answered_by_its_lm() -> None:
    class Two(Module):
        def __init__(self) -> None:
            self.draft = Predict("question -> draft", role="small")
            self.judge = Predict("draft -> answer", role="large")

        def forward(self, question: str) -> Prediction:
            return self.judge(draft=self.draft(question=question).draft)

    small, large = ScriptedLM(lambda _: "draft: d", "small"), ScriptedLM(lambda _: "answer: a", "large")
    with Session(lm={"small": small, "large": large}) as session:
        assert Two()(question="?").answer == "a"
        assert initial_state(Two(), session).weights["large"].base == "large"
    assert [len(lm.requests) for lm in (small, large)] == [1, 1]
    with Session(lm=small), pytest.raises(SessionError, match="needs an LM of role 'small'; this state has lm"):
        Two()(question="?")


def test_a_prediction_is_a_read_only_mapping() -> None:
    prediction = Prediction(answer="4")
    with pytest.raises(AttributeError, match="no field 'anwser'; it has answer"):
        _ = prediction.anwser
    with pytest.raises(AttributeError, match="cannot be changed"):
        prediction.answer = "5"


class Recorder(Module):
    """A program with data of its own besides its modules."""

    def __init__(self) -> None:
        self.parts = {"ask": [Predict("question -> answer")]}
        self.names = {"4": "four"}

    def forward(self, question: str) -> Prediction:
        return Prediction(answer=self.names[self.parts["ask"][0](question=question).answer])


def copies(program: Module) -> list[Module]:
    return [copy.copy(program), copy.deepcopy(program), pickle.loads(pickle.dumps(program))]


def test_programs_can_be_copied_before_and_after_they_run() -> None:
    program, session = Recorder(), Session(lm=ScriptedLM(lambda request: "answer: 4"))
    for copied in copies(program):
        with session:
            assert copied(question="2 + 2?").answer == "four"
    with session:
        program(question="2 + 2?")
    for copied in copies(program):
        copied.names = {"4": "vier"}  # type: ignore[attr-defined]
        with session:
            assert copied(question="2 + 2?").answer == "vier"
            assert program(question="2 + 2?").answer == "four"
        with pytest.raises(ModuleError, match="has run already"):
            copied.names = {}  # type: ignore[attr-defined]
    with pytest.raises(ModuleError, match="has run already"):
        program.names = {}


def test_traces_and_predictions_can_be_copied_and_pickled() -> None:
    program, session = Recorder(), Session(lm=ScriptedLM(lambda request: "answer: 4"))
    [trace] = rollout(program, [Job(initial_state(program, session), Example({"question": "2 + 2?"}))], session)
    for copied in (copy.deepcopy(trace), pickle.loads(pickle.dumps(trace))):
        assert copied == trace
        assert copied.prediction.answer == "four"
    prediction = Prediction(answer="4", _values=3)
    for same in (copy.copy(prediction), copy.deepcopy(prediction), pickle.loads(pickle.dumps(prediction))):
        assert same == prediction
        assert isinstance(same, Prediction)


class Forward(Module):
    """A program whose `forward` returns the wrong type, or calls a module from another thread."""

    def __init__(self, how: str) -> None:
        self.how, self.ask = how, Predict("question -> answer")

    def forward(self, question: str) -> Any:
        if self.how == "str":
            return self.ask(question=question).answer
        if self.how == "dict":
            return dict(self.ask(question=question))
        if self.how == "pool":
            with ThreadPoolExecutor(1) as pool:
                return next(pool.map(lambda text: self.ask(question=text), [question]))
        if self.how == "thread":
            predictions: list[Prediction] = []
            thread = Thread(target=self.ask_quietly, args=(question, predictions))
            thread.start()
            thread.join()
            return predictions[0] if question == "2 + 2?" else Prediction(answer="never asked")
        if self.how == "pool with the context":
            with ThreadPoolExecutor(1) as pool:
                return pool.submit(copy_context().run, lambda: self.ask(question=question)).result()
        return None

    def ask_quietly(self, question: str, predictions: list[Prediction]) -> None:
        with suppress(ModuleError):
            predictions.append(self.ask(question=question))


class Async(Module):
    async def forward(self, question: str) -> Prediction:  # type: ignore[override]
        return Prediction(answer=question)


class Awaits(Module):
    def __init__(self) -> None:
        self.part = Async()

    def forward(self, question: str) -> Prediction:
        return Prediction(answer=self.part(question=question))


class Cyclic(Module):
    def __init__(self) -> None:
        self.parts: list[Any] = [Predict("question -> answer")]
        self.parts.append({"again": self.parts})

    def forward(self, question: str) -> Prediction:
        return self.parts[0](question=question)  # type: ignore[no-any-return]


CANNOT_RUN = {
    "str": (lambda: Forward("str"), ModuleError, "returned str, not a Prediction; return what a module returned"),
    "dict": (lambda: Forward("dict"), ModuleError, "returned dict, not a Prediction"),
    "nothing": (lambda: Forward("nothing"), ModuleError, "returned NoneType, not a Prediction"),
    "async": (Async, ModuleError, "Async.forward.. is async; write `def forward`"),
    "async part": (Awaits, ModuleError, "Async.forward.. is async; write `def forward`"),
    "pool": (lambda: Forward("pool"), ModuleError, "called from a thread that forward.. started; call modules one af"),
    "thread": (lambda: Forward("thread"), ModuleError, "called from a thread that forward.. started"),
    "pool with the context": (lambda: Forward("pool with the context"), ModuleError, "thread that forward.. started"),
    "cycle": (Cyclic, ModuleError, "Cyclic.parts.1.again is a list that contains itself"),
}


@pytest.mark.parametrize("how", CANNOT_RUN)
def test_a_program_that_cannot_run_raises_an_error_that_says_what_to_write(how: str) -> None:
    make, error, message = CANNOT_RUN[how]
    program, session = make(), Session(lm=ScriptedLM(lambda request: "answer: 4"))
    with session, pytest.raises(error, match=message):
        program(question="2 + 2?")
    jobs = [Job(ProgramState(prompts={}, weights=session.untuned_weights()), Example({"question": "2 + 2?"}))]
    with pytest.raises(error, match=message):
        rollout(make(), jobs, session)


def test_metrics_and_threads_with_a_session_may_call_modules() -> None:
    judge, lm = Predict("question -> answer"), ScriptedLM(lambda request: "answer: 4")
    examples = [Example({"question": str(number)}) for number in range(24)]

    def metric(example: Example, prediction: Prediction) -> float:
        return float(judge(question=example.id).answer == program(question="?").answer == "4")

    program, session = Nested(), Session(lm=lm, max_concurrency=8)
    with session:
        assert evaluate(program, examples, metric, session).mean == 1

    def ask(number: int) -> str:
        with Session(lm=lm):
            return str(program(question=str(number)).answer)

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(ask, range(40))) == ["4"] * 40


def wrapping(forward: Callable[..., Prediction]) -> Callable[..., Prediction]:
    @functools.wraps(forward)
    def injected(self: Module, **inputs: Any) -> Prediction:
        return forward(self, extra="!", **inputs)

    return injected


class Decorated(Module):
    def __init__(self) -> None:
        self.ask = Predict("question -> answer")

    @wrapping
    def forward(self, question: str, extra: str = "", more: int = 3) -> Prediction:
        return self.ask(question=question + extra)


def test_forward_may_be_decorated_and_have_defaults() -> None:
    program, session = Decorated(), Session(lm=echo())
    [trace] = rollout(program, [Job(initial_state(program, session), Example({"question": "a"}))], session)
    assert trace.prediction == {"answer": "a!"}


@pytest.mark.parametrize("inputs", [{"q": "a"}, {}, {"question": "a", "more": 1}])
def test_inputs_that_forward_does_not_accept_are_named_before_any_call(inputs: Any) -> None:
    program, session = Nested(), Session(lm=echo())
    jobs = [Job(initial_state(program, session), Example(inputs))]
    with pytest.raises(ConfigError, match=r"examples have the inputs .*, and Nested.forward\(\) takes question"):
        rollout(program, jobs, session)


def test_changes_that_a_program_makes_to_its_inputs_do_not_reach_the_example() -> None:
    class Changes(Nested):
        def forward(self, question: Any) -> Prediction:
            question[0].append("changed")
            return Prediction(answer=question)

    program, session = Changes(), Session(lm=echo())
    example = Example({"question": (["a"],)})
    for _ in range(2):
        [trace] = rollout(program, [Job(initial_state(program, session), example)], session)
        assert trace.prediction == {"answer": (["a", "changed"],)}
    assert example.inputs == {"question": (["a"],)}


def test_a_list_that_two_attributes_hold_is_not_a_cycle() -> None:
    program = Nested()
    program.other = program.hops  # type: ignore[attr-defined]
    assert list(predictors(program)) == ["hops.0.predict", "hops.1.deep", "answer"]


DEMO = Demo(inputs={"question": "2 + 2?"}, outputs={"answer": "4"})


def test_a_state_of_another_program_is_refused_with_the_paths_that_differ() -> None:
    lm = echo()
    session, state = Session(lm=lm), PromptState(instructions="Be brief.", demos=(DEMO,))
    renamed = ProgramState(prompts={"respond": state}, weights=session.untuned_weights())
    message = r"for 'respond', and Nested has .*'answer'; .* write state.with_renamed_modules\(.'respond': "
    with Session(lm=lm, state=renamed), pytest.raises(ConfigError, match=message):
        Nested()(question="Why?")
    with pytest.raises(ConfigError, match=message):
        rollout(Nested(), [Job(renamed, Example({"question": "Why?"}))], session)
    tuned = ProgramState(prompts={}, weights=renamed.weights | {"lm/respond": renamed.weights["lm"]})
    with pytest.raises(ConfigError, match="it is for 'respond'"):
        rollout(Nested(), [Job(tuned, Example({"question": "Why?"}))], session)
    assert not lm.requests
    with Session(lm=lm, state=renamed.with_renamed_modules({"respond": "answer"})):
        Nested()(question="Why?")
    assert lm.requests[-1].messages[0].content.startswith("Be brief.")


@pytest.mark.parametrize(
    ("demo", "message"),
    [
        (
            Demo(inputs={"query": "2 + 2?"}, outputs={"answer": "4"}),
            "demonstrations of 'answer' have the inputs query, and its signature has question",
        ),
        (Demo(inputs={"question": "2 + 2?"}, outputs={}), "a demonstration of 'answer' lacks the outputs answer"),
    ],
)
def test_a_state_whose_demonstrations_have_other_fields_is_refused(demo: Demo, message: str) -> None:
    lm = echo()
    state = ProgramState(
        prompts={"answer": PromptState(instructions="", demos=(demo,))}, weights=Session(lm=lm).untuned_weights()
    )
    with (
        Session(lm=lm, state=state),
        pytest.raises(ConfigError, match=message),
    ):
        Nested()(question="Why?")
    assert not lm.requests
