"""The command line that all benchmarks share: reads options, runs, and shows what was found."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, final

import typer
from rich.console import Console

from benchmarks.cells import Cluster, Work
from benchmarks.report import write_report
from benchmarks.run import run, versions
from benchmarks.settings import settings_for
from benchmarks.task import Task
from lmpipe import LM, LmpipeError
from lmpipe.commands.tables import show
from lmpipe.commands.terminal import progress_bars, show_warnings
from lmpipe.engines import load_lm
from lmpipe.engines.cached import CachedLM
from lmpipe.engines.local import LocalLM
from lmpipe.errors import ConfigError
from lmpipe.events import Callback
from lmpipe.files import write_whole
from lmpipe.hashing import describe
from lmpipe.result import Result
from lmpipe.store import RunStore
from lmpipe.trackers import load_tracker

console = Console()


def main(task: Task) -> None:
    """Runs the command line for one task."""
    app = typer.Typer(add_completion=False, rich_markup_mode="markdown")

    @app.command(
        help=f"Teaches the {task.name} program with every strategy on every seed, and reports the test scores."
    )
    def command(
        out: Annotated[Path, typer.Option(help="Run directory. Started again on it, a run goes on where it was.")],
        lm: Annotated[
            str, typer.Option(help="`embedded`, `hf:ID_OR_PATH`, `vllm:ID_OR_PATH`, or `openai:MODEL@URL,URL`.")
        ] = "embedded",
        train_lm: Annotated[
            str | None, typer.Option(help="What trains adapters if `--lm` cannot: `embedded`, or `hf:ID_OR_PATH`.")
        ] = None,
        dtype: Annotated[str | None, typer.Option(help="Of a model in this process: `float32`, `bfloat16` …")] = None,
        quantization: Annotated[
            str | None, typer.Option(help="Of a model in this process: `nf4` or `int8`, through bitsandbytes.")
        ] = None,
        cache: Annotated[Path | None, typer.Option(help="File that keeps completions, for runs to share.")] = None,
        strategy: Annotated[
            list[str] | None,
            typer.Option(
                help="`vanilla`, `p`, `w`, `p -> w -> p` … (p searches prompts, w tunes weights); repeatable."
            ),
        ] = None,
        seeds: Annotated[str, typer.Option(help="Comma-separated; each has a data split of its own.")] = "0",
        train: Annotated[int | None, typer.Option(help="Training examples.")] = None,
        val: Annotated[int | None, typer.Option(help="Validation examples.")] = None,
        test: Annotated[int | None, typer.Option(help="Test examples.")] = None,
        max_tokens: Annotated[int | None, typer.Option(help="Most new tokens of an LM call.")] = None,
        max_lm_calls: Annotated[int | None, typer.Option(help="Most LM calls of a strategy's stages.")] = None,
        max_total_tokens: Annotated[int | None, typer.Option(help="Most tokens of a strategy's stages.")] = None,
        max_seconds: Annotated[float | None, typer.Option(help="Most seconds of a strategy's stages.")] = None,
        structured: Annotated[bool | None, typer.Option(help="Hold completions to the form that can be read.")] = None,
        track: Annotated[
            list[str] | None,
            typer.Option(help="`tensorboard:FOLDER`, `mlflow:URI` or `wandb:PROJECT`; repeatable."),
        ] = None,
        ray: Annotated[
            str | None,
            typer.Option(
                help="Runs cells on a Ray cluster: `local` starts one here, `auto`, `HOST:6379` or `ray://HOST:10001` "
                "joins one. All its machines must see `--out` under the same path."
            ),
        ] = None,
        cpus_per_cell: Annotated[float, typer.Option(help="With `--ray`: cores of a cell.", min=0)] = 1,
        gpus_per_cell: Annotated[float, typer.Option(help="With `--ray`: GPUs of a cell, such as 0.5.", min=0)] = 0,
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
        show_warnings(console)
        strategies = strategy or ["vanilla", "p", "w", "p -> w -> p"]
        changes = {
            "train": train,
            "val": val,
            "test": test,
            "max_tokens": max_tokens,
            "max_lm_calls": max_lm_calls,
            "max_total_tokens": max_total_tokens,
            "max_seconds": max_seconds,
            "structured": structured,
        }
        given = {name: value for name, value in changes.items() if value is not None}
        with _told(), ExitStack() as stack:
            models = Models(lm, train_lm, cache, dtype, quantization)
            trackers = tuple(stack.enter_context(load_tracker(spec)) for spec in track or ())
            chosen = _set(task, {"data": data, "retriever": retriever})
            if cache is not None and ray not in (None, "local"):
                raise ConfigError("--cache is a file for processes of one machine; leave it out with --ray ADDRESS")
            cells = None if ray is None else Cluster(ray, cpus_per_cell, gpus_per_cell)
            show(execute(chosen, models, strategies, _numbers(seeds), out, given, trackers, cells), console)
        console.print(f"written: {out / 'result.json'}, {out / 'report.html'}", highlight=False)

    app()


@contextmanager
def _told() -> Iterator[None]:
    """Ends the command with the message of an error that lmpipe raises on purpose."""
    try:
        yield
    except LmpipeError as error:
        console.print(f"[bold red]{type(error).__name__}:[/] {error}", highlight=False)
        raise typer.Exit(1) from error


@final
@dataclass(frozen=True)
class Models:
    """What a benchmark runs on.

    Args:
        lm: Generates.
        train_lm: Trains adapters, if `lm` cannot; a model in this process, of the same name.
        cache: File that keeps completions.
        dtype: Of what runs in this process.
        quantization: Of what runs in this process.
    """

    lm: str
    train_lm: str | None = None
    cache: Path | None = None
    dtype: str | None = None
    quantization: str | None = None

    @property
    def identity(self) -> dict[str, str | None]:
        """What decides results: not where servers are."""
        return {
            "lm": self.lm.partition("@http")[0],
            "train_lm": self.train_lm,
            "dtype": self.dtype,
            "quantization": self.quantization,
        }

    def load(self, *, to_train: bool) -> tuple[LM, LocalLM | None]:
        """The LM that generates, and the one that trains if that is asked for.

        Raises:
            ConfigError: If the second cannot train, or is not the same model.
        """
        lm = self._made(self.lm)
        trained = lm if self.train_lm is None else self._made(self.train_lm)
        if not isinstance(trained, LocalLM):
            if not to_train:
                return self._cached(lm), None
            raise ConfigError(
                f"{self.train_lm or self.lm!r} cannot be fine-tuned here; add --train-lm with the same model, as "
                "'embedded' or 'hf:ID_OR_PATH'"
            )
        if trained.name != lm.name:
            raise ConfigError(f"--lm is {lm.name!r} and --train-lm is {trained.name!r}; serve the model by that name")
        return self._cached(lm), trained

    def _made(self, spec: str) -> LM:
        chosen = {"dtype": self.dtype, "quantization": self.quantization}
        here = spec == "embedded" or spec.startswith("hf:")
        return load_lm(spec, **{name: value for name, value in chosen.items() if here and value is not None})

    def _cached(self, lm: LM) -> LM:
        return lm if self.cache is None else CachedLM(lm, self.cache)


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


def execute(
    task: Task,
    models: Models,
    strategies: list[str],
    seeds: list[int],
    out: Path,
    changes: Mapping[str, object],
    callbacks: tuple[Callback, ...] = (),
    cluster: Cluster | None = None,
) -> Result:
    """Runs a benchmark, with progress on the terminal, and writes its result and report into its directory."""
    settings = settings_for(task.name, models.train_lm or models.lm).model_copy(update=changes)
    config = {
        "task": describe(task),
        **models.identity,
        "settings": settings.model_dump(mode="json"),
        "versions": versions(),
    }
    work = Work(task, models, settings, tuple(strategies), tuple(seeds), out.absolute(), config)
    store = RunStore(out, config)
    try:
        result = _run_here(work, store, callbacks) if cluster is None else _run_on(cluster, work, store, callbacks)
        write_whole(out / "result.json", (result.model_dump_json(indent=2) + "\n").encode())
        write_report(result, out)
    finally:
        store.close()
    return result


def _run_here(work: Work, store: RunStore, callbacks: tuple[Callback, ...]) -> Result:
    """Runs the cells one after another in this process."""
    with console.status("loading the LM"):
        lm, trained, retriever = work.load()
    task, settings, strategies, seeds = work.task, work.settings, work.strategies, work.seeds
    with progress_bars(console) as progress:
        return run(task, lm, trained, settings, strategies, seeds, store, progress, callbacks, retriever)


def _run_on(cluster: Cluster, work: Work, store: RunStore, callbacks: tuple[Callback, ...]) -> Result:
    """Runs the cells on a Ray cluster."""
    from benchmarks.cluster import connected, run_cells

    with connected(cluster), progress_bars(console) as progress:
        return run_cells(work, store, cluster, progress, callbacks)


def _numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"--seeds {text!r} must be whole numbers with commas between them, such as 0,1,2") from None
