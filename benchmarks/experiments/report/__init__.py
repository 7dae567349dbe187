"""The report of a run: a page of tables, plots and traces, the same as Markdown, scores as CSV, and one plot alone.

Knows nothing of how a run is made: all is read from its result, and from the traces in its directory.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jinja2

from benchmarks.experiments.report.confusion import confusions
from benchmarks.experiments.report.csv_tables import results_csv, scores_csv
from benchmarks.experiments.report.plot_style import themed
from benchmarks.experiments.report.plots import PLOTS, draw
from benchmarks.experiments.report.rows import (
    arrows,
    best_of,
    efficiencies,
    headline,
    module_rows,
    stage_costs,
    stage_tree,
    stages_of,
)
from benchmarks.experiments.report.trace_examples import Logs, changes, endings, prompts
from lmpipe.results.result import Result
from lmpipe.results.run_reader import FinishedRun
from lmpipe.storage.files import write_whole
from lmpipe.text.cleaning import clean
from lmpipe.text.markdown import as_block, as_code, as_line

_HERE = Path(__file__).parent


def write_report(result: Result, folder: Path, label: str | None = None, command: str = "") -> None:
    """Writes ``report.html`` (which needs no other file), ``report.md``, ``results.csv``, ``scores.csv`` and
    ``scores.svg``.

    Args:
        result: Of the run.
        folder: The run directory, in whose ``blobs`` the traces of its test runs are.
        label: The label of examples whose classes are told apart, if there is one.
        command: What makes the run again, as it is typed.

    Raises:
        CorruptBlob: If traces that the result names are absent or damaged.
        StoreError: If the files cannot be written.
    """
    logs = FinishedRun(folder, result).records
    drawn = {name: draw(name, result) for name in PLOTS}
    values: dict[str, Any] = {
        "result": result,
        "command": command,
        "best": best_of(result),
        "headline": headline(result),
        "tree": stage_tree(result),
        "stages": stages_of(result),
        "costs": stage_costs(result),
        "efficiencies": efficiencies(result),
        "modules": module_rows(result),
    }
    markdown = _environment(escape=False).get_template("report.md.jinja").render(values)
    page = (
        _environment(escape=True)
        .get_template("report.html.jinja")
        .render(
            values | _of_traces(result, logs, label),
            plots={name: themed(svg, name) for name, svg in drawn.items() if svg is not None},
        )
    )
    write_whole(folder / "report.html", clean(page).encode())
    write_whole(folder / "report.md", clean(markdown).encode())
    write_whole(folder / "results.csv", clean(results_csv(result)).encode())
    write_whole(folder / "scores.csv", clean(scores_csv(result, logs)).encode())
    write_whole(folder / "scores.svg", (drawn["scores"] or "").encode())


def _of_traces(result: Result, logs: Logs, label: str | None) -> dict[str, Any]:
    return {
        "endings": endings(result, logs),
        "confusions": confusions(result, logs, label),
        "prompts": prompts(result, logs),
        "changes": changes(result, logs),
    }


def _environment(*, escape: bool) -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HERE),
        autoescape=escape,  # noqa: S701 Markdown has other rules: lmpipe.text.markdown
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {"count": "{:,.0f}".format, "arrows": arrows, "written": _written}
    environment.filters |= {"line": as_line, "code": as_code, "fenced": as_block}
    return environment


def _written(value: object) -> str:
    """A list or record as people read it: JSON in which letters and line ends are themselves."""
    return json.dumps(value, indent=1, ensure_ascii=False).replace("\\n", "\n")
