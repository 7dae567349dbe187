"""A new optimizer: greedy selection of demonstrations, in one class.

`search` is all that an optimizer has to write. `optimize`, which calls it, checks the examples, counts the cost, and
recalls the result in a resumed run; and `BetterTogether` accepts the class as a stage.

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
    PromptState,
    Sampling,
    Session,
    exact_match,
    initial_state,
)
from lmpipe.engines import load_lm
from lmpipe.metrics import best
from lmpipe.program.evaluate import evaluate_many


@final
@dataclass(frozen=True)
class GreedyDemos(PromptOptimizer):
    """Adds the training example that raises the validation score most to the prompt of one module, again and again.

    Args:
        metric: Scores a run.
        path: Path of the module; its inputs and outputs are those of the examples.
        max_demos: Largest number of demonstrations.
    """

    needs: ClassVar[tuple[Literal["train", "val"], ...]] = ("train", "val")

    metric: Metric
    path: str
    max_demos: int = 2

    def search(
        self,
        program: Module,
        state: ProgramState,
        train: Sequence[Example],
        val: Sequence[Example],
        session: Session,
    ) -> OptimizeResult:
        pool = [Demo(inputs=example.inputs, outputs=example.labels) for example in train]
        evaluation = evaluate_many(program, [state], val, self.metric, session)[0]
        for _ in range(self.max_demos):
            prompt = state.prompts[self.path]
            prompts = [PromptState(instructions=prompt.instructions, demos=(*prompt.demos, demo)) for demo in pool]
            states = [state.with_prompt(self.path, longer) for longer in prompts]
            evaluations = evaluate_many(program, states, val, self.metric, session)
            winner = best(candidate.comparable for candidate in evaluations)
            if winner is None or evaluations[winner].mean <= evaluation.mean:
                break
            state, evaluation = states[winner], evaluations[winner]
        return OptimizeResult(state=state, evaluation=evaluation)


WORDS = {"cat": "animal", "oak": "plant", "fern": "plant", "wolf": "animal", "moss": "plant", "crow": "animal"}


def main() -> None:
    """Searches demonstrations for a program of one module."""
    examples = [Example({"word": word}, {"answer": kind}) for word, kind in WORDS.items()]
    program = Predict("word -> answer: Literal['animal', 'plant']")
    session = Session(lm=load_lm("bundled"), sampling=Sampling(max_tokens=8))
    optimizer = GreedyDemos(exact_match, path="self")
    result = optimizer.optimize(program, initial_state(program, session), examples[:3], examples[3:], session)
    for demo in result.state.prompts["self"].demos:
        print(dict(demo.inputs), dict(demo.outputs))
    print(f"{result.cost.lm_calls} LM calls")


if __name__ == "__main__":
    main()
