"""The wavefront: batches, seeds, and failures as data."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from pathlib import Path

import pytest

from lmpipe import (
    LM,
    Completion,
    EngineError,
    Example,
    Job,
    Module,
    Predict,
    Prediction,
    ProgramState,
    PromptState,
    Request,
    Sampling,
    ScriptedLM,
    Session,
    Trace,
    exact_match,
    initial_state,
    rollout,
)
from lmpipe.errors import ModuleError, SignatureError
from lmpipe.lm import Usage


class TwoHops(Module):
    """Asks for a query once, or twice if the question ends with an exclamation mark, and then answers."""

    def __init__(self) -> None:
        self.query = Predict("question -> query")
        self.answer = Predict("question, query -> answer")

    def forward(self, question: str) -> Prediction:
        query = self.query(question=question).query
        if question.endswith("!"):
            query = self.query(question=query).query
        return self.answer(question=question, query=query)


def script(request: Request) -> str:
    """Answers differently for every prompt and seed."""
    prompt = request.messages[-1].content
    mark = hashlib.sha256(f"{request.messages}{request.seed}".encode()).hexdigest()[:6]
    return f"answer: {mark}" if "query: " in prompt else f"query: {mark}"


def examples(count: int) -> list[Example]:
    return [Example({"question": f"{number}" + "!" * (number % 3 == 0)}, {"answer": "x"}) for number in range(count)]


def roll_out(lm: LM, count: int = 20, **settings: int) -> list[Trace]:
    program, session = TwoHops(), Session(lm=lm, **settings)  # type: ignore[arg-type]
    state = initial_state(program, session)
    return rollout(program, [Job(state, example) for example in examples(count)], session, exact_match)


def texts(traces: Sequence[Trace]) -> list[list[str | None]]:
    return [[step.text for step in trace.steps] for trace in traces]


def test_waiting_calls_are_sent_as_one_batch_in_the_order_of_the_jobs() -> None:
    lm = ScriptedLM(script)
    roll_out(lm)
    assert lm.batch_sizes == [20, 20, 7]
    assert [request.messages[-1].content for request in lm.requests[:20]] == [
        f"question: {example.inputs['question']}" for example in examples(20)
    ]


def test_steps_contain_the_path_and_the_number_of_the_call() -> None:
    first = roll_out(ScriptedLM(script))[0]
    assert [(step.path, step.index) for step in first.steps] == [("query", 0), ("query", 1), ("answer", 0)]


@pytest.mark.parametrize("max_concurrency", [1, 3, 64])
def test_results_do_not_depend_on_the_number_of_threads(max_concurrency: int) -> None:
    assert texts(roll_out(ScriptedLM(script), max_concurrency=max_concurrency)) == texts(roll_out(ScriptedLM(script)))


def test_the_seed_decides_every_draw() -> None:
    assert texts(roll_out(ScriptedLM(script), seed=1)) == texts(roll_out(ScriptedLM(script), seed=1))
    assert texts(roll_out(ScriptedLM(script), seed=1)) != texts(roll_out(ScriptedLM(script), seed=2))


def test_samples_of_one_example_draw_from_different_seeds() -> None:
    program, session = TwoHops(), Session(lm=ScriptedLM(script))
    state = initial_state(program, session)
    jobs = [Job(state, examples(1)[0], sample, temperature=0.7) for sample in range(4)]
    traces = rollout(program, jobs, session)
    assert len({trace.steps[0].text for trace in traces}) == 4
    assert {trace.steps[0].request.sampling.temperature for trace in traces} == {0.7}


def test_many_states_run_in_one_wavefront_without_mixing() -> None:
    program, lm = TwoHops(), ScriptedLM(script)
    session = Session(lm=lm)
    plain = initial_state(program, session)
    prompted = plain.with_prompt("query", PromptState(instructions="Ask well."))
    jobs = [Job(state, example) for state in (plain, prompted) for example in examples(5)]
    traces = rollout(program, jobs, session)
    assert lm.batch_sizes[0] == 10
    assert [trace.state for trace in traces] == [plain.digest] * 5 + [prompted.digest] * 5
    assert all(
        ("Ask well." in step.request.messages[0].content) == (trace.state == prompted.digest and step.path == "query")
        for trace in traces
        for step in trace.steps
    )


def test_a_bad_completion_a_failed_request_and_a_bug_cost_only_their_example(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Fragile(Module):
        def __init__(self) -> None:
            self.answer = Predict("number: int -> answer: int")

        def forward(self, number: int) -> Prediction:
            return Prediction(answer=12 // self.answer(number=number).answer)

    def reply(request: Request) -> str:
        number = int(request.messages[-1].content.partition(": ")[2])
        if number == 7:
            raise EngineError("out of memory")
        return "answer: " + {3: "many", 5: "0"}.get(number, "1")

    program, session = Fragile(), Session(lm=ScriptedLM(reply))
    jobs = [Job(initial_state(program, session), Example({"number": n}, {"answer": "12"})) for n in range(10)]
    traces = rollout(program, jobs, session, exact_match)
    assert [trace.failure for trace in traces] == [
        None,
        None,
        None,
        "parse",
        None,
        "program",
        None,
        "engine",
        None,
        None,
    ]
    assert [trace.score for trace in traces] == [1, 1, 1, 0, 1, 0, 1, 0, 1, 1]
    assert "many" in (traces[3].error or "")
    assert traces[3].steps[0].error == (traces[3].error or "").removeprefix("ParseError: ")
    assert "out of memory" in (traces[7].error or "")
    assert "ZeroDivisionError" in caplog.text
    cost = session.ledger.total
    assert (cost.lm_calls, cost.parse_errors, cost.engine_errors) == (10, 1, 1)


class DeadLM(LM):
    """An engine that cannot be reached."""

    @property
    def name(self) -> str:
        return "dead"

    def complete(self, requests: Sequence[Request]) -> list[Completion | EngineError]:
        raise EngineError("connection refused")

    def register_adapter(self, adapter: str, folder: Path) -> None:
        raise EngineError("connection refused")


def test_a_dead_engine_ends_the_run_with_its_error() -> None:
    with pytest.raises(EngineError, match="connection refused"):
        roll_out(DeadLM())


class ShortLM(LM):
    """An engine that returns one answer too few."""

    @property
    def name(self) -> str:
        return "short"

    def complete(self, requests: Sequence[Request]) -> list[Completion | EngineError]:
        return [Completion("answer: x", usage=Usage(1)) for _ in requests[1:]]

    def register_adapter(self, adapter: str, folder: Path) -> None:
        return


def test_an_engine_that_returns_too_few_answers_is_named() -> None:
    with pytest.raises(EngineError, match="returned 19 answers for 20 requests"):
        roll_out(ShortLM())


def test_a_job_that_spends_its_time_elsewhere_does_not_hold_up_the_others() -> None:
    done: dict[str, float] = {}

    class Slow(Module):
        def __init__(self) -> None:
            self.answer = Predict("question -> answer")

        def forward(self, question: str) -> Prediction:
            if question == "slow":
                time.sleep(1.5)
            answer = self.answer(question=question)
            done[question] = time.perf_counter()
            return answer

    program, session = Slow(), Session(lm=ScriptedLM(lambda _: "answer: x"))
    state: ProgramState = initial_state(program, session)
    rollout(program, [Job(state, Example({"question": name})) for name in ("slow", "a", "b")], session)
    assert max(done["a"], done["b"]) < done["slow"]
    assert len(done) == 3


class Queue(LM):
    """An engine that schedules requests by itself; it answers the question "2" only after another job's second call."""

    batched = False

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error
        self.second = threading.Event()

    @property
    def name(self) -> str:
        return "queue"

    def complete(self, requests: Sequence[Request]) -> list[Completion | EngineError]:
        if self.error:
            raise self.error
        assert len(requests) == 1
        prompt = requests[0].messages[-1].content
        if "query: " in prompt:
            self.second.set()
        elif prompt == "question: 2":
            assert self.second.wait(timeout=60)
        return [Completion(script(requests[0]))]

    def register_adapter(self, adapter: str, folder: Path) -> None:
        return


def test_an_engine_that_batches_by_itself_is_called_at_once() -> None:
    assert texts(roll_out(Queue())) == texts(roll_out(ScriptedLM(script, name="queue")))


@pytest.mark.parametrize("error", [EngineError("connection refused"), ValueError("a bug of the engine")])
def test_an_exception_of_such_an_engine_ends_the_run(error: Exception) -> None:
    with pytest.raises(EngineError, match=str(error)):
        roll_out(Queue(error))


def test_a_predictor_can_override_the_sampling_of_the_session() -> None:
    program = Predict("question -> answer", sampling=Sampling(max_tokens=3))
    session = Session(lm=ScriptedLM(lambda _: "answer: x"), sampling=Sampling(temperature=0.5))
    trace = rollout(program, [Job(initial_state(program, session), Example({"question": "?"}))], session)[0]
    assert trace.steps[0].request.sampling == Sampling(max_tokens=3)


def test_no_jobs_give_no_traces() -> None:
    assert rollout(TwoHops(), [], Session(lm=ScriptedLM(script))) == []


class Growing(Module):
    """Appends to the list that it has just given to a module, as multi-hop programs do."""

    def __init__(self) -> None:
        self.hop = Predict("notes: list[str] -> note")

    def forward(self, notes: list[str]) -> Prediction:
        for _ in range(2):
            notes.append(self.hop(notes=notes).note)
        return Prediction(answer=len(notes))


def test_a_step_keeps_its_inputs_as_they_were_when_it_was_made() -> None:
    program, session = Growing(), Session(lm=ScriptedLM(lambda request: "note: n"))
    example = Example({"notes": ["first"]})
    trace = rollout(program, [Job(initial_state(program, session), example)], session)[0]
    assert [step.inputs for step in trace.steps] == [{"notes": ["first"]}, {"notes": ["first", "n"]}]
    assert example.inputs == {"notes": ["first"]}


class Quits(Module):
    """Exits, misspells an input, or calls modules from other threads."""

    def __init__(self, how: str) -> None:
        self.how = how
        self.answer = Predict("question -> answer")

    def forward(self, question: str) -> Prediction:
        if question == "quit":
            if self.how == "exit":
                raise SystemExit(3)
            if self.how == "misspelled":
                return self.answer(questoin=question)
            with ThreadPoolExecutor() as pool:
                context = copy_context()
                calls = [pool.submit(context.copy().run, self.ask, question) for _ in range(2)]
                return min((call.result() for call in calls), key=str)
        return self.answer(question=question)

    def ask(self, question: str) -> Prediction:
        return self.answer(question=question)


@pytest.mark.parametrize(
    ("how", "error", "message"),
    [
        ("exit", SystemExit, "3"),
        ("misspelled", SignatureError, "missing question"),
        ("threads", ModuleError, "a thread that forward"),
    ],
)
def test_a_fault_of_the_program_ends_the_run(how: str, error: type[BaseException], message: str) -> None:
    def unhurried(request: Request) -> str:
        time.sleep(0.2)  # so that the second of two simultaneous calls comes while the first is being answered
        return "answer: x"

    program, session = Quits(how), Session(lm=ScriptedLM(unhurried))
    jobs = [Job(initial_state(program, session), Example({"question": name})) for name in ("a", "quit", "b")]
    with pytest.raises(error, match=message):
        rollout(program, jobs, session)


def test_a_metric_may_call_an_lm() -> None:
    judge = Predict("answer -> verdict: bool")

    def metric(example: Example, prediction: Prediction) -> float:
        return float(judge(answer=prediction.answer).verdict)

    program, session = Predict("question -> answer"), Session(lm=ScriptedLM(lambda _: "answer: x"))
    jobs = [Job(initial_state(program, session), Example({"question": str(n)})) for n in range(5)]
    with Session(lm=ScriptedLM(lambda _: "verdict: true")):
        assert [trace.score for trace in rollout(program, jobs, session, metric)] == [1] * 5
