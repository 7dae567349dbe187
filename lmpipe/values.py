"""Typed field values as text, in both directions.

`render_value` is exact; `parse_value` reads back all that it wrote, and forgives what LMs commonly do to a value
(quotes, a final full stop, a code fence, words around a choice or a number) as long as one reading remains.
Knows nothing of whole completions: see `lmpipe.template`.
"""

from __future__ import annotations

import json
import re
from functools import lru_cache
from typing import Any, Literal, get_args, get_origin

from pydantic import TypeAdapter, ValidationError
from pydantic_core import to_jsonable_python

from lmpipe.errors import ParseError
from lmpipe.signature import Field

_NUMBER = re.compile(r"[-+]?(?:\d[\d,]*\.?\d*|\.\d+)(?:[eE][-+]?\d+)?")
_FENCE = re.compile(r"\A```[a-zA-Z]*\n(.*?)\n?```\Z", re.DOTALL)
_EDGES = " \t\r\n\"'`*_.()[]"


def render_value(value: Any) -> str:
    """The text of one field value: strings as they are, all else as JSON with sorted keys."""
    if isinstance(value, str):
        return value
    return json.dumps(to_jsonable_python(value), ensure_ascii=False, sort_keys=True)


def parse_value(field: Field, text: str) -> Any:
    """Reads a value of the field's type.

    Raises:
        ParseError: If no reading or more than one fits; it names the field and shows the text.
    """
    if field.type is str:
        return text
    try:
        if get_origin(field.type) is Literal:
            return _choice(get_args(field.type), text)
        if field.type in (int, float):
            return _adapter(field.type).validate_python(_number(text))
        if field.type is bool:
            return _adapter(bool).validate_python(text.strip(_EDGES).lower())
        return _adapter(field.type).validate_json(_FENCE.sub(r"\1", text))
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]["msg"]
        raise ParseError(field.name, f"is no {field.type_name} ({problem})", text) from None
    except ValueError as error:
        raise ParseError(field.name, str(error), text) from None


@lru_cache(maxsize=1024)
def _adapter(type_: Any) -> TypeAdapter[Any]:
    return TypeAdapter(type_)


def _choice(options: tuple[Any, ...], text: str) -> Any:
    bare = text.strip(_EDGES).casefold()
    named = {str(option).casefold(): option for option in options}
    for exact in (text, bare):
        for option in options:
            if str(option) == exact:
                return option
    if bare in named:
        return named[bare]
    found = {key for key in named if re.search(rf"(?<!\w){re.escape(key)}(?!\w)", bare)}
    longest = [key for key in found if not any(key != other and key in other for other in found)]
    if len(longest) != 1:
        listed = ", ".join(map(str, options))
        raise ValueError(f"names {'none' if not longest else 'several'} of the choices {listed}")
    return named[longest[0]]


def _number(text: str) -> str:
    found = _NUMBER.findall(text)
    if len(found) != 1:
        raise ValueError(f"holds {len(found) or 'no'} number{'s' if found else ''} where one is wanted")
    return str(found[0]).replace(",", "").rstrip(".")
