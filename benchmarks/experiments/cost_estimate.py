"""What the paper's whole grid takes, and what sharing stages saves: ``python -m benchmarks.experiments.cost_estimate``.

Runs and LM calls follow from the paper's settings and are exact, as long as no stage is skipped and no two states are
equal; a test holds them against a real run. Tokens and GPU-hours are estimates: each figure that goes into them is a
field here, and is said to be measured, from a source, or assumed. Nothing is run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import Annotated, final

import typer
from rich.console import Console
from rich.table import Table

from benchmarks.experiments.settings import ROWS, STAGES, Settings, settings_for
from optimizers import distinct_stages, parse_strategy

_FIXED_CANDIDATES = 3
"""Of a prompt search, beside the random draws: no demos, labelled ones, the first bootstrapped ones."""


@final
@dataclass(frozen=True)
class Traffic:
    """What a run of a program sends.

    Args:
        calls: LM calls of a run: modules, each called once.
        prompt: Tokens of a prompt without demonstrations.
        completion: Tokens of a completion.
        demo: Tokens of a demonstration: inputs of a call, and a completion.
        demos: Demonstrations of a prompt that shows any, of 6 at most.
        solved: Share of training runs that succeed, and whose calls become rows.
    """

    calls: int
    prompt: int
    completion: int
    demo: int
    demos: float = 4
    solved: float = 0.5


# Prompts, and the inputs in a demonstration: measured with SmolLM2's tokenizer on 40 test examples of each task, BM25
# passages for HotPotQA (96 and 69, 101 and 92, 300 and 286). Completions of GSM8K: its written solutions, measured on
# 200. The other completions are assumed, and so are `demos`; `solved` is after the scores in the paper's table 1.
TRAFFIC = {
    "iris": Traffic(calls=1, prompt=96, completion=80, demo=69 + 80),
    "gsm8k": Traffic(calls=1, prompt=101, completion=158, demo=92 + 158),
    "hotpotqa": Traffic(calls=3, prompt=300, completion=80, demo=286 + 80, solved=0.3),
}


@final
@dataclass(frozen=True)
class Gpu:
    """Tokens a second that one GPU reads, writes and trains on, with a model of 8 billion weights in bf16.

    An A100 multiplies 312 TFLOP/s in bf16 (NVIDIA's data sheet). Reading takes 2 operations a weight and token, LoRA
    training 4, since frozen weights need no gradients. That 40 % of the peak is reached in both is assumed, and so is
    the rate of writing, of many requests at once. Prefixes that prompts share count as read each time.
    """

    read: float = 0.4 * 312e12 / (2 * 8e9)
    write: float = 2000
    train: float = 0.4 * 312e12 / (4 * 8e9)


@final
@dataclass(frozen=True)
class Spent:
    """LM calls, tokens read, written and trained on."""

    calls: float = 0
    read: float = 0
    written: float = 0
    trained: float = 0

    def __add__(self, other: Spent) -> Spent:
        return Spent(*map(sum, zip(astuple(self), astuple(other), strict=True)))

    def __mul__(self, times: float) -> Spent:
        return Spent(*(times * amount for amount in astuple(self)))

    def hours(self, gpu: Gpu) -> float:
        """GPU-hours."""
        return (self.read / gpu.read + self.written / gpu.write + self.trained / gpu.train) / 3600


@final
@dataclass(frozen=True)
class Estimate:
    """What strategies take on one task, with one LM and one seed.

    Args:
        settings: Of the stages.
        traffic: Of the program.
    """

    settings: Settings
    traffic: Traffic

    def runs(self, number: int, *, demos: bool) -> Spent:
        """Runs of the program, under prompts with demonstrations or without."""
        traffic = self.traffic
        prompt = traffic.prompt + (traffic.demos * traffic.demo if demos else 0)
        return Spent(traffic.calls, traffic.calls * prompt, traffic.calls * traffic.completion) * number

    def score(self, stages: Sequence[str]) -> Spent:
        """Scoring the state after some stages, on validation and training examples."""
        scored = self.settings.num_train_scored if stages else 0
        return self.runs(self.settings.val + scored, demos="p" in stages)

    def stage(self, stages: Sequence[str]) -> Spent:
        """The last of some stages, and scoring its state."""
        work = self._search() if stages[-1] == "p" else self._tuning(stages[:-1])
        return work + self.score(stages)

    def _search(self) -> Spent:
        """Runs to learn from show labelled demonstrations; one candidate shows none."""
        settings = self.settings
        drawn = settings.num_candidate_programs + _FIXED_CANDIDATES - 1
        shown = settings.num_train + drawn * settings.num_val
        return self.runs(settings.num_val, demos=False) + self.runs(shown, demos=True)

    def _tuning(self, before: Sequence[str]) -> Spent:
        """Rows show the prompt without demonstrations."""
        tried = self.settings.train * self.settings.rollouts_per_example
        rows = self.runs(tried, demos=False) * self.traffic.solved
        trained = (rows.read + rows.written) * self.settings.tuning.epochs
        return self.runs(tried, demos="p" in before) + Spent(trained=trained)

    def test(self, stages: Sequence[str]) -> Spent:
        """The test of a strategy."""
        return self.runs(self.settings.test, demos="p" in stages)

    def strategies(self, rows: Sequence[str], *, shared: bool) -> Spent:
        """All of some strategies, with stages that they begin with done once, or each strategy by itself."""
        chains = [parse_strategy(row, STAGES) for row in rows]
        if shared:
            stages, starts = distinct_stages(chains), 1
        else:
            stages = [chain[:length] for chain in chains for length in range(1, len(chain) + 1)]
            starts = len(chains)
        parts = [*map(self.stage, stages), *map(self.test, chains)]
        return sum(parts, self.score(()) * starts)


def main(
    lms: Annotated[int, typer.Option(help="LMs.")] = 3,
    seeds: Annotated[int, typer.Option(help="Seeds.")] = 5,
) -> None:
    """Calls, tokens and GPU-hours of the paper's eight rows on its three tasks."""
    table = Table("task", "stages", "LM calls", "M tokens read", "M written", "M trained on", "GPU-hours")
    gpu, totals = Gpu(), {True: Spent(), False: Spent()}
    for task, traffic in TRAFFIC.items():
        for shared in totals:
            spent = Estimate(settings_for(task, "any"), traffic).strategies(ROWS, shared=shared) * (lms * seeds)
            totals[shared] += spent
            table.add_row(task, *_cells(spent, gpu, shared=shared))
    for shared, spent in totals.items():
        table.add_row("all", *_cells(spent, gpu, shared=shared))
    table.title = f"{lms} LMs, {seeds} seeds, {len(ROWS)} strategies"
    Console().print(table)
    saved = 1 - totals[True].hours(gpu) / totals[False].hours(gpu)
    print(f"sharing stages saves {100 * saved:.0f} % of the GPU-hours")


def _cells(spent: Spent, gpu: Gpu, *, shared: bool) -> list[str]:
    tokens = (f"{amount / 1e6:,.1f}" for amount in (spent.read, spent.written, spent.trained))
    return ["shared" if shared else "each alone", f"{spent.calls:,.0f}", *tokens, f"{spent.hours(gpu):,.1f}"]


if __name__ == "__main__":
    typer.run(main)
