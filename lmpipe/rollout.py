"""The wavefront: many runs of a program at once, their LM calls answered in batches.

Every job runs in a thread with a context of its own and blocks at its LM calls. When all live jobs are blocked, the
waiting calls go out as one batch, sorted by job, so what is in a batch depends neither on the number of cores nor
on timing. A job that spends its time elsewhere (a tool, an HTTP call) is waited for only while anything else
moves; then the others go on without it. An LM that makes its own batches, as a server does, is asked at once, from
the job's own thread.

This is the one place that turns an exception into data: whatever ends one example becomes a trace with a failure.
Knows nothing of signatures or prompts.
"""

from __future__ import annotations

import contextvars
import logging
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import final

from lmpipe.data import Example, Prediction, snapshot
from lmpipe.errors import ConfigError, EngineError, ModuleError, ParseError, SessionError
from lmpipe.hashing import derive_seed
from lmpipe.ledger import Cost
from lmpipe.lm import LM, Completion, Request
from lmpipe.metrics import Metric
from lmpipe.module import Module
from lmpipe.session import Run, Session
from lmpipe.state import ProgramState
from lmpipe.trace import Failure, Trace, total_usage

logger = logging.getLogger(__name__)

_TICK = 0.02  # seconds between looks at jobs that neither finish nor call
_QUIET_TICKS = 10  # looks without any movement after which the waiting calls go out


@final
@dataclass(frozen=True)
class Job:
    """One run to make.

    Args:
        state: Prompts and weights to run under.
        example: What to run on.
        sample: Number of the repetition; each draws from seeds of its own.
        temperature: Overrides the sampling of every call.
    """

    state: ProgramState
    example: Example
    sample: int = 0
    temperature: float | None = None


def rollout(
    program: Module, jobs: Sequence[Job], session: Session, metric: Metric | None = None, *, title: str = "rollouts"
) -> list[Trace]:
    """Runs a program on every job and scores what comes out.

    Args:
        program: The program.
        jobs: States and examples, in any mixture.
        session: LMs, seed and limits.
        metric: Scores a prediction; without one every finished run scores 0.
        title: What the progress bar says.

    Returns:
        A trace for every job, in order. A job that failed has score 0 and says why.

    Raises:
        EngineError: If an engine as a whole failed.
        ConfigError, SessionError, ModuleError: If the program cannot run like this on any example.
    """
    for state in {job.state for job in jobs}:
        session.prepare(state)
    with session.track(title, len(jobs)) as advance:
        wavefront = _Wavefront(program, jobs, session, metric, advance)
        traces = wavefront.run()
    session.ledger.add(cost_of(traces))
    _warn_of_broken_code(traces)
    return traces


def cost_of(traces: Sequence[Trace]) -> Cost:
    """Calls, tokens and failed calls of some traces; no time."""
    usage = total_usage(traces)
    failed = [step for trace in traces for step in trace.steps if step.error is not None]
    return Cost(
        usage.calls,
        usage.prompt_tokens,
        usage.completion_tokens,
        parse_errors=sum(step.text is not None for step in failed),
        engine_errors=sum(step.text is None for step in failed),
    )


def _warn_of_broken_code(traces: Sequence[Trace]) -> None:
    broken = [trace for trace in traces if trace.failure == "program"]
    if broken:
        example, error = broken[0].example.id, broken[0].error
        logger.warning(
            "the program failed in %d of %d runs; on example %s: %s", len(broken), len(traces), example, error
        )


@final
@dataclass
class _Call:
    role: str
    request: Request
    answered: threading.Lock = field(default_factory=threading.Lock)
    answer: Completion | EngineError | None = None


@final
class _Abandoned(BaseException):
    """Ends the job threads when the rollout itself has ended; no user code should catch it."""


@final
class _Wavefront:
    def __init__(
        self,
        program: Module,
        jobs: Sequence[Job],
        session: Session,
        metric: Metric | None,
        advance: Callable[[int], None],
    ) -> None:
        self._program, self._session, self._metric, self._advance = program, session, metric, advance
        self._jobs = jobs
        self._context = contextvars.copy_context()
        self._paths = program.paths()
        self._traces: list[Trace | None] = [None] * len(jobs)
        self._pending = deque(range(len(jobs)))
        self._moved = threading.Condition()
        self._waiting: dict[int, _Call] = {}
        self._calling: set[int] = set()
        self._running = min(len(jobs), session.max_concurrency)  # workers that are neither waiting nor gone
        self._moves = 0  # counts everything that job threads do, to see whether any still moves
        self._error: BaseException | None = None
        self._ended = False

    def run(self) -> list[Trace]:
        workers = [threading.Thread(target=self._work, daemon=True) for _ in range(self._running)]
        for worker in workers:
            worker.start()
        try:
            while batch := self._next_batch():
                self._answer(batch)
        finally:
            self._end()
        for worker in workers:
            worker.join()
        return [trace for trace in self._traces if trace is not None]

    def _next_batch(self) -> dict[int, _Call]:
        """Waits until every live job waits, or until nothing has moved for a while; empty when all are done."""
        with self._moved:
            quiet, seen = 0, self._moves
            while self._running and not self._error and not (self._waiting and quiet >= _QUIET_TICKS):
                self._moved.wait(_TICK)
                quiet, seen = (quiet + 1 if self._moves == seen else 0), self._moves
            if self._error:
                raise self._error
            batch, self._waiting = dict(sorted(self._waiting.items())), {}
            self._running += len(batch)
            return batch

    def _answer(self, batch: Mapping[int, _Call]) -> None:
        try:
            for role in sorted({call.role for call in batch.values()}):
                calls = [call for call in batch.values() if call.role == role]
                answers = self._session.lm_of(role).complete([call.request for call in calls])
                if len(answers) != len(calls):
                    raise EngineError(f"the LM of role {role!r} gave {len(answers)} answers to {len(calls)} requests")
                for call, answer in zip(calls, answers, strict=True):
                    call.answer = answer
        finally:
            for call in batch.values():
                call.answered.release()

    def _end(self) -> None:
        with self._moved:
            self._ended = True
            for call in self._waiting.values():
                call.answered.release()

    def _work(self) -> None:
        """A worker thread: takes jobs until none is left."""
        try:
            while (number := self._take()) is not None:
                self._traces[number] = self._context.copy().run(self._job, number)
                self._advance(1)
        except _Abandoned:
            return
        except BaseException as error:  # not of one example: the run ends with it
            self._error = error
        finally:
            with self._moved:
                self._moves += 1
                self._running -= 1
                self._moved.notify()

    def _take(self) -> int | None:
        with self._moved:
            self._moves += 1
            return self._pending.popleft() if self._pending and not self._ended else None

    def _job(self, number: int) -> Trace:
        job = self._jobs[number]
        seed = derive_seed(self._session.seed, job.example.id, job.sample)

        def answer(role: str, request: Request) -> Completion | EngineError:
            return self._call(number, role, request)

        run = Run(self._session, job.state, self._paths, seed, answer, job.temperature)
        prediction: Prediction | None = None
        score, failure, message = 0.0, None, None
        try:
            with run.active():
                prediction = self._program(**snapshot(dict(job.example.inputs)))
            score = float(self._metric(job.example, prediction)) if self._metric else 0.0
        except (ConfigError, SessionError, ModuleError):  # a fault of the program, not of this example
            raise
        except Exception as error:  # the boundary: one example's failure is data
            failure, message = _classify(error), f"{type(error).__name__}: {error}"
        return Trace(job.example, job.state.digest, job.sample, tuple(run.steps), prediction, score, failure, message)

    def _call(self, number: int, role: str, request: Request) -> Completion | EngineError:
        lm = self._session.lm_of(role)
        return self._park(number, role, request) if lm.batched else self._ask(number, lm, request)

    def _ask(self, number: int, lm: LM, request: Request) -> Completion | EngineError:
        """Asks at once; what the LM raises ends the run."""
        with self._moved:
            self._begin_call(number)
        try:
            return lm.complete([request])[0]
        except BaseException as error:
            self._error = error
            raise _Abandoned from error
        finally:
            self._calling.discard(number)

    def _begin_call(self, number: int) -> None:
        if self._ended:
            raise _Abandoned
        if number in self._calling:
            raise ModuleError("forward() called two modules at once; examples run at once, their calls in order")
        self._calling.add(number)
        self._moves += 1

    def _park(self, number: int, role: str, request: Request) -> Completion | EngineError:
        """Waits with the other jobs for the next batch."""
        call = _Call(role, request)
        call.answered.acquire()
        with self._moved:
            self._begin_call(number)
            self._waiting[number] = call
            self._running -= 1
            if not self._running:
                self._moved.notify()
        call.answered.acquire()
        self._calling.discard(number)
        if call.answer is None:
            raise _Abandoned
        return call.answer


def _classify(error: Exception) -> Failure:
    if isinstance(error, ParseError):
        return "parse"
    return "engine" if isinstance(error, EngineError) else "program"
