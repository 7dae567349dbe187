"""``result.json``: what a comparison of strategies found, in a documented and versioned form (docs/benchmarks.md).

Apart from what `lmpipe.ledger.MEASURED` names, and from the checksum over all of it, it is the same, byte for byte,
whenever a run is repeated.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, final

from pydantic import AfterValidator, BaseModel, ValidationError

from lmpipe.errors import ConfigError
from lmpipe.ledger import Cost, ModuleCost
from lmpipe.state import ProgramState
from lmpipe.storage.checksummed_json import read_checksummed, write_checksummed

SCHEMA = 5


def _as_cost(value: dict[str, Any]) -> dict[str, Any]:
    """Raises:
    ValueError: If it is not the JSON of a `Cost`.
    """
    try:
        if Cost.from_json(value).to_json().keys() != value.keys():
            raise ValueError(f"fields of a cost are missing; there are {', '.join(value)}")
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"it is no cost: {error}") from error
    return value


CostFields = Annotated[dict[str, Any], AfterValidator(_as_cost)]
"""`lmpipe.ledger.Cost.to_json`."""


@final
class Score(BaseModel):
    """A mean over seeds.

    Attributes:
        mean: None where there is nothing to report ("—").
        stderr: Standard error of the mean: over seeds, or over examples where there is one seed.
        low: Where its 95 % bootstrap interval over seeds × examples begins.
        high: Where that ends.
        n: Examples of all seeds together.
        per_seed: The mean of each seed, in the order of the run's seeds.
    """

    mean: float | None
    stderr: float | None
    low: float | None
    high: float | None
    n: int
    per_seed: list[float | None]

    @property
    def percent(self) -> str:
        """As ``"84.0 (79.5–88.2)"``, or "—"."""
        if self.mean is None or self.low is None or self.high is None:
            return "—"
        return f"{100 * self.mean:.1f} ({100 * self.low:.1f}–{100 * self.high:.1f})"


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
    cost: CostFields
    per_seed: list[dict[str, Any]]

    @property
    def skips(self) -> str:
        """On which seeds it had nothing to work with, and why, in words; empty if it always had."""
        seeds = [str(own["seed"]) for own in self.per_seed if own["status"] == "skipped"]
        return f"{self.name} skipped on seed {', '.join(seeds)}: {self.reason}" if seeds else ""


@final
class StrategyOutcome(BaseModel):
    """What a strategy ended in on one seed.

    Attributes:
        seed: Which.
        state: Prompts and weights; an adapter is ``blobs/DIGEST`` of the run directory.
        modules: Module path → calls, tokens and failures of the test runs.
        traces: The log of the test runs, ``blobs/DIGEST`` of the run directory (`lmpipe.results.trace_log`).
        cost: Of its stages.
    """

    seed: int
    state: ProgramState
    modules: dict[str, ModuleCost]
    traces: str | None
    cost: CostFields


@final
class StrategyReport(BaseModel):
    """One row of the table."""

    strategy: str
    val: Score
    test: Score
    quality: dict[str, Quality] = {}
    stages: list[StageReport]
    outcomes: list[StrategyOutcome]
    cost: CostFields

    @property
    def skips(self) -> list[str]:
        """Which stages had nothing to work with, on which seeds and why, in words."""
        return list(dict.fromkeys(stage.skips for stage in self.stages if stage.skips))


@final
class Comparison(BaseModel):
    """A paired difference of test scores between two strategies.

    Attributes:
        strategy: The one.
        baseline: The other, which is subtracted.
        difference: Mean.
        low: Where its 95 % bootstrap interval begins.
        high: Where that ends.
        p: Of a two-sided paired permutation test.
        p_holm: The same, corrected for all tests of the run (Holm); none where the baseline is none of them.
        wins: Pairs of seed and example in which the strategy scored higher.
        losses: In which it scored lower.
        ties: In which both scored the same.
    """

    strategy: str
    baseline: str
    difference: float
    low: float
    high: float
    p: float
    p_holm: float | None = None
    wins: int
    losses: int
    ties: int

    def format_points(self, per: float = 1, digits: int = 1) -> str:
        """The difference and its interval in points, as ``"+5.0 (+1.0 to +10.0)"``.

        Args:
            per: What they are divided by.
            digits: Behind the point.
        """
        mean, low, high = (f"{100 * value / per:+,.{digits}f}" for value in (self.difference, self.low, self.high))
        return f"{mean} ({low} to {high})"


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
        cost: Of all strategies and seeds, what they share counted once, test evaluation left out.
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
    cost: CostFields

    @property
    def measures(self) -> list[str]:
        """Names of what was measured of the test runs, beside the score."""
        return list(dict.fromkeys(name for row in self.strategies for name in row.quality))

    @property
    def skips(self) -> list[str]:
        """Those of all strategies, each after the strategies that it is about."""
        notes = dict.fromkeys(note for row in self.strategies for note in row.skips)
        about = {note: [row.strategy for row in self.strategies if note in row.skips] for note in notes}
        return [f"{', '.join(rows)}: {note}" for note, rows in about.items()]

    def write(self, path: Path) -> None:
        """Writes a file with a checksum.

        Raises:
            StoreError: If it cannot be written.
        """
        write_checksummed(path, self.model_dump(mode="json"))

    @classmethod
    def read(cls, path: Path) -> Result:
        """Reads a file that `write` wrote.

        Raises:
            ConfigError: If it is of another version.
            CorruptBlob: If it is damaged, or was edited.
        """
        values = read_checksummed(path)
        if (found := values.get("schema_version")) != SCHEMA:
            raise ConfigError(
                f"{path} is of another version: its schema_version is {found!r}, and this lmpipe reads {SCHEMA}; run "
                "it again"
            )
        try:
            return cls.model_validate(values)
        except (ValidationError, RecursionError) as error:
            raise ConfigError(f"{path} is of another version: {error}; run it again") from error
