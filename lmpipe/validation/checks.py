"""Checks of examples and settings, made before any LM call is spent on them.

Knows nothing about what the examples or the settings are for.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, get_args, get_origin, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, PydanticUserError, ValidationError, create_model

from lmpipe.data import Example, without_numpy
from lmpipe.errors import ConfigError
from lmpipe.storage.hashing import digest
from lmpipe.text.display import shown
from lmpipe.text.rules import state_rule
from lmpipe.validation.arguments import check_callable, check_items
from lmpipe.validation.replacements import or_write

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

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
    if isinstance(examples, (int, float)):
        raise ConfigError(
            f"{name} is {examples}; pass a list of Example, such as half of a shuffled list: {name}=examples[:50]"
        )
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

    Numbers and arrays of numpy become those of Python, unless the type of the field is one of numpy.

    Raises:
        ConfigError: If the value of a field does not fit its type; the message names the field and its value, and says
            what to write. Also if a type cannot be resolved, such as one that is imported only under ``TYPE_CHECKING``.
    """
    kind: type = type(settings)
    try:
        hints, model = _hints(kind), _model(kind)
    except (NameError, TypeError, PydanticUserError) as error:
        raise ConfigError(f"the types of the fields of {kind.__name__} cannot be resolved: {error}") from error
    values = {name: getattr(settings, name) for name in hints}
    values = {
        name: value if type(value) in (hints[name], *get_args(hints[name])) else without_numpy(value)
        for name, value in values.items()
    }
    for name, value in values.items():
        if value is not getattr(settings, name):
            object.__setattr__(settings, name, value)
    try:
        model.model_validate(values)
    except ValidationError as error:
        details = error.errors(include_url=False)
        problems = [_problem(name, hints[name], values[name], details) for name in hints]
        raise ConfigError(f"{kind.__name__}: {'. '.join(filter(None, problems))}") from error
    for name, hint in hints.items():
        if get_origin(hint) is Callable and isinstance(parameters := get_args(hint)[0], list):
            names = [parameter.__name__.lower() for parameter in parameters]
            check_callable(f"{kind.__name__}: {name}", values[name], names, f"def {name}({', '.join(names)}): …")


def _problem(name: str, hint: Any, value: object, details: Sequence[ErrorDetails]) -> str:
    """Says what is wrong with the value of a field, or with items of it; empty if it is valid."""
    details = [detail for detail in details if detail["loc"][0] == name]
    inner = [detail for detail in details if detail["input"] is not value]
    places: dict[str, tuple[object, list[str]]] = {}
    for detail in inner or details:
        place = f"{name}[{detail['loc'][-1]!r}]" if inner else name
        places.setdefault(place, (detail["input"], []))[1].append(state_rule(detail))
    around = "{'…': {}}" if get_origin(hint) is Mapping and not inner else "{}"
    return ". ".join(
        f"{place} is {shown(wrong)}; it {' or '.join(rules)}{_advice(wrong, hint, around)}"
        for place, (wrong, rules) in places.items()
    )


def _advice(value: object, hint: Any, around: str) -> str:
    """Says what to write in place of a value, for the first class in its type for which there is something to say."""
    if isinstance(hint, type) or get_origin(hint) is Callable:
        return or_write(value, hint if isinstance(hint, type) else Callable, around)  # type: ignore[arg-type]
    return next(filter(None, (_advice(value, part, around) for part in get_args(hint))), "")


@lru_cache(maxsize=256)
def _hints(kind: type) -> dict[str, Any]:
    """Field of a dataclass → its type."""
    hints = get_type_hints(kind, include_extras=True)
    return {name: hint for name, hint in hints.items() if get_origin(hint) is not ClassVar}


@lru_cache(maxsize=256)
def _model(kind: type) -> type[BaseModel]:
    """A pydantic model with the fields of a dataclass; NaN and infinite values are refused everywhere."""
    config = ConfigDict(strict=True, arbitrary_types_allowed=True, allow_inf_nan=False, protected_namespaces=())
    fields: dict[str, Any] = {name: (hint, ...) for name, hint in _hints(kind).items()}
    return create_model(kind.__name__, __config__=config, **fields)
