"""Typed field values as text, in both directions.

`parse_value` reads back all that `render_output` wrote, and forgives what LMs commonly do to a value
(quotes, a final full stop, a code fence, words around a choice or a number) as long as one reading remains.
Knows nothing of whole completions: see `lmpipe.template`.
"""

from __future__ import annotations

import json
import re
from functools import lru_cache
from typing import Any, Literal, get_args, get_origin

from pydantic import TypeAdapter, ValidationError

from lmpipe.errors import ParseError
from lmpipe.hashing import plain
from lmpipe.signature import Field

_NUMBER = re.compile(r"[-+]?(?:(?:\d{1,3}(?:,\d{3})+|\d+)\.?\d*|\.\d+)(?:[eE][-+]?\d+)?")
_FENCE = re.compile(r"\A```[a-zA-Z]*\n(.*?)\n?```\Z", re.DOTALL)
_EDGES = " \t\r\n\"'`*_.()[]"


def render_input(value: Any) -> str:
    """The text of an input: strings as they are, lists of strings as numbered lines, all else as JSON."""
    if isinstance(value, str):
        return value
    if isinstance(value, (list, tuple)) and value and all(isinstance(item, str) for item in value):
        return "\n" + "\n".join(f"[{number}] {item}" for number, item in enumerate(value, 1))
    return _json(value)


def render_output(field: Field, value: Any) -> str:
    """The text of an output: strings and choices as they are, all else as JSON with sorted keys."""
    return str(value) if field.type is str or is_choice(field) else _json(value)


def is_choice(field: Field) -> bool:
    """Whether the field's type is a ``Literal``."""
    return get_origin(field.type) is Literal


def is_one_line(field: Field) -> bool:
    """Whether a value of the field is a single line: choices, numbers and truth values."""
    return field.type is not str and (is_choice(field) or field.type in (int, float, bool))


def parse_value(field: Field, text: str) -> Any:
    """Reads a value of the field's type.

    Raises:
        ParseError: If no reading or more than one fits; it names the field and shows the text.
    """
    if field.type is str:
        return text
    try:
        if is_choice(field):
            return _choice(get_args(field.type), text)
        if field.type in (int, float):
            return _adapter(field.type).validate_python(_number(text))
        if field.type is bool:
            return _adapter(bool).validate_python(text.strip(_EDGES).lower())
        return _structure(field.type, _FENCE.sub(r"\1", text))
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]["msg"]
        raise ParseError(field.name, f"is no {field.type_name} ({problem})", text) from None
    except ValueError as error:
        raise ParseError(field.name, str(error), text) from None


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, sort_keys=True, default=plain)


@lru_cache(maxsize=1024)
def _adapter(type_: Any) -> TypeAdapter[Any]:
    return TypeAdapter(type_)


def _structure(type_: Any, text: str) -> Any:
    """JSON of the type; or the bare text, where the type allows it (``str | None``, dates)."""
    try:
        return _adapter(type_).validate_json(text)
    except ValidationError as error:
        try:
            return _adapter(type_).validate_python(text)
        except ValidationError:
            raise error from None


def _choice(options: tuple[Any, ...], text: str) -> Any:
    for option in options:
        if str(option) == text:
            return option
    named = {str(option).casefold(): option for option in options}
    longest_first = "|".join(re.escape(name) for name in sorted(named, key=len, reverse=True))
    found = set(re.findall(rf"(?<!\w)(?:{longest_first})(?!\w)", text.casefold()))
    if len(found) != 1:
        listed = ", ".join(map(str, options))
        raise ValueError(f"names {'several' if found else 'none'} of the choices {listed}")
    return named[found.pop()]


def _number(text: str) -> str:
    found = _NUMBER.findall(text)
    if len(found) != 1:
        raise ValueError(f"holds {len(found) or 'no'} number{'s' if found else ''} where one is wanted")
    return str(found[0]).replace(",", "").rstrip(".")
