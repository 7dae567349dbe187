"""A new optimizer.

This one selects demonstrations greedily. An optimizer defines its settings and `search`. The inherited `optimize` calls
`search`, checks the examples, counts the cost, and recalls the result in a resumed run.

    python new_optimizer.py
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, final

from lmpipe import (
    Demo,
    Example,
    Metric,
    Module,
    OptimizeResult,
    Predict,
    ProgramState,
    PromptOptimizer,
    Sampling,
    Session,
    exact_match,
    load_lm,
)
from lmpipe.extend import best_index, evaluate_many


@final
@dataclass(frozen=True)
class GreedyDemos(PromptOptimizer):
    """In each round, adds to one prompt the training example that raises the validation score most, if any does.

    Args:
        metric: Scores a run.
        path: Path of the module; its inputs and outputs are those of the examples.
        max_demos: Number of rounds, and so the largest number of demonstrations.
    """

    needs: ClassVar[tuple[Literal["train", "val"], ...]] = ("train", "val")
    metric: Metric
    path: str
    max_demos: int = 2

    def search(
        self, program: Module, state: ProgramState, train: Sequence[Example], val: Sequence[Example], session: Session
    ) -> OptimizeResult:
        pool = [Demo(inputs=example.inputs, outputs=example.labels) for example in train]
        evaluation = None
        for _ in range(self.max_demos):
            prompt = state.prompts[self.path]
            prompts = [prompt.model_copy(update={"demos": (*prompt.demos, demo)}) for demo in pool]
            states = [state, *(state.with_prompt(self.path, longer) for longer in prompts)]
            evaluations = evaluate_many(program, states, val, self.metric, session)
            winner = best_index(evaluated.comparable_mean for evaluated in evaluations) or 0  # the earliest of equals
            state, evaluation = states[winner], evaluations[winner]
        return OptimizeResult(state=state, evaluation=evaluation)


WORDS = {"cat": "animal", "oak": "plant", "fern": "plant", "wolf": "animal", "moss": "plant", "crow": "animal"}


def main() -> None:
    """Selects demonstrations for a program of one module."""
    examples = [Example({"word": word}, {"answer": kind}) for word, kind in WORDS.items()]
    program = Predict("word -> answer: Literal['animal', 'plant']")
    session = Session(lm=load_lm("bundled"), sampling=Sampling(max_tokens=8))
    optimizer = GreedyDemos(exact_match, path="self")
    result = optimizer.optimize(program, None, examples[:3], examples[3:], session)
    print(*result.state.prompts["self"].demos, sep="\n")
    print(f"{result.cost.lm_calls} LM calls")


if __name__ == "__main__":
    main()
