"""What racing finds, and what it saves: ``python -m benchmarks.performance.racing [--json] [--run FOLDER]``.

A search is a table of scores, 9 candidates × 250 examples, as in the paper. Both searches read the same table: the
exhaustive one all of it, the race block by block. A race is right if the exhaustive mean of its winner equals the best.

Simulated tables are correlated Bernoulli outcomes: whether a candidate is right depends on its mean, on how difficult
the example is for all of them, and on chance (a probit model with one factor). What varies between the searches of the
realistic mixture, each uniformly:

- the mean of the candidates, 30 to 80 %: tasks that demonstrations can help with;
- the standard deviation of their means, 5 to 10 points. Random search over demonstrations exists because sets of them
  differ by that much: Zhao et al. 2021 (arXiv 2102.09690) and Lu et al. 2022 (arXiv 2104.08786) find more. So does
  Iris (docs/results.md), where the zero-shot candidate alone lies 34 points or more from the best one;
- the share of an outcome's variance that is the example's, 30 to 70 %: of two candidates that are right on one half of
  the examples, on 40 to 25 % of them only one is.

Not in the mixture are searches with a spread of 2 points, and those whose candidates are all alike. There no rule can
have both goals, since the best two of nine differ by a few examples of 250; the mean loss says what that costs: the
goal is half a point.

Real tables: a nearest-neighbour classifier that is shown drawn demonstrations of three data sets, whose candidates
differ only in the draw; and the searches that a run directory has recorded.
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

from benchmarks.performance.metrics_table import Figure, show
from optimizers.prompts.racing import Race, Rule, race

Table = NDArray[np.float64]
"""Candidates × examples."""

CANDIDATES, EXAMPLES = 9, 250
SAME_GOAL, SHARE_GOAL = 0.95, 0.5


@final
@dataclass(frozen=True)
class Family:
    """Simulated searches.

    Args:
        spread: Standard deviation of the candidates' means, from and to.
        level: Mean of the candidates' means, from and to.
        shared: Share of the variance of an outcome that is the example's, from and to.
    """

    spread: tuple[float, float]
    level: tuple[float, float] = (0.3, 0.8)
    shared: tuple[float, float] = (0.3, 0.7)

    def table(self, rng: np.random.Generator) -> Table:
        """One search."""
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
class Outcome:
    """What became of some searches.

    Attributes:
        same: Share of the races whose winner is an exhaustive winner.
        share: Share of the exhaustive rollouts that were made.
        loss: By how much, in exhaustive mean, the winners fall short of the best.
    """

    same: float
    share: float
    loss: float


def measure(tables: Iterator[Table], rule: Rule) -> Outcome:
    """Races on some tables."""
    rows = [_compare(table, rule) for table in tables]
    same, share, loss = (float(column) for column in np.mean(rows, axis=0))
    return Outcome(same, share, loss)


def _compare(table: Table, rule: Rule) -> tuple[bool, float, float]:
    means = table.mean(axis=1)
    ran = on_table(table, rule)
    if ran.winner is None:
        raise RuntimeError("a race without a budget has no winner")
    loss = float(means.max() - means[ran.winner])
    return loss < 1e-12, ran.rollouts / table.size, loss


def on_table(table: Table, rule: Rule) -> Race:
    """A race whose scores are known."""
    rows = table.tolist()
    return race(lambda alive, block: [rows[number][block] for number in alive], len(rows), len(rows[0]), rule)


def simulated(family: Family, searches: int, seed: int) -> Iterator[Table]:
    """Tables of a family."""
    rng = np.random.default_rng(seed)
    return (family.table(rng) for _ in range(searches))


def demonstrated(load: Callable[..., tuple[Table, Table]], searches: int, seed: int) -> Iterator[Table]:
    """Tables of nearest-neighbour classifiers; each candidate is shown two drawn demonstrations of each class."""
    inputs, labels = load(return_X_y=True)
    inputs = StandardScaler().fit_transform(inputs)
    rng = np.random.default_rng(seed)
    for _ in range(searches):
        order = rng.permutation(len(labels))
        val, train = order[: min(EXAMPLES, len(order) // 2)], order[min(EXAMPLES, len(order) // 2) :]
        rows = []
        for _ in range(CANDIDATES):
            shown = np.concatenate(
                [rng.choice(train[labels[train] == label], 2, replace=False) for label in np.unique(labels)]
            )
            model = KNeighborsClassifier(n_neighbors=1).fit(inputs[shown], labels[shown])
            rows.append(model.predict(inputs[val]) == labels[val])
        yield np.array(rows, dtype=np.float64)


def recorded(run: Path, orders: int, seed: int) -> Iterator[Table]:
    """Tables of the searches in a run's journal, each with its examples in several orders.

    Candidates that were scored together were recorded together.
    """
    rng = random.Random(seed)
    for line in (run / "journal.jsonl").read_text().splitlines():
        records: Mapping[str, dict[str, dict[str, dict[str, float]]]] = json.loads(line).get("records", {})
        rows = [record["value"]["scores"] for key, record in records.items() if key.startswith("evaluation ")]
        if len(rows) > 2:
            for _ in range(orders):
                order = rng.sample(sorted(rows[0]), len(rows[0]))
                yield np.array([[row[name] for name in order] for row in rows])


def figures_of(name: str, outcome: Outcome) -> dict[str, Figure]:
    """An outcome beside the goals."""
    return {
        f"{name}: same winner": Figure(round(outcome.same, 4), SAME_GOAL, "higher", ""),
        f"{name}: rollouts made": Figure(round(outcome.share, 4), SHARE_GOAL, "lower", ""),
        f"{name}: mean loss of score": Figure(round(outcome.loss, 5), 0.005, "lower", ""),
    }


def main(
    as_json: Annotated[bool, typer.Option("--json", help="End with one JSON object.")] = False,
    searches: Annotated[int, typer.Option(help="Simulated searches of each family.")] = 2000,
    run: Annotated[list[Path] | None, typer.Option(help="Run directory whose searches are raced too.")] = None,
    boundary: Annotated[float, typer.Option(help="Standard errors at which a candidate is dropped.")] = Rule.boundary,
) -> None:
    """Compares races with exhaustive searches."""
    rule = Rule(boundary=boundary)
    tables = {name: simulated(family, searches, seed) for seed, (name, family) in enumerate(FAMILIES.items())}
    for load in (load_digits, load_wine, load_breast_cancer):
        name = f"{load.__name__.removeprefix('load_').replace('_', ' ')}, drawn demonstrations"
        tables[name] = demonstrated(load, max(searches // 5, 1), seed=0)
    for folder in run or ():
        tables[f"searches of {folder}"] = recorded(folder, 100, seed=0)
    figures: dict[str, Figure] = {}
    for name, some in tables.items():
        figures |= figures_of(name, measure(some, rule))
    show(f"racing, {searches} searches of each family", figures, as_json=as_json)


if __name__ == "__main__":
    typer.run(main)
