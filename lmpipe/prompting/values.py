"""Rendering of typed field values as text, and parsing of text as typed values.

`parse_value` reads all text that `render_output` writes. It also accepts what LMs commonly add to a value (quotes, a
final full stop, a code fence, words around a choice or a number, bullets) as long as the value is unambiguous. Knows
nothing about whole completions: see `lmpipe.prompting.template`.
"""

from __future__ import annotations

import cmath
import datetime
import enum
import json
import math
import re
import types
from functools import lru_cache
from typing import Any, Union, get_args, get_origin

from pydantic import TypeAdapter, ValidationError
from pydantic_core import PydanticSerializationError

from lmpipe.errors import ParseError, SignatureError
from lmpipe.prompting.choices import Choice, Choices, choices_of, ends_negated, to_choice
from lmpipe.prompting.numbers import find_numbers, normalize_digits
from lmpipe.prompting.signature import Field
from lmpipe.storage.hashing import json_default

_FENCE = re.compile(r"`{3,}|~{3,}")
_BOOLEANS = Choices((Choice(True, "true", ("yes",)), Choice(False, "false", ("no",))))
_NONE = re.compile(r"[`*_.()\s]*(?:none|null)[`*_.()\s]*", re.IGNORECASE)  # in quotes, it is a string
_SCALES = frozenset(["hundred", "thousand", "million", "billion", "trillion", "lakh", "crore", "dozen", "k", "bn"])
_SCALE = re.compile(r"[\s*_-]*([^\W\d_]+)")
_SIGN_APART = re.compile(r"\b(?:minus|negative)\b|(?<![^\s*_])[-−–±][\s*_$€£¥([]+\Z", re.IGNORECASE)
_BULLET = re.compile(r"[ \t]*(?:[-*+•‣◦▪–]|\d{1,6}[.)]|\[\d{1,6}\])[ \t]+")
_TIMES = (datetime.date, datetime.time, datetime.timedelta)
_PLAIN_NUMBER = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)")


def render_input(value: Any) -> str:
    """Renders an input: a string as it is, a list of strings as numbered lines, anything else as JSON.

    Raises:
        SignatureError: If the value cannot be written as JSON.
    """
    if type(value) is str or (isinstance(value, str) and not isinstance(value, enum.Enum)):
        return value
    if type(value) is list and not value:
        return "[]"
    if isinstance(value, (list, tuple)) and value and not [item for item in value if not isinstance(item, str)]:
        return "\n" + "\n".join([f"[{number}] {item}" for number, item in enumerate(value, 1)])
    return _render_json(value)


def render_output(field: Field, value: Any) -> str:
    """Renders an output: a string or choice as it is, anything else as JSON with sorted keys.

    Raises:
        SignatureError: If the value cannot be written as JSON.
    """
    if field.type is str:
        return value if type(value) is str else to_choice(value).text
    choices = choices_of(field.type)
    return choices.render(value) if choices else _render_json(value)


def parse_value(field: Field, text: str) -> Any:
    """Parses a value of the field's type.

    Raises:
        ParseError: If the text has no value of this type, or is ambiguous; the message names the field and shows the
            text.
    """
    if field.type is str:
        return text
    try:
        return _parse(field.type, strip_fence(text))
    except ValidationError as error:
        problem = error.errors(include_url=False, include_context=False)[0]["msg"]
        raise ParseError(field.name, f"is not of type {field.type_name} ({problem})", text) from None
    except (ValueError, RecursionError) as error:
        raise ParseError(field.name, str(error), text) from None


def strip_fence(text: str) -> str:
    """Removes a code fence around the whole text; returns any other text as it is."""
    inner = text.strip()
    mark = _FENCE.match(inner)
    if not mark or not inner.endswith(mark[0]) or len(inner) < 2 * mark.end():
        return text
    _, line_end, body = inner[mark.end() : -mark.end()].partition("\n")
    if not line_end:
        return inner[mark.end() : -mark.end()].strip()
    *lines, last = body.split("\n")
    if last.strip() or any(line.lstrip().startswith(mark[0]) for line in lines):  # several fences
        return text
    return "\n".join(lines).strip()


def _parse(type_: Any, text: str) -> Any:
    choices = choices_of(type_)
    if choices is not None:
        return choices.read(text)
    if not text.strip():
        raise ValueError("is empty")
    inner = _without_none(type_)
    if inner is not type_ and _NONE.fullmatch(text):
        return None
    line = text.strip().partition("\n")[0]
    if inner is bool:
        return _BOOLEANS.read(line)
    if inner in (int, float):
        return _parse_number(line, inner)
    return _parse_structured(type_, text)


def _render_json(value: Any) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, sort_keys=True, default=json_default)
    except (TypeError, ValueError, RecursionError, PydanticSerializationError) as error:
        raise SignatureError(
            f"a value of type {type(value).__name__} cannot be written into a prompt: {error}; "
            "use strings, numbers, lists, dicts, dataclasses or pydantic models"
        ) from None


@lru_cache(maxsize=1024)
def _adapter(type_: Any) -> TypeAdapter[Any]:
    return TypeAdapter(type_)


def _without_none(type_: Any) -> Any:
    """Returns ``X`` for ``X | None``, and any other type as it is."""
    if get_origin(type_) not in (Union, types.UnionType):
        return type_
    parts = [part for part in get_args(type_) if part is not type(None)]
    return parts[0] if len(parts) == 1 and len(get_args(type_)) == 2 else type_


def _parse_number(text: str, type_: Any) -> int | float:
    """Returns the only number in a text.

    Raises:
        ValueError: If the text has no number or several, the number is not of the type, or the words around it change
            its value.
    """
    numbers = find_numbers(text)
    if len(numbers) != 1:
        raise ValueError(f"has {len(numbers) or 'no'} number{'s' if numbers else ''} instead of one")
    number = numbers[0]
    before, written, after = text[: number.start], text[number.start : number.end], text[number.end :]
    if number.value is None:
        parts = len(re.findall(r"\d+", written))
        several = f"{parts} numbers instead of one, or " if parts > 1 else ""
        raise ValueError(f"has {several}a number that is too long or in an unknown notation")
    scale = _SCALE.match(f"{number.unit} {after}")
    if _SIGN_APART.search(before) or ends_negated(before) or (scale and scale[1].lower() in _SCALES):
        raise ValueError("has a number with words that change its value; write it in digits, with its sign")
    if number.spaced and len(f"{before} {after}".split()) > 1:
        raise ValueError(f"has several numbers, or one with spaces in it ({written.strip()})")
    if type_ is int and number.value.denominator != 1:
        raise ValueError("is not an int: it has a fractional part")
    try:
        return int(number.value) if type_ is int else float(number.value)
    except OverflowError:
        raise ValueError("is not a float: it is too large") from None


def _parse_structured(type_: Any, text: str) -> Any:
    """Parses JSON; or else the text itself, if the type allows it (``str | None``, dates); or else a list of lines."""
    adapter = _adapter(type_)
    try:
        return _parse_json(adapter, text)
    except ValueError as error:  # raised by pydantic or by `_check_misread`
        problem = error
    try:
        value = adapter.validate_python(text)
    except ValidationError:
        if not _is_list_of_strings(type_):
            raise problem from None
        return adapter.validate_python(_list_items(text, problem))
    if isinstance(value, _TIMES) and _PLAIN_NUMBER.fullmatch(normalize_digits(text.strip())):
        raise ValueError("has a number instead of a date or time")
    if isinstance(value, (float, complex)) and not cmath.isfinite(value):
        raise problem
    return value


def _is_list_of_strings(type_: Any) -> bool:
    """Whether the type is a list, set or tuple of strings."""
    arguments = get_args(type_)
    if get_origin(type_) is tuple:
        return arguments == (str, ...)
    return get_origin(type_) in (list, set, frozenset) and arguments == (str,)


def _list_items(text: str, problem: ValueError) -> list[str]:
    """Returns the items of a list with one item a line, if all lines or no lines have bullets or numbers.

    Raises:
        ValueError: If the text is ambiguous; the error is the one passed as `problem`.
    """
    lines = [line for line in text.split("\n") if line.strip()]
    bullets = [_BULLET.match(line) for line in lines]
    items = [line[bullet.end() if bullet else 0 :].strip() for line, bullet in zip(lines, bullets, strict=True)]
    if all(bullets):
        return items
    enumeration = len(items) == 1 and re.search(r"[,;]", items[0])
    if any(bullets) or enumeration or items[0][0] in '[{"' or _NONE.fullmatch(text):
        raise problem
    return items


def _parse_json(adapter: TypeAdapter[Any], text: str) -> Any:
    """Parses JSON strictly, but accepts numbers and booleans in quotes, and whole numbers with a decimal point."""
    try:
        value = adapter.validate_json(text, strict=True)
    except ValidationError as error:
        if not all(map(_is_harmless, error.errors(include_url=False, include_context=False))):
            raise
        value = adapter.validate_json(text)
    _check_misread(adapter, text)
    return value


def _is_harmless(error: Any) -> bool:
    """Whether a value that strict parsing refuses can be converted without a change of its meaning."""
    value = error["input"]
    match error["type"]:
        case "int_type" | "float_type" if isinstance(value, str):
            return bool(_PLAIN_NUMBER.fullmatch(value.strip()))
        case "int_type":
            return isinstance(value, float) and value.is_integer()
        case "bool_type":
            return value in ("true", "false", "True", "False")
        case "datetime_parsing":
            return not _PLAIN_NUMBER.fullmatch(value.strip())
        case _:
            return False


def _check_misread(adapter: TypeAdapter[Any], text: str) -> None:
    """Raises a ValueError for JSON that pydantic would misread: NaN, infinity, or ``"2024"`` as a date or time."""
    has_numbers = False  # whether a string is a number

    def finite(number: str) -> float:
        if not math.isfinite(value := float(number)):
            raise ValueError(f"has {number}, which is not a finite number")
        return value

    def mark_numbers(value: Any) -> Any:
        nonlocal has_numbers
        if isinstance(value, dict):
            return {mark_numbers(key): mark_numbers(item) for key, item in value.items()}
        if isinstance(value, list):
            return [mark_numbers(item) for item in value]
        if isinstance(value, str) and _PLAIN_NUMBER.fullmatch(value.strip()):
            has_numbers = True
            return f"{value} is a number"
        return value

    marked = mark_numbers(json.loads(text, strict=False, parse_float=finite, parse_constant=finite))
    if not has_numbers:
        return
    try:
        adapter.validate_json(json.dumps(marked))
    except ValidationError as error:
        if any(detail["type"].startswith(("date", "time")) for detail in error.errors(include_url=False)):
            raise ValueError("has a number instead of a date or time") from None
