"""Jobs that never wait share threads; those that wait keep a thread each, and delay no other."""

from __future__ import annotations

import asyncio
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from contextvars import ContextVar
from pathlib import Path

import pytest

from lmpipe import (
    LM,
    Budget,
    Completion,
    EngineError,
    Example,
    Job,
    Module,
    Predict,
    Prediction,
    Request,
    ScriptedLM,
    Session,
    Trace,
    initial_state,
    rollout,
)
from lmpipe.errors import ModuleError
from lmpipe.lm import Message, Sampling
from lmpipe.runtime.call_context import CompleteFn, SearchFn
from lmpipe.runtime.waiting import WaitRecord
from lmpipe.runtime.wavefront import Wavefront
from lmpipe.state import WeightState

OBSERVED = 64  # jobs of a program that have a thread each, before jobs share threads


class Calls(Module):
    """Makes two calls, and does something else before each, on the examples that `where` is true for.

    Args:
        work: What is done.
        where: Function of the example's number.
    """

    def __init__(self, work: Callable[[], object], where: Callable[[int], bool] = lambda number: True) -> None:
        self.first, self.second = Predict("number: int -> draft"), Predict("draft -> answer")
        self.work, self.where = work, where
        self.threads: dict[int, int] = {}
        self.done: dict[int, float] = {}

    def forward(self, number: int) -> Prediction:
        self.threads[number] = threading.get_ident()
        draft = ""
        for step in (self.first, self.second):
            if self.where(number):
                self.work()
            result = step(number=number) if step is self.first else step(draft=draft)
            draft = result.get("draft", "done")
        self.done[number] = time.perf_counter()
        return Prediction(answer=draft)


def lm() -> ScriptedLM:
    return ScriptedLM(lambda request: "answer: x" if "draft" in request.messages[-1].content else "draft: d")


def run(program: Module, numbers: Sequence[int] = range(OBSERVED), session: Session | None = None) -> list[Trace]:
    session = session or Session(lm=lm(), quiet=True)
    state = initial_state(program, session)
    traces = rollout(program, [Job(state, Example({"number": n}, {"answer": "done"})) for n in numbers], session)
    assert [trace.error for trace in traces] == [None] * len(numbers)
    return traces


def shares_threads(program: Calls) -> bool:
    """Whether the next jobs of a program share threads."""
    program.threads.clear()
    run(program)
    return len(set(program.threads.values())) < OBSERVED


def nothing() -> None:
    return


def test_jobs_share_threads_once_many_have_run_without_waiting() -> None:
    program = Calls(nothing)
    run(program)
    assert len(set(program.threads.values())) == OBSERVED
    assert shares_threads(program)


def test_batches_are_the_same_whether_jobs_share_threads_or_not() -> None:
    program, alone, shared = Calls(nothing), lm(), lm()
    numbers = range(100)
    run(program, numbers, Session(lm=alone, quiet=True, max_concurrency=40))
    run(program, numbers, Session(lm=shared, quiet=True, max_concurrency=40))
    assert len(set(program.threads.values())) < 40
    assert shared.batch_sizes == alone.batch_sizes
    assert shared.requests == alone.requests


@pytest.mark.parametrize("rollouts", [1, 2])
def test_jobs_that_sleep_between_their_calls_overlap(rollouts: int) -> None:
    program = Calls(lambda: time.sleep(0.05))
    for _ in range(rollouts):
        started = time.perf_counter()
        run(program)
    assert time.perf_counter() - started < OBSERVED * 0.05 / 2  # 64 jobs that sleep 0.1 s each
    assert not shares_threads(program)


def test_a_job_that_sleeps_for_long_delays_no_other() -> None:
    program = Calls(lambda: time.sleep(1), lambda number: number == 3)
    run(program)
    others = [done for number, done in program.done.items() if number != 3]
    assert max(others) < program.done[3] - 0.5
    assert not shares_threads(program)


def test_a_lock_that_is_held_across_calls_keeps_threads_apart() -> None:
    class Locked(Calls):
        lock = threading.Lock()

        def forward(self, number: int) -> Prediction:
            with self.lock if number < 8 and not unlocked.is_set() else nullcontext():
                return super().forward(number)

    unlocked = threading.Event()
    program = Locked(nothing)
    run(program)
    unlocked.set()
    assert not shares_threads(program)


def test_jobs_that_begin_to_wait_delay_only_those_in_their_thread() -> None:
    waiting = threading.Event()
    program = Calls(lambda: waiting.is_set() and time.sleep(1), lambda number: number == 3)
    run(program)
    assert shares_threads(program)
    waiting.set()
    run(program)
    late = [number for number, done in program.done.items() if done > program.done[3] - 0.5]
    assert {program.threads[number] for number in late} == {program.threads[3]}
    assert not shares_threads(program)


def test_context_variables_belong_to_one_job() -> None:
    current: ContextVar[int] = ContextVar("current")
    seen: dict[int, int] = {}

    class Setting(Calls):
        def forward(self, number: int) -> Prediction:
            current.set(number)
            result = super().forward(number)
            seen[number] = current.get()
            return result

    program = Setting(nothing)
    run(program)
    assert shares_threads(program)
    assert seen == {number: number for number in range(OBSERVED)}


def shared(work: Callable[[], object]) -> Calls:
    """Returns a program whose jobs share threads."""
    switched_on = threading.Event()
    program = Calls(lambda: switched_on.is_set() and work())
    run(program)
    assert shares_threads(program)
    switched_on.set()
    return program


def test_shared_threads_run_event_loops_and_deep_recursion() -> None:
    def deep(depth: int) -> int:
        return 0 if not depth else 1 + deep(depth - 1)

    async def sleep() -> None:
        await asyncio.sleep(0)

    run(shared(lambda: (asyncio.run(sleep()), deep(500))))


def test_a_module_that_is_called_from_a_thread_of_forward_is_refused() -> None:
    refused = threading.Event()

    def call() -> None:
        with pytest.raises(ModuleError):
            program.first(number=1)
        refused.set()

    other = threading.Thread(target=call)
    program = shared(other.start)
    with pytest.raises(ModuleError, match="a thread that forward"):
        run(program, [1])
    assert refused.wait(60)


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt()])
def test_an_exit_in_a_shared_thread_ends_the_run(error: BaseException) -> None:
    def leave() -> None:
        raise error

    with pytest.raises(type(error)):
        run(shared(leave))


def test_a_budget_ends_jobs_that_share_threads() -> None:
    program = shared(nothing)
    session = Session(lm=lm(), quiet=True).limited(Budget(max_lm_calls=100))
    state = initial_state(program, session)
    traces = rollout(program, [Job(state, Example({"number": n})) for n in range(OBSERVED)], session)
    assert [trace.failure for trace in traces] == [None] * 36 + ["budget"] * 28


def test_a_job_that_hangs_in_a_shared_thread_is_abandoned_at_the_deadline() -> None:
    over = threading.Event()
    program = shared(lambda: over.wait(600))
    session = Session(lm=lm(), quiet=True).limited(Budget(max_seconds=0.5))
    state = initial_state(program, session)
    started = time.monotonic()
    traces = rollout(program, [Job(state, Example({"number": n})) for n in range(OBSERVED)], session)
    assert {trace.failure for trace in traces} == {"budget"}
    assert time.monotonic() - started < 10
    over.set()


class Server(LM):
    """An LM that schedules requests itself; it answers when all jobs have called it."""

    name, batched = "scripted", False

    def __init__(self, count: int) -> None:
        self.all = threading.Barrier(count)

    def complete(self, requests: Sequence[Request]) -> list[Completion | EngineError]:
        self.all.wait(60)
        return lm().complete(requests)

    def register_adapter(self, adapter: str, folder: Path) -> None:
        return


def test_an_lm_that_makes_its_own_batches_is_called_from_a_thread_for_each_job() -> None:
    run(shared(nothing), session=Session(lm=Server(OBSERVED), quiet=True))


def run_in_one_thread(work: Callable[[int, Callable[[], object]], object]) -> list[int]:
    """Runs work that shares a thread, given its number and a function that makes a call, with little patience."""
    record, session = WaitRecord(patience=0.1), Session(lm=lm(), quiet=True)
    record.add(jobs=10 * OBSERVED)
    request = Request((Message("user", "number: 1"),), Sampling(), WeightState(base="scripted"), 0)

    def run_job(number: int, complete: CompleteFn, search: SearchFn) -> int:
        work(number, lambda: complete("lm", request))
        return number

    return Wavefront(session, run_job, lambda number: -1, 4, lambda count: None, record).run()


def test_jobs_behind_one_that_begins_to_wait_are_run_again_in_threads_of_their_own() -> None:
    returned = threading.Event()

    def work(number: int, call: Callable[[], object]) -> None:
        call()
        if number == 0:
            assert returned.wait(60)
        call()
        if number == 3:
            returned.set()

    assert run_in_one_thread(work) == [0, 1, 2, 3]


def test_a_lock_that_late_jobs_hold_across_calls_ends_the_run_with_the_line() -> None:
    lock = threading.Lock()

    def work(number: int, call: Callable[[], object]) -> None:
        with lock:
            call()

    with pytest.raises(ModuleError, match=r"test_wavefront.py, line \d+.*shares_threads = False"):
        run_in_one_thread(work)


def test_jobs_of_a_module_that_says_so_never_share_threads() -> None:
    class Holding(Calls):
        shares_threads = False

    program = Holding(nothing)
    run(program)
    assert not shares_threads(program)


def test_jobs_in_one_thread_share_its_thread_local_values() -> None:
    local, seen = threading.local(), set[int]()

    def count() -> None:
        local.count = getattr(local, "count", 0) + 1
        seen.add(local.count)

    run(shared(count))
    assert max(seen) > 2  # a job that has a thread of its own counts its two calls


def test_a_trace_function_of_a_job_does_not_end_the_run() -> None:
    calls: list[str] = []

    def traced() -> None:
        sys.settrace(lambda frame, event, arg: calls.append(frame.f_code.co_name))
        nothing()
        sys.settrace(None)

    run(shared(traced))
    assert calls.count("nothing") == 2 * OBSERVED
