"""The regular expression of a signature's completions, for structured output.

It is a regular expression and not a grammar because all engines and servers with constrained decoding support regular
expressions.
Knows nothing about how engines enforce it.
"""

from __future__ import annotations

import json
import re
from functools import lru_cache
from typing import Any

from lmpipe.errors import SignatureError
from lmpipe.prompting.choices import choices_of
from lmpipe.prompting.signature import Field, Signature, schema_of
from lmpipe.prompting.thoughts import quote_tags

_INTEGER = r"-?(0|[1-9][0-9]{0,17})"
_TYPES = {
    int: _INTEGER,
    float: _INTEGER + r"(\.[0-9]{1,17})?([eE][+-]?[0-9]{1,2})?",
    bool: r"(true|false)",
}
_LEAD = r"[ \t]*(/[ \t]*)?"  # between the < of a tag and its name
_OTHER_NAME = "[tT]([^hH<{0}]|[hH]([^iI<{0}]|[iI]([^nN<{0}]|[nN][^kK<{0}])))"
_OPEN = f"<({_LEAD}([tT]([hH]([iI][nN]?)?)?)?<)*"  # several < in a row, none of which begins a tag
_NO_TAG = rf"{_OPEN}([ \t]*([^ \t/tT<{{0}}]|/[ \t]*[^ \ttT<{{0}}])|{_LEAD}{_OTHER_NAME})"
_TAIL = f"{_OPEN}{_LEAD}([tT]([hH]([iI][nN]?)?)?)?"
_NON_SPACE = (
    "[^<\t-\r\x1c-\x20\x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]"  # as `str.isspace` defines it
)


@lru_cache(maxsize=1024)
def completion_regex(signature: Signature) -> str:
    """Returns the regular expression of a signature's completions.

    Fields are in the signature's order, each on its own line; optional fields may be absent. Text is a single line,
    except in the last field, and contains no tag of a thought.

    Raises:
        SignatureError: If the values of a field's type cannot be described by a regular expression.
    """
    fields = signature.outputs
    first = next((number for number, field in enumerate(fields) if not field.optional), 0)
    parts = []
    for number, field in enumerate(fields):
        line = f"{re.escape(field.name)}: {_value(field, last=number == len(fields) - 1)}"
        line = line + r"\n" if number < first else line if number == first else r"\n" + line
        parts.append(f"({line})?" if field.optional and number != first else line)
    return "".join(parts)


def _value(field: Field, *, last: bool) -> str:
    line_end = "" if last else r"\n"
    piece = f"([^<{line_end}]|{_NO_TAG.format(line_end)})"  # of a text without tags
    if field.type is str:
        return f"({piece}+({_TAIL})?|{_TAIL})"
    if field.type is Any:  # unlike a string, it cannot be empty
        return f"{_NON_SPACE}{piece}*({_TAIL})?"
    choices = choices_of(field.type)
    if choices is not None:
        return "(" + "|".join(re.escape(quote_tags(choice.text)) for choice in choices.choices) + ")"
    return _TYPES.get(field.type) or _json(field)


def _json(field: Field) -> str:
    try:
        from outlines_core.json_schema import build_regex_from_schema
    except ImportError as error:
        raise SignatureError(
            f"structured output of field {field.name!r}, of type {field.type_name}, needs outlines-core; "
            "run: pip install 'lmpipe[structured]'"
        ) from error
    try:
        pattern = build_regex_from_schema(json.dumps(schema_of(field.type)))
    except (ValueError, TypeError, RecursionError) as error:
        raise SignatureError(
            f"field {field.name!r} of type {field.type_name} cannot be written as a regular expression: {error}"
        ) from error
    return f"({pattern.replace('[1-9][0-9]*', '[1-9][0-9]{0,17}').replace('[eE][+-][0-9]+', '[eE][+-][0-9]{1,2}')})"
