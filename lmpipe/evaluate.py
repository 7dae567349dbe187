"""Evaluation: a score with its standard error, the scores behind it, and what went wrong on the way.

Evaluations are remembered in the session's store, so the same one is never made twice in a run.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from time import perf_counter
from typing import Any, final

from pydantic import BaseModel, ConfigDict

from lmpipe.data import Example
from lmpipe.hashing import describe, digest
from lmpipe.ledger import Cost
from lmpipe.metrics import Metric
from lmpipe.module import Module
from lmpipe.predict import predictors
from lmpipe.rollout import Job, cost_of, rollout
from lmpipe.session import Session
from lmpipe.state import ProgramState
from lmpipe.trace import Failure, Trace


@final
class Evaluation(BaseModel):
    """The scores of one state of a program on some examples.

    Attributes:
        scores: Example id → score; failed runs score 0.
        failures: Kind of failure (parse, engine, program) → how many examples it cost.
        first_error: The message of the first failed example, or none.
    """

    model_config = ConfigDict(frozen=True)

    scores: Mapping[str, float]
    failures: Mapping[Failure, int] = {}
    first_error: str | None = None

    @property
    def n(self) -> int:
        """Number of examples."""
        return len(self.scores)

    @cached_property
    def mean(self) -> float:
        """Mean score; not a number if there is no example."""
        return statistics.fmean(self.scores.values()) if self.scores else math.nan

    @cached_property
    def stderr(self) -> float:
        """Standard error of the mean over examples; not a number below two examples."""
        return statistics.stdev(self.scores.values()) / math.sqrt(self.n) if self.n > 1 else math.nan


def evaluate(
    program: Module,
    state: ProgramState,
    examples: Sequence[Example],
    metric: Metric,
    session: Session,
    *,
    title: str = "evaluation",
) -> Evaluation:
    """Scores one state of a program; see `evaluate_many`."""
    return evaluate_many(program, [state], examples, metric, session, title=title)[0]


def evaluate_many(
    program: Module,
    states: Sequence[ProgramState],
    examples: Sequence[Example],
    metric: Metric,
    session: Session,
    *,
    title: str = "evaluation",
) -> list[Evaluation]:
    """Scores several states of a program on the same examples, in one wavefront.

    Args:
        program: The program.
        states: What to score.
        examples: What to score it on; ids must differ.
        metric: Scores one prediction.
        session: LMs, seed and, if it has one, the store that remembers evaluations.
        title: What the progress bar says.

    Returns:
        An evaluation for every state, in order.
    """
    keys = {state: _key(program, state, examples, metric, session) for state in states}
    records: dict[ProgramState, Any] = {}
    if session.store:
        records = {state: session.store.get(key) for state, key in keys.items()}
    missing = [state for state in keys if records.get(state) is None]
    for record in filter(None, records.values()):
        session.ledger.add(Cost(**record["cost"]))
    started = perf_counter()
    traces = rollout(
        program, [Job(state, example) for state in missing for example in examples], session, metric, title=title
    )
    seconds = (perf_counter() - started) / max(len(missing), 1)
    for number, state in enumerate(missing):
        own = traces[number * len(examples) : (number + 1) * len(examples)]
        cost = replace(cost_of(own), seconds=seconds)
        records[state] = {"value": _summary(own).model_dump(mode="json"), "cost": cost.to_json()}
        if session.store:
            session.store.put(keys[state], records[state])
    return [Evaluation.model_validate(records[state]["value"]) for state in states]


def program_digest(program: Module) -> str:
    """Identity of a program by its class and the signatures, roles and sampling of its predictors."""
    parts = {path: [p.signature.digest, p.role, describe(p.sampling)] for path, p in predictors(program).items()}
    return digest([type(program).__qualname__, parts])


def _key(program: Module, state: ProgramState, examples: Sequence[Example], metric: Metric, session: Session) -> str:
    ids = [example.id for example in examples]
    parts = [program_digest(program), state.digest, ids, describe(metric), describe(session.sampling), session.seed]
    return "evaluation " + digest(parts)


def _summary(traces: Sequence[Trace]) -> Evaluation:
    failed = [trace for trace in traces if trace.failure is not None]
    return Evaluation(
        scores={trace.example.id: trace.score for trace in traces},
        failures=Counter(trace.failure for trace in failed if trace.failure),
        first_error=failed[0].error if failed else None,
    )
