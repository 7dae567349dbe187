"""Refine: a program answers, a predictor criticizes the answer, and another one writes a better answer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, final

from pydantic import PositiveInt

from lmpipe import Module, Predict, Prediction, Signature, signature
from lmpipe.extend import ConfigError, Field, check_settings
from programs.attempts import Reward, best_prediction, successful


@final
class Refine(Module):
    """Runs a program, then revises its answer with feedback until it is good enough.

    This is Self-Refine (Madaan et al. 2023, arXiv 2303.17651). ``critic`` reads an answer and writes feedback;
    ``reviser`` reads the answer and the feedback and writes the next answer, each time revising the latest one. Both
    are predictors, whose prompts and weights optimizers improve like those of the program. An attempt that fails
    counts, and the next one starts from the latest answer that there is.

    Args:
        program: The program that writes the first answer; its modules have paths that begin with ``program``.
        task: Signature of the answers: what critic and reviser read, and what the reviser writes. Its inputs are
            inputs or outputs of the program, and its outputs are outputs of the program. With an output ``reasoning``
            before the answer, the reasoning is criticized and revised too.
        n: Largest number of answers.
        reward: Function of the inputs, as a mapping, and a prediction; it returns a number. It sees no labels. The
            answer with the highest reward is returned; without a reward it is the last one.
        threshold: Reward that is good enough: the first answer that reaches it is returned and not revised.

    Raises:
        ConfigError: If an argument is invalid; when it runs, if the program does not have the fields of the task, or
            the reward does not return a number.
    """

    program: Module
    task: Signature
    n: PositiveInt
    reward: Reward | None
    threshold: float | None

    def __init__(
        self,
        program: Module,
        task: Signature | str | type,
        n: int,
        reward: Reward | None = None,
        *,
        threshold: float | None = None,
    ) -> None:
        self.program = program
        self.task = signature(task)
        self.n = n
        self.reward = reward
        self.threshold = threshold
        check_settings(self)
        if reward is None and threshold is not None:
            raise ConfigError(f"Refine: threshold={threshold} has no effect without a reward; pass reward=")
        self.critic = Predict(_critic_signature(self.task))
        self.reviser = Predict(_reviser_signature(self.task))

    def forward(self, **inputs: Any) -> Prediction:
        latest: Prediction | None = None

        def attempt() -> Prediction:
            nonlocal latest
            latest = self.program(**inputs) if latest is None else self._revise(inputs, latest)
            return latest

        answers = successful(attempt, self.n)
        if self.reward is None:
            return list(answers)[-1]
        return best_prediction(answers, inputs, self.reward, self.threshold)

    def _revise(self, inputs: Mapping[str, Any], latest: Prediction) -> Prediction:
        """Returns the next answer; outputs of the program that the task reads are kept."""
        known = {**latest, **inputs}
        missing = [field.name for field in self.task.inputs if field.name not in known]
        missing += [field.name for field in self.task.outputs if field.name not in latest]
        if missing:
            raise ConfigError(
                f"the task of Refine has {', '.join(missing)}, and {type(self.program).__name__} has the inputs "
                f"{', '.join(inputs) or 'none'} and returns {', '.join(latest) or 'nothing'}; name only such fields"
            )
        given = {field.name: known[field.name] for field in self.task.inputs}
        answer = {field.name: latest[field.name] for field in self.task.outputs}
        feedback = self.critic(**given, **answer).feedback
        previous = {f"previous_{name}": value for name, value in answer.items()}
        revised = self.reviser(**given, **previous, feedback=feedback)
        return Prediction(**{name: value for name, value in given.items() if name in latest}, **revised)


def _critic_signature(task: Signature) -> Signature:
    """The inputs and outputs of a task → feedback."""
    outputs = " and ".join(field.name for field in task.outputs)
    return Signature(
        (*task.inputs, *task.outputs),
        (Field("feedback", desc="what to change, in a few sentences"),),
        f"{task.instructions}\n\nThis was done. Check {outputs} step by step; say what is wrong and how to correct it.",
    )


def _reviser_signature(task: Signature) -> Signature:
    """The inputs of a task, its previous outputs and feedback on them → new outputs."""
    previous = [replace(field, name=f"previous_{field.name}") for field in task.outputs]
    return Signature(
        (*task.inputs, *previous, Field("feedback")),
        task.outputs,
        f"{task.instructions}\n\nThis was done once. Do it again, and follow the feedback.",
    )
