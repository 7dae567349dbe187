"""Numbers in text: the one pattern by which fields, metrics and checks of sums read them.

A number may have a sign, a currency sign after it, groups of three digits, decimals after a point, and an exponent.
What looks like a number and is written in another way (``1.000.000``, ``1,5``, ``0x1F``, ``10²``) is found too, but has
no value: it is never read as another number. Knows nothing of fields or metrics.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from fractions import Fraction
from typing import final

MOST_DIGITS = 4300
"""Numbers with more digits have no value; it is also the limit of Python's own `int`."""

UNSIGNED = r"(?:[1-9]\d{0,2}(?:,\d{3})+(?!\d)(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+)"
"""A number without a sign, an exponent or spaces, as a regular expression: ``1,234.5``."""

_GAP = " \N{NO-BREAK SPACE}\N{THIN SPACE}\N{NARROW NO-BREAK SPACE}"
_RAISED = "²³¹\u2070-\u209f¼-¾⅐-⅞"  # digits that stand above or below the line, and fractions in one character
_NUMBER = re.compile(
    rf"""(?<![\w.±])(?P<sign>(?:[-+](?=[\d.$€£¥]))?)(?:[$€£¥]\s?(?P<inner>(?:[-+](?=[\d.]))?))?  # -$3 and $-3
        (?P<digits>(?:[1-9]\d{{0,2}}(?:(?P<gap>[{_GAP}])\d{{3}}(?!\d))+|\.?\d))
        (?P<rest>(?:[eE][-+]\d|[\w.,'’{_RAISED}])*)""",
    re.VERBOSE,
)
_PLAIN = re.compile(rf"(?P<value>{UNSIGNED}(?:[eE][-+]?\d+)?)(?P<unit>[.,'’]*[^\d{_RAISED}]*)")
_SPELLED = str.maketrans("−‐‑‒–﹣－＋．，＄￡￥", "-------+.,$£¥")


@final
@dataclass(frozen=True, slots=True)
class Number:
    """A number in a text.

    Attributes:
        start: Where it begins.
        end: Where it ends.
        value: The exact value; none if it is written in a way that has no certain reading, or has too many digits.
        unit: Letters that follow without a space: ``kg`` of ``5kg``.
        spaced: Whether plain spaces stand between its groups of digits: ``1 000``.
    """

    start: int
    end: int
    value: Fraction | None
    unit: str = ""
    spaced: bool = False


def find_numbers(text: str) -> list[Number]:
    """Every number of a text, in order.

    A hyphen is a sign only directly before the number and not after a letter or digit: ``-3`` is negative, and
    ``COVID-19``, ``2-3`` and ``10 - 7`` hold none that is. Digits of a word (``v2``) are no number. Groups of exactly
    three digits after a comma or a space belong to the number before them. Decimal digits of any script are digits.
    """
    text = normalize_digits(text)
    return [_number(found) for found in _NUMBER.finditer(text)]


def normalize_digits(text: str) -> str:
    """The text, as long as before, with ASCII in the place of other digits, minus signs and full-width marks."""
    if text.isascii():
        return text
    return re.sub(r"[^\D0-9]", lambda digit: str(unicodedata.decimal(digit[0])), text.translate(_SPELLED))


def _number(found: re.Match[str]) -> Number:
    gap = found["gap"] or ""
    written = found["digits"].replace(gap, "") + found["rest"] if gap else found["digits"] + found["rest"]
    read = _PLAIN.fullmatch(written)
    value, unit = (_value(read["value"].replace(",", "")), read["unit"].strip(".,'’")) if read else (None, "")
    if value is not None and "-" in (found["sign"], found["inner"]):
        value = -value
    return Number(found.start(), found.start() + len(found[0].rstrip(".,'’")), value, unit, gap == " ")


def _value(written: str) -> Fraction | None:
    digits, _, exponent = written.lower().partition("e")
    power = int(exponent or 0) if len(exponent) <= 6 else MOST_DIGITS
    return Fraction(written) if len(digits) + abs(power) <= MOST_DIGITS else None
