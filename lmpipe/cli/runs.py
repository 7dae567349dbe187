"""``lmpipe show``, ``trace``, ``prompt``, ``export`` and ``diff``: inspecting runs, finished or not."""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from lmpipe.cli.terminal import new_console, styled
from lmpipe.errors import ConfigError, LmpipeError
from lmpipe.text.figures import count

if TYPE_CHECKING:
    from lmpipe.results.result import Result, StrategyOutcome, StrategyReport
    from lmpipe.results.run_reader import FinishedRun
    from lmpipe.results.trace_log import StepRecord, TraceRecord

console = new_console(soft_wrap=True)
_COLOURS = {"system": "magenta", "user": "cyan", "assistant": "green"}

RunFolder = Annotated[Path, typer.Argument(help="Run directory of a benchmark or a script.")]
Strategy = Annotated[
    str | None, typer.Option(help="Strategy to use, or its first stages; by default the best by validation score.")
]
Seed = Annotated[int | None, typer.Option(help="Seed to use; by default the first.")]
Module = Annotated[str | None, typer.Option(help="Path of a module, such as `answer`; by default all modules.")]


def show(run: RunFolder) -> None:
    """Shows the scores of all strategies with confidence intervals, their costs, and noteworthy findings.

    Of a folder with several runs, it shows what they are.
    """
    from lmpipe.cli.tables import show_result
    from lmpipe.run_directory import find_runs, open_run

    if runs := find_runs(run):
        console.print(styled(f"{run} contains {count(len(runs), 'run')}; to see one: lmpipe show {runs[0]}"))
        for path in runs:
            console.print(styled((str(path), "bold"), f": {_summary(path)}"))
        return
    finished = open_run(run)
    if finished.result.strategies:
        show_result(finished.result, new_console(), finished.intervals, finished.beginnings)
    for note in finished.notes:
        console.print(styled(("note", "yellow"), f": {note}"))


def trace(
    run: RunFolder,
    strategy: Strategy = None,
    seed: Seed = None,
    example: Annotated[str | None, typer.Option(help="Id of an example; by default all examples.")] = None,
    module: Module = None,
    errors: Annotated[
        bool, typer.Option("--errors", help="Show only traces that failed, and only their failed steps.")
    ] = False,
    limit: Annotated[int, typer.Option(help="Maximum number of traces to show.")] = 5,
) -> None:
    """Shows traces: the messages sent, the completions, the outputs parsed from them, the scores.

    They are those of validation examples; of a benchmark that has ended, those of test examples.
    """
    from lmpipe.run_directory import open_run

    finished = open_run(run)
    outcome, name = _select_outcome(finished, strategy, seed)
    where = f" on {finished.examples} examples"
    ids, paths, selected, num_matches = [], set[str](), list["TraceRecord"](), 0
    for record in finished.traces(name, seed):
        ids.append(record.example)
        if example in (None, record.example) and (record.failure or not errors):
            num_matches += 1
            paths |= {step.path for step in record.steps}
            selected += [record] if num_matches <= limit else []
    if example is not None and example not in ids:
        raise ConfigError(f"{name!r}, seed {outcome.seed}, has no example {example!r}; it has {_some(ids)}")
    if not num_matches:
        only = "" if example is None else f"example {example}: "
        console.print(styled((name, "bold"), f", seed {outcome.seed}: {only}no failed traces among {len(ids)}{where}"))
        return
    _check_module(module, paths)
    console.print(
        styled((name, "bold"), f", seed {outcome.seed}: {len(selected)} of {count(num_matches, 'trace')}{where}")
    )
    for record in selected:
        _show_trace(record, module, errors)


def prompt(run: RunFolder, strategy: Strategy = None, seed: Seed = None, module: Module = None) -> None:
    """Shows the final prompts of a strategy as they are sent: instructions, output format and demonstrations."""
    from lmpipe.run_directory import open_run

    finished = open_run(run)
    outcome, name = _select_outcome(finished, strategy, seed)
    unsent = "" if outcome.traces else ", from its state, since no traces were kept"
    console.print(styled((name, "bold"), f", seed {outcome.seed}{unsent}"))
    prompts = finished.prompts(outcome)
    _check_module(module, set(prompts))
    for path, messages in prompts.items():
        if _is_in(path, module):
            console.rule(styled(path))
            _show_messages(messages)


def export(
    run: RunFolder,
    folder: Annotated[Path, typer.Argument(help="Folder to create.")],
    strategy: Strategy = None,
    seed: Seed = None,
) -> None:
    """Exports the final state of a strategy for `lmpipe.load`: prompts, adapters, settings and a model card."""
    from lmpipe.results.export import export as write
    from lmpipe.run_directory import open_run

    finished = open_run(run)
    outcome, name = _select_outcome(finished, strategy, seed)
    write(finished, outcome, finished.strategy(name), folder)
    console.print(styled(f"wrote {', '.join(sorted(file.name for file in folder.iterdir()))} to {folder}"))


def diff(
    run_a: Annotated[Path, typer.Argument(help="Run directory of a benchmark or a script.")],
    run_b: Annotated[Path, typer.Argument(help="Run directory to compare it with.")],
    strategy: Annotated[
        str | None, typer.Option(help="Strategy whose prompts are compared; by default all common strategies.")
    ] = None,
) -> None:
    """Shows how two runs differ: settings, versions, data splits, scores, and prompts of their first common seed."""
    from lmpipe.run_directory import open_run

    first, second = open_run(run_a), open_run(run_b)
    _show_difference("settings", _json_lines(first.provenance), _json_lines(second.provenance))
    _show_difference("versions", _json_lines(first.result.versions), _json_lines(second.result.versions))
    _show_difference("splits", _json_lines(first.splits), _json_lines(second.splits))
    _show_difference("validation scores", *(_score_lines(run.result, "val") for run in (first, second)))
    _show_difference("test scores", *(_score_lines(run.result, "test") for run in (first, second)))
    names, others = ([row.strategy for row in run.result.strategies] for run in (first, second))
    common = [name for name in names if name in others]
    if not common:
        console.rule(styled(f"no strategy in common: {', '.join(names) or 'none'}; {', '.join(others) or 'none'}"))
    for name in [strategy] if strategy else common:
        seeds = [[outcome.seed for outcome in run.strategy(name).outcomes] for run in (first, second)]
        for seed in [seed for seed in seeds[0] if seed in seeds[1]][:1]:
            prompts = [run.prompts(run.outcome(name, seed)) for run in (first, second)]
            _show_difference(f"prompts of {name}, seed {seed}", *map(_prompt_lines, prompts))


def _select_outcome(run: FinishedRun, strategy: str | None, seed: int | None) -> tuple[StrategyOutcome, str]:
    """Returns the outcome of a strategy and seed, with the name of the strategy; see the options for the defaults."""
    name = run.strategy(strategy).strategy
    return run.outcome(name, seed), name


def _summary(path: Path) -> str:
    """Returns a line about the run in a directory."""
    from lmpipe.run_directory import open_run

    try:
        run = open_run(path)
    except LmpipeError as error:
        return str(error)
    rows = ", ".join(f"{row.strategy} {_main_score(row)}" for row in run.result.strategies)
    return f"{run.result.task} on {run.result.lm}: {rows}" if rows else "; ".join(run.notes)


def _main_score(row: StrategyReport) -> str:
    part, score = ("test", row.test) if row.test.n else ("val", row.val)
    return f"{part} {score.percent}" + " %" * (score.mean is not None)


def _some(ids: list[str]) -> str:
    """Lists the first ids."""
    return ", ".join(ids[:5]) + f" and {len(ids) - 5} others" * (len(ids) > 5)


def _is_in(path: str, module: str | None) -> bool:
    """Whether a path is that of the module or of a submodule; always true if `module` is None."""
    return module is None or path == module or path.startswith(f"{module}.")


def _check_module(module: str | None, paths: set[str]) -> None:
    """Raises a ConfigError if none of the paths is in the module."""
    if module is not None and not any(_is_in(path, module) for path in paths):
        raise ConfigError(f"there is no module {module!r}; the modules are {', '.join(sorted(paths))}")


def _json_lines(values: object) -> list[str]:
    return json.dumps(values, indent=2, ensure_ascii=False, sort_keys=True).splitlines()


def _score_lines(result: Result, part: Literal["val", "test"]) -> list[str]:
    scores = {row.strategy: row.val if part == "val" else row.test for row in result.strategies}
    return [f"{name}: {score.percent}" + " %" * (score.mean is not None) for name, score in scores.items()]


def _prompt_lines(prompts: dict[str, list[tuple[str, str]]]) -> list[str]:
    return [
        line
        for path, messages in prompts.items()
        for role, content in messages
        for line in (f"{path}, {role}:", *content.splitlines())
    ]


def _show_difference(title: str, first: list[str], second: list[str]) -> None:
    changed = list(difflib.unified_diff(first, second, lineterm="", n=2))[2:]
    console.rule(styled(title + ("" if changed else ": no difference")))
    for line in changed:
        console.print(styled((line, {"+": "green", "-": "red", "@": "cyan"}.get(line[0], "dim"))))


def _show_trace(record: TraceRecord, module: str | None, errors: bool) -> None:
    measures = "".join(f", {name} {value:g}" for name, value in record.measures.items())
    console.rule(styled(f"example {record.example}, score {record.score:g}{measures}"))
    labels = ((f"correct {name}", value) for name, value in record.labels.items())
    for name, value in [*record.inputs.items(), *labels]:
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
        outputs = step.outputs or {}
        for text, score in zip(outputs.get("passages", []), outputs.get("scores", []), strict=False):
            console.print(styled(f"  {score:8.2f}  {text}"))
    else:
        _show_messages(step.messages)
        console.print(styled(("completion", "bold green"), f" ({step.completion_tokens} tokens)\n", step.text or ""))
        console.print(styled(("parsed outputs", "bold"), f": {step.outputs}"))
    if step.error:
        console.print(styled(("error", "bold red"), ": ", step.error))


def _show_messages(messages: list[tuple[str, str]] | tuple[tuple[str, str], ...]) -> None:
    for role, content in messages:
        console.print(styled((role, f"bold {_COLOURS.get(role, 'white')}"), "\n", content))
