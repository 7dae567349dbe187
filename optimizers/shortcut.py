"""The shortest way from a program and examples to a better program: one function over the classes of this package.

It makes a session, a store, a trainer, the stages and `BetterTogether`, with settings for a small LM
(`optimizers.small_lm`). Everything that it does can be done with these classes, and more.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import NoneType
from typing import Literal

from lmpipe import (
    LM,
    Budget,
    Example,
    Metric,
    Module,
    Optimizer,
    OptimizeResult,
    Retriever,
    RunStore,
    Sampling,
    Session,
    Trainer,
    load_lm,
    predictors,
)
from lmpipe.extend import (
    ConfigError,
    Field,
    check_examples,
    check_metric,
    check_type,
    check_whole_number,
    derive_seed,
    digest,
    digest_without_id,
    shown,
    shuffled,
)
from optimizers.rollouts import class_label
from optimizers.schedule import VANILLA, BetterTogether, Strategy
from optimizers.schedule.strategy import as_strategy
from optimizers.small_lm import SMALL_LM_TUNING, small_lm_stages

_MIN_EXAMPLES, _MAX_VAL = 4, 250
_TOKENS_OF_TEXT, _TOKENS_OF_VALUE = 128, 24
_KINDS: Mapping[str, tuple[tuple[type, ...], str]] = {
    "lm": ((LM, str, Mapping), "optimize(…, lm='bundled'), or any other spec that load_lm reads"),
    "stages": ((dict, Mapping, NoneType), "optimize(…, stages={'p': optimizer})"),
    "out": ((str, Path, NoneType), "optimize(…, out='runs/first')"),
    "quiet": ((bool,), "quiet=True or quiet=False"),
    "structured": ((bool, NoneType), "structured=True or structured=False"),
    "sampling": ((Sampling, NoneType), "optimize(…, sampling={})"),
    "retriever": ((Retriever, NoneType), "optimize(…, retriever={})"),
}
"""Argument of `optimize` → its types, and the code that messages suggest."""

logger = logging.getLogger(__name__)


def optimize(
    program: Module,
    train: Sequence[Example],
    metric: Metric,
    *,
    val: Sequence[Example] | None = None,
    lm: str | LM | Mapping[str, LM] = "bundled",
    strategy: str | Strategy = "p -> w -> p",
    out: str | Path | None = None,
    seed: int = 0,
    quiet: bool = False,
    stages: Mapping[str, Optimizer] | None = None,
    trainer: Trainer | Mapping[str, Trainer] | None = None,
    retriever: Retriever | None = None,
    sampling: Sampling | None = None,
    structured: bool | None = None,
    select: Literal["last", "best"] = "best",
    budget: Budget | None = None,
) -> OptimizeResult:
    """Optimizes the prompts and weights of a program on examples, and returns the best state on validation examples.

    ``with result.session: program(…)`` runs the program with the state that was found; ``result.save(…)`` keeps it.
    A run that is started again with the same arguments recalls what it has finished.

    Args:
        program: The program.
        train: Examples to learn from.
        metric: Scores a prediction on an example, in [0, 1]; any function of the two.
        val: Examples to choose by. By default half of the training examples, at most 250, are set aside for this:
            shuffled, and stratified by class if the examples have one label with a few classes.
        lm: An LM; its spec, as `lmpipe.load_lm` reads it; or a mapping from roles to LMs.
        strategy: The order of the stages; see `BetterTogether`.
        out: Run directory; by default ``runs/`` and the name of the program's class.
        seed: Seed of every random choice.
        quiet: Whether nothing is reported while it runs.
        stages: Further stages by name, or others in the place of ``p`` and ``w``, which `small_lm_stages` makes.
        trainer: Trainer of the weights; by default a `LocalTrainer`, if the LM runs in this process.
        retriever: Searches passages, for programs that retrieve.
        sampling: Sampling settings of predictors that have none of their own. By default decoding is greedy, and a call
            gets 24 new tokens for each typed output and 128 for each text.
        structured: Whether completions are constrained to the format that can be parsed. By default they are if an
            output of the program is not a text and the engine can.
        select: Whether the result is the best state or the last one; see `BetterTogether`.
        budget: Budget of all stages together.

    Raises:
        ConfigError: If an argument is of the wrong kind, if there are too few examples, if the program has no predictor
            or a role has no LM, if the strategy does not name one of the `stages`, or if it tunes weights and the LM
            cannot be trained here. No run directory is opened then.
        StoreError: If the run directory cannot be written, or another process has it open.
        ConfigChanged: If the run directory belongs to other work.
    """
    _check_order(program, train, metric)
    _check_predictors(program)
    given = {"lm": lm, "stages": stages, "out": out, "quiet": quiet, "structured": structured, "sampling": sampling}
    for name, value in {**given, "retriever": retriever}.items():
        check_type(name, value, *_KINDS[name])
    if out and Path(out).is_file():
        raise ConfigError(f"out is {out}, which is a file; write the path of a directory: {_KINDS['out'][1]}")
    seed = check_whole_number("seed", seed, None)
    strategy = _strategy(strategy, stages or {})
    train = _distinct(check_examples(train, "train"))
    label = class_label(program, train)
    train, val = _split(train, label, seed) if val is None else (train, check_examples(val, "val"))
    if any(label not in example.labels for example in val):
        label = None  # validation examples have other labels
    usual_stages = partial(small_lm_stages, metric, label=label)
    stages = stages or {}
    better = BetterTogether(
        metric, {**usual_stages(trainer), **stages}, strategy=VANILLA, select=select, budget=budget
    )  # checks its settings before the LM is loaded
    session = Session(
        lm=load_lm(lm, quiet=quiet) if isinstance(lm, str) else lm,
        seed=seed,
        sampling=sampling or Sampling(temperature=0.0, max_tokens=_max_tokens(program)),
        retriever=retriever,
        quiet=quiet,
    )
    _check_roles(session, program)
    session = replace(session, structured=_can_constrain(session, program) if structured is None else structured)
    if trainer is None and "w" in strategy.stages and "w" not in stages:
        trainer = _local_trainers(session, program)
    better = replace(better, optimizers={**usual_stages(trainer), **stages}, strategy=strategy)
    session = replace(session, store=RunStore(out or Path("runs") / type(program).__name__.lower()))
    return better.optimize(program, None, train, val, session)


def _check_order(program: object, train: object, metric: object) -> None:
    """Checks the three arguments that have no names in a call.

    Raises:
        ConfigError: If they are in another order, the program is not a module, or the metric not a function of two.
    """
    if not isinstance(program, (Module, type)) or isinstance(metric, Module) or callable(train):
        raise ConfigError(
            f"program is {shown(program, 80)}, train is {shown(train, 80)} and metric is {shown(metric, 80)}; "
            "write optimize(program, train, metric)"
        )
    check_type("program", program, Module)
    check_metric(metric)


def _check_predictors(program: Module) -> None:
    """Checks that a program calls an LM.

    Raises:
        ConfigError: If it has no predictor.
    """
    if not predictors(program):
        raise ConfigError(
            f"{type(program).__name__} has no predictor, so there is nothing to optimize; make one in __init__: "
            "self.predict = Predict('question -> answer')"
        )


def _check_roles(session: Session, program: Module) -> None:
    """Checks that there is an LM for every predictor.

    Raises:
        ConfigError: If the role of a predictor has none.
    """
    for path, predictor in predictors(program).items():
        if predictor.role not in session.roles:
            known = ", ".join(map(repr, session.roles)) or "no role"
            raise ConfigError(
                f"{type(program).__name__} needs an LM for the role {predictor.role!r} of its predictor {path!r}, and "
                f"lm has {known}; write optimize(…, lm={{…, {predictor.role!r}: lm}})"
            )


def _strategy(strategy: str | Strategy, stages: Mapping[str, Optimizer]) -> Strategy:
    """Parses the strategy.

    Raises:
        ConfigError: If the strategy is invalid, or does not name one of the further stages.
    """
    parsed = as_strategy(strategy, {"p", "w", *stages})
    unused = [name for name in stages if name not in parsed.stages]
    if unused:
        raise ConfigError(
            f"stages has {unused[0]!r}, which the strategy {str(parsed)!r} does not name; leave it out, or write "
            f"strategy={f'{unused[0]} -> {parsed}' if parsed.stages else unused[0]!r}"
        )
    return parsed


def _distinct(examples: Sequence[Example]) -> list[Example]:
    """Returns one example of each content, so that no copy is in both parts of a split; a warning counts the copies.

    Another warning names an example whose inputs another one has, with other labels.
    """
    distinct = list({digest_without_id(example): example for example in reversed(examples)}.values())[::-1]
    if copies := len(examples) - len(distinct):
        logger.warning("train: %d of %d examples are copies of others; each is used once", copies, len(examples))
    by_inputs: dict[str, Example] = {}
    conflicts = [
        (first, example)
        for example in distinct
        if (first := by_inputs.setdefault(digest(dict(example.inputs)), example)) is not example
    ]
    if conflicts:
        logger.warning(
            "train: %d examples have the inputs of another example and other labels, such as %s: %s and %s",
            len(conflicts),
            shown(dict(conflicts[0][0].inputs)),
            *(shown(dict(example.labels)) for example in conflicts[0]),
        )
    return distinct


def _split(examples: Sequence[Example], label: str | None, seed: int) -> tuple[list[Example], list[Example]]:
    """Sets examples aside for validation.

    Raises:
        ConfigError: If there are fewer than four.
    """
    if len(examples) < _MIN_EXAMPLES:
        raise ConfigError(
            f"there are {len(examples)} different examples, too few to set some aside; pass at least {_MIN_EXAMPLES}, "
            "or examples to choose by: val=[…]"
        )
    order = shuffled(examples, derive_seed(seed, "split"), label)
    num_val = min(len(order) // 2, _MAX_VAL)
    return order[num_val:], order[:num_val]


def _max_tokens(program: Module) -> int:
    """Returns the number of new tokens that the longest completion of the program needs."""
    needed = [
        sum(_TOKENS_OF_TEXT if field.type is str else _TOKENS_OF_VALUE for field in predictor.signature.outputs)
        for predictor in predictors(program).values()
    ]
    return max(needed, default=_TOKENS_OF_TEXT)


def _outputs(program: Module) -> list[Field]:
    """Returns the outputs of all predictors of a program."""
    return [field for predictor in predictors(program).values() for field in predictor.signature.outputs]


def _can_constrain(session: Session, program: Module) -> bool:
    """Whether an output is typed, and all LMs can constrain completions to the format."""
    typed = any(field.type is not str for field in _outputs(program))
    return typed and all(lm.constrains for lm in session.roles.values())


def _local_trainers(session: Session, program: Module) -> dict[str, Trainer]:
    """Returns a trainer for the LM of each role of a program; an LM with a cache is trained without it.

    Raises:
        ConfigError: If an LM does not run in this process.
    """
    from lmpipe import LocalTrainer
    from lmpipe.extend import CachedLM, LocalLM

    trainers: dict[str, Trainer] = {}
    for role in dict.fromkeys(predictor.role for predictor in predictors(program).values()):
        lm = session.lm_of(role)
        model = lm.lm if isinstance(lm, CachedLM) else lm
        if not isinstance(model, LocalLM):
            raise ConfigError(
                f"{model.name!r} ({type(model).__name__}) cannot be trained here; pass trainer=…, such as a "
                "LocalTrainer of the same base, or tune prompts alone: strategy='p'"
            )
        trainers[role] = LocalTrainer(model, SMALL_LM_TUNING)
    return trainers
