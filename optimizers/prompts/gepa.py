"""Reflective evolution of instructions: GEPA (Agrawal et al. 2025, arXiv 2507.19457), through the package `gepa`.

Knows the settings, and which candidate wins; gepa talks to `optimizers.prompts.gepa_adapter`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal, final

from pydantic import NonNegativeInt, PositiveInt

from lmpipe import Example, Metric, Module, OptimizeResult, ProgramState, PromptOptimizer, Session
from lmpipe.extend import ConfigError, check_settings, derive_seed, subsample
from optimizers.choice import best_of, outcome
from optimizers.prompts.proposer import Proposer


@final
@dataclass(frozen=True)
class GEPA(PromptOptimizer):
    """Lets an LM rewrite one instruction after another, from what went wrong and what the metric said of it.

    Each step takes a candidate from the Pareto front over validation examples, runs it on a few training examples,
    shows an LM the calls of one module with feedback, and keeps the instruction it writes if it does better on the same
    examples. A metric that gives ``(score, feedback)`` says most; otherwise the labels are shown. Demonstrations stay
    as they are. The candidate with the best validation score wins, the state it began with among them, the earliest of
    equals. Needs the extra ``lmpipe[search]``.

    Args:
        metric: Scores a prediction, and may say what is wrong with it.
        max_metric_calls: After how many scored runs no new step begins. Each step makes two for every example it
            reflects on, and one for every validation example if it finds something.
        reflection_minibatch_size: How many training examples are reflected on in a step.
        candidate_selection_strategy: Which candidate a step starts from.
        module_selector: Whether a step rewrites one module, in turn, or all of them.
        skip_perfect_score: Whether a step ends where nothing went wrong, and the search where nothing did on any
            validation example.
        perfect_score: Score of a run in which nothing went wrong.
        use_merge: Whether candidates that improve different modules are merged; it takes five validation examples.
        max_merge_invocations: How often.
        acceptance_criterion: Whether a new instruction must do better on what was reflected on, or not worse.
        reflection_prompt_template: What the LM is told, with ``<curr_param>`` where the instruction goes and
            ``<side_info>`` where the calls go; by default what gepa has.
        proposer: Who reflects (gepa's ``reflection_lm``).
        num_train: How many training examples are used; none means all.
        num_val: On how many validation examples candidates are scored; none means all.
        stratify_by: Label whose classes the subsets hold in proportion, or none.

    Raises:
        ConfigError: If a setting is out of its range or the template lacks a place; in `optimize`, if gepa is not
            installed, or there are no training or validation examples.
    """

    needs: ClassVar[tuple[Literal["train", "val"], ...]] = ("train", "val")

    metric: Metric
    max_metric_calls: PositiveInt = 1000
    reflection_minibatch_size: PositiveInt = 3
    candidate_selection_strategy: Literal["pareto", "current_best", "epsilon_greedy", "top_k_pareto"] = "pareto"
    module_selector: Literal["round_robin", "all"] = "round_robin"
    skip_perfect_score: bool = True
    perfect_score: float = 1.0
    use_merge: bool = False
    max_merge_invocations: NonNegativeInt = 5
    acceptance_criterion: Literal["strict_improvement", "improvement_or_equal"] = "strict_improvement"
    reflection_prompt_template: str | None = None
    proposer: Proposer = field(default=Proposer())
    num_train: PositiveInt | None = 100
    num_val: PositiveInt | None = 50
    stratify_by: str | None = None

    def __post_init__(self) -> None:
        check_settings(self)
        template = self.reflection_prompt_template
        missing = [place for place in ("<curr_param>", "<side_info>") if template is not None and place not in template]
        if missing:
            raise ConfigError(f"the reflection_prompt_template has no place {' and no place '.join(missing)}")

    def search(
        self, program: Module, state: ProgramState, train: Sequence[Example], val: Sequence[Example], session: Session
    ) -> OptimizeResult:
        try:
            from optimizers.prompts.gepa_adapter import Adapter, evolve
        except ImportError as error:
            raise ConfigError(f'GEPA runs on the package gepa: pip install "lmpipe[search]" ({error})') from error
        train = subsample(train, self.num_train, derive_seed(session.seed, "train"), self.stratify_by)
        val = subsample(val, self.num_val, derive_seed(session.seed, "val"), self.stratify_by)
        template = self.reflection_prompt_template
        enough = self.perfect_score if self.skip_perfect_score else math.inf
        adapter = Adapter(program, state, val, self.metric, session, self.proposer, template, enough)
        details = evolve(
            adapter,
            train,
            val,
            derive_seed(session.seed, "evolution"),
            max_metric_calls=self.max_metric_calls,
            reflection_minibatch_size=min(self.reflection_minibatch_size, len(train)),
            candidate_selection_strategy=self.candidate_selection_strategy,
            module_selector=self.module_selector,
            skip_perfect_score=self.skip_perfect_score,
            perfect_score=self.perfect_score,
            use_merge=self.use_merge,
            max_merge_invocations=self.max_merge_invocations,
            acceptance_criterion=self.acceptance_criterion,
        )
        scored = [(name, tried, evaluation) for tried, (name, evaluation) in adapter.scored.items()]
        return outcome(state, scored, session, details, winner=best_of(scored))
