"""Cells on a real Ray with two workers, one of which is killed: the result is that of one process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, final

import pytest

from benchmarks.experiments import models
from benchmarks.experiments.cells import Cell, Cluster, Work
from benchmarks.experiments.experiment import execute
from benchmarks.experiments.ray_cluster import connected, run_cells
from benchmarks.experiments.run import run
from benchmarks.experiments.settings import Settings
from benchmarks.experiments.task import Task
from benchmarks.tasks.iris import IrisTask
from lmpipe import LM, Completion, EngineError, Example, Metric, Module, Predict, Request, RunStore
from lmpipe.engines.local import LocalLM
from lmpipe.engines.training import TuningConfig
from lmpipe.errors import ClusterError, ConfigError, StoreError
from lmpipe.events import EpochEnded, Event, StageEnded
from lmpipe.ledger import MEASURED
from lmpipe.results.result import Result
from tests.killable import even_length

STRATEGIES = ("vanilla", "p", "w*2")
CONFIG = {"task": "numbers"}
HERE = Cluster("local", cores=2)


@final
@dataclass(frozen=True)
class Numbers(Task):
    """Numbers whose answer is right if it has an even length."""

    name: str = "numbers"

    def examples(self) -> Sequence[Example]:
        return [Example({"number": number}, {"answer": ""}, id=str(number)) for number in range(20)]

    def program(self) -> Module:
        return Predict("number: int -> answer")

    def metric(self) -> Metric:
        return even_length


@final
class Deadly(LM):
    """Kills its process before the first request on an adapter, once."""

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
class Models:
    """The tiny LM; leaves a line in a file whenever it is loaded."""

    path: Path
    notes: Path

    def load(self, *, to_train: bool, at_once: int = 1) -> tuple[LM, LocalLM]:
        with (self.notes / "loads").open("a") as loads:
            loads.write(f"{os.getpid()}\n")
        (self.notes / "at once").write_text(str(at_once))
        lm = LocalLM.from_pretrained(str(self.path), name="tiny")
        return Deadly(lm, self.notes / "killed"), lm

    @property
    def loads(self) -> list[int]:
        """The processes that loaded it, in order."""
        path = self.notes / "loads"
        return list(map(int, path.read_text().split())) if path.exists() else []


@pytest.fixture(scope="module")
def workers() -> Iterator[Cluster]:
    with connected(HERE):
        yield HERE


@pytest.fixture
def work(tiny_folder: Path, tmp_path: Path) -> Work:
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
    models = Models(tiny_folder, tmp_path)
    return Work(Numbers(), models, settings, STRATEGIES, (0,), tmp_path / "out", CONFIG, folder=tmp_path)


def without_measured(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: without_measured(item) for name, item in value.items() if name not in MEASURED}
    return list(map(without_measured, value)) if isinstance(value, list) else value


def test_the_result_of_two_workers_one_of_which_is_killed_is_that_of_one_process(workers: Cluster, work: Work) -> None:
    assert isinstance(work.models, Models)
    notes, told = work.models.notes, list[Event]()
    with closing(RunStore(work.out, CONFIG)) as store:
        spread = run_cells(work, store, workers, callbacks=[told.append])
    first = work.models.loads
    killed = int((notes / "killed").read_text())
    assert killed in first
    assert killed != os.getpid() not in first
    assert (notes / "at once").read_text() == "2"  # each of the two takes half of what one would
    assert len(first) == len(work.cells) + 1 + 1  # the cells, the one that was killed again, and the summary

    heard = list[Event]()
    with closing(RunStore(notes / "alone", CONFIG)) as store:
        lm, trained, _ = work.load()
        alone = run(work.task, lm, trained, work.settings, STRATEGIES, (0,), store, None, (heard.append,))
    mine, theirs = (json.dumps(without_measured(json.loads(one.model_dump_json()))) for one in (spread, alone))
    assert mine == theirs
    assert alone.strategies[2].stages[1].status == "done"
    # the cell "w" was killed between its training and its scores, and did not train again
    assert {event.stage for event in told if isinstance(event, EpochEnded)} == {"w -> w"}
    assert {event.stage for event in heard if isinstance(event, EpochEnded)} == {"w", "w -> w"}
    ended = {(event.stage, event.score) for event in told if isinstance(event, StageEnded)}
    assert ended == {(event.stage, event.score) for event in heard if isinstance(event, StageEnded)}

    with closing(RunStore(work.out, CONFIG)) as store:  # once more: only the summary loads the LM
        again = run_cells(work, store, workers)
    assert again == spread
    assert len(work.models.loads) == len(first) + 2


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"settings": Settings(train=60)}, ConfigError, "^cell 'vanilla' of seed 0: numbers has 20 different examples"),
        ({"versions": {"python": "2.7"}}, ClusterError, "^cell 'vanilla' of seed 0: .* and the driver has .*2.7"),
        ({"folder": Path("/nowhere")}, ClusterError, "^cell 'vanilla' of seed 0: .* does not see /nowhere and .*mount"),
        (
            {"config": {"task": "other"}},
            StoreError,
            r"0-vanilla was made with other settings \(task: 'other' → 'numbers'\)",
        ),
    ],
)
def test_what_ends_a_cell_is_named(
    workers: Cluster, work: Work, change: dict[str, Any], error: type[Exception], message: str
) -> None:
    with closing(RunStore(work.out, CONFIG)) as store, pytest.raises(error, match=message):
        run_cells(replace(work, **change), store, workers)


def test_the_command_runs_cells_on_a_ray_of_its_own(tiny_folder: Path, tmp_path: Path) -> None:
    sizes = {"train": 3, "val": 3, "test": 3, "max_tokens": 8}
    options = [f"--{name.replace('_', '-')}={value}" for name, value in sizes.items()]
    command = [sys.executable, "-m", "benchmarks.iris", "--strategy=vanilla", f"--lm=hf:{tiny_folder}", *options]
    spread = subprocess.run([*command, f"--out={tmp_path}/out", "--ray=local"], capture_output=True, check=True)
    assert b"written:" in spread.stdout
    assert b"ray" not in spread.stderr
    alone = execute(IrisTask(), models.Models(f"hf:{tiny_folder}"), ["vanilla"], [0], tmp_path / "alone", sizes)
    mine = Result.read(tmp_path / "out" / "result.json").model_dump()
    assert without_measured(mine) == without_measured(alone.model_dump())


def test_what_no_machine_has_is_refused(workers: Cluster, work: Work) -> None:
    with (
        closing(RunStore(work.out, CONFIG)) as store,
        pytest.raises(ClusterError, match="needs 1 CPUs and 9 GPUs of one machine; there are: 2 CPUs, 0 GPUs"),
    ):
        run_cells(work, store, replace(workers, gpus=9))


def test_strategies_share_the_cells_that_they_begin_with(work: Work) -> None:
    shared = replace(work, strategies=("p -> w -> p", "p -> w"), seeds=(0, 1))
    assert [cell.name for cell in shared.cells] == [
        f"{seed}-{stages}" for stages in ("vanilla", "p", "p.w", "p.w.p") for seed in (0, 1)
    ]
    assert str(Cell(1, ("p", "w"))) == "cell 'p -> w' of seed 1"
