"""What happened when a program ran on one example, step by step.

Every step carries the path of its module, so nothing ever matches steps to modules by position. Knows nothing of
how programs are run.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, final

from lmpipe.data import Example, Prediction
from lmpipe.ledger import Cost, ModuleCost
from lmpipe.lm import Request, Usage
from lmpipe.retriever import Passage

Failure = Literal["parse", "engine", "program", "metric", "budget"]
"""What ended a run: an unreadable completion, the engine, the program's own code, its metric, or a spent budget."""


@final
@dataclass(frozen=True, slots=True)
class Step:
    """One LM call of a module.

    Attributes:
        path: Path of the module in its program, such as ``"hops.0.query"``.
        index: Which call of that module it was within the example, from 0.
        kind: What was called.
        inputs: What the module was given.
        outputs: The parsed outputs; none if the call failed.
        request: Exactly what was sent.
        text: The raw completion; none if the engine failed.
        usage: Tokens of the call.
        error: Why the call failed, or none.
        replaced: How many characters of its inputs and its completion were no text and were replaced by U+FFFD.
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

    @property
    def cost(self) -> ModuleCost:
        """Calls, tokens and failures."""
        failed, unanswered = self.error is not None, self.text is None
        return ModuleCost(
            self.usage.calls,
            self.usage.prompt_tokens,
            self.usage.completion_tokens,
            parse_errors=int(failed and not unanswered),
            engine_errors=int(failed and unanswered),
            replaced=self.replaced,
        )


@final
@dataclass(frozen=True, slots=True)
class RetrievalStep:
    """One search of a module: neither a demonstration nor a training row can be made of it.

    Attributes:
        path: Path of the module in its program.
        index: Which call of that module it was within the example, from 0.
        kind: What was called.
        query: What was searched for.
        k: How many passages were asked for.
        passages: What was found, best first; none if the search failed.
        error: Why it failed, or none.
    """

    path: str
    index: int
    kind: Literal["retrieval"]
    query: str
    k: int
    passages: tuple[Passage, ...] | None
    error: str | None = None

    @property
    def inputs(self) -> Mapping[str, Any]:
        """What the module was given."""
        return {"query": self.query}

    @property
    def outputs(self) -> Mapping[str, Any] | None:
        """What the module gave: the texts of the passages, their ids and scores; none if the search failed."""
        if self.passages is None:
            return None
        found = self.passages
        return {
            "passages": [passage.text for passage in found],
            "ids": [passage.id for passage in found],
            "scores": [passage.score for passage in found],
        }

    @property
    def cost(self) -> ModuleCost:
        """One retrieval, and whether it failed."""
        return ModuleCost(retrievals=1, engine_errors=int(self.error is not None))


AnyStep = Step | RetrievalStep


@final
@dataclass(frozen=True, slots=True)
class Trace:
    """One run of a program on one example.

    Attributes:
        example: What it ran on.
        state: Digest of the `ProgramState` it ran under.
        sample: Which repetition of the example it was, from 0.
        steps: Its LM calls and retrievals, in order.
        prediction: What the program returned; none if it failed.
        score: The metric's value; 0 if the run failed.
        failure: What ended the run, or none if the metric scored it.
        error: The message that goes with `failure`.
        feedback: What the metric said of the prediction, beside the score.
    """

    example: Example
    state: str
    sample: int
    steps: tuple[AnyStep, ...]
    prediction: Prediction | None
    score: float
    failure: Failure | None = None
    error: str | None = None
    feedback: str = ""

    @property
    def lm_steps(self) -> list[Step]:
        """The steps that are LM calls, in order: what optimizers learn from."""
        return [step for step in self.steps if isinstance(step, Step)]


def module_costs(steps: Iterable[AnyStep]) -> dict[str, ModuleCost]:
    """Module path → what the calls of it cost."""
    costs: dict[str, list[ModuleCost]] = {}
    for step in steps:
        costs.setdefault(step.path, []).append(step.cost)
    return {path: ModuleCost.total(own) for path, own in costs.items()}


def total_cost(steps: Sequence[AnyStep]) -> Cost:
    """Calls, tokens and failed calls of some steps, by module too; no time."""
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
