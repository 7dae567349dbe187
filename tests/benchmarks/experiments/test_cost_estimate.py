"""The cost estimate, compared with a real run."""

from __future__ import annotations

import pytest

from benchmarks.cost_estimate import TRAFFIC
from benchmarks.experiments.cost_estimate import CallsAndTokens, CostEstimate, Gpu, Traffic
from benchmarks.experiments.models import ModelSpec
from benchmarks.experiments.run import run_seed
from benchmarks.experiments.settings import Settings
from benchmarks.experiments.spec import ExperimentSpec, LoadedModels
from benchmarks.experiments.strategies import PAPER_STRATEGIES, table_rows
from benchmarks.experiments.task import Task
from benchmarks.tasks.iris import IrisTask
from lmpipe import Request, RunStore, ScriptedLM
from lmpipe.engines.local import LocalLM
from lmpipe.engines.training import TuningConfig
from optimizers import Strategy
from tests.processes import run

SMALL = Settings(
    train=12,
    val=6,
    test=5,
    num_train=6,
    num_val=4,
    num_candidate_programs=3,
    num_train_scored=2,
    tuning=TuningConfig(epochs=1),
)
ONE_CALL = Traffic(calls=1, prompt=10, completion=5, demo=8)


def species(request: Request) -> str:
    """Answers setosa without demonstrations and reasonably with them, so that a search chooses demonstrations."""
    length = float(request.messages[-1].content.partition("petal_length:")[2].split()[0])
    shown = any(message.role == "assistant" for message in request.messages)
    name = "setosa" if length < 2.5 or not shown else "versicolor" if length < 4.9 else "virginica"
    return f"reasoning: by its petals\nanswer: {name}"


def test_calls_are_those_of_a_real_run(tiny_lm: LocalLM, store: RunStore) -> None:
    """The scripted LM has the name of the LM that is trained."""
    lm, estimate = ScriptedLM(species, name=tiny_lm.name), CostEstimate(SMALL, ONE_CALL)
    rows = table_rows(["vanilla", "p", "w -> p"])
    spec = ExperimentSpec(IrisTask(), ModelSpec("scripted"), SMALL, rows, (0,))
    cells = run_seed(spec, LoadedModels(lm, tiny_lm), 0, store)
    calls = {str(cell.strategy): [stage.cost.lm_calls for stage in cell.result.stages] for cell in cells}
    assert calls["p"] == [estimate.stage(Strategy(("p",))).calls]
    assert calls["w -> p"] == [estimate.stage(Strategy(("w",))).calls, estimate.stage(Strategy(("w", "p"))).calls]
    assert len(lm.requests) == estimate.strategies(rows, shared=True).calls
    assert len(lm.requests) < estimate.strategies(rows, shared=False).calls


@pytest.mark.parametrize(("task", "traffic"), TRAFFIC, ids=lambda value: getattr(value, "name", ""))
def test_sharing_saves_the_stages_that_rows_have_in_common(task: Task, traffic: Traffic) -> None:
    estimate = CostEstimate(task.settings, traffic)
    alone = sum((estimate.strategies([row], shared=True) for row in PAPER_STRATEGIES), CallsAndTokens())
    assert estimate.strategies(PAPER_STRATEGIES, shared=False) == alone
    repeated = [Strategy(tuple(stages)) for stages in ("p", "p", "p", "w", "w", "pw")]  # 13 stages instead of 7
    saved = sum(map(estimate.stage, repeated), estimate.score(Strategy()) * 7)
    assert (estimate.strategies(PAPER_STRATEGIES, shared=True) + saved).calls == alone.calls
    assert estimate.settings.test * 8 < alone.calls


def test_hours_add_up() -> None:
    gpu = Gpu(read=100, write=10, train=1)
    assert CallsAndTokens(1, 360_000, 36_000, 3_600).hours(gpu) == pytest.approx(3)
    assert (CallsAndTokens(1, 2, 3, 4) + CallsAndTokens(1, 1, 1, 1)) * 2 == CallsAndTokens(4, 6, 8, 10)


def test_the_command_prints_the_table() -> None:
    done = run("-m", "benchmarks.cost_estimate", "--lms", "1", "--seeds", "1")
    done.check_returncode()
    assert "1 LMs, 1 seeds, 8 strategies" in done.stdout
    assert "sharing stages saves" in done.stdout
