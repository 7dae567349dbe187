"""Inspecting runs without a ``result.json``: of scripts, of runs that were killed, and of runs that are going on."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from lmpipe import (
    Example,
    Module,
    OptimizeResult,
    Prediction,
    ProgramState,
    Request,
    RunStore,
    ScriptedLM,
    Session,
    evaluate,
    exact_match,
)
from lmpipe.cli import app
from lmpipe.errors import ConfigError, CorruptBlob
from lmpipe.extend import open_run
from optimizers import BetterTogether, BootstrapFewShotRandomSearch
from programs import MajorityVote
from tests.scripted import COLOURS, Colour, KeepingTrainer, colour_script, examples, scheduler, scripted


class Shouting(Colour):
    """Another program with the same modules."""


TRAIN, VAL = examples(24), examples(24, start=50)
RUNNING = """
import sys
from lmpipe import RunStore, ScriptedLM, Session
from tests.scripted import Colour, KeepingTrainer, examples, scheduler, slow_script

with RunStore(sys.argv[1]) as store:
    session = Session(lm=ScriptedLM(slow_script), store=store)
    scheduler(KeepingTrainer()).optimize(Colour(), None, examples(24), examples(24, start=50), session)
"""


def optimize(folder: Path, strategies: Sequence[str], seed: int = 0, max_calls: float = float("inf")) -> int:
    """Runs strategies, as a script does, until the LM has been called too often; returns the number of calls."""
    calls = 0

    def script(request: Request) -> str:
        nonlocal calls
        calls += 1
        if calls > max_calls:
            raise KeyboardInterrupt
        return colour_script(request)

    with RunStore(folder) as store:
        session = Session(lm=ScriptedLM(script), store=store, seed=seed)
        for strategy in strategies:
            scheduler(KeepingTrainer(), strategy).optimize(Colour(), None, TRAIN, VAL, session)
    return calls


def search(folder: Path) -> OptimizeResult:
    """Runs a single optimizer, as a script does."""
    with RunStore(folder) as store:
        session = Session(lm=scripted(), store=store)
        optimizer = BootstrapFewShotRandomSearch(exact_match, num_candidate_programs=3, num_train=12, num_val=8)
        return optimizer.optimize(Colour(), None, TRAIN, VAL, session)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of a script: two strategies with a common stage, one of them on two seeds, and a single optimizer."""
    folder = tmp_path_factory.mktemp("scripts") / "colours"
    optimize(folder, ["p", "p -> w"])
    optimize(folder, ["p -> w"], seed=1)
    search(folder)
    return folder


def run_cli(*arguments: str | Path) -> str:
    done = CliRunner().invoke(app, list(map(str, arguments)), catch_exceptions=False)
    assert done.exit_code == 0
    return done.stdout


def test_strategies_and_single_optimizers_are_rows_with_validation_scores(run: Path) -> None:
    shown = run_cli("show", run)
    opened = open_run(run)
    assert [row.strategy for row in opened.result.strategies] == ["p", "p -> w", "BootstrapFewShotRandomSearch"]
    assert "Colour on scripted, seeds 0, 1" in shown
    assert "95 % Wilson intervals over validation examples" in shown
    assert "…" not in shown, "80 columns are enough"
    for row in opened.result.strategies:
        assert row.strategy in shown
        assert row.val.percent in shown
        assert row.test.percent == "—"
    assert "val %" in shown
    assert "test %" not in shown, "no row has test scores"
    assert "unreadable: LM calls whose completion could not be parsed" in shown
    assert "kept / tried: traces used for training, of those made for it" in shown
    assert opened.notes == ()


def test_a_row_has_the_values_of_the_results(run: Path, tmp_path: Path) -> None:
    result = search(tmp_path)
    row = open_run(run).strategy("BootstrapFewShotRandomSearch")
    assert result.evaluation is not None
    assert row.val.mean == pytest.approx(result.evaluation.mean)
    assert (row.val.low, row.val.high) == pytest.approx(result.evaluation.interval, abs=1e-6)
    assert row.outcomes[0].state == result.state
    assert row.cost["lm_calls"] == result.cost.lm_calls
    candidates = row.stages[0].per_seed[0]["candidates"]
    assert [candidate["name"] for candidate in candidates] == [candidate.name for candidate in result.candidates]


def test_a_run_in_code(run: Path) -> None:
    opened = open_run(str(run))
    scores = opened.scores("p -> w", seed=1)
    assert scores.keys() == {example.id for example in VAL}
    assert sum(scores.values()) / len(scores) == opened.strategy("p -> w").val.per_seed[1]
    assert {trace.example: trace.score for trace in opened.traces("p -> w", seed=1)} == scores
    assert opened.state("p -> w", seed=1) == opened.outcome("p -> w", seed=1).state
    with pytest.raises(ConfigError, match="no traces of 'BootstrapFewShotRandomSearch', seed 0: they were not kept"):
        opened.traces("BootstrapFewShotRandomSearch")


def test_a_stage_that_strategies_share_is_counted_once(tmp_path: Path) -> None:
    calls = optimize(tmp_path, ["p", "p -> w"])
    result = open_run(tmp_path).result
    assert result.cost["lm_calls"] == calls
    assert sum(row.cost["lm_calls"] for row in result.strategies) > calls


def test_traces_are_those_on_validation_examples(run: Path) -> None:
    shown = run_cli("trace", run, "--strategy", "p", "--limit", "1")
    assert "1 of 24 traces on validation examples" in shown
    assert "correct answer" in shown
    shown = run_cli("trace", run, "--strategy", "p", "--errors")
    assert "failed (parse)" in shown
    shown = run_cli("trace", run, "--strategy", "p -> w", "--errors")
    assert shown == "p -> w, seed 0: no failed traces among 24 on validation examples\n"
    shown = run_cli("trace", run, "--strategy", "p -> w", "--errors", "--example", "n50")
    assert "example n50: no failed traces" in shown
    with pytest.raises(ConfigError, match="no example 'n3'; it has n50, n51, n52, n53, n54 and 19 others"):
        run_cli("trace", run, "--example", "n3")


def test_prompts_are_those_sent_or_those_of_the_state(run: Path) -> None:
    assert "Reply with these lines:" in run_cli("prompt", run, "--strategy", "p")
    shown = run_cli("prompt", run, "--strategy", "BootstrapFewShotRandomSearch", "--module", "hint")
    assert "from its state, since no traces were kept" in shown
    prompt = open_run(run).state("BootstrapFewShotRandomSearch").prompts["hint"]
    assert prompt.demos
    assert shown.count("demonstration\n") == len(prompt.demos)
    assert prompt.instructions in shown


def test_a_state_is_exported_with_its_adapter(run: Path, tmp_path: Path) -> None:
    run_cli("export", run, tmp_path / "out", "--strategy", "p -> w", "--seed", "1")
    state = ProgramState.model_validate_json((tmp_path / "out" / "state.json").read_text())
    assert state == open_run(run).state("p -> w", seed=1)
    assert (tmp_path / "out" / "adapter" / "adapter.json").is_file()


def test_two_scripts_are_compared(run: Path, tmp_path: Path) -> None:
    optimize(tmp_path / "other", ["p"], seed=1)
    shown = run_cli("diff", run, tmp_path / "other")
    assert "-p -> w: " in shown
    assert "prompts of p, seed" not in shown, "they have no seed in common"
    search(tmp_path / "third")
    shown = run_cli("diff", run, tmp_path / "third")
    assert "prompts of BootstrapFewShotRandomSearch, seed 0: no difference" in shown
    assert "no strategy in common: p; BootstrapFewShotRandomSearch" in run_cli(
        "diff", tmp_path / "other", tmp_path / "third"
    )


def test_the_finished_stages_of_a_killed_run_are_shown(tmp_path: Path) -> None:
    whole = optimize(tmp_path / "whole", ["p -> w -> p"])
    with pytest.raises(KeyboardInterrupt):
        optimize(tmp_path / "killed", ["p -> w -> p"], max_calls=whole - 80)
    note = "p -> w on seed 0 is part of a strategy that is not finished; finished stages: p, p -> w"
    assert note in " ".join(run_cli("show", tmp_path / "killed").split())
    (row,) = open_run(tmp_path / "killed").result.strategies
    (finished,) = open_run(tmp_path / "whole").result.strategies
    assert [stage.val for stage in row.stages] == [stage.val for stage in finished.stages[:2]]
    assert "24 traces on validation examples" in run_cli("trace", tmp_path / "killed")
    optimize(tmp_path / "killed", ["p -> w -> p"])
    assert open_run(tmp_path / "killed").result.strategies[0].val == finished.val
    assert open_run(tmp_path / "killed").notes == ()


def test_a_stage_that_was_not_scored_has_no_score(tmp_path: Path) -> None:
    calls = optimize(tmp_path / "whole", ["p"])
    with pytest.raises(KeyboardInterrupt):
        optimize(tmp_path / "killed", ["p"], max_calls=calls - 1)
    (row,) = open_run(tmp_path / "killed").result.strategies
    assert (row.strategy, row.val.percent) == ("p", "—")
    with pytest.raises(ConfigError, match="no traces of 'p'"):
        run_cli("trace", tmp_path / "killed")


def test_stages_of_a_strategy_that_was_run_again_with_other_settings_are_not_shown(tmp_path: Path) -> None:
    whole = optimize(tmp_path / "whole", ["p -> w"])
    with pytest.raises(KeyboardInterrupt):
        optimize(tmp_path / "run", ["p -> w"], max_calls=whole - 20)
    with RunStore(tmp_path / "run") as store:
        session = Session(lm=scripted(), store=store)
        scheduler(KeepingTrainer(), "p -> w").optimize(Colour(), None, TRAIN, VAL[:12], session)
    assert open_run(tmp_path / "run").notes == ()
    assert [row.val.n for row in open_run(tmp_path / "run").result.strategies] == [12]


def test_a_run_with_nothing_finished_says_what_there_is(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        optimize(tmp_path, ["p"], max_calls=80)
    note = "no optimizer and no stage has finished; recorded so far: 1 evaluation"
    score = "the first evaluation scored 0 % (0–14) on 24 examples"
    assert run_cli("show", tmp_path) == f"note: {note}\nnote: {score}\n"
    for command in ("trace", "prompt"):
        with pytest.raises(ConfigError, match=f"has no result yet; {note}"):
            run_cli(command, tmp_path)


def test_a_run_on_a_cluster_names_the_directories_of_its_cells(run: Path, tmp_path: Path) -> None:
    with RunStore(tmp_path):
        (tmp_path / "cells").mkdir()
        (tmp_path / "cells" / "0").symlink_to(run)
        assert f"its cells have run directories of their own: lmpipe show {tmp_path}/cells" in run_cli("show", tmp_path)
    assert "Colour on scripted" in run_cli("show", tmp_path / "cells")


def test_a_new_run_directory_is_empty(tmp_path: Path) -> None:
    with RunStore(tmp_path):
        assert "recorded so far: nothing" in run_cli("show", tmp_path)


def test_results_of_earlier_versions_are_counted(tmp_path: Path) -> None:
    """Earlier versions did not record what a result was made with."""
    result = search(tmp_path / "new").model_dump(mode="json", exclude={"origin"})
    with RunStore(tmp_path / "old") as store:
        store.put({f"optimize {'0' * 32}": {"value": result, "cost": result["cost"]}})
        store.put({f"optimize {'1' * 32}": {"value": {"state": 1}}, "notes of my own": [1]})
        evaluate(Colour(), VAL, exact_match, Session(lm=scripted(), store=store))
    shown = " ".join(run_cli("show", tmp_path / "old").split())
    assert shown == (
        "note: 2 results of optimizers are of another version of lmpipe and not shown; also recorded: 1 evaluation"
    )


def test_work_whose_blobs_are_missing_is_not_shown(run: Path, tmp_path: Path) -> None:
    optimize(tmp_path, ["p", "p -> w"])
    (weights,) = open_run(tmp_path).state("p -> w").weights.values()
    adapter = tmp_path / "blobs" / str(weights.adapter)
    (adapter / "adapter.json").unlink()
    adapter.rmdir()
    assert [row.strategy for row in open_run(tmp_path).result.strategies] == ["p"]


def test_repeated_seeds_and_several_programs_have_rows_of_their_own(tmp_path: Path) -> None:
    with RunStore(tmp_path) as store:
        session = Session(lm=scripted(), store=store)
        for val in (VAL, VAL[:12]):
            scheduler(KeepingTrainer(), "vanilla").optimize(Colour(), None, TRAIN, val, session)
        names = [row.strategy for row in open_run(tmp_path).result.strategies]
        assert names == ["vanilla", "vanilla (2)"]
        scheduler(KeepingTrainer(), "vanilla").optimize(MajorityVote(Colour(), 2), None, TRAIN, VAL, session)
    opened = open_run(tmp_path)
    names = [row.strategy for row in opened.result.strategies]
    assert names == ["vanilla of Colour", "vanilla of Colour (2)", "vanilla of MajorityVote"]
    assert opened.result.task == "Colour, MajorityVote"


def test_different_experiments_in_one_directory_are_rows_of_their_own(tmp_path: Path) -> None:
    """As when a script is changed and run again: only what differs in its seed alone is one row."""

    def lenient(example: Example, prediction: Prediction) -> float:
        return 1.0 if prediction.answer in COLOURS else 0.0

    calls = 0
    plain = scheduler(KeepingTrainer(), "p")
    changed = replace(plain, metric=lenient)
    runs: list[tuple[BetterTogether, Module, int, int]] = [
        (plain, Colour(), 0, 24),
        (plain, Colour(), 1, 24),
        (changed, Colour(), 2, 24),
        (plain, Shouting(), 3, 24),
        (plain, Shouting(), 4, 12),
    ]
    with RunStore(tmp_path) as store:
        for optimizer, program, seed, num_val in runs:
            session = Session(lm=scripted(), store=store, seed=seed)
            calls += optimizer.optimize(program, None, TRAIN, VAL[:num_val], session).cost.lm_calls
    opened = open_run(tmp_path)
    assert [(row.strategy, [one.seed for one in row.outcomes]) for row in opened.result.strategies] == [
        ("p of Colour", [0, 1]),
        ("p of Colour (2)", [2]),
        ("p of Shouting", [3]),
        ("p of Shouting (2)", [4]),
    ]
    assert opened.notes == (
        "p of Colour (2) differs from p of Colour in: metric",
        "p of Shouting (2) differs from p of Shouting in: data",
    )
    assert opened.strategy().strategy == "p of Shouting (2)", "the latest, not the one with the easiest metric"
    assert opened.result.cost["lm_calls"] == calls == sum(row.cost["lm_calls"] for row in opened.result.strategies)


def test_a_changed_program_of_the_same_name_is_another_experiment_on_the_same_seed(tmp_path: Path) -> None:
    """Its stages have the same names and the same state as before, and still count."""
    calls = 0
    with RunStore(tmp_path) as store:
        for times in (2, 3):
            session = Session(lm=scripted(), store=store)
            program = MajorityVote(Colour(), times)
            calls += scheduler(KeepingTrainer(), "p").optimize(program, None, TRAIN, VAL, session).cost.lm_calls
    opened = open_run(tmp_path)
    assert opened.result.cost["lm_calls"] == calls
    assert opened.notes == ("p (2) differs from p in: program",)
    assert "p (2) differs from p in: program" in run_cli("show", tmp_path)


def test_seeds_with_examples_of_their_own_are_one_row(tmp_path: Path) -> None:
    with RunStore(tmp_path) as store:
        for seed in range(2):
            session = Session(lm=scripted(), store=store, seed=seed)
            scheduler(KeepingTrainer(), "p").optimize(Colour(), None, TRAIN, VAL[12 * seed :][:12], session)
    assert [row.val.n for row in open_run(tmp_path).result.strategies] == [24]
    assert open_run(tmp_path).notes == ("the seeds of p have different examples",)


def test_the_stages_of_a_finished_strategy_can_be_looked_at(tmp_path: Path) -> None:
    optimize(tmp_path, ["p -> w -> p"])
    opened = open_run(tmp_path)
    assert [row.strategy for row in opened.result.strategies] == ["p -> w -> p"]
    assert [row.strategy for row in opened.beginnings] == ["p", "p -> w"]
    (whole,) = opened.result.strategies
    for number, row in enumerate(opened.beginnings):
        assert row.val == whole.stages[number].val
        assert run_cli("trace", tmp_path, "--strategy", row.strategy).startswith(f"{row.strategy}, seed 0: 5 of 24")
        assert "Reply with these lines:" in run_cli("prompt", tmp_path, "--strategy", row.strategy)
    shown = run_cli("show", tmp_path)
    table = [re.split(r" {2,}", line.strip()) for line in shown.splitlines()]
    stages = [report.stages[-1] for report in (*opened.beginnings, whole)]
    for name, stage in zip(("p", "p -> w", "p -> w -> p"), stages, strict=True):
        assert [name, "done", stage.val.percent, f"{stage.cost['lm_calls']:,}"] in [cells[:4] for cells in table]
    assert opened.beginnings[0].cost["lm_calls"] < opened.beginnings[1].cost["lm_calls"] < whole.cost["lm_calls"]
    assert opened.strategy() == whole, "by default it is the result of the run"
    with pytest.raises(ConfigError, match="no strategy 'w'; it has p -> w -> p, p, p -> w"):
        opened.strategy("w")


def test_a_run_is_shown_while_another_process_writes_it(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    views: list[tuple[str, ...]] = []
    with subprocess.Popen([sys.executable, "-c", RUNNING, str(folder)]) as process:
        while process.poll() is None:
            if (folder / "journal.jsonl").exists():
                opened = open_run(folder)
                views.append((*(row.strategy for row in opened.result.strategies), *opened.notes[:1]))
            time.sleep(0.01)
    assert process.returncode == 0
    assert ("p", "p on seed 0 is part of a strategy that is not finished; finished stages: p") in views
    assert [row.strategy for row in open_run(folder).result.strategies] == ["p -> w -> p"]
    assert open_run(folder).notes == ()


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.floats(0, 1))
def test_any_beginning_of_a_journal_can_be_shown(run: Path, tmp_path: Path, part: float) -> None:
    """As it is while the run is going on, and after it was killed."""
    journal = (run / "journal.jsonl").read_bytes()
    if not (tmp_path / "blobs").exists():
        (tmp_path / "blobs").symlink_to(run / "blobs")
    (tmp_path / "journal.jsonl").write_bytes(journal[: int(part * len(journal))])
    shown = run_cli("show", tmp_path)
    for row in open_run(tmp_path).result.strategies:
        assert row.strategy in shown


def test_a_script_may_have_any_settings(tmp_path: Path) -> None:
    configs: list[dict[str, object]] = [{"task": "colours", "settings": 3, "versions": [1]}, {"versions": {"own": 2}}]
    for number, config in enumerate(configs):
        with RunStore(tmp_path / str(number), config) as store:
            session = Session(lm=scripted(), store=store)
            scheduler(KeepingTrainer(), "vanilla").optimize(Colour(), None, TRAIN, VAL, session)
    shown = run_cli("diff", tmp_path / "0", tmp_path / "1")
    assert '-  "settings": 3' in shown
    assert '+  "own": "2"' in shown


def test_damage_is_reported(run: Path, tmp_path: Path) -> None:
    journal = (run / "journal.jsonl").read_bytes()
    (tmp_path / "journal.jsonl").write_bytes(journal.replace(b"Colour", b"Color ", 1))
    with pytest.raises(CorruptBlob, match=r"journal\.jsonl, line \d+: damaged"):
        run_cli("show", tmp_path)


def test_a_folder_of_runs_lists_them(run: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).symlink_to(run)
    with RunStore(tmp_path / "c"):
        pass
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "result.json").write_text("{")
    shown = run_cli("show", tmp_path)
    assert f"{tmp_path} contains 4 runs; to see one: lmpipe show {tmp_path / 'a'}" in shown
    assert f"{tmp_path / 'b'}: Colour on scripted: p val " in shown
    assert f"{tmp_path / 'c'}: no optimizer and no stage has finished" in shown
    assert f"{tmp_path / 'd' / 'result.json'} is damaged" in shown
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "a").symlink_to(run)
    assert "one contains 1 run; to see one" in run_cli("show", tmp_path / "one")
    with pytest.raises(ConfigError, match=r"is not a run directory, but contains some: .*/a, .*/b, .*/c"):
        run_cli("trace", tmp_path)


def test_a_folder_that_is_no_run_says_what_it_has(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(ConfigError, match=r"it has neither result.json nor journal.jsonl, but notes\.txt"):
        run_cli("show", tmp_path)
    with pytest.raises(ConfigError, match="is a file; pass the path of a run directory"):
        run_cli("show", tmp_path / "notes.txt")
    with pytest.raises(ConfigError, match="does not exist; pass the path of a run directory"):
        run_cli("show", tmp_path / "absent")
