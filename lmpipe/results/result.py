"""``result.json``: the results of a comparison of strategies, in a versioned format (see docs/benchmarks.md).

A repeated run writes the same bytes, except for the measured fields of costs (`lmpipe.ledger.MEASURED`) and the
checksum.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, final

from pydantic import AfterValidator, BaseModel, Field, ValidationError

from lmpipe.errors import ConfigError
from lmpipe.ledger import Cost, ModuleCost
from lmpipe.results.saved import SavedSession
from lmpipe.state import ProgramState
from lmpipe.storage.checksummed_json import read_checksummed, write_checksummed
from lmpipe.text.figures import decimals, name_seeds, percent, points

_SCHEMA_VERSION = 5


def _as_cost(value: dict[str, Any]) -> dict[str, Any]:
    """Checks that a value is the JSON of a `Cost`.

    Raises:
        ValueError: If the value is not a cost.
    """
    try:
        if Cost.from_json(value).to_json().keys() != value.keys():
            raise ValueError(f"fields of a cost are missing; its fields are {', '.join(value)}")
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"it is not a cost: {error}") from error
    return value


CostFields = Annotated[dict[str, Any], AfterValidator(_as_cost)]
"""A cost as plain JSON, as `lmpipe.ledger.Cost.to_json` returns it."""


@final
class Score(BaseModel):
    """A mean over seeds.

    Attributes:
        mean: The mean; None (shown as "—") if there are no scores.
        stderr: Standard error of the mean: over seeds, or over examples if there is one seed.
        low: Lower end of the 95 % bootstrap interval over seeds × examples.
        high: Upper end of this interval.
        n: Number of examples, summed over seeds.
        per_seed: Mean of each seed, in the order of the run's seeds.
    """

    mean: float | None
    stderr: float | None
    low: float | None
    high: float | None
    n: int
    per_seed: list[float | None]

    @property
    def decimals(self) -> int:
        """Number of decimals of the score in percent that its interval carries (`lmpipe.text.figures`)."""
        return 0 if self.low is None or self.high is None else decimals(100 * self.low, 100 * self.high)

    @property
    def percent(self) -> str:
        """The mean in percent with its interval, as ``"84 (79–88)"`` or ``"84.2 (83.4–85.1)"``, or "—"."""
        if self.mean is None or self.low is None or self.high is None:
            return "—"
        return percent(self.mean, self.low, self.high, unit="")


@final
class MeasureReport(BaseModel):
    """Means of one measure of the test examples.

    Attributes:
        all: Mean over all examples.
        successful: Mean over examples with a score of 1.
    """

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
        """A clause that says on which seeds the stage was skipped, and why; empty if it never was."""
        seeds = [entry["seed"] for entry in self.per_seed if entry["status"] == "skipped"]
        return f"{self.name} skipped on {name_seeds(seeds)}: {self.reason}" if seeds else ""


@final
class StrategyOutcome(BaseModel):
    """The outcome of a strategy on one seed.

    Attributes:
        seed: The seed.
        state: Final prompts and weights; an adapter is in ``blobs/DIGEST`` of the run directory.
        modules: Module path → calls, tokens and failures of the test evaluation. Here and in `traces`, this is the
            validation evaluation if the run has no ``result.json``.
        traces: Digest of the trace log of the test evaluation, which is in ``blobs/DIGEST`` of the run directory
            (`lmpipe.results.trace_log`).
        cost: Cost of the stages.
        session: LMs and settings that the state was found with, if the run is not a benchmark's, whose settings are in
            `Result.config`.
    """

    seed: int
    state: ProgramState
    modules: dict[str, ModuleCost]
    traces: str | None
    cost: CostFields
    session: SavedSession | None = Field(default=None, exclude=True)


@final
class StrategyReport(BaseModel):
    """The results of one strategy: a row of the table."""

    strategy: str
    val: Score
    test: Score
    quality: dict[str, MeasureReport] = {}
    stages: list[StageReport]
    outcomes: list[StrategyOutcome]
    cost: CostFields

    def test_score(self, seed: int) -> float | None:
        """Returns the mean test score of a seed of this strategy; None if there is none."""
        return self.test.per_seed[[outcome.seed for outcome in self.outcomes].index(seed)]

    @property
    def skips(self) -> list[str]:
        """Clauses that say which stages were skipped, on which seeds, and why."""
        return list(dict.fromkeys(stage.skips for stage in self.stages if stage.skips))


@final
class Comparison(BaseModel):
    """A paired difference of test scores between two strategies.

    Attributes:
        strategy: Strategy that is compared with the baseline.
        baseline: Strategy whose scores are subtracted.
        difference: Mean difference.
        low: Lower end of the 95 % bootstrap interval of the difference.
        high: Upper end of this interval.
        p: p-value of a two-sided paired permutation test.
        p_holm: p-value with Holm's correction for all tests of the run; None if the baseline is not part of them.
        wins: Number of pairs of seed and example on which the strategy scored higher.
        losses: Number of pairs on which it scored lower.
        ties: Number of pairs with the same score.
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

    def format_points(self, per: float = 1) -> str:
        """Formats the difference and its interval in points, as ``"+5 (+1 to +10)"``, with the decimals it carries.

        Args:
            per: Divisor of all three numbers.
        """
        return points(self.difference / per, self.low / per, self.high / per)


@final
class FindingReport(BaseModel):
    """A finding about the run with one seed; for the other fields, see `lmpipe.optimize_result.Finding`."""

    seed: int
    kind: str
    stage: str
    message: str
    advice: str


@final
class Result(BaseModel):
    """The results of a whole run.

    Attributes:
        cost: Cost of all strategies and seeds, without the test evaluations; shared stages are counted once.
    """

    schema_version: int = _SCHEMA_VERSION
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
        """Names of the measures of the test examples, besides the score."""
        return list(dict.fromkeys(name for row in self.strategies for name in row.quality))

    @property
    def skips(self) -> list[str]:
        """Clauses about skipped stages, each after the names of its strategies."""
        notes = dict.fromkeys(note for row in self.strategies for note in row.skips)
        strategies = {note: [row.strategy for row in self.strategies if note in row.skips] for note in notes}
        return [f"{', '.join(names)}: {note}" for note, names in strategies.items()]

    def write(self, path: Path) -> None:
        """Writes the results to a file with a checksum.

        Raises:
            StoreError: If the file cannot be written.
        """
        write_checksummed(path, self.model_dump(mode="json"))

    @classmethod
    def read(cls, path: Path) -> Result:
        """Reads a file that `write` wrote.

        Raises:
            ConfigError: If another version of lmpipe wrote the file.
            CorruptBlob: If the file is damaged or was edited.
        """
        values = read_checksummed(path)
        if (version := values.get("schema_version")) != _SCHEMA_VERSION:
            raise ConfigError(
                f"{path} is of another version: its schema_version is {version!r}, and this lmpipe reads "
                f"{_SCHEMA_VERSION}; run the benchmark again"
            )
        try:
            return cls.model_validate(values)
        except (ValidationError, RecursionError) as error:
            raise ConfigError(f"{path} is of another version: {error}; run the benchmark again") from error
