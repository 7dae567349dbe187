"""``lmpipe show``, ``trace``, ``prompt``, ``export`` and ``diff``: looking into a finished run."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lmpipe.cli.terminal import new_console, styled
from lmpipe.errors import ConfigError

if TYPE_CHECKING:
    from lmpipe.results.result import StrategyOutcome
    from lmpipe.results.run_reader import FinishedRun
    from lmpipe.results.trace_log import StepRecord, TraceRecord

console = new_console(soft_wrap=True)
_COLOURS = {"system": "magenta", "user": "cyan", "assistant": "green"}

Run = Annotated[Path, typer.Argument(help="Run directory of a benchmark.")]
Strategy = Annotated[str | None, typer.Option(help="By default the one with the best validation score.")]
Seed = Annotated[int | None, typer.Option(help="By default the first.")]
Module = Annotated[str | None, typer.Option(help="Path of a module, such as `answer`; by default all.")]


def show(run: Run) -> None:
    """Shows the scores of all strategies with their intervals, what they cost, and what is to be known."""
    from lmpipe.cli.tables import show as show_tables
    from lmpipe.results.run_reader import open_run

    show_tables(open_run(run).result, new_console())


def trace(
    run: Run,
    strategy: Strategy = None,
    seed: Seed = None,
    example: Annotated[str | None, typer.Option(help="Id of an example.")] = None,
    module: Module = None,
    errors: Annotated[bool, typer.Option("--errors", help="Only runs that failed, and their failed steps.")] = False,
    limit: Annotated[int, typer.Option(help="Most runs to show.")] = 5,
) -> None:
    """Shows test runs step by step: the messages as sent, the completion, what was read of it, and the score."""
    from lmpipe.results.run_reader import open_run

    opened = open_run(run)
    outcome, name = _chosen(opened, strategy, seed)
    found, paths, shown = 0, set[str](), list["TraceRecord"]()
    for record in _tested(opened, outcome, name):
        if example in (None, record.example) and (record.failure or not errors):
            found += 1
            paths |= {step.path for step in record.steps}
            shown += [record] if found <= limit else []
    if not found:
        raise ConfigError(f"{run} has no such run of {name!r}, seed {outcome.seed}")
    _check_module(module, paths)
    console.print(styled((name, "bold"), f", seed {outcome.seed}: {len(shown)} of {found} runs"))
    for record in shown:
        _show_trace(record, module, errors)


def prompt(run: Run, strategy: Strategy = None, seed: Seed = None, module: Module = None) -> None:
    """Shows the prompts that a strategy ended in, as they are sent: instruction, reply form, demonstrations."""
    from lmpipe.results.run_reader import open_run, prompts_sent

    opened = open_run(run)
    outcome, name = _chosen(opened, strategy, seed)
    console.print(styled((name, "bold"), f", seed {outcome.seed}"))
    prompts = prompts_sent(_tested(opened, outcome, name))
    _check_module(module, set(prompts))
    for path, messages in prompts.items():
        if _is_in(path, module):
            console.rule(styled(path))
            _show_messages(messages)


def export(
    run: Run,
    folder: Annotated[Path, typer.Argument(help="To be made.")],
    strategy: Strategy = None,
    seed: Seed = None,
) -> None:
    """Writes a folder with the state, the adapters in PEFT's format, which transformers and vLLM load, and a card."""
    from lmpipe.results.export import export as write
    from lmpipe.results.run_reader import open_run

    opened = open_run(run)
    outcome, name = _chosen(opened, strategy, seed)
    write(opened, outcome, opened.strategy(name), folder)
    console.print(styled(f"written: {', '.join(sorted(path.name for path in folder.iterdir()))} in {folder}"))


def diff(
    run_a: Annotated[Path, typer.Argument(help="Run directory.")],
    run_b: Annotated[Path, typer.Argument(help="Another one.")],
    strategy: Annotated[str | None, typer.Option(help="Whose prompts to compare; by default those of all.")] = None,
) -> None:
    """Shows in what two runs differ: settings, versions, splits, scores, prompts of the first seed that both have."""
    from lmpipe.results.run_reader import open_run, prompts_sent

    first, second = open_run(run_a), open_run(run_b)
    _show_difference("settings", _lines(first.provenance), _lines(second.provenance))
    _show_difference("versions", _lines(first.result.versions), _lines(second.result.versions))
    _show_difference("splits", _lines(first.splits), _lines(second.splits))
    _show_difference("test scores", _scores(first), _scores(second))
    both = [row.strategy for row in first.result.strategies if row.strategy in dict(_rows(second))]
    seeds = [seed for seed in first.result.seeds if seed in second.result.seeds]
    for name in [strategy] if strategy else both:
        for seed in seeds[:1]:
            sides = [prompts_sent(one.records(one.outcome(name, seed))) for one in (first, second)]
            _show_difference(f"prompts of {name}, seed {seed}", *map(_lines_of, sides))


def _chosen(run: FinishedRun, strategy: str | None, seed: int | None) -> tuple[StrategyOutcome, str]:
    name = run.strategy(strategy).strategy
    return run.outcome(name, seed), name


def _tested(run: FinishedRun, outcome: StrategyOutcome, name: str) -> Iterator[TraceRecord]:
    """The test runs of an outcome.

    Raises:
        ConfigError: If there are none.
    """
    if outcome.traces is None:
        why = "; ".join(run.strategy(name).skips) or "its traces were not kept"
        raise ConfigError(f"{run.folder} has no test runs of {name!r}, seed {outcome.seed}: {why}")
    return run.records(outcome)


def _is_in(path: str, module: str | None) -> bool:
    """Whether a path is that of a module, or of a part of it."""
    return module is None or path == module or path.startswith(f"{module}.")


def _check_module(module: str | None, paths: set[str]) -> None:
    """Raises:
    ConfigError: If no path is in the module.
    """
    if module is not None and not any(_is_in(path, module) for path in paths):
        raise ConfigError(f"there is no module {module!r}; there are {', '.join(sorted(paths))}")


def _rows(run: FinishedRun) -> list[tuple[str, str]]:
    return [(row.strategy, row.test.percent) for row in run.result.strategies]


def _lines(values: object) -> list[str]:
    return json.dumps(values, indent=2, ensure_ascii=False, sort_keys=True).splitlines()


def _scores(run: FinishedRun) -> list[str]:
    return [f"{name}: {score}" for name, score in _rows(run)]


def _lines_of(prompts: dict[str, list[tuple[str, str]]]) -> list[str]:
    return [
        line
        for path, messages in prompts.items()
        for role, content in messages
        for line in (f"{path}, {role}:", *content.splitlines())
    ]


def _show_difference(what: str, first: list[str], second: list[str]) -> None:
    changed = list(difflib.unified_diff(first, second, lineterm="", n=2))[2:]
    console.rule(styled(what + ("" if changed else ": the same")))
    for line in changed:
        console.print(styled((line, {"+": "green", "-": "red", "@": "cyan"}.get(line[0], "dim"))))


def _show_trace(record: TraceRecord, module: str | None, errors: bool) -> None:
    measured = "".join(f", {name} {value:g}" for name, value in record.measures.items())
    console.rule(styled(f"example {record.example}, score {record.score:g}{measured}"))
    for name, value in [*record.inputs.items(), *((f"right {name}", value) for name, value in record.labels.items())]:
        console.print(styled((name, "bold"), f": {value}"))
    for step in record.steps:
        if _is_in(step.path, module) and (step.error or not errors):
            _show_step(step)
    console.print(styled(("prediction", "bold"), f": {record.prediction}"))
    if record.failure:
        console.print(styled((f"failed ({record.failure})", "bold red"), ": ", record.error or ""))
    if record.feedback:
        console.print(styled(("feedback", "bold"), ": ", record.feedback))


def _show_step(step: StepRecord) -> None:
    console.print(styled("\n", (step.path, "bold yellow"), f", call {step.index}"))
    if step.kind == "retrieval":
        console.print(styled(f"  query: {step.inputs.get('query')}"))
        found = step.outputs or {}
        for text, score in zip(found.get("passages", []), found.get("scores", []), strict=False):
            console.print(styled(f"  {score:8.2f}  {text}"))
    else:
        _show_messages(step.messages)
        console.print(styled(("completion", "bold green"), f" ({step.completion_tokens} tokens)\n", step.text or ""))
        console.print(styled(("read as", "bold"), f": {step.outputs}"))
    if step.error:
        console.print(styled(("error", "bold red"), ": ", step.error))


def _show_messages(messages: list[tuple[str, str]] | tuple[tuple[str, str], ...]) -> None:
    for role, content in messages:
        console.print(styled((role, f"bold {_COLOURS.get(role, 'white')}"), "\n", content))
