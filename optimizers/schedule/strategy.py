"""Strategy strings: ``"p -> w -> p"`` names the stages of a run in order; ``"vanilla"`` names none.

    strategy   stages ("->" stages)*
    stages     (name | "(" strategy ")") ("*" count)?

So ``"p*3"`` is ``"p -> p -> p"``, and ``"(p -> w)*2"`` is ``"p -> w -> p -> w"``. Knows nothing of what a stage does.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import NoReturn, final

from lmpipe.extend import StrategyError, clean_text, shorten, shown

VANILLA = "vanilla"
"""The strategy without stages."""
MOST_STAGES = 100
_DEEPEST = 100  # parentheses within one another
_SHOWN = 60  # characters before and after the place that a message points at

_TOKEN = re.compile(r"->|[()*]|(?:(?!->)[^()*\s])(?:(?:(?!->)[^()*])*(?:(?!->)[^()*\s]))?")


def parse_strategy(text: str, known: Collection[str]) -> tuple[str, ...]:
    """Reads a strategy.

    Args:
        text: Stage names with ``->`` between them, ``*`` and a number to repeat, and parentheses; or ``"vanilla"``.
        known: The names there are.

    Returns:
        The names in order; none for ``"vanilla"``.

    Raises:
        StrategyError: If it cannot be read; the message points at the place.
    """
    if not isinstance(text, str):
        raise StrategyError(f"a strategy is a text such as 'p -> w -> p', and not {shown(text)}")
    if text.strip() == VANILLA:
        return ()
    return _Reader(text, known).read()


def format_strategy(names: Collection[str]) -> str:
    """The plain form of a strategy, which `parse_strategy` reads back: names with ``->`` between them."""
    return " -> ".join(names) or VANILLA


def distinct_stages(strategies: Iterable[Collection[str]]) -> list[tuple[str, ...]]:
    """Each stage that some strategies take, once, as the strategy up to and with it: parents before children.

    Strategies that begin alike share these stages, so this is what running all of them takes.
    """
    prefixes = {tuple(names)[:length] for names in strategies for length in range(1, len(names) + 1)}
    return sorted(prefixes, key=lambda names: (len(names), names))


@final
@dataclass(frozen=True, slots=True)
class _Token:
    text: str
    at: int


@final
class _Reader:
    """Reads one strategy from left to right."""

    def __init__(self, text: str, known: Collection[str]) -> None:
        self._text, self._known = text, known
        self._tokens = [_Token(match.group(), match.start()) for match in _TOKEN.finditer(text)]
        self._next = 0
        self._depth = 0

    def read(self) -> tuple[str, ...]:
        names = self._strategy()
        if (left := self._peek()) is not None:
            self._fail("there is no parenthesis to close" if left.text == ")" else "'->' is missing", left)
        return names

    def _strategy(self) -> tuple[str, ...]:
        names = self._stages()
        while (arrow := self._peek()) is not None and self._take("->"):
            names += self._stages()
            if len(names) > MOST_STAGES:
                self._fail(f"a strategy has at most {MOST_STAGES} stages", arrow)
        return names

    def _stages(self) -> tuple[str, ...]:
        opening = self._peek()
        if self._take("("):
            self._depth += 1
            if self._depth > _DEEPEST:
                self._fail(f"parentheses are nested more than {_DEEPEST} deep", opening)
            names = self._strategy()
            self._depth -= 1
            if not self._take(")"):
                self._fail("this parenthesis is not closed", opening)
        else:
            names = (self._name(),)
        return self._repeated(names)

    def _name(self) -> str:
        token = self._peek()
        if token is None or token.text in {"->", "(", ")", "*"}:
            self._fail("a stage name is missing", token)
        if token.text not in self._known:
            self._fail(f"no stage is called {shown(token.text, 100)}", token)
        self._next += 1
        return token.text

    def _repeated(self, names: tuple[str, ...]) -> tuple[str, ...]:
        while self._take("*"):
            token = self._peek()
            digits = token.text.lstrip("0") if token and token.text.isascii() and token.text.isdigit() else ""
            if not digits:
                self._fail("after '*' comes how often, such as 2", token)
            count = int(digits[:6])  # more digits are too many, whatever they are
            if len(names) * count > MOST_STAGES:
                self._fail(f"a strategy has at most {MOST_STAGES} stages", token)
            self._next += 1
            names *= count
        return names

    def _peek(self) -> _Token | None:
        return self._tokens[self._next] if self._next < len(self._tokens) else None

    def _take(self, text: str) -> bool:
        token = self._peek()
        found = token is not None and token.text == text
        self._next += found
        return found

    def _fail(self, problem: str, token: _Token | None) -> NoReturn:
        at = len(self._text.rstrip()) if token is None else token.at
        first, last = max(0, at - _SHOWN), at + _SHOWN
        before = "…" * (first > 0) + self._text[first:at]
        shown = _line(before + self._text[at:last]) + "…" * (last < len(self._text))
        listed = shorten(", ".join(sorted(self._known)), 500)
        raise StrategyError(f"{problem}; the stages are {listed}\n  {shown}\n  {' ' * len(before)}^")


def _line(text: str) -> str:
    """The text as one line of as many characters, none of which commands a terminal."""
    return "".join(clean_text("\0" if character in "\t\r\n\x85\u2028\u2029" else character) for character in text)
