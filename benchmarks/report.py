"""``report.html``: a run as one self-contained page of tables and plots."""

from __future__ import annotations

import io
from pathlib import Path

import jinja2
import matplotlib as mpl
from matplotlib.figure import Figure

from lmpipe.files import write_whole
from lmpipe.result import Result, StageReport

BLUE, GREY, GREEN = "#2f6690", "#9aa5b1", "#3a7d44"


def write_report(result: Result, folder: Path) -> None:
    """Writes the page, and its first plot as a file of its own (``scores.svg``)."""
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    scores = _svg(_plot_scores(result))
    page = environment.get_template("report.html.jinja").render(
        result=result,
        scores=scores,
        stages=_stages(result),
        searches=_svg(_plot_candidates(result)),
        losses=_svg(_plot_losses(result)),
    )
    write_whole(folder / "report.html", page.encode())
    write_whole(folder / "scores.svg", scores.encode())


def _svg(figure: Figure | None) -> str:
    if figure is None:
        return ""
    text = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": "lmpipe"}):  # the same ids, so the same bytes, in every run
        figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()[text.getvalue().index("<svg") :]


def _plot_scores(result: Result) -> Figure:
    rows = list(reversed(result.strategies))
    figure = Figure(figsize=(7, 0.8 + 0.6 * len(rows)), layout="constrained")
    axes = figure.subplots()
    for offset, colour, name, scores in (
        (0.18, GREY, "validation", [row.val for row in rows]),
        (-0.18, BLUE, "test", [row.test for row in rows]),
    ):
        for number, score in enumerate(scores):
            if score.mean is None or score.low is None or score.high is None:
                axes.text(0.5, number + offset, "—", va="center", color=colour)
                continue
            sides = [[100 * (score.mean - score.low)], [100 * (score.high - score.mean)]]
            axes.barh(number + offset, 100 * score.mean, 0.34, color=colour, xerr=sides, capsize=3, ecolor="#333333")
        axes.barh(0, 0, color=colour, label=name)
    axes.set_yticks(range(len(rows)), [row.strategy for row in rows])
    axes.set_xlim(0, 105)
    axes.set_xlabel("score, percent (whiskers: 95 % intervals)")
    figure.legend(loc="outside upper right", ncols=2, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def _stages(result: Result) -> dict[str, StageReport]:
    """Every stage once, named by the strategy up to it."""
    named: dict[str, StageReport] = {}
    for row in result.strategies:
        for number, stage in enumerate(row.stages, 1):
            named.setdefault(" → ".join(part.name for part in row.stages[:number]), stage)
    return named


def _plot_candidates(result: Result) -> Figure | None:
    searches = {name: stage for name, stage in _stages(result).items() if any(s["candidates"] for s in stage.per_seed)}
    if not searches:
        return None
    figure = Figure(figsize=(7, 2.6 * len(searches)), layout="constrained")
    for axes, (name, stage) in zip(figure.subplots(len(searches), squeeze=False)[:, 0], searches.items(), strict=True):
        for details in stage.per_seed:
            means = [100 * candidate["mean"] for candidate in details["candidates"]]
            axes.plot(means, "o", alpha=0.7, label=f"seed {details['seed']}")
        labels = [candidate["name"] for candidate in stage.per_seed[0]["candidates"]]
        axes.set_xticks(range(len(labels)), labels, rotation=25, ha="right")
        axes.set_ylim(-3, 103)
        axes.set_ylabel("validation, %")
        axes.set_title(f"candidates of {name}", loc="left", fontsize=10)
        axes.legend(frameon=False, fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def _plot_losses(result: Result) -> Figure | None:
    curves = [
        (f"{name}, seed {details['seed']}, {key}", training["losses"])
        for name, stage in _stages(result).items()
        for details in stage.per_seed
        for key, training in details.get("training", {}).items()
    ]
    if not curves:
        return None
    figure = Figure(figsize=(7, 3), layout="constrained")
    axes = figure.subplots()
    for name, losses in curves:
        axes.plot(range(1, len(losses) + 1), losses, label=name)
    axes.set_xlabel("step")
    axes.set_ylabel("loss per completion token, nats")
    axes.set_yscale("log")
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    return figure
