"""Traces: step-by-step records of what a program did on one example.

Every step carries the path of its module, so steps are never matched to modules by position. This module knows nothing
about how programs are run.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, final

from lmpipe.data import Example, Prediction
from lmpipe.ledger import Cost, ModuleCost
from lmpipe.lm import Request, Usage
from lmpipe.retriever import Passage
from lmpipe.text.display import shown
from lmpipe.text.reprs import short_repr
from lmpipe.text.tables import Table

Failure = Literal["parse", "engine", "program", "metric", "budget"]
"""Cause that ended a rollout: an unreadable completion, the engine, the program's code, the metric, a spent budget."""


@final
@dataclass(frozen=True, slots=True)
class Step:
    """One LM call of a module.

    Attributes:
        path: Path of the module in its program, such as ``"hops.0.query"``.
        index: Number of this call among the calls of that module on the example, from 0.
        kind: Always ``"lm"``.
        inputs: Inputs of the module.
        outputs: The parsed outputs, or None if the call failed.
        request: The request as it was sent.
        text: The raw completion, or None if the engine failed.
        usage: Tokens of the call.
        error: Why the call failed, or None.
        replaced: Number of characters in the inputs and the completion that are not valid text and were replaced by
            U+FFFD.
    """

    path: str
    index: int
    kind: Literal["lm"]
    inputs: Mapping[str, Any]
    outputs: Mapping[str, Any] | None
    request: Request
    text: str | None
    usage: Usage
    error: str | None = None
    replaced: int = 0

    def __repr__(self) -> str:
        return short_repr(self, self.path, self.index, outputs=self.outputs, error=self.error)

    @property
    def counts(self) -> tuple[int, ...]:
        """Calls, tokens and failures of this step, as the fields of a `ModuleCost`."""
        usage, failed, answered = self.usage, self.error is not None, self.text is not None
        parse_errors, engine_errors = int(failed and answered), int(failed and not answered)
        tokens = usage.prompt_tokens, usage.completion_tokens
        return usage.calls, *tokens, parse_errors, engine_errors, 0, 0, self.replaced


@final
@dataclass(frozen=True, slots=True)
class RetrievalStep:
    """One search of a module. It becomes neither a demonstration nor a training row.

    Attributes:
        path: Path of the module in its program.
        index: Number of this call among the calls of that module on the example, from 0.
        kind: Always ``"retrieval"``.
        query: The query.
        k: Largest number of passages to return.
        passages: The passages, best first, or None if the search failed.
        error: Why the search failed, or None.
    """

    path: str
    index: int
    kind: Literal["retrieval"]
    query: str
    k: int
    passages: tuple[Passage, ...] | None
    error: str | None = None

    def __repr__(self) -> str:
        return short_repr(self, self.path, self.index, query=self.query, k=self.k, error=self.error)

    @property
    def inputs(self) -> Mapping[str, Any]:
        """Inputs of the module."""
        return {"query": self.query}

    @property
    def outputs(self) -> Mapping[str, Any] | None:
        """Outputs of the module: texts, ids and scores of the passages; None if the search failed."""
        if self.passages is None:
            return None
        return {
            "passages": [passage.text for passage in self.passages],
            "ids": [passage.id for passage in self.passages],
            "scores": [passage.score for passage in self.passages],
        }

    @property
    def counts(self) -> tuple[int, ...]:
        """One retrieval, and whether it failed, as the fields of a `ModuleCost`."""
        return 0, 0, 0, 0, int(self.error is not None), 0, 1, 0


TraceStep = Step | RetrievalStep
"""An entry of a trace."""


@final
@dataclass(frozen=True, slots=True)
class Trace:
    """Record of one rollout: what a program did on one example.

    Attributes:
        example: The example.
        state: Digest of the `ProgramState` that the program ran under.
        sample: Number of the repetition of this example, from 0.
        steps: LM calls and retrievals, in order.
        prediction: The program's prediction, or None if the rollout failed before it.
        score: Value of the metric; 0 if the rollout failed.
        failure: The cause that ended the rollout, or None if it succeeded.
        error: Error message of the failure, or None.
        feedback: Feedback that the metric returned with the score.
    """

    example: Example
    state: str
    sample: int
    steps: tuple[TraceStep, ...]
    prediction: Prediction | None
    score: float
    failure: Failure | None = None
    error: str | None = None
    feedback: str = ""

    def __repr__(self) -> str:
        return short_repr(
            self, self.example.id, score=self.score, steps=len(self.steps), prediction=self.prediction, error=self.error
        )

    def _repr_html_(self) -> str:
        """The steps as a table, for notebooks."""
        rows = [
            (step.path, shown(dict(step.inputs)), shown(dict(step.outputs)) if step.outputs else step.error or "")
            for step in self.steps
        ]
        return Table(("module", "inputs", "outputs"), rows, repr(self), [self.error] if self.error else []).html()

    @property
    def lm_steps(self) -> list[Step]:
        """The steps that are LM calls, in order. Optimizers learn from these."""
        return [step for step in self.steps if isinstance(step, Step)]


def module_costs(steps: Iterable[TraceStep]) -> dict[str, ModuleCost]:
    """Returns module path → cost of the calls of that module."""
    counts: dict[str, list[tuple[int, ...]]] = {}
    for step in steps:
        counts.setdefault(step.path, []).append(step.counts)
    return {path: ModuleCost(*map(sum, zip(*rows, strict=True))) for path, rows in counts.items()}


def total_cost(steps: Sequence[TraceStep]) -> Cost:
    """Returns calls, tokens and failed calls of some steps, in total and by module. Times are left at 0."""
    modules = module_costs(steps)
    total = ModuleCost.total(modules.values())
    return Cost(
        total.calls,
        sum(step.usage.cached for step in steps if isinstance(step, Step)),
        total.prompt_tokens,
        total.completion_tokens,
        parse_errors=total.parse_errors,
        engine_errors=total.engine_errors,
        gpu_seconds=sum(step.usage.gpu_seconds for step in steps if isinstance(step, Step)),
        retrievals=total.retrievals,
        replaced=total.replaced,
        modules=modules,
    )
