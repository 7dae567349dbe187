"""An estimate of the cost of experiments on one GPU, and of the savings from shared stages. Nothing is run.

Runs and LM calls follow from the settings and are exact, as long as no stage is skipped and no two states are equal; a
test compares them with a real run. Tokens and GPU-hours are estimates: each figure behind them is a field
here, and its documentation says whether it is measured, from a source, or assumed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import final

from benchmarks.experiments.settings import Settings
from benchmarks.experiments.strategies import VANILLA_STRATEGY
from optimizers import Strategy, distinct_stages

_FIXED_CANDIDATES = 3
"""Candidates of a prompt search besides the random ones: no demos, labelled demos, the first bootstrapped demos."""


@final
@dataclass(frozen=True)
class Traffic:
    """The LM calls of one run of a program.

    Args:
        calls: Number of LM calls of a run: the program's modules, each called once.
        prompt: Tokens of a prompt without demonstrations.
        completion: Tokens of a completion.
        demo: Tokens of a demonstration: the inputs of a call, and a completion.
        demos: Number of demonstrations in a prompt that has any, of 6 at most.
        solved: Share of training runs that succeed, and whose calls become rows.
    """

    calls: int
    prompt: int
    completion: int
    demo: int
    demos: float = 4
    solved: float = 0.5


@final
@dataclass(frozen=True)
class Gpu:
    """Tokens per second that one GPU reads, writes and trains on, with a model of 8 billion weights in bf16.

    An A100 computes 312 TFLOP/s in bf16 (NVIDIA's data sheet). Reading takes 2 operations per weight and token, LoRA
    training 4, since frozen weights need no gradients. It is assumed that both reach 40 % of the peak; the rate of
    writing many requests at once is assumed too. A prefix that several prompts share counts as read each time.
    """

    read: float = 0.4 * 312e12 / (2 * 8e9)
    write: float = 2000
    train: float = 0.4 * 312e12 / (4 * 8e9)


@final
@dataclass(frozen=True)
class CallsAndTokens:
    """Numbers of LM calls, and of tokens read, written and trained on."""

    calls: float = 0
    read: float = 0
    written: float = 0
    trained: float = 0

    def __add__(self, other: CallsAndTokens) -> CallsAndTokens:
        return CallsAndTokens(*map(sum, zip(astuple(self), astuple(other), strict=True)))

    def __mul__(self, times: float) -> CallsAndTokens:
        return CallsAndTokens(*(times * amount for amount in astuple(self)))

    def hours(self, gpu: Gpu) -> float:
        """Returns the GPU-hours."""
        return (self.read / gpu.read + self.written / gpu.write + self.trained / gpu.train) / 3600


@final
@dataclass(frozen=True)
class CostEstimate:
    """The cost of strategies on one task, with one LM and one seed.

    Args:
        settings: Settings of the stages.
        traffic: LM calls of the program.
    """

    settings: Settings
    traffic: Traffic

    def runs(self, number: int, *, demos: bool) -> CallsAndTokens:
        """Returns the cost of some runs of the program, whose prompts have demonstrations or not."""
        traffic = self.traffic
        prompt = traffic.prompt + (traffic.demos * traffic.demo if demos else 0)
        return CallsAndTokens(traffic.calls, traffic.calls * prompt, traffic.calls * traffic.completion) * number

    def score(self, strategy: Strategy) -> CallsAndTokens:
        """Returns the cost of scoring the state after a strategy on validation and training examples."""
        num_train_scored = self.settings.num_train_scored if strategy.stages else 0
        return self.runs(self.settings.val + num_train_scored, demos="p" in strategy.stages)

    def stage(self, strategy: Strategy) -> CallsAndTokens:
        """Returns the cost of the last stage of a strategy, and of scoring its state."""
        *before, stage = strategy.stages
        cost = self._search() if stage == "p" else self._finetune(before)
        return cost + self.score(strategy)

    def _search(self) -> CallsAndTokens:
        """Returns the cost of a prompt search; bootstrapping shows labelled demonstrations, and one candidate none."""
        settings = self.settings
        candidates_with_demos = settings.num_candidate_programs + _FIXED_CANDIDATES - 1
        runs_with_demos = settings.num_train + candidates_with_demos * settings.num_val
        return self.runs(settings.num_val, demos=False) + self.runs(runs_with_demos, demos=True)

    def _finetune(self, before: Sequence[str]) -> CallsAndTokens:
        """Returns the cost of a fine-tuning after some stages; its rows have the prompt without demonstrations."""
        num_runs = self.settings.train * self.settings.rollouts_per_example
        rows = self.runs(num_runs, demos=False) * self.traffic.solved
        trained = (rows.read + rows.written) * self.settings.tuning.epochs
        return self.runs(num_runs, demos="p" in before) + CallsAndTokens(trained=trained)

    def test(self, strategy: Strategy) -> CallsAndTokens:
        """Returns the cost of testing a strategy."""
        return self.runs(self.settings.test, demos="p" in strategy.stages)

    def strategies(self, strategies: Sequence[Strategy], *, shared: bool) -> CallsAndTokens:
        """Returns the cost of several strategies.

        Args:
            strategies: The strategies.
            shared: Whether stages that several strategies begin with are run once, instead of each strategy alone.
        """
        if shared:
            stages, starts = distinct_stages(strategies), 1
        else:
            stages = [prefix for strategy in strategies for prefix in strategy.prefixes()]
            starts = len(strategies)
        parts = [*map(self.stage, stages), *map(self.test, strategies)]
        return sum(parts, self.score(VANILLA_STRATEGY) * starts)
