"""Racing against exhaustive search: ``python -m benchmarks.performance.racing [--json] [--run FOLDER]``.

A search is a table of scores, 9 candidates × 250 examples, as in the paper. Both searches read the same table: the
exhaustive one reads all of it, the race reads it block by block. A race is correct if the exhaustive mean of its winner
equals the best mean.

Simulated tables are correlated Bernoulli outcomes: whether a candidate is correct depends on its mean, on the
difficulty of the example, which is the same for all candidates, and on chance (a probit model with one factor). The
searches of the realistic mixture vary uniformly in:

- the mean of the candidates, 30 to 80 %: tasks that demonstrations can help with;
- the standard deviation of their means, 5 to 10 points. Random search over demonstrations is useful because sets of
  demonstrations differ by that much: Zhao et al. 2021 (arXiv 2102.09690) and Lu et al. 2022 (arXiv 2104.08786) found
  larger differences, and on Iris (docs/results.md) the zero-shot candidate is 34 points or more from the best one;
- the share of an outcome's variance that is due to the example, 30 to 70 %: if two candidates are each correct on half
  of the examples, exactly one of them is correct on 40 to 25 % of the examples.

The mixture does not include searches with a spread of 2 points, nor those whose candidates are all alike. No rule can
reach both goals on these, since the best two of nine candidates differ by a few examples of 250. The mean loss shows
what that costs; its goal is half a point.

Real tables are those of a nearest-neighbour classifier with demonstrations drawn from three data sets, whose candidates
differ only in the draw, and the searches that a run directory has recorded.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, final

import numpy as np
import typer
from numpy.typing import NDArray
from scipy.special import ndtri
from sklearn.datasets import load_breast_cancer, load_digits, load_wine
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler

from benchmarks.performance.metrics_table import Measurement, show_measurements
from optimizers.prompts.racing import EliminationRule, RaceResult, race

Table = NDArray[np.float64]
"""Candidates × examples."""

CANDIDATES, EXAMPLES = 9, 250
SAME_GOAL, SHARE_GOAL = 0.95, 0.5


@final
@dataclass(frozen=True)
class Family:
    """A family of simulated searches.

    Args:
        spread: Range of the standard deviation of the candidates' means.
        level: Range of the mean of the candidates' means.
        shared: Range of the share of an outcome's variance that is due to the example.
    """

    spread: tuple[float, float]
    level: tuple[float, float] = (0.3, 0.8)
    shared: tuple[float, float] = (0.3, 0.7)

    def table(self, rng: np.random.Generator) -> Table:
        """Draws the table of one search."""
        means = rng.uniform(*self.level) + rng.uniform(*self.spread) * rng.standard_normal((CANDIDATES, 1))
        shared = rng.uniform(*self.shared)
        difficulty = rng.standard_normal(EXAMPLES)
        chance = rng.standard_normal((CANDIDATES, EXAMPLES))
        ability = math.sqrt(shared) * difficulty + math.sqrt(1 - shared) * chance
        return np.array(ability < ndtri(np.clip(means, 0.01, 0.99)), dtype=np.float64)


REALISTIC = "realistic mixture"
FAMILIES: Mapping[str, Family] = {
    REALISTIC: Family((0.05, 0.1)),
    "spread 5 points": Family((0.05, 0.05)),
    "spread 10 points": Family((0.1, 0.1)),
    "spread 2 points": Family((0.02, 0.02)),
    "all alike": Family((0.0, 0.0)),
}


@final
@dataclass(frozen=True)
class RaceSummary:
    """Results of several races.

    Attributes:
        same: Share of the races whose winner is an exhaustive winner.
        share: Share of the exhaustive rollouts that the races made.
        loss: Mean difference between the best exhaustive mean and that of the winner.
    """

    same: float
    share: float
    loss: float


def measure(tables: Iterator[Table], rule: EliminationRule) -> RaceSummary:
    """Runs races on several tables."""
    rows = [_compare(table, rule) for table in tables]
    same, share, loss = (float(column) for column in np.mean(rows, axis=0))
    return RaceSummary(same, share, loss)


def _compare(table: Table, rule: EliminationRule) -> tuple[bool, float, float]:
    means = table.mean(axis=1)
    result = race_on_table(table, rule)
    if result.winner is None:
        raise RuntimeError("a race without a budget has no winner")
    loss = float(means.max() - means[result.winner])
    return loss < 1e-12, result.rollouts / table.size, loss


def race_on_table(table: Table, rule: EliminationRule) -> RaceResult:
    """Runs a race whose scores are read from a table."""
    rows = table.tolist()
    return race(lambda alive, block: [rows[number][block] for number in alive], len(rows), len(rows[0]), rule)


def simulated(family: Family, searches: int, seed: int) -> Iterator[Table]:
    """Draws tables of a family."""
    rng = np.random.default_rng(seed)
    return (family.table(rng) for _ in range(searches))


def demonstrated(load: Callable[..., tuple[Table, Table]], searches: int, seed: int) -> Iterator[Table]:
    """Yields tables of nearest-neighbour classifiers; each candidate has two random demonstrations of each class."""
    inputs, labels = load(return_X_y=True)
    inputs = StandardScaler().fit_transform(inputs)
    rng = np.random.default_rng(seed)
    for _ in range(searches):
        order = rng.permutation(len(labels))
        val, train = order[: min(EXAMPLES, len(order) // 2)], order[min(EXAMPLES, len(order) // 2) :]
        rows = []
        for _ in range(CANDIDATES):
            demos = np.concatenate(
                [rng.choice(train[labels[train] == label], 2, replace=False) for label in np.unique(labels)]
            )
            model = KNeighborsClassifier(n_neighbors=1).fit(inputs[demos], labels[demos])
            rows.append(model.predict(inputs[val]) == labels[val])
        yield np.array(rows, dtype=np.float64)


def recorded(run: Path, orders: int, seed: int) -> Iterator[Table]:
    """Yields tables of the searches in a run's journal, each with its examples in several orders.

    Candidates that were scored together are in one line of the journal.
    """
    rng = random.Random(seed)
    for line in (run / "journal.jsonl").read_text().splitlines():
        records: Mapping[str, dict[str, dict[str, dict[str, float]]]] = json.loads(line).get("records", {})
        rows = [record["value"]["scores"] for key, record in records.items() if key.startswith("evaluation ")]
        if len(rows) > 2:
            for _ in range(orders):
                order = rng.sample(sorted(rows[0]), len(rows[0]))
                yield np.array([[row[name] for name in order] for row in rows])


def measurements_of(name: str, summary: RaceSummary) -> dict[str, Measurement]:
    """Returns the results of several races with the goals."""
    return {
        f"{name}: same winner": Measurement(round(summary.same, 4), SAME_GOAL, "higher", ""),
        f"{name}: rollouts made": Measurement(round(summary.share, 4), SHARE_GOAL, "lower", ""),
        f"{name}: mean loss of score": Measurement(round(summary.loss, 5), 0.005, "lower", ""),
    }


def main(
    as_json: Annotated[bool, typer.Option("--json", help="End with one JSON object.")] = False,
    searches: Annotated[int, typer.Option(help="Simulated searches of each family.")] = 2000,
    run: Annotated[list[Path] | None, typer.Option(help="Run directory with recorded searches to race on too.")] = None,
    boundary: Annotated[
        float, typer.Option(help="Number of standard errors behind the best at which a candidate is dropped.")
    ] = EliminationRule.boundary,
) -> None:
    """Compares races with exhaustive searches."""
    rule = EliminationRule(boundary=boundary)
    tables = {name: simulated(family, searches, seed) for seed, (name, family) in enumerate(FAMILIES.items())}
    for load in (load_digits, load_wine, load_breast_cancer):
        name = f"{load.__name__.removeprefix('load_').replace('_', ' ')}, drawn demonstrations"
        tables[name] = demonstrated(load, max(searches // 5, 1), seed=0)
    for folder in run or ():
        tables[f"searches of {folder}"] = recorded(folder, 100, seed=0)
    measurements: dict[str, Measurement] = {}
    for name, family_tables in tables.items():
        measurements |= measurements_of(name, measure(family_tables, rule))
    show_measurements(f"racing, {searches} searches of each family", measurements, as_json=as_json)


if __name__ == "__main__":
    typer.run(main)
