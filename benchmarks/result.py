"""``result.json``: what a benchmark run found, in a documented and versioned form (docs/results.md has the fields).

Apart from what `lmpipe.ledger.MEASURED` names it is the same, byte for byte, whenever a run is repeated.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any, Literal, final

from pydantic import BaseModel

SCHEMA = 3


@final
class Score(BaseModel):
    """A mean over seeds.

    Attributes:
        mean: None where there is nothing to report ("—").
        stderr: Standard error of the mean: over seeds, or over examples where there is one seed.
        n: Examples of all seeds together.
        per_seed: The mean of each seed, in the order of the run's seeds.
    """

    mean: float | None
    stderr: float | None
    n: int
    per_seed: list[float | None]

    @property
    def percent(self) -> str:
        """As ``"84.0 ± 2.1"``, or "—"."""
        if self.mean is None:
            return "—"
        return f"{100 * self.mean:.1f}" + ("" if self.stderr is None else f" ± {100 * self.stderr:.1f}")

    @classmethod
    def of(cls, scores: Sequence[Sequence[float] | None]) -> Score:
        """From the example scores of each seed; none for a seed that has nothing to report."""
        known = [list(values) for values in scores if values]
        means = [statistics.fmean(values) for values in known]
        spread = means if len(means) > 1 else known[0] if known else []
        stderr = statistics.stdev(spread) / math.sqrt(len(spread)) if len(spread) > 1 else None
        return cls(
            mean=round(statistics.fmean(means), 6) if means else None,
            stderr=None if stderr is None else round(stderr, 6),
            n=sum(map(len, known)),
            per_seed=[round(statistics.fmean(values), 6) if values else None for values in scores],
        )


@final
class Quality(BaseModel):
    """Means of one measure of the test runs: of all, and of those with the full score."""

    all: Score
    successful: Score


@final
class StageReport(BaseModel):
    """One stage of a strategy, over all seeds."""

    name: str
    status: Literal["done", "skipped", "mixed"]
    reason: str
    val: Score
    cost: dict[str, Any]
    per_seed: list[dict[str, Any]]


@final
class StrategyReport(BaseModel):
    """One row of the table."""

    strategy: str
    val: Score
    test: Score
    quality: dict[str, Quality] = {}
    stages: list[StageReport]
    cost: dict[str, Any]


@final
class Comparison(BaseModel):
    """A paired difference of test scores between two strategies, with its 95 % bootstrap interval."""

    strategy: str
    baseline: str
    difference: float
    low: float
    high: float


@final
class FindingReport(BaseModel):
    """Something that a researcher should know of the run with one seed; `lmpipe.optimizer.Finding` has the fields."""

    seed: int
    kind: str
    stage: str
    message: str
    advice: str


@final
class Result(BaseModel):
    """A whole run.

    Attributes:
        cost: Of all stages of all strategies and seeds, shared ones counted once, test evaluation left out.
    """

    schema_version: int = SCHEMA
    task: str
    lm: str
    seeds: list[int]
    config: dict[str, Any]
    versions: dict[str, str]
    strategies: list[StrategyReport]
    comparisons: list[Comparison]
    findings: list[FindingReport]
    cost: dict[str, Any]
