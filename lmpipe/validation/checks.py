"""What callers pass is looked at before anything is spent on it: collections of examples, and settings.

Knows nothing of what the examples or the settings are for.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Annotated, Any, ClassVar, get_origin, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, PydanticUserError, ValidationError, create_model

from lmpipe.data import Example
from lmpipe.errors import ConfigError
from lmpipe.storage.hashing import digest
from lmpipe.text.display import shown
from lmpipe.validation.arguments import items

Share = Annotated[float, Field(ge=0, le=1)]
"""The type of a setting from 0 to 1."""

logger = logging.getLogger(__name__)


def checked_examples(examples: Iterable[Example], name: str) -> list[Example]:
    """The examples as a list, so that what can be gone through once only is not lost.

    Args:
        examples: Any iterable of examples.
        name: What messages call it.

    Raises:
        ConfigError: If it is something else; the message names the first item that is no example.
    """
    return list(items(name, examples, Example))


def check_ids(examples: Sequence[Example], name: str = "examples") -> None:
    """Raises:
    ConfigError: If two examples have one id.
    """
    doubled = [key for key, count in Counter(example.id for example in examples).items() if count > 1]
    if doubled:
        raise ConfigError(
            f"{name}: {len(doubled)} example ids are not unique, such as {doubled[0]!r}; drop or rename the doubles"
        )


def without_repeats(examples: Sequence[Example], name: str) -> list[Example]:
    """The examples, each once; a warning says how many were there again.

    Args:
        examples: With the same example several times, or not.
        name: What messages call them.

    Raises:
        ConfigError: If different examples have one id.
    """
    once = list({example.digest: example for example in examples}.values())
    if len(once) < len(examples):
        repeats = len(examples) - len(once)
        logger.warning("%s: %d of %d examples were there before; each is used once", name, repeats, len(examples))
    check_ids(once, name)
    return once


def warn_of_overlap(train: Sequence[Example], val: Sequence[Example]) -> None:
    """Warns if validation examples are training examples too, whatever their ids."""
    known = set(map(content, train))
    shared = sum(content(example) in known for example in val)
    if shared:
        logger.warning(
            "%d of %d validation examples are training examples too; what is chosen by them looks better than it is",
            shared,
            len(val),
        )


def content(example: Example) -> str:
    """Identity of what an example says, whatever its id."""
    return digest([dict(example.inputs), dict(example.labels)])


def check_settings(settings: object) -> None:
    """Compares the fields of a dataclass with their types; a type such as ``PositiveInt`` says the range too.

    Raises:
        ConfigError: If a field holds what its type does not allow; the message has its name and value. Also if a type
            cannot be read, such as one that is imported for type checkers alone.
    """
    kind: type = type(settings)
    try:
        fields = _model(kind)
    except (NameError, TypeError, PydanticUserError) as error:
        raise ConfigError(f"the types of the fields of {kind.__name__} cannot be read: {error}") from error
    values = {name: getattr(settings, name) for name in fields.model_fields}
    try:
        fields.model_validate(values)
    except ValidationError as error:
        wrong: dict[str, list[str]] = {}
        for found in error.errors():
            wrong.setdefault(str(found["loc"][0]), []).append(_plainly(found["msg"]))
        texts = [f"{name} is {shown(values[name])}; it {' or '.join(rules)}" for name, rules in wrong.items()]
        raise ConfigError(f"{kind.__name__}: {'. '.join(texts)}") from error


@lru_cache(maxsize=256)
def _model(kind: type) -> type[BaseModel]:
    """A model with the fields of a dataclass; NaN and infinite values are refused everywhere."""
    hints = {
        name: hint
        for name, hint in get_type_hints(kind, include_extras=True).items()
        if get_origin(hint) is not ClassVar
    }
    config = ConfigDict(strict=True, arbitrary_types_allowed=True, allow_inf_nan=False, protected_namespaces=())
    fields: dict[str, Any] = {name: (hint, ...) for name, hint in hints.items()}
    return create_model(kind.__name__, __config__=config, **fields)


def _plainly(message: str) -> str:
    words = message.removeprefix("Input ").replace("should be", "must be", 1)
    return words.replace("greater than or equal to", "at least").replace("less than or equal to", "at most")
