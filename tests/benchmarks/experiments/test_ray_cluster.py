"""Cells on a real Ray with two workers, one of which is killed: the result equals that of one process."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, final

import pytest

from benchmarks.experiments.cells import Cell, Cluster, cells_of
from benchmarks.experiments.experiment import run_experiment
from benchmarks.experiments.models import ModelSpec
from benchmarks.experiments.ray_cluster import connected, run_on_cluster
from benchmarks.experiments.run import run
from benchmarks.experiments.settings import Settings
from benchmarks.experiments.spec import ExperimentSpec
from benchmarks.experiments.strategies import table_rows
from benchmarks.experiments.task import Task
from benchmarks.tasks.iris import IrisTask
from lmpipe import LM, Completion, EngineError, Example, Metric, Module, Predict, Request, RunStore
from lmpipe.engines.local import LocalLM
from lmpipe.engines.training import TuningConfig
from lmpipe.errors import ClusterError, ConfigError, StoreError
from lmpipe.events import EpochEnded, Event, StageEnded
from lmpipe.ledger import MEASURED
from lmpipe.results.result import Result
from optimizers import Strategy
from tests.killable import even_length
from tests.processes import run as run_python

STRATEGIES = ("vanilla", "p", "w*2")
HERE = Cluster("local", cores=2)


@final
@dataclass(frozen=True)
class Numbers(Task):
    """A task of numbers, in which every answer of even length is correct."""

    name: str = "numbers"

    def examples(self) -> Sequence[Example]:
        return [Example({"number": number}, {"answer": ""}, id=str(number)) for number in range(20)]

    def program(self) -> Module:
        return Predict("number: int -> answer")

    def metric(self) -> Metric:
        return even_length


@final
class Deadly(LM):
    """An LM that kills its process once, before the first request on an adapter."""

    def __init__(self, lm: LM, killed: Path) -> None:
        self._lm, self._killed = lm, killed

    @property
    def name(self) -> str:
        return self._lm.name

    def register_adapter(self, adapter: str, folder: Path) -> None:
        self._lm.register_adapter(adapter, folder)

    def complete(self, requests: Sequence[Request]) -> list[Completion | EngineError]:
        if any(request.weights.adapter for request in requests) and not self._killed.exists():
            self._killed.write_text(str(os.getpid()))
            os.kill(os.getpid(), signal.SIGKILL)
        return self._lm.complete(requests)


@final
@dataclass(frozen=True)
class CountedLoads:
    """Loads the tiny LM, and adds a line to a file each time."""

    path: Path
    notes: Path

    @property
    def identity(self) -> dict[str, str]:
        return {"lm": "tiny"}

    def load(self, *, to_train: bool, num_processes: int = 1) -> tuple[LM, LocalLM]:
        with (self.notes / "loads").open("a") as loads:
            loads.write(f"{os.getpid()}\n")
        (self.notes / "processes").write_text(str(num_processes))
        lm = LocalLM.from_pretrained(str(self.path), name="tiny")
        return Deadly(lm, self.notes / "killed"), lm

    @property
    def loads(self) -> list[int]:
        """Ids of the processes that loaded the LM, in order."""
        path = self.notes / "loads"
        return list(map(int, path.read_text().split())) if path.exists() else []


@pytest.fixture(scope="module")
def workers() -> Iterator[Cluster]:
    with connected(HERE):
        yield HERE


@pytest.fixture
def spec(tiny_folder: Path, tmp_path: Path) -> ExperimentSpec:
    settings = Settings(
        train=8,
        val=4,
        test=4,
        temperature=1.0,
        max_tokens=6,
        num_candidate_programs=1,
        num_train_scored=2,
        tuning=TuningConfig(rank=2, alpha=4, learning_rate=0.01, epochs=2),
    )
    models = CountedLoads(tiny_folder, tmp_path)
    return ExperimentSpec(Numbers(), models, settings, table_rows(STRATEGIES), (0,), tmp_path / "out", folder=tmp_path)


def without_measured(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: without_measured(item) for name, item in value.items() if name not in MEASURED}
    return list(map(without_measured, value)) if isinstance(value, list) else value


def test_the_result_of_two_workers_one_of_which_is_killed_is_that_of_one_process(
    workers: Cluster, spec: ExperimentSpec
) -> None:
    assert isinstance(spec.models, CountedLoads)
    notes, told = spec.models.notes, list[Event]()
    with closing(RunStore(spec.out, spec.config)) as store:
        spread = run_on_cluster(spec, store, workers, callbacks=[told.append])
    first = spec.models.loads
    killed = int((notes / "killed").read_text())
    assert killed in first
    assert killed != os.getpid() not in first
    assert (notes / "processes").read_text() == "2"  # each of the two takes half of what one would
    assert len(first) == len(cells_of(spec)) + 1 + 1  # the cells, the one that was killed again, and the summary

    heard = list[Event]()
    with closing(RunStore(notes / "alone", spec.config)) as store:
        alone = run(spec, spec.load(), store, None, (heard.append,))
    mine, theirs = (json.dumps(without_measured(json.loads(one.model_dump_json()))) for one in (spread, alone))
    assert mine == theirs
    assert alone.strategies[2].stages[1].status == "done"
    # the cell "w" was killed between its training and its scores, and did not train again
    assert {event.stage for event in told if isinstance(event, EpochEnded)} == {"w -> w"}
    assert {event.stage for event in heard if isinstance(event, EpochEnded)} == {"w", "w -> w"}
    ended = {(event.stage, event.score) for event in told if isinstance(event, StageEnded)}
    assert ended == {(event.stage, event.score) for event in heard if isinstance(event, StageEnded)}

    with closing(RunStore(spec.out, spec.config)) as store:  # once more: only the summary loads the LM
        again = run_on_cluster(spec, store, workers)
    assert again == spread
    assert len(spec.models.loads) == len(first) + 2


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"settings": Settings(train=60)}, ConfigError, "^cell 'vanilla' of seed 0: numbers has 20 different examples"),
        ({"versions": {"python": "2.7"}}, ClusterError, "^cell 'vanilla' of seed 0: .* and the driver has .*2.7"),
        ({"folder": Path("/nowhere")}, ClusterError, "^cell 'vanilla' of seed 0: .* does not see /nowhere and .*mount"),
        (
            {"settings": Settings(train=8, val=4, test=4, max_tokens=5)},
            StoreError,
            r"0-vanilla has other settings \(.*settings.max_tokens: 5 → 6",
        ),
    ],
)
def test_what_ends_a_cell_is_named(
    workers: Cluster, spec: ExperimentSpec, change: dict[str, Any], error: type[Exception], message: str
) -> None:
    with closing(RunStore(spec.out, spec.config)) as store, pytest.raises(error, match=message):
        run_on_cluster(replace(spec, **change), store, workers)


def test_the_command_runs_cells_on_a_ray_of_its_own(tiny_folder: Path, tmp_path: Path) -> None:
    task, sizes = IrisTask(), {"train": 3, "val": 3, "test": 3, "max_tokens": 8}
    options = [f"--{name.replace('_', '-')}={value}" for name, value in sizes.items()]
    command = ["-m", "benchmarks.iris", "--strategy=vanilla", f"--lm=hf:{tiny_folder}", *options]
    spread = run_python(*command, f"--out={tmp_path}/out", "--ray=local")
    spread.check_returncode()
    assert "written:" in spread.stdout
    assert "ray" not in spread.stderr
    models, settings = ModelSpec(f"hf:{tiny_folder}"), task.settings.changed(sizes)
    alone = run_experiment(ExperimentSpec(task, models, settings, table_rows(["vanilla"]), (0,), tmp_path / "alone"))
    mine = Result.read(tmp_path / "out" / "result.json").model_dump()
    assert without_measured(mine) == without_measured(alone.model_dump())


def test_what_no_machine_has_is_refused(workers: Cluster, spec: ExperimentSpec) -> None:
    with (
        closing(RunStore(spec.out, spec.config)) as store,
        pytest.raises(ClusterError, match="needs 1 CPUs and 9 GPUs of one machine; there are: 2 CPUs, 0 GPUs"),
    ):
        run_on_cluster(spec, store, replace(workers, gpus=9))


def test_strategies_share_the_cells_that_they_begin_with(spec: ExperimentSpec) -> None:
    shared = replace(spec, strategies=table_rows(["p -> w -> p", "p -> w"]), seeds=(0, 1))
    assert [cell.name for cell in cells_of(shared)] == [
        f"{seed}-{stages}" for stages in ("vanilla", "p", "p.w", "p.w.p") for seed in (0, 1)
    ]
    assert str(Cell(1, Strategy(("p", "w")))) == "cell 'p -> w' of seed 1"
