"""Checks the sums in a text: ``48 / 2 = 24`` is correct, ``3 x $4 = $13`` is not. Knows nothing about tasks."""

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
    """Yields, for each equation of numbers in a text, whether it is correct.

    The right side may be rounded: the equation is correct if the left side rounds to it. Annotations such as
    ``<<48/2=24>>`` (GSM8K) are equations like any other. Equations that cannot be computed are left out.
    """
    text = _SPACES.sub("", _TIMES.sub("*", text.translate(_SPELLED)))
    for equation in _EQUATION.finditer(text):
        left, right = (equation[side].translate(_LEFT_OUT) for side in ("left", "right"))
        try:
            value = _value(ast.parse(left.replace("%", "/100"), mode="eval").body)
            stated = Fraction(right)
        except (SyntaxError, ZeroDivisionError, KeyError, ValueError, RecursionError, MemoryError):
            continue  # also for sums of a thousand terms, and numbers of thousands of digits
        decimals = len(right.partition(".")[2])
        yield abs(value - stated) <= Fraction(1, 2 * 10**decimals) * (decimals > 0)


def _value(node: ast.AST) -> Fraction:
    if isinstance(node, ast.BinOp):
        return _OPERATORS[type(node.op)](_value(node.left), _value(node.right))
    if isinstance(node, ast.UnaryOp):
        return _OPERATORS[type(node.op)](_value(node.operand))
    if isinstance(node, ast.Constant):
        return Fraction(str(node.value))
    raise KeyError(type(node))
