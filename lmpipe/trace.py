"""What happened when a program ran on one example, step by step.

Every step carries the path of its module, so nothing ever matches steps to modules by position. Knows nothing of
how programs are run.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, final

from lmpipe.data import Example, Prediction
from lmpipe.ledger import ModuleCost
from lmpipe.lm import Request, Usage

Failure = Literal["parse", "engine", "program", "budget"]


@final
@dataclass(frozen=True, slots=True)
class Step:
    """One call of a module.

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


@final
@dataclass(frozen=True, slots=True)
class Trace:
    """One run of a program on one example.

    Attributes:
        example: What it ran on.
        state: Digest of the `ProgramState` it ran under.
        sample: Which repetition of the example it was, from 0.
        steps: Its module calls, in order.
        prediction: What the program returned; none if it failed.
        score: The metric's value; 0 if the run failed.
        failure: What ended the run: an unreadable completion, the engine, the program's own code, or a spent budget.
        error: The message that goes with `failure`.
        feedback: What the metric said of the prediction, beside the score.
    """

    example: Example
    state: str
    sample: int
    steps: tuple[Step, ...]
    prediction: Prediction | None
    score: float
    failure: Failure | None = None
    error: str | None = None
    feedback: str = ""


def module_costs(steps: Iterable[Step]) -> dict[str, ModuleCost]:
    """Module path → what the calls of it cost."""
    sums: dict[str, list[int]] = {}  # plain numbers: a search has thousands of steps
    for step in steps:
        failed, unanswered, usage = step.error is not None, step.text is None, step.usage
        total = sums.setdefault(step.path, [0] * 5)
        total[0] += usage.calls
        total[1] += usage.prompt_tokens
        total[2] += usage.completion_tokens
        total[3] += failed and not unanswered
        total[4] += failed and unanswered
    return {path: ModuleCost(*total) for path, total in sums.items()}
