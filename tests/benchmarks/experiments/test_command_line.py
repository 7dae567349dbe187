"""The command line of the benchmarks: its options, its configuration file, and the dry run."""

from __future__ import annotations

import re
import subprocess
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from benchmarks.experiments.config_file import read_config
from benchmarks.experiments.dry_run import StageCost, dry_run
from benchmarks.experiments.models import ModelSpec
from benchmarks.experiments.setting_options import add_setting_options, settings_of_options
from benchmarks.experiments.settings import Settings, as_toml
from benchmarks.experiments.spec import ExperimentSpec
from benchmarks.experiments.strategies import PAPER_STRATEGIES, table_rows
from benchmarks.tasks.gsm8k import Gsm8kTask
from benchmarks.tasks.hotpotqa import HotpotTask
from benchmarks.tasks.iris import IrisTask
from lmpipe.engines.tuning_config import TuningConfig
from lmpipe.errors import ConfigError
from tests.benchmarks.experiments.rivers_task import RiversTask
from tests.processes import run


def said(*options: str, task: str = "iris") -> subprocess.CompletedProcess[str]:
    return run("-m", f"benchmarks.{task}", *options)


def settings_from(*options: str) -> dict[str, Any]:
    """Returns the settings that a command gets from options."""
    parameters: dict[str, str | bool] = {}

    def command(**setting_options: str | bool | None) -> None:
        parameters.update({name: value for name, value in setting_options.items() if value is not None})

    add_setting_options(command, Settings(), Settings())
    app = typer.Typer()
    app.command()(command)
    done = CliRunner().invoke(app, list(options), catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return settings_of_options(parameters)


def plan(**changes: int) -> dict[str, StageCost]:
    task = IrisTask()
    settings = task.settings.changed({"num_train_scored": 0, **changes})
    strategies = ("vanilla", "p", "w", "p -> w", "p -> w -> p")
    spec = ExperimentSpec(task, ModelSpec("hf:no/such-lm"), settings, table_rows(strategies), (0, 1))
    return {stage.name: stage for stage in dry_run(spec)}


def test_every_setting_is_an_option() -> None:
    help_text = said("--help").stdout
    nested = [f"tuning.{field.name}" for field in fields(TuningConfig)]
    for name in [*(name for name in Settings.model_fields if name != "tuning"), *nested]:
        assert f"--{name.replace('_', '-')} " in help_text
    assert "Peak learning rate" in help_text, "the descriptions of nested settings are those of their class"


def test_options_are_read_as_settings() -> None:
    options = ["--num-train", "7", "--tuning.rank", "16", "--tuning.no-bf16", "--no-structured", "--balance"]
    given = settings_from(*options, "--stop", '["a", "b"]', "--tuning.target-modules", "all-linear")
    assert Settings().changed(given) == Settings(
        num_train=7,
        balance=True,
        stop=("a", "b"),
        tuning=TuningConfig(rank=16, bf16=False, target_modules="all-linear"),
    )
    assert Settings(max_seconds=3).changed(settings_from("--max-seconds", "none")) == Settings()
    with pytest.raises(ConfigError, match=r"^invalid settings: tuning\.rank: Input should be a valid integer"):
        Settings().changed(settings_from("--tuning.rank", "many"))
    assert settings_from("--tuning.target-modules", "[qk]_proj") == {"tuning": {"target_modules": "[qk]_proj"}}
    with pytest.raises(ConfigError, match=r"--stop .* is not a valid JSON list"):
        settings_from("--stop", '["a"')
    with pytest.raises(ConfigError, match=r"stop: Input should be a valid tuple; write a list, on the command line as"):
        Settings().changed(settings_from("--stop", "a"))


def test_a_flag_cannot_be_turned_on_and_off() -> None:
    for options in (["--structured", "--no-structured"], ["--no-structured", "--structured"]):
        assert "--structured and --no-structured contradict each other" in said(*options, "--dry-run").stdout


def test_a_setting_outside_of_the_table_of_settings_is_checked_like_those_in_it(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    for text in ('train = "many"\n', '[settings]\ntrain = "many"\n'):
        file.write_text(text)
        shown = " ".join(said("--config", str(file), "--dry-run").stdout.split())
        assert "run.toml: invalid settings: train: Input should be a valid integer" in shown
    file.write_text("""stop = '["a"]'\ntrain = 8\nval = 8\ntest = 8\nnum_val = 8\nnum_train = 8\n""")
    assert said("--config", str(file), "--dry-run", "--strategy", "vanilla").returncode == 0


def test_options_override_the_file_field_by_field(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text("structured = true\nnum_val = 8\n[settings]\ntrain = 9\n[settings.tuning]\nbatch_size = 8\n")
    refused = said("--config", str(file), "--tuning.micro-batch-size", "3", "--no-structured", "--dry-run").stdout
    shown = " ".join(refused.split())
    assert "batch_size=8 is not a multiple of micro_batch_size=3" in shown
    assert said("--config", str(file), "--train", "0", "--dry-run").stdout.count("train: Input should be greater") == 1


def test_a_dry_run_counts_what_each_stage_would_call() -> None:
    """There are two seeds, and the 50 validation flowers are scored after every stage."""
    found = plan()
    assert found["vanilla"].cost.lm_calls == 2 * 50
    assert found["p"].cost.lm_calls >= 2 * (9 * 35 + 50)  # nine candidates on 35 flowers
    assert found["w"].cost.lm_calls == 2 * (50 + 50)  # a run of each training flower
    assert found["w"].cost.training_tokens > 0
    assert found["test"].cost.lm_calls == 2 * 5 * 50
    assert plan(rollouts_per_example=3)["w"].cost.lm_calls == 2 * (3 * 50 + 50)


def test_a_dry_run_counts_runs_of_programs_that_search() -> None:
    """The module that retrieves calls no LM."""
    settings = Settings(train=8, val=8, test=8, num_train=8, num_val=8)
    spec = ExperimentSpec(RiversTask(), ModelSpec("hf:no/such-lm"), settings, table_rows(["p", "vanilla"]), (0,))
    found = {stage.name: stage for stage in dry_run(spec)}
    assert (found["vanilla"].runs, found["test"].runs) == (8, 16)
    assert found["p"].runs >= 8


def test_rows_are_strategies_in_their_plain_form_and_each_is_one_row() -> None:
    rows = table_rows(["p->w->p", "(p -> w)*1", "p", "p -> w", " vanilla "])
    assert list(map(str, rows)) == ["vanilla", "p", "p -> w -> p", "p -> w"]
    assert table_rows(map(str, PAPER_STRATEGIES)) == table_rows(PAPER_STRATEGIES) == PAPER_STRATEGIES
    spec = ExperimentSpec(IrisTask(), ModelSpec("hf:no/such-lm"), Settings(), (rows[1], rows[0], rows[1]), (0,))
    assert spec.strategies == rows[:2]


def test_a_dry_run_needs_no_lm_and_no_run_directory(tmp_path: Path) -> None:
    done = said("--dry-run", "--all-strategies", "--lm", "hf:no/such-lm", "--data", str(tmp_path))
    assert "iris has no option --data" in done.stdout
    done = said("--dry-run", "--all-strategies", "--lm", "hf:no/such-lm")
    rows = re.findall(r"^ *((?:p|w)(?: -> \w)*|vanilla|test|total) +[\d,]+", done.stdout, re.MULTILINE)
    assert rows == ["p", "w", "p -> p", "w -> w", "p -> w", "w -> p", "p -> w -> p", "vanilla", "test", "total"]


def test_the_settings_of_the_paper_are_a_file_that_can_be_used(tmp_path: Path) -> None:
    file = tmp_path / "paper.toml"
    file.write_text(said("--paper", task="gsm8k").stdout)
    assert Gsm8kTask().settings_for("bundled").changed(read_config(file).settings) == Settings(test=1319)


def test_a_file_gives_options_and_settings_and_the_command_line_overrides_them(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text(
        'seeds = "0,1,2"\nstrategy = ["p", "w"]\ndry-run = true\n'
        "[settings]\nnum_train_scored = 0\nrollouts_per_example = 2\nmax_rollouts_per_example = 2\nvary_demos = false\n"
    )
    calls = re.findall(r"^ *w +[\d,]+ +([\d,]+)", said("--config", str(file)).stdout, re.MULTILINE)
    assert calls == ["450"]  # three seeds, two runs of 50 training flowers, 50 validation flowers
    overridden = said("--config", str(file), "--seeds", "0", "--rollouts-per-example", "1").stdout
    (fewer,) = re.findall(r"^ *w +[\d,]+ +([\d,]+)", overridden, re.MULTILINE)
    assert 100 < int(fewer) < 150  # those that do not succeed run again


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("seed = 1", "there is no option 'seed'"),
        ("seeds = ", "cannot be read"),
        ("strategy = 'p'", "it must be a list of texts"),
        ("dry_run = true\n[settings]\nnum_trian = 3", "num_trian"),
        ("dry_run = true\n[settings.tuning]\nranks = 3", "ranks"),
        ("dry_run = true\n[settings.tuning]\nrank = -3", "rank"),
    ],
)
def test_a_file_that_is_wrong_is_refused_with_what_is_wrong(text: str, told: str, tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text(text)
    done = said("--config", str(file))
    assert done.returncode == 1
    assert "ConfigError" in done.stdout
    assert told in " ".join(done.stdout.split())


def test_settings_survive_the_file() -> None:
    settings = HotpotTask().settings_for("bundled")
    assert 'max_seconds = "none"' in as_toml(settings)
    for wrong in ("many", 0):
        with pytest.raises(ConfigError, match="max_tokens"):
            settings.changed({"max_tokens": wrong})
    with pytest.raises(ConfigError, match="test"):
        settings.changed({"test": -1})


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (b"\xff\xfe\x00", "cannot be read: 'utf-8'"),
        (b"a = " + b"[" * 50_000 + b"]" * 50_000, "nested too deeply"),
        (b"settings = 3", "settings = 3 is not a table"),
        (b"[[settings]]\nval = 3", "is not a table"),
        (b"dry-run = true\ndry_run = true", "the option 'dry_run' is set twice"),
        (b"[lm]\nname = 3", "is neither a text"),
        (b"seeds = 2024-01-01", "is neither a text"),
        (b"strategy = [[3]]", "is neither a text"),
    ],
)
def test_a_file_of_another_form_is_named(data: bytes, told: str, tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_bytes(data)
    with pytest.raises(ConfigError, match=re.escape(told)) as found:
        read_config(file, {"lm", "seeds", "strategy", "dry_run", "a"})
    assert str(file) in str(found.value)


def test_a_file_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_bytes(b'\xef\xbb\xbfseeds = "1"')
    assert read_config(file).options == {"seeds": "1"}


@pytest.mark.parametrize("wrong", [{"temperature": float("nan")}, {"tuning": {"rank": "x"}}, {"val": [1]}])
def test_settings_of_another_type_are_named(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=f"invalid settings: {next(iter(wrong))}"):
        Settings().changed(wrong)
