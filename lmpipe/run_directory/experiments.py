"""The experiments in a run directory: which results are seeds of one strategy, and which differ in more than the seed.

A script may be changed and run again in the same directory. Results are told apart by what their origins record.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import final

from lmpipe.ledger import Cost
from lmpipe.optimize_result import Origin
from lmpipe.run_directory.trials import Trial, work_of

ARROW = " -> "
_FIXED = ("program", "metric", "optimizer", "settings", "budget")  # digests that are the same on all seeds
_DRAWN = ("data", "start")  # digests that are the same on all seeds, or different on each
_WORDS = {"optimizer": "settings of the optimizer", "settings": "settings of the session", "start": "initial state"}


@final
@dataclass(frozen=True)
class Row:
    """The trials of one strategy that differ in their seeds only.

    Args:
        name: The strategy, with a number if there are several experiments with it.
        trials: The trials, each with another seed.
        before: The row of the experiment before this one with the same strategy.
    """

    name: str
    trials: tuple[Trial, ...]
    before: Row | None = None

    @property
    def difference(self) -> str:
        """A sentence about how the row differs from the one before it; empty if nothing is known."""
        changed = _changed(self.trials[0], self.before.trials[-1]) if self.before else []
        return (
            f"{self.name} differs from {self.before.name} in: {', '.join(changed)}" if self.before and changed else ""
        )

    @property
    def has_drawn_examples(self) -> bool:
        """Whether its seeds have different examples."""
        return len({_digests(trial, ("data",)) for trial in self.trials}) > 1

    def is_comparable(self, latest: Origin) -> bool:
        """Whether its scores can be compared with those of a result: of the same program, metric and examples."""
        origins = [trial.result.origin for trial in self.trials]
        names = ("program", "metric", "data")
        return any(one and all(one.digests.get(n) == latest.digests.get(n) for n in names) for one in origins)


def rows_of(trials: Sequence[Trial], taken: Collection[str] = ()) -> list[Row]:
    """Returns the trials by strategy and experiment.

    Later experiments are named ``p -> w (2)``. Where a run directory has several programs or LMs, rows are also named
    by these.

    Args:
        trials: The trials, in the order in which they were recorded.
        taken: Names that no row may have.
    """
    origins = [trial.result.origin for trial in trials]
    programs, lms = ({part(one) for one in origins if one} for part in (lambda one: one.program, lms_of))
    experiments: dict[str, list[list[Trial]]] = {}
    for trial in trials:
        name, origin = trial.strategy, trial.result.origin
        if origin is not None:
            name += f" of {origin.program}" * (len(programs) > 1) + f" on {lms_of(origin)}" * (len(lms) > 1)
        same_name = experiments.setdefault(name, [])
        row = next((row for row in same_name if _fits(trial, row)), None)
        if row is None:
            same_name.append([trial])
        else:
            row.append(trial)
    rows: list[Row] = []
    for name, same_name in experiments.items():
        names = (numbered for number in count(1) if (numbered := _numbered(name, number)) not in taken)
        before = None
        for row in same_name:
            number_name = next(names)
            before = Row(number_name, tuple(replace(trial, strategy=number_name) for trial in row), before)
            rows.append(before)
    return rows


def beginnings(trials: Sequence[Trial]) -> Iterator[Trial]:
    """Yields the strategies that the trials began with and that are not among the trials, each once."""
    done = {_last_work(trial) for trial in trials if trial.result.stages}
    for trial in trials:
        result, stages = trial.result, trial.result.stages
        for number, stage in enumerate(stages[:-1], 1):
            update = {
                "state": stage.result.state,
                "status": stage.result.status,
                "evaluation": stage.evaluation,
                "stages": stages[:number],
                "findings": (),
                "cost": sum((later.cost for later in stages[:number]), result.cost - _stages_cost(trial)),
                "origin": stage.result.origin or result.origin,
            }
            path = ARROW.join(one.name for one in stages[:number])
            beginning = Trial(path, trial.seed, result.model_copy(update=update))
            if (work := _last_work(beginning)) not in done:
                done.add(work)
                yield beginning


def lms_of(origin: Origin) -> str:
    """Returns the names of the LMs of a result."""
    return ", ".join(dict.fromkeys(origin.lm.values())) or "—"


def _numbered(name: str, number: int) -> str:
    return name if number == 1 else f"{name} ({number})"


def _last_work(trial: Trial) -> object:
    """Returns a value that is equal for two trials only if they end with the same recorded stages."""
    stages = trial.result.stages
    return trial.seed, tuple(stage.name for stage in stages), work_of(stages[-1])


def _stages_cost(trial: Trial) -> Cost:
    return sum((stage.cost for stage in trial.result.stages), Cost())


def _fits(trial: Trial, row: Sequence[Trial]) -> bool:
    """Whether a trial is of the same experiment as those of a row, and of another seed."""
    if any(trial.seed == other.seed or _fixed(trial) != _fixed(other) for other in row):
        return False
    drawn = [[_digests(one, (name,)) for one in (trial, *row)] for name in _DRAWN]
    return all(len(set(digests)) in (1, len(digests)) for digests in drawn)


def _fixed(trial: Trial) -> object:
    """Returns what is the same on all seeds of an experiment."""
    origin = trial.result.origin
    sizes = (origin.lm, origin.train, origin.val) if origin else None
    return len(trial.result.stages), sizes, _digests(trial, _FIXED)


def _digests(trial: Trial, names: Sequence[str]) -> tuple[str | None, ...]:
    origin = trial.result.origin
    return tuple(origin.digests.get(name) if origin else None for name in names)


def _changed(trial: Trial, other: Trial) -> list[str]:
    """Names what differs between two experiments. An optimizer with another metric is not named too."""
    names = [n for n in (*_FIXED, *_DRAWN) if _digests(trial, (n,)) != _digests(other, (n,))]
    return [_WORDS.get(name, name) for name in names if name != "optimizer" or "metric" not in names]
