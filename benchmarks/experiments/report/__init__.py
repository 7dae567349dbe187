"""The report of an experiment: an HTML page of tables, plots and traces, a Markdown page, CSV tables, and one plot.

Everything is read from the result and from the traces in the run directory; how an experiment is run does not matter.
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
    contenders,
    efficiencies,
    headline,
    module_rows,
    stage_costs,
    stage_tree,
    stages_of,
    winner_of,
)
from benchmarks.experiments.report.trace_examples import changes, endings, prompts
from lmpipe.results.result import Result
from lmpipe.results.run_reader import FinishedRun
from lmpipe.storage.files import write_atomically
from lmpipe.text.cleaning import clean_text
from lmpipe.text.figures import fixed, name_seeds, p_value
from lmpipe.text.markdown import as_block, as_code, as_line

_HERE = Path(__file__).parent


def write_report(result: Result, folder: Path, label: str | None = None, command: str = "") -> None:
    """Writes ``report.html`` (which needs no other file), ``report.md``, ``results.csv``, ``scores.csv`` and
    ``scores.svg``.

    Args:
        result: The result.
        folder: The run directory; its ``blobs`` hold the traces of the test runs.
        label: Label of the examples whose classes are compared in a confusion table, if there is one.
        command: The command that repeats the experiment, as it is typed.

    Raises:
        CorruptBlob: If traces that the result names are missing or damaged.
        StoreError: If a file cannot be written.
    """
    traces_of = FinishedRun(folder, result).records
    plots = {name: draw(name, result) for name in PLOTS}
    values: dict[str, Any] = {
        "result": result,
        "command": command,
        "best": winner_of(result),
        "contenders": contenders(result),
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
            values,
            endings=endings(result, traces_of),
            confusions=confusions(result, traces_of, label),
            prompts=prompts(result, traces_of),
            changes=changes(result, traces_of),
            plots={name: themed(svg, name) for name, svg in plots.items() if svg is not None},
        )
    )
    write_atomically(folder / "report.html", clean_text(page).encode())
    write_atomically(folder / "report.md", clean_text(markdown).encode())
    write_atomically(folder / "results.csv", clean_text(results_csv(result)).encode())
    write_atomically(folder / "scores.csv", clean_text(scores_csv(result, traces_of)).encode())
    write_atomically(folder / "scores.svg", (plots["scores"] or "").encode())


def _environment(*, escape: bool) -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HERE),
        autoescape=escape,  # noqa: S701 Markdown is escaped by lmpipe.text.markdown
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {"count": "{:,.0f}".format, "arrows": arrows, "json": _json}
    environment.filters |= {"fixed": fixed, "p_value": p_value, "seeds": name_seeds}
    environment.filters |= {"line": as_line, "code": as_code, "fenced": as_block}
    return environment


def _json(value: object) -> str:
    """Returns readable JSON of a list or record, in which letters and line ends are not escaped."""
    return json.dumps(value, indent=1, ensure_ascii=False).replace("\\n", "\n")
