"""Checks the sums in a text: ``48 / 2 = 24`` is right, ``3 x $4 = $13`` is wrong. Knows nothing of tasks."""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable, Iterator
from fractions import Fraction

from lmpipe.prompting.numbers import UNSIGNED

_TERM = rf"\(*-?[$€£]?{UNSIGNED}%?\)*"
_EQUATION = re.compile(rf"(?<![\w.])(?P<left>{_TERM}(?:[-+*/]{_TERM})+)=(?P<right>-?[$€£]?{UNSIGNED})")
_SPACES = re.compile(r"(?<=[\d)%])\s+(?=[-+*/=)%])|(?<=[-+*/=($€£])\s+(?=[-\d.($€£])")
_TIMES = re.compile(r"(?<=[\d)%])\s*[x×]\s*(?=[\d($€£.])")
_SPELLED = str.maketrans({"÷": "/", "−": "-"})
_LEFT_OUT = str.maketrans("", "", "$€£,")
_OPERATORS: dict[type[ast.AST], Callable[..., Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.USub: operator.neg,
}


def equations(text: str) -> Iterator[bool]:
    """For each equation of numbers in a text, in order, whether it is right.

    The right side may be rounded: it counts as right if the left side rounds to it. Annotations such as
    ``<<48/2=24>>`` (GSM8K) are equations like any other. What cannot be computed is left out.
    """
    text = _SPACES.sub("", _TIMES.sub("*", text.translate(_SPELLED)))
    for found in _EQUATION.finditer(text):
        left, right = found["left"].translate(_LEFT_OUT).replace("%", "/100"), found["right"].translate(_LEFT_OUT)
        try:
            value, said = _value(ast.parse(left, mode="eval").body), Fraction(right)
        except (SyntaxError, ZeroDivisionError, KeyError, ValueError, RecursionError, MemoryError):
            continue  # among them sums of a thousand terms, and numbers of thousands of digits
        decimals = len(right.partition(".")[2])
        yield abs(value - said) <= Fraction(1, 2 * 10**decimals) * (decimals > 0)


def _value(node: ast.AST) -> Fraction:
    if isinstance(node, ast.BinOp):
        return _OPERATORS[type(node.op)](_value(node.left), _value(node.right))
    if isinstance(node, ast.UnaryOp):
        return _OPERATORS[type(node.op)](_value(node.operand))
    if isinstance(node, ast.Constant):
        return Fraction(str(node.value))
    raise KeyError(type(node))
