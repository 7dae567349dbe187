"""Numbers in text: the one parser that fields, metrics and checks of arithmetic use.

A number may have a sign, followed by a currency sign, groups of three digits, decimals after a point, and an exponent.
Other notations (``1.000.000``, ``1,5``, ``0x1F``, ``10²``) are found too but have no value, so that they are never
mistaken for another number. Knows nothing about fields or metrics.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from fractions import Fraction
from typing import final

_MAX_DIGITS = 4300
"""Numbers with more digits have no value; Python's `int` has the same limit."""

UNSIGNED = r"(?:[1-9]\d{0,2}(?:,\d{3})+(?!\d)(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+)"
"""A number without a sign, an exponent or spaces, as a regular expression: ``1,234.5``."""

_GAP = " \N{NO-BREAK SPACE}\N{THIN SPACE}\N{NARROW NO-BREAK SPACE}"
_RAISED = "²³¹\u2070-\u209f¼-¾⅐-⅞"  # superscript and subscript digits, and fractions in one character
_NUMBER = re.compile(
    rf"""(?<![\w.±])(?P<sign>(?:[-+](?=[\d.$€£¥]))?)(?:[$€£¥]\s?(?P<inner>(?:[-+](?=[\d.]))?))?  # -$3 and $-3
        (?P<digits>(?:[1-9]\d{{0,2}}(?:(?P<gap>[{_GAP}])\d{{3}}(?!\d))+|\.?\d))
        (?P<rest>(?:[eE][-+]\d|[\w.,'’{_RAISED}])*)""",
    re.VERBOSE,
)
_PLAIN = re.compile(rf"(?P<value>{UNSIGNED}(?:[eE][-+]?\d+)?)(?P<unit>[.,'’]*[^\d{_RAISED}]*)")
_TO_ASCII = str.maketrans("−‐‑‒–﹣－＋．，＄￡￥", "-------+.,$£¥")


@final
@dataclass(frozen=True, slots=True)
class Number:
    """A number in a text.

    Attributes:
        start: Index of its first character.
        end: Index after its last character.
        value: Exact value; None if the notation is ambiguous or unknown, or if the number has too many digits.
        unit: Letters that follow without a space, such as ``kg`` in ``5kg``.
        spaced: Whether its groups of digits are separated by plain spaces, as in ``1 000``.
    """

    start: int
    end: int
    value: Fraction | None
    unit: str = ""
    spaced: bool = False


def find_numbers(text: str) -> list[Number]:
    """Returns all numbers of a text, in order.

    A hyphen is a sign only if it is directly before the number and not after a letter or digit: ``-3`` is negative, but
    no number in ``COVID-19``, ``2-3`` or ``10 - 7`` is. Digits within a word (``v2``) are not a number. A group of
    exactly three digits after a comma or a space belongs to the number before it. Decimal digits of any script count.
    """
    text = normalize_digits(text)
    return [_number(match) for match in _NUMBER.finditer(text)]


def normalize_digits(text: str) -> str:
    """Replaces non-ASCII digits, minus signs and full-width punctuation by ASCII; the length of the text is kept."""
    if text.isascii():
        return text
    return re.sub(r"[^\D0-9]", lambda digit: str(unicodedata.decimal(digit[0])), text.translate(_TO_ASCII))


def _number(match: re.Match[str]) -> Number:
    gap = match["gap"] or ""
    written = match["digits"].replace(gap, "") + match["rest"] if gap else match["digits"] + match["rest"]
    plain = _PLAIN.fullmatch(written)
    value, unit = (_parse_number(plain["value"].replace(",", "")), plain["unit"].strip(".,'’")) if plain else (None, "")
    if value is not None and "-" in (match["sign"], match["inner"]):
        value = -value
    return Number(match.start(), match.start() + len(match[0].rstrip(".,'’")), value, unit, gap == " ")


def _parse_number(written: str) -> Fraction | None:
    digits, _, exponent = written.lower().partition("e")
    power = int(exponent or 0) if len(exponent) <= 6 else _MAX_DIGITS
    return Fraction(written) if len(digits) + abs(power) <= _MAX_DIGITS else None
