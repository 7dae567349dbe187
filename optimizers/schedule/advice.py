"""Advice: what a researcher can change about the stage that a finding is about.

A setting is advised only if the stage's optimizer, its trainer or the session has it and its value can still be
changed in the advised direction. Settings are found by name among the fields of dataclasses, so this module knows no
optimizer and no trainer, and advice for optimizers that users write names the settings that theirs share with them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from numbers import Real
from typing import Any, final

from lmpipe import Example, Module, Optimizer, ProgramState, Session, Trainer, predictors
from lmpipe.extend import CommonFailure, ModuleCost

_MAX_CLAUSES = 4
_NEAR_LIMIT = 0.9  # unreadable completions that may have had this share of the maximum number of tokens were cut off


@final
@dataclass(frozen=True)
class StageContext:
    """What advice on a stage depends on.

    Attributes:
        optimizer: Optimizer of the stage.
        program: The program.
        state: The state before the stage.
        session: Session of the run.
        train: The training examples.
        val: The validation examples.
        after_prompts: Whether an earlier stage tunes prompts.
        ended: Why the stage made no further rollouts, as `optimizers.rollouts.Rollouts` reports it.
    """

    optimizer: Optimizer
    program: Module
    state: ProgramState
    session: Session
    train: Sequence[Example]
    val: Sequence[Example]
    after_prompts: bool
    ended: object = "limit"

    @property
    def settings(self) -> Mapping[str, Any]:
        """The settings of the optimizer by name."""
        return settings_of(self.optimizer)

    @property
    def shows_demos(self) -> bool:
        """Whether a prompt before the stage shows demonstrations."""
        return any(prompt.demos for prompt in self.state.prompts.values())

    def tuning_of(self, key: str = "") -> Mapping[str, Any]:
        """Returns the settings of the optimizer's trainer, also those of its `TuningConfig`.

        Args:
            key: Weight key (a role, or ``"role/path"``), if there are trainers for several roles.
        """
        trainer = self.settings.get("trainer")
        if isinstance(trainer, Mapping):
            trainer = trainer.get(key.partition("/")[0]) or next(iter(trainer.values()), None)
        settings = settings_of(trainer) if isinstance(trainer, Trainer) else {}
        return {**settings, **settings_of(settings.get("tuning"))}

    def wider(self, name: str, available: int) -> Iterator[str]:
        """Yields the advice to raise a number of examples, if the optimizer has this setting and more are available."""
        number = number_of(self.settings, name)
        if number is not None and number < available:
            yield f"{name} above {number}"


def settings_of(value: object) -> dict[str, Any]:
    """Returns the fields of a dataclass by name; empty for values of other types."""
    if not is_dataclass(value) or isinstance(value, type):
        return {}
    return {field.name: getattr(value, field.name) for field in fields(value)}


def number_of(settings: Mapping[str, Any], name: str) -> Any:
    """Returns a setting that is a number; None for others, which optimizers of users may have under the same name."""
    value = settings.get(name)
    return value if isinstance(value, Real) and not isinstance(value, bool) else None


def listed(clauses: Iterable[str], otherwise: str) -> str:
    """Joins the first clauses with commas and an "or"; returns the other text if there are none."""
    chosen = list(dict.fromkeys(clauses))[:_MAX_CLAUSES]
    return f"{', '.join(chosen[:-1])} or {chosen[-1]}" if len(chosen) > 1 else (chosen or [otherwise])[0]


def against_failure(failure: CommonFailure, program: Module, session: Session, costs: Mapping[str, ModuleCost]) -> str:
    """Returns what to do about a failure that many rollouts share.

    Args:
        failure: The failure.
        program: The program that failed.
        session: Session that it ran in.
        costs: Module path → cost of its calls, which shows whether completions were cut off.
    """
    if failure.kind == "parse":
        return against_unreadable(failure.modules, program, session, costs)
    return {
        "engine": "what the LM's error message says; nothing can be learned until the LM answers",
        "program": "a program whose own code handles these examples; the error is raised there",
        "metric": "a metric that returns a number in [0, 1] for every prediction",
        "budget": "a larger budget",
    }[failure.kind]


def against_unreadable(paths: Iterable[str], program: Module, session: Session, costs: Mapping[str, ModuleCost]) -> str:
    """Returns what to do about completions of some modules that cannot be parsed; see `against_failure`."""
    modules = predictors(program)

    def clauses() -> Iterator[str]:
        if not session.structured:
            yield "Session(structured=True)"
        for path in paths:
            limit = ((modules[path].sampling if path in modules else None) or session.sampling).max_tokens
            cost = costs.get(path, ModuleCost())
            if cost.completion_tokens >= _NEAR_LIMIT * cost.parse_errors * limit:
                yield f"max_tokens above {limit}"
            elif session.structured:
                yield "an engine that supports structured=True"
        yield "a simpler signature"

    return listed(clauses(), "")


def more_successes(context: StageContext, failures: Sequence[CommonFailure], *, partial_scores: bool) -> str:
    """Returns how the optimizer can get more successful rollouts, or more varied ones.

    Args:
        context: The stage.
        failures: Common failures of the rollouts.
        partial_scores: Whether some rollouts that count as failed score above 0.
    """
    return listed(_more_successes(context, failures, partial_scores), "more training examples or a stronger LM")


def _more_successes(context: StageContext, failures: Sequence[CommonFailure], partial_scores: bool) -> Iterator[str]:
    settings = context.settings
    if not context.session.structured and any(failure.kind == "parse" for failure in failures):
        yield "Session(structured=True)"
    if partial_scores and number_of(settings, "metric_threshold"):
        yield f"metric_threshold below {settings['metric_threshold']}"
    for name in ("max_bootstrapped_demos", "max_labeled_demos"):
        if settings.get(name) == 0:
            yield f"{name} above 0"
    yield from _more_rollouts(context)
    yield from _hotter(context)
    if settings.get("vary_demos") is False and context.shows_demos:
        yield "vary_demos=True"
    if context.optimizer.tunes == "weights" and not context.after_prompts:
        yield "a prompt stage before this one"
    if settings.get("adapters") == "module":
        yield "adapters='role'"
    yield from context.wider("num_train", len(context.train))
    if "teacher" in settings and settings["teacher"] is None:
        yield "a teacher with a stronger LM (teacher=Teacher(lm=...))"
    if settings.get("reject_unreadable") is False:
        yield "reject_unreadable=True"


def _more_rollouts(context: StageContext) -> Iterator[str]:
    """Yields the setting that ended the rollouts of an example: their number, unless something else ended them."""
    settings = context.settings
    if context.ended == "budget":
        yield "a larger budget"
        return
    names = ("rollouts_per_example", "max_rounds", "group_size")
    first = {"idle": "max_idle_rounds", "solved": "rollouts_per_example"}
    for name in (first.get(str(context.ended), "max_rollouts_per_example"), *names):
        if name in settings:
            number = number_of(settings, name) or number_of(settings, "rollouts_per_example")
            yield f"{name} above {number}" if number else f"a higher {name}"
            return


def _hotter(context: StageContext) -> Iterator[str]:
    """Yields a higher temperature of the rollouts, unless it is at least 1, or the optimizer does not use it yet."""
    if "temperature" not in context.settings or context.settings.get("max_rounds") == 1:
        return
    value = context.session.sampling.temperature
    if context.settings["temperature"] is not None:
        value = number_of(context.settings, "temperature")
    if value is not None and value < 1:
        yield f"temperature above {value}"


def more_learning(context: StageContext, key: str, steps: int, *, diverging: bool = False) -> str:
    """Returns how training can change the weights more, or less if it is diverging.

    Args:
        context: The stage.
        key: Weight key of the training.
        steps: Number of steps that it took.
        diverging: Whether its loss rose.
    """
    tuning = context.tuning_of(key)
    rate, warmup = tuning.get("learning_rate"), number_of(tuning, "warmup_steps")
    if diverging:
        return "a lower learning rate" if rate is None else f"learning_rate below {rate}"

    def clauses() -> Iterator[str]:
        if warmup and warmup >= steps > 0:
            yield f"warmup_steps below {steps}"
        yield "a higher learning rate" if rate is None else f"learning_rate above {rate}"
        yield f"epochs above {tuning['epochs']}" if "epochs" in tuning else "more steps of training"
        yield from _more_rollouts(context)

    return listed(clauses(), "")


def less_fitting(context: StageContext) -> str:
    """Returns how a stage can fit the training examples less closely."""
    return listed(_less_fitting(context), "")


def _less_fitting(context: StageContext) -> Iterator[str]:
    tuning = context.tuning_of()
    if (number_of(tuning, "epochs") or 0) > 1:
        yield f"epochs below {tuning['epochs']}"
    if tuning.get("eval_fraction") == 0:
        yield "eval_fraction above 0 (which keeps the best epoch)"
    if tuning.get("method") in ("lora", "qlora", "dora") and (number_of(tuning, "rank") or 0) > 1:
        yield f"rank below {tuning['rank']}"
    if "trainer" in context.settings and not tuning:
        yield "fewer steps of training"
    yield from context.wider("num_val", len(context.val))
    yield "more training examples"
