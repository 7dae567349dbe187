"""Checks of examples and settings, made before any LM call is spent on them.

Knows nothing about what the examples or the settings are for.
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
from lmpipe.validation.arguments import check_items

UnitInterval = Annotated[float, Field(ge=0, le=1)]
"""Type of a setting from 0 to 1, both included."""

logger = logging.getLogger(__name__)


def check_examples(examples: Iterable[Example], name: str) -> list[Example]:
    """Returns the examples as a list, so that an iterator is read only once.

    Args:
        examples: Any iterable of examples.
        name: Name of the argument in error messages.

    Raises:
        ConfigError: If an item is not an example; the message names the first such item.
    """
    return list(check_items(name, examples, Example))


def check_ids(examples: Sequence[Example], name: str = "examples") -> None:
    """Checks that the ids of examples are unique.

    Raises:
        ConfigError: If two examples have the same id.
    """
    repeated = [key for key, count in Counter(example.id for example in examples).items() if count > 1]
    if repeated:
        raise ConfigError(
            f"{name}: {len(repeated)} example ids are not unique, such as {repeated[0]!r}; drop or rename duplicates"
        )


def deduplicate(examples: Sequence[Example], name: str) -> list[Example]:
    """Drops repeated examples; a warning says how many there were.

    Args:
        examples: Examples, some of them perhaps several times.
        name: Name of the argument in messages.

    Raises:
        ConfigError: If two different examples have the same id.
    """
    unique = list({example.digest: example for example in examples}.values())
    if len(unique) < len(examples):
        repeats = len(examples) - len(unique)
        logger.warning("%s: %d of %d examples are repeated; each is used once", name, repeats, len(examples))
    check_ids(unique, name)
    return unique


def warn_about_overlap(train: Sequence[Example], val: Sequence[Example]) -> None:
    """Warns if validation examples are also training examples, even under other ids."""
    train_digests = set(map(digest_without_id, train))
    shared = sum(digest_without_id(example) in train_digests for example in val)
    if shared:
        logger.warning(
            "%d of %d validation examples are also training examples; validation scores will be too high",
            shared,
            len(val),
        )


def digest_without_id(example: Example) -> str:
    """Returns the digest of the inputs and labels of an example, without its id."""
    return digest([dict(example.inputs), dict(example.labels)])


def check_settings(settings: object) -> None:
    """Checks the fields of a dataclass against their types; a type such as ``PositiveInt`` also limits the range.

    Raises:
        ConfigError: If the value of a field does not fit its type; the message names the field and its value. Also if
            a type cannot be resolved, such as one that is imported only under ``TYPE_CHECKING``.
    """
    kind: type = type(settings)
    try:
        model = _model(kind)
    except (NameError, TypeError, PydanticUserError) as error:
        raise ConfigError(f"the types of the fields of {kind.__name__} cannot be resolved: {error}") from error
    values = {name: getattr(settings, name) for name in model.model_fields}
    try:
        model.model_validate(values)
    except ValidationError as error:
        problems: dict[str, list[str]] = {}
        for detail in error.errors():
            problems.setdefault(str(detail["loc"][0]), []).append(_reword(detail["msg"]))
        texts = [f"{name} is {shown(values[name])}; it {' or '.join(rules)}" for name, rules in problems.items()]
        raise ConfigError(f"{kind.__name__}: {'. '.join(texts)}") from error


@lru_cache(maxsize=256)
def _model(kind: type) -> type[BaseModel]:
    """A pydantic model with the fields of a dataclass; NaN and infinite values are refused everywhere."""
    hints = {
        name: hint
        for name, hint in get_type_hints(kind, include_extras=True).items()
        if get_origin(hint) is not ClassVar
    }
    config = ConfigDict(strict=True, arbitrary_types_allowed=True, allow_inf_nan=False, protected_namespaces=())
    fields: dict[str, Any] = {name: (hint, ...) for name, hint in hints.items()}
    return create_model(kind.__name__, __config__=config, **fields)


def _reword(message: str) -> str:
    """Puts a message of pydantic into the words of lmpipe's own messages."""
    rule = message.removeprefix("Input ").replace("should be", "must be", 1)
    return rule.replace("greater than or equal to", "at least").replace("less than or equal to", "at most")
