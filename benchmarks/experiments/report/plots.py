"""The plots of a report; each is drawn from the result alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from benchmarks.experiments.report.plot_style import GREY, INK, colour_of, legend, panels, plain_log, style, svg_of
from benchmarks.experiments.report.rows import arrows, cost_of_seed, difference, stages_of, start_of
from lmpipe.results.result import Result, Score, StageReport
from optimizers import VANILLA

_MOST_NAMES = 12  # candidates that are named below a plot; more names would overlap


def draw(name: str, result: Result) -> str | None:
    """Draws one of `PLOTS` as SVG; None if the result has nothing to show in it."""
    with style():
        figure = PLOTS[name](result)
        return None if figure is None else svg_of(figure)


def _scores(result: Result) -> Figure:
    pairs = {"test": [row.test for row in result.strategies], "validation": [row.val for row in result.strategies]}
    figure, (axes,) = panels(1, 0.9 + 0.5 * len(result.strategies))
    _bars(axes, [row.strategy for row in result.strategies], pairs)
    legend(figure, axes)
    return figure


def _measures(result: Result) -> Figure | None:
    """Draws the further measures of test runs: of all runs, and of the successful ones."""
    names = result.measures
    if not names:
        return None
    figure, panes = panels(len(names), 0.8 + 0.42 * len(result.strategies))
    for name, axes in zip(names, panes, strict=True):
        rows = [row for row in result.strategies if name in row.quality]
        qualities = [row.quality[name] for row in rows]
        pairs = {
            "all test runs": [quality.all for quality in qualities],
            "successful ones": [quality.successful for quality in qualities],
        }
        _bars(axes, [row.strategy for row in rows], pairs)
        axes.set_title(name)
    legend(figure, panes[0])
    return figure


def _bars(axes: Axes, strategies: Sequence[str], series: Mapping[str, Sequence[Score]]) -> None:
    """Draws two bars with whiskers for each strategy, the first on top, and "—" where there is no score."""
    for offset, colour, (name, scores) in zip((-0.19, 0.19), (colour_of(0), GREY), series.items(), strict=True):
        for number, score in enumerate(scores):
            if score.mean is None:
                axes.text(1, number + offset, "—", va="center", color=INK)
            else:
                axes.barh(number + offset, 100 * score.mean, 0.34, color=colour)
                axes.errorbar(100 * score.mean, number + offset, xerr=_sides(score), color=INK, capsize=2.5, lw=1)
        axes.barh(0, 0, color=colour, label=name)
    axes.set_yticks(range(len(strategies)), list(map(arrows, strategies)))
    axes.set_ylim(len(strategies) - 0.45, -0.55)
    axes.set_xlim(0, max([103, *(105 * score.high for scores in series.values() for score in scores if score.high)]))
    axes.set_xlabel("percent, with 95 % intervals")
    axes.grid(visible=False, axis="y")


def _sides(score: Score) -> list[list[float]]:
    """Returns how far an interval extends to either side, in percent."""
    if score.mean is None or score.low is None or score.high is None:
        return [[0.0], [0.0]]
    return _whiskers(score.mean, score.low, score.high)


def _whiskers(mean: float, low: float, high: float) -> list[list[float]]:
    return [[100 * max(0.0, mean - low)], [100 * max(0.0, high - mean)]]


def _by_stage(result: Result) -> Figure | None:
    """Draws the score of each strategy from the program as it is written to its last stage, without skipped stages."""
    start = start_of(result)
    first = [] if start is None or start.val.mean is None else [(0, start.val)]
    longest = max(len(row.stages) for row in result.strategies)
    if not longest:
        return None
    figure, (axes,) = panels(1, 3.1)
    for number, row in enumerate(result.strategies):
        points = [
            *first,
            *((place, stage.val) for place, stage in enumerate(row.stages, 1) if stage.val.mean is not None),
        ]
        _chain(axes, points, number, len(result.strategies), row.strategy)
    axes.set_xticks(range(longest + 1), ["start", *(f"stage {number}" for number in range(1, longest + 1))])
    axes.set_xlim(-0.4, longest + 0.4)
    axes.set_ylim(-4, 104)
    axes.set_ylabel("validation, percent")
    legend(figure, axes)
    return figure


def _chain(axes: Axes, points: Sequence[tuple[int, Score]], number: int, count: int, name: str) -> None:
    """Draws the scores of one strategy, a little beside those of the others, which may share stages with it."""
    aside = 0.09 * (number - (count - 1) / 2)
    colour = colour_of(number)
    axes.plot([], [], "o-", ms=5, color=colour, label=arrows(name))
    axes.plot([place + aside for place, _ in points], [_percent(score) for _, score in points], color=colour, lw=1.2)
    for place, score in points:
        sides = _sides(score)
        axes.errorbar(place + aside, _percent(score), yerr=sides, color=colour, fmt="o", ms=5, capsize=2.5, lw=1)


def _percent(score: Score) -> float:
    return 100 * (score.mean or 0.0)


def _gains(result: Result) -> Figure | None:
    """Draws the gain over vanilla on the test examples, in points, against the LM calls of a seed."""
    gains = [(number, row, difference(result, row.strategy, VANILLA)) for number, row in enumerate(result.strategies)]
    compared = [(number, row, gain) for number, row, gain in gains if gain is not None and row.cost["lm_calls"]]
    if not compared:
        return None
    figure, (axes,) = panels(1, 2.9)
    dots: list[tuple[float, float, int]] = []
    for number, row, gain in compared:
        calls, points = cost_of_seed(row, "lm_calls"), 100 * gain.difference
        sides = _whiskers(gain.difference, gain.low, gain.high)
        axes.errorbar(calls, points, yerr=sides, fmt="o", ms=7, capsize=3, lw=1, color=colour_of(number))
        dots.append((points, calls, number))
    axes.axhline(0, color=GREY, lw=1)
    axes.set_xscale("log")
    plain_log(axes.xaxis)
    axes.margins(x=0.15)
    axes.set_xlabel("LM calls per seed")
    axes.set_ylabel("points gained over vanilla")
    _name_dots(axes, sorted(dots), [row.strategy for row in result.strategies])
    return figure


def _name_dots(axes: Axes, dots: Sequence[tuple[float, float, int]], strategies: Sequence[str]) -> None:
    """Writes the names of dots at the right, each at the height of its dot if the other names leave room.

    Args:
        axes: The plot, whose axes must have their final limits.
        dots: ``(height, place, number of the strategy)`` of each dot, from the lowest up.
        strategies: Names of the strategies.
    """
    low, high = axes.get_ylim()
    gap = 0.08 * (high - low)
    heights: list[float] = []
    for points, _, _ in dots:
        heights.append(points if not heights else max(points, heights[-1] + gap))
    shift = max(0.0, heights[-1] - high)
    for height, (points, calls, number) in zip(heights, dots, strict=True):
        axes.annotate(
            arrows(strategies[number]),
            (calls, points),
            xytext=(1.04, (height - shift - low) / (high - low)),
            textcoords="axes fraction",
            va="center",
            color=colour_of(number),
            arrowprops={"arrowstyle": "-", "lw": 0.5, "color": colour_of(number), "shrinkB": 5},
        )


def _candidates(result: Result) -> Figure | None:
    """Draws the candidates of each prompt search, and marks the chosen one."""
    searches = {
        path: stage for path, stage in stages_of(result).items() if any(seed["candidates"] for seed in stage.per_seed)
    }
    if not searches:
        return None
    figure, panes = panels(len(searches), 2.4)
    for axes, (path, stage) in zip(panes, searches.items(), strict=True):
        _search(axes, stage)
        axes.set_title(" → ".join(path))
    legend(figure, panes[0])
    return figure


def _search(axes: Axes, stage: StageReport) -> None:
    longest: list[str] = []
    for number, seed in enumerate(stage.per_seed):
        names = [candidate["name"] for candidate in seed["candidates"]]
        longest = max(longest, names, key=len)
        means = [100 * candidate["mean"] for candidate in seed["candidates"]]
        places = [place + 0.07 * (number - (len(stage.per_seed) - 1) / 2) for place in range(len(means))]
        axes.plot(places, means, "o", ms=5, alpha=0.75, color=colour_of(number), label=f"seed {seed['seed']}")
        if seed.get("chosen") in names:
            place = names.index(seed["chosen"])
            axes.plot(places[place], means[place], "o", ms=10, mfc="none", mec=colour_of(number), clip_on=False)
    if len(longest) <= _MOST_NAMES:
        axes.set_xticks(range(len(longest)), longest, rotation=35, ha="right", fontsize=8)
    axes.set_ylim(-5, 105)
    axes.set_ylabel("validation, %")


def _losses(result: Result) -> Figure | None:
    """Draws the loss of each training, with a colour for each stage and a line for each seed."""
    curves = {
        " → ".join(path): [
            (key, training["losses"]) for seed in stage.per_seed for key, training in seed.get("training", {}).items()
        ]
        for path, stage in stages_of(result).items()
    }
    curves = {name: lines for name, lines in curves.items() if lines}
    if not curves:
        return None
    figure, (axes,) = panels(1, 2.6)
    for number, (name, lines) in enumerate(curves.items()):
        for _, losses in lines:
            marker = "o" if len(losses) == 1 else None
            axes.plot(range(1, len(losses) + 1), losses, marker=marker, ms=4, lw=1, alpha=0.7, color=colour_of(number))
        axes.plot(
            [], [], color=colour_of(number), label=f"{name} ({', '.join(dict.fromkeys(key for key, _ in lines))})"
        )
    axes.set_xlabel("step")
    axes.set_ylabel("loss per token, nats")
    axes.set_yscale("log")
    plain_log(axes.yaxis)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    legend(figure, axes)
    return figure


PLOTS: Mapping[str, Callable[[Result], Figure | None]] = MappingProxyType(
    {
        "scores": _scores,
        "by-stage": _by_stage,
        "gains": _gains,
        "measures": _measures,
        "candidates": _candidates,
        "losses": _losses,
    }
)
"""Name of a plot → function that draws it, or returns None if a result has nothing to show in it."""
