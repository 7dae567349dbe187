"""Checks of labels against the choices of a program's outputs, since a misspelt choice can never be answered right.

Knows the signatures of a program, but neither its metric nor what its code does to the outputs of its modules.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator

from lmpipe.data import Example
from lmpipe.errors import ConfigError
from lmpipe.program.module import Module
from lmpipe.program.predict import ChainOfThought, Predict, predictors
from lmpipe.prompting.choices import Choices, choices_of

logger = logging.getLogger(__name__)

_warned: set[tuple[str, str]] = set()  # names and values of labels that this process has warned of


def check_labels(program: Module, examples: Iterable[Example]) -> None:
    """Checks that labels are among the choices of the outputs that have their names.

    Raises:
        ConfigError: If the program is a single predictor, which returns what its LM chose, and a label is not among the
            choices.
    """
    problems = dict(_problems(program, examples))
    if problems and isinstance(program, (Predict, ChainOfThought)):
        raise ConfigError(f"{next(iter(problems.values()))}; correct the labels, or the choices in the signature")
    _warn(problems)


def warn_about_labels(program: Module, examples: Iterable[Example]) -> None:
    """Warns of labels that are not among the choices of the outputs that have their names, once per process."""
    _warn(dict(_problems(program, examples)))


def _warn(problems: dict[tuple[str, str], str]) -> None:
    for label, problem in problems.items():
        if label not in _warned:
            logger.warning("%s; is one of them misspelt?", problem)
    _warned.update(problems)


def _problems(program: Module, examples: Iterable[Example]) -> Iterator[tuple[tuple[str, str], str]]:
    """Yields name and text of each label that no output can be, and what is wrong with it."""
    counts: dict[tuple[str, str], int] = {}
    outputs = _choices(program)
    for example in examples:
        for name, value in example.labels.items():
            if name in outputs and not isinstance(value, (list, dict)):
                key = name, outputs[name][0].render(value)
                counts[key] = counts.get(key, 0) + 1
    for (name, text), count in counts.items():
        if not any(_can_be(text, choices) for choices in outputs[name]):
            known = ", ".join(dict.fromkeys(choice.text for choices in outputs[name] for choice in choices.choices))
            of = f"{count:,} examples" if count > 1 else "an example"
            yield (name, text), f"the label {name} = {text!r} of {of} is not among the choices of {name}: {known}"


def _choices(program: Module) -> dict[str, list[Choices]]:
    """Returns the outputs of the program's modules that have choices wherever they occur, with the choices of each."""
    types: dict[str, list[Choices | None]] = {}
    for predictor in predictors(program).values():
        for field in predictor.signature.outputs:
            types.setdefault(field.name, []).append(choices_of(field.type))
    return {name: [each for each in found if each] for name, found in types.items() if all(found)}


def _can_be(text: str, choices: Choices) -> bool:
    try:
        choices.read(text)
    except ValueError:
        return False
    return True
