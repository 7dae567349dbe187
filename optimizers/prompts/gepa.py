"""Reflective evolution of instructions: GEPA (Agrawal et al. 2025, arXiv 2507.19457), through the package `gepa`.

Knows the settings and which candidate wins; `optimizers.prompts.gepa_adapter` connects a program to gepa.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal, final

from pydantic import NonNegativeInt, PositiveInt

from lmpipe import Example, Metric, Module, OptimizeResult, ProgramState, PromptOptimizer, Session
from lmpipe.extend import ConfigError, check_settings, derive_seed, subsample
from optimizers.prompts.proposer import Proposer
from optimizers.selection import best_candidate, selection_result


@final
@dataclass(frozen=True, repr=False)
class GEPA(PromptOptimizer):
    """Lets an LM rewrite one instruction after another, from failed rollouts and the metric's feedback on them.

    Each step takes a candidate from the Pareto front over validation examples, runs it on a few training examples,
    shows an LM the calls of one module with feedback, and keeps the instruction that the LM writes if it scores better
    on the same examples. A metric that returns ``(score, feedback)`` helps most; without feedback the LM sees the
    labels. Demonstrations stay as they are. The candidate with the best validation score wins, the earliest of equals;
    the initial state is among them. Needs the extra ``lmpipe[search]``.

    Args:
        metric: Scores a prediction, and may explain what is wrong with it.
        max_metric_calls: Number of scored rollouts after which no new step begins. Each step needs two for every
            example that it reflects on, and one for every validation example if the new instruction is kept.
        reflection_minibatch_size: Number of training examples that a step reflects on.
        candidate_selection_strategy: How a step chooses the candidate that it starts from.
        module_selector: Whether a step rewrites one module, in turn, or all of them.
        skip_perfect_score: Whether a step ends early if all its rollouts are perfect, and the search if a candidate
            is perfect on all validation examples.
        perfect_score: Score of a perfect rollout.
        use_merge: Whether candidates that improve different modules are merged; this needs five validation examples.
        max_merge_invocations: Maximum number of merges.
        acceptance_criterion: Whether a new instruction must score better on the examples reflected on, or at least as
            well.
        reflection_prompt_template: Prompt for the LM, with the placeholders ``<curr_param>`` for the instruction and
            ``<side_info>`` for the calls; by default gepa's own.
        proposer: The LM that reflects (gepa's ``reflection_lm``).
        num_train: Number of training examples that the search uses; None means all.
        num_val: Number of validation examples that candidates are scored on; None means all.
        stratify_by: Label whose classes the subsets keep in proportion; None does not stratify.

    Raises:
        ConfigError: If a setting is out of its range or the template lacks a placeholder; in `optimize`, if gepa is not
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
        placeholders = ("<curr_param>", "<side_info>")
        missing = [name for name in placeholders if template is not None and name not in template]
        if missing:
            raise ConfigError(f"the reflection_prompt_template lacks the placeholder {' and '.join(missing)}")

    def search(
        self, program: Module, state: ProgramState, train: Sequence[Example], val: Sequence[Example], session: Session
    ) -> OptimizeResult:
        try:
            from optimizers.prompts.gepa_adapter import ProgramAdapter, run_gepa
        except ImportError as error:
            raise ConfigError(f'GEPA needs the package gepa: pip install "lmpipe[search]" ({error})') from error
        train = subsample(train, self.num_train, derive_seed(session.seed, "train"), self.stratify_by)
        val = subsample(val, self.num_val, derive_seed(session.seed, "val"), self.stratify_by)
        template = self.reflection_prompt_template
        enough = self.perfect_score if self.skip_perfect_score else math.inf
        adapter = ProgramAdapter(program, state, val, self.metric, session, self.proposer, template, enough)
        details = run_gepa(
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
        scored = [(name, candidate, evaluation) for candidate, (name, evaluation) in adapter.scored.items()]
        return selection_result(state, scored, session, details, winner=best_candidate(scored))
