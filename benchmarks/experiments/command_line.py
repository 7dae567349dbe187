"""The command line that all benchmarks share: reads options, and starts the experiment.

Modules that take long to import are imported when an experiment begins, so that ``--help`` answers at once.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.experiments.config_file import read_config
from benchmarks.experiments.setting_options import add_setting_options, check_flags, settings_of_options
from benchmarks.experiments.settings import Settings, as_toml
from benchmarks.experiments.strategies import BASELINES, PAPER_STRATEGIES, table_rows
from benchmarks.experiments.task import Task
from lmpipe.cli.interrupts import run_command
from lmpipe.cli.terminal import new_console, styled
from lmpipe.errors import ConfigError
from lmpipe.runtime.garbage import collector_paused
from lmpipe.text.cleaning import clean_text
from lmpipe.text.secrets import redact

console = new_console()


def main(task: Task) -> None:
    """Runs the command line for one task."""
    app = typer.Typer(add_completion=False, rich_markup_mode="markdown", pretty_exceptions_show_locals=False)

    @app.command(
        help=f"Optimizes the {task.name} program with the chosen strategies on every seed, and reports the test "
        "scores.\n\nThe settings have the defaults of the paper or, with the bundled LM, those that suit it; both are "
        "shown below. Lists are written as JSON, `none` stands for no value, and `--no-NAME` (or `--tuning.no-NAME`) "
        "turns a flag off."
    )
    def command(
        context: typer.Context,
        out: Annotated[
            Path | None, typer.Option(help="Run directory. The same command continues an unfinished run in it.")
        ] = None,
        config: Annotated[
            Path | None,
            typer.Option(
                help="TOML file with options of this command by name, and settings in a table `[settings]`. The "
                "command line overrides it.",
                is_eager=True,
                callback=_use_config,
            ),
        ] = None,
        lm: Annotated[
            str, typer.Option(help="`bundled`, `hf:ID_OR_PATH`, `vllm:ID_OR_PATH`, or `openai:MODEL@URL,URL`.")
        ] = "bundled",
        strategy: Annotated[
            list[str] | None,
            typer.Option(
                help="`vanilla`, `p`, `w`, `p -> w -> p` … (p searches prompts, w tunes weights); repeatable. By "
                "default vanilla, p, w and p -> w -> p."
            ),
        ] = None,
        all_strategies: Annotated[
            bool, typer.Option("--all-strategies", help="Run the eight strategies of the paper's table.")
        ] = False,
        seeds: Annotated[str, typer.Option(help="Comma-separated; each seed has its own data split.")] = "0",
        dry_run: Annotated[
            bool,
            typer.Option("--dry-run", help="Print stages, runs, LM calls and expected tokens, and run nothing."),
        ] = False,
        paper: Annotated[
            bool, typer.Option("--paper", help="Print the paper's settings as a file for `--config`, and exit.")
        ] = False,
        train_lm: Annotated[
            str | None,
            typer.Option(
                help="LM whose adapters are trained, if `--lm` cannot be: `bundled`, or `hf:ID_OR_PATH`.",
                rich_help_panel="LM",
            ),
        ] = None,
        dtype: Annotated[
            str | None,
            typer.Option(help="Data type of a model in this process: `float32`, `bfloat16` …", rich_help_panel="LM"),
        ] = None,
        quantization: Annotated[
            str | None,
            typer.Option(
                help="Quantization of a model in this process: `nf4` or `int8`, by bitsandbytes, or `int8-dynamic`.",
                rich_help_panel="LM",
            ),
        ] = None,
        cache: Annotated[
            Path | None,
            typer.Option(help="File that keeps completions; several runs may share it.", rich_help_panel="LM"),
        ] = None,
        track: Annotated[
            list[str] | None,
            typer.Option(help="`tensorboard:FOLDER`, `mlflow:URI` or `wandb:PROJECT`; repeatable."),
        ] = None,
        ray: Annotated[
            str | None,
            typer.Option(
                help="Run cells on a Ray cluster: `local` starts one here, `auto`, `HOST:6379` or `ray://HOST:10001` "
                "joins one. All its machines must see `--out` under the same path.",
                rich_help_panel="Machines",
            ),
        ] = None,
        cpus_per_cell: Annotated[
            float, typer.Option(help="With `--ray`: cores of a cell.", min=0, rich_help_panel="Machines")
        ] = 1,
        gpus_per_cell: Annotated[
            float, typer.Option(help="With `--ray`: GPUs of a cell, such as 0.5.", min=0, rich_help_panel="Machines")
        ] = 0,
        # defaults, not annotations, since those cannot see the task
        data: str | None = typer.Option(
            None, help="Folder with the data; by default they come from the hub.", hidden="data" not in task.options
        ),
        retriever: str | None = typer.Option(
            None,
            help="`bm25`, `bm25:PASSAGES`, `dense:PASSAGES`, the folder of an index, or `http://HOST:PORT`.",
            hidden="retriever" not in task.options,
        ),
        **setting_options: str | bool | None,
    ) -> None:
        check_flags(context)
        with _missing_packages_named(), ExitStack() as stack:
            with collector_paused():
                from benchmarks.experiments.cells import Cluster
                from benchmarks.experiments.dry_run import dry_run as count_costs
                from benchmarks.experiments.dry_run import show_costs
                from benchmarks.experiments.experiment import run_experiment
                from benchmarks.experiments.models import ModelSpec
                from benchmarks.experiments.spec import ExperimentSpec
                from lmpipe.cli.tables import show_result
                from lmpipe.trackers import load_tracker

            changes = _changes(task, config, settings_of_options(setting_options))
            if paper:
                print(as_toml(task.settings), end="")
                return
            models = ModelSpec(lm, train_lm, cache, dtype, quantization)
            spec = ExperimentSpec(
                _with_options(task, {"data": data, "retriever": retriever}),
                models,
                task.settings_for(train_lm or lm).changed(changes),
                PAPER_STRATEGIES if all_strategies else table_rows(strategy or [*BASELINES, "p -> w -> p"]),
                tuple(_seed_numbers(seeds)),
                out or Path(),
            )
            if dry_run:
                show_costs(count_costs(spec), console)
                return
            if out is None:
                raise ConfigError("--out is missing: the run directory, such as --out runs/first")
            if cache is not None and ray not in (None, "local"):
                raise ConfigError("--cache is a file for processes on one machine; leave it out with --ray ADDRESS")
            cluster = None if ray is None else Cluster(ray, cpus_per_cell, gpus_per_cell)
            trackers = [stack.enter_context(load_tracker(text)) for text in track or ()]
            result = run_experiment(spec, trackers, _typed_command(), cluster)
            show_result(result, console)
            console.print(styled(f"written: {out / 'result.json'}, {out / 'report.html'}"))

    add_setting_options(command, task.settings, task.settings_for("bundled"))
    run_command(app, console)


def _changes(task: Task, config: Path | None, options: Mapping[str, object]) -> dict[str, object]:
    """Returns the settings that were set; those of the command line override those of a file.

    Raises:
        ConfigError: If the settings of the file are invalid.
    """
    from_file = read_config(config).settings if config else {}
    if config is not None:
        _check_settings(config, from_file, task.settings)
    for name, value in options.items():
        earlier = from_file.get(name)
        from_file[name] = {**earlier, **value} if isinstance(earlier, dict) and isinstance(value, dict) else value
    return from_file


def _use_config(context: typer.Context, path: Path | None) -> Path | None:
    """Makes the options in a file the defaults of the command line.

    Raises:
        ConfigError: If the file cannot be read, or an option in it has an invalid value.
    """
    if path is not None:
        parameters = {parameter.name or "": parameter for parameter in context.command.params}
        option_names = {name for name in parameters if name != "config" and "__" not in name}  # no nested settings
        options = read_config(path, option_names).options
        for name, value in options.items():
            _check_option(name, value, path, context, parameters[name])
        in_options = {name: value for name, value in options.items() if name in Settings.model_fields}
        _check_settings(path, settings_of_options(in_options), Settings())
        context.default_map = options
    return path


def _check_settings(path: Path, changes: Mapping[str, object], settings: Settings) -> None:
    """Checks the settings in a file, together with those that it does not change.

    Raises:
        ConfigError: If one of them does not exist or has an invalid value.
    """
    try:
        settings.changed(changes)
    except ConfigError as error:
        raise ConfigError(f"--config {path}: {error}") from error


def _check_option(name: str, value: Any, path: Path, context: typer.Context, parameter: Any) -> None:
    """Checks the value of an option in a file by converting it as the command line will.

    Raises:
        ConfigError: If the value is invalid.
    """
    try:
        if parameter.multiple != isinstance(value, list):
            raise ValueError("it must be a list of texts" if parameter.multiple else "it must not be a list")
        if isinstance(value, bool) != parameter.is_flag:
            raise ValueError("true and false are for options that take no value")
        parameter.process_value(context, value)
    except (typer.BadParameter, TypeError, ValueError) as error:
        raise ConfigError(f"--config {path}: {name} = {value!r} is invalid: {error}") from error


@contextmanager
def _missing_packages_named() -> Iterator[None]:
    """Turns the error of a missing package into one that says how to install it.

    Raises:
        ConfigError: If a package is missing.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise ConfigError(f"{error}; run: pip install -e '.[local,benchmarks]' (with cluster for --ray)") from error


def _with_options(task: Task, options: Mapping[str, str | None]) -> Task:
    """Returns the task with the options that were set.

    Raises:
        ConfigError: If the task has no such option.
    """
    values: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
    for name in values:
        if name not in task.options:
            raise ConfigError(f"{task.name} has no option --{name}")
    return replace(task, **values)


def _typed_command() -> str:
    """Returns the command of this process, as it is typed in the checkout, without credentials and keys."""
    spec = sys.modules["__main__"].__spec__
    started = [sys.argv[0]] if spec is None else ["-m", spec.name]
    return clean_text(shlex.join(["python", *started, *map(redact, sys.argv[1:])]))


def _seed_numbers(text: str) -> list[int]:
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"--seeds {text!r} must be whole numbers with commas between them, such as 0,1,2") from None
    if len(set(numbers)) < len(numbers):
        raise ConfigError(f"--seeds {text!r} names a seed twice, which would count its examples twice")
    return numbers
