"""The command line that all benchmarks share: reads options, and calls what they ask for.

Whatever takes long to import is imported when a run begins, so that ``--help`` answers at once.
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
from benchmarks.experiments.task import Task
from lmpipe.cli.ending import run_command
from lmpipe.cli.terminal import new_console, styled
from lmpipe.errors import ConfigError
from lmpipe.text.cleaning import clean
from lmpipe.text.secrets import hide

console = new_console()


def main(task: Task) -> None:
    """Runs the command line for one task."""
    app = typer.Typer(add_completion=False, rich_markup_mode="markdown", pretty_exceptions_show_locals=False)

    @app.command(
        help=f"Teaches the {task.name} program with every strategy on every seed, and reports the test scores."
    )
    def command(
        out: Annotated[
            Path | None, typer.Option(help="Run directory. Started again on it, a run goes on where it was.")
        ] = None,
        config: Annotated[
            Path | None,
            typer.Option(
                help="TOML file: options of this command by name, and any setting in a table `[settings]`. What "
                "the command line says counts more.",
                is_eager=True,
                callback=_use_config,
                rich_help_panel="Settings",
            ),
        ] = None,
        lm: Annotated[
            str, typer.Option(help="`bundled`, `hf:ID_OR_PATH`, `vllm:ID_OR_PATH`, or `openai:MODEL@URL,URL`.")
        ] = "bundled",
        strategy: Annotated[
            list[str] | None,
            typer.Option(
                help="`vanilla`, `p`, `w`, `p -> w -> p` … (p searches prompts, w tunes weights); repeatable."
            ),
        ] = None,
        all_strategies: Annotated[
            bool, typer.Option("--all-strategies", help="The eight rows of the paper's table.")
        ] = False,
        seeds: Annotated[str, typer.Option(help="Comma-separated; each has a data split of its own.")] = "0",
        dry_run: Annotated[
            bool, typer.Option("--dry-run", help="Print stages, runs, LM calls and expected tokens; spend nothing.")
        ] = False,
        paper: Annotated[
            bool, typer.Option("--paper", help="Print the paper's settings as a file for `--config`, and end.")
        ] = False,
        train_lm: Annotated[
            str | None,
            typer.Option(
                help="What trains adapters if `--lm` cannot: `bundled`, or `hf:ID_OR_PATH`.", rich_help_panel="LM"
            ),
        ] = None,
        dtype: Annotated[
            str | None,
            typer.Option(help="Of a model in this process: `float32`, `bfloat16` …", rich_help_panel="LM"),
        ] = None,
        quantization: Annotated[
            str | None,
            typer.Option(
                help="Of a model in this process: `nf4` or `int8`, through bitsandbytes.", rich_help_panel="LM"
            ),
        ] = None,
        cache: Annotated[
            Path | None, typer.Option(help="File that keeps completions, for runs to share.", rich_help_panel="LM")
        ] = None,
        train: Annotated[int | None, typer.Option(help="Training examples.", rich_help_panel="Settings")] = None,
        val: Annotated[int | None, typer.Option(help="Validation examples.", rich_help_panel="Settings")] = None,
        test: Annotated[int | None, typer.Option(help="Test examples.", rich_help_panel="Settings")] = None,
        max_tokens: Annotated[
            int | None, typer.Option(help="Most new tokens of an LM call.", rich_help_panel="Settings")
        ] = None,
        rollouts_per_example: Annotated[
            int | None,
            typer.Option(help="Runs of each training example to fine-tune on.", rich_help_panel="Settings"),
        ] = None,
        structured: Annotated[
            bool | None,
            typer.Option(help="Hold completions to the form that can be read.", rich_help_panel="Settings"),
        ] = None,
        max_lm_calls: Annotated[
            int | None, typer.Option(help="Most LM calls of a strategy's stages.", rich_help_panel="Limits")
        ] = None,
        max_total_tokens: Annotated[
            int | None, typer.Option(help="Most tokens of a strategy's stages.", rich_help_panel="Limits")
        ] = None,
        max_seconds: Annotated[
            float | None, typer.Option(help="Most seconds of a strategy's stages.", rich_help_panel="Limits")
        ] = None,
        track: Annotated[
            list[str] | None,
            typer.Option(help="`tensorboard:FOLDER`, `mlflow:URI` or `wandb:PROJECT`; repeatable."),
        ] = None,
        ray: Annotated[
            str | None,
            typer.Option(
                help="Runs cells on a Ray cluster: `local` starts one here, `auto`, `HOST:6379` or `ray://HOST:10001` "
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
            None, help="Folder with the data; without it they come from the hub.", hidden="data" not in task.options
        ),
        retriever: str | None = typer.Option(
            None,
            help="`bm25`, `bm25:PASSAGES`, `dense:PASSAGES`, the folder of an index, or `http://HOST:PORT`.",
            hidden="retriever" not in task.options,
        ),
    ) -> None:
        options = locals()
        with _installed(), ExitStack() as stack:
            from benchmarks.experiments import settings as known
            from benchmarks.experiments.cells import Cluster
            from benchmarks.experiments.dry_run import rehearse, show_plan
            from benchmarks.experiments.experiment import chosen_settings, execute
            from benchmarks.experiments.models import Models
            from lmpipe.cli.tables import show
            from lmpipe.trackers import load_tracker

            given = _given(task, options, config)
            if paper:
                print(known.as_toml(known.settings_of_paper(task.name)), end="")
                return
            strategies = list(known.ROWS) if all_strategies else strategy or [*known.BASELINES, "p -> w -> p"]
            models = Models(lm, train_lm, cache, dtype, quantization)
            chosen = _set(task, {"data": data, "retriever": retriever})
            if dry_run:
                settings = chosen_settings(chosen, models, given)
                show_plan(rehearse(chosen, settings, strategies, _numbers(seeds)), console)
                return
            if out is None:
                raise ConfigError("--out says where the run's results go, such as --out runs/first")
            if cache is not None and ray not in (None, "local"):
                raise ConfigError("--cache is a file for processes of one machine; leave it out with --ray ADDRESS")
            cells = None if ray is None else Cluster(ray, cpus_per_cell, gpus_per_cell)
            trackers = tuple(stack.enter_context(load_tracker(spec)) for spec in track or ())
            numbers = _numbers(seeds)
            result = execute(chosen, models, strategies, numbers, out, given, trackers, console, _typed(), cells)
            show(result, console)
            console.print(styled(f"written: {out / 'result.json'}, {out / 'report.html'}"))

    run_command(app, console)


_SETTINGS = (
    "train",
    "val",
    "test",
    "max_tokens",
    "rollouts_per_example",
    "structured",
    "max_lm_calls",
    "max_total_tokens",
    "max_seconds",
)
"""The options that are fields of `benchmarks.experiments.settings.Settings`."""


def _given(task: Task, options: Mapping[str, Any], config: Path | None) -> dict[str, object]:
    """The settings that were asked for, those of the command line before those of a file.

    Raises:
        ConfigError: If the file has settings that cannot be.
    """
    from benchmarks.experiments.settings import settings_of_paper

    more = read_config(config).settings if config else {}
    try:
        settings_of_paper(task.name).changed(more)
    except ConfigError as error:
        raise ConfigError(f"--config {config}: {error}") from error
    return {**more, **{name: options[name] for name in _SETTINGS if options[name] is not None}}


def _use_config(context: typer.Context, path: Path | None) -> Path | None:
    """Makes what a file says the defaults of the options.

    Raises:
        ConfigError: If it cannot be read, or an option of it cannot be.
    """
    if path is not None:
        known = {parameter.name: parameter for parameter in context.command.params if parameter.name != "config"}
        options = read_config(path, {name for name in known if name}).options
        for name, value in options.items():
            parameter = known[name]
            try:
                _convert(value, context, parameter)
            except (typer.BadParameter, TypeError, ValueError) as error:
                raise ConfigError(f"--config {path}: {name} = {value!r} cannot be: {error}") from error
        context.default_map = options
    return path


def _convert(value: Any, context: typer.Context, parameter: Any) -> None:
    """Converts the value of an option as the command line will.

    Raises:
        typer.BadParameter, TypeError, ValueError: If it cannot be one.
    """
    if parameter.multiple != isinstance(value, list):
        raise ValueError("it must be a list of texts" if parameter.multiple else "it must not be a list")
    if isinstance(value, bool) != parameter.is_flag:
        raise ValueError("true and false are for options that take no value")
    parameter.process_value(context, value)


@contextmanager
def _installed() -> Iterator[None]:
    """Says what is to be installed.

    Raises:
        ConfigError: If a package is missing.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise ConfigError(f"{error}; run: pip install -e '.[local,benchmarks]', for --ray with cluster") from error


def _set(task: Task, options: Mapping[str, str | None]) -> Task:
    """The task with the options that were given.

    Raises:
        ConfigError: If it does not take one of them.
    """
    given: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
    for name in given:
        if name not in task.options:
            raise ConfigError(f"{task.name} takes no --{name}")
    return replace(task, **given)


def _typed() -> str:
    """The command of this process, as it is typed in the checkout, without credentials and keys."""
    spec = sys.modules["__main__"].__spec__
    started = [sys.argv[0]] if spec is None else ["-m", spec.name]
    return clean(shlex.join(["python", *started, *map(hide, sys.argv[1:])]))


def _numbers(text: str) -> list[int]:
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"--seeds {text!r} must be whole numbers with commas between them, such as 0,1,2") from None
    if len(set(numbers)) < len(numbers):
        raise ConfigError(f"--seeds {text!r} names a seed twice, which would count its examples twice")
    return numbers
