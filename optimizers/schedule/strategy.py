"""Strategies: ``"p -> w -> p"`` names the stages of a run in order; ``"vanilla"`` names none.

    strategy   stages ("->" stages)*
    stages     (name | "(" strategy ")") ("*" count)?

So ``"p*3"`` is ``"p -> p -> p"``, and ``"(p -> w)*2"`` is ``"p -> w -> p -> w"``.
Knows nothing about what a stage does.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import NoReturn, final

from lmpipe.extend import StrategyError, clean_text, did_you_mean, shorten, shown

VANILLA = "vanilla"
"""Text of the strategy without stages."""
MAX_STAGES = 100
_MAX_DEPTH = 100  # of nested parentheses
_CONTEXT = 60  # characters that a message shows before and after the position that it points to

_TOKEN = re.compile(r"->|[()*]|(?:(?!->)[^()*\s])(?:(?:(?!->)[^()*])*(?:(?!->)[^()*\s]))?")


@final
@dataclass(frozen=True)
class Strategy:
    """The stages of a run, in order. ``str`` returns the canonical text, which `parse` reads back.

    Args:
        stages: Names of the stages; empty for ``"vanilla"``.
    """

    stages: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "stages", tuple(self.stages))

    @classmethod
    def parse(cls, text: str, available: Collection[str]) -> Strategy:
        """Parses a strategy.

        Args:
            text: Stage names with ``->`` between them, ``*`` and a number to repeat, and parentheses; or ``"vanilla"``.
            available: Names of the available stages.

        Raises:
            StrategyError: If the text cannot be parsed; the message points to the position.
        """
        cls.check_text(text)
        return cls(() if text.strip() == VANILLA else _Parser(text, available).parse())

    @staticmethod
    def check_text(text: object) -> None:
        """Checks that a strategy is text, before it is parsed.

        Raises:
            StrategyError: If it is not; the message says how to write a list of stages.
        """
        if isinstance(text, str):
            return
        listed = isinstance(text, (list, tuple)) and text and all(isinstance(name, str) for name in text)
        example = " -> ".join(text) if isinstance(text, (list, tuple)) and listed else "p -> w -> p"
        raise StrategyError(f"strategy is {shown(text)}; it must be a text, so write {example!r}")

    @property
    def parent(self) -> Strategy | None:
        """The strategy without its last stage; None for the strategy without stages."""
        return Strategy(self.stages[:-1]) if self.stages else None

    def prefixes(self) -> list[Strategy]:
        """The strategies up to and including each stage, the shortest first."""
        return [Strategy(self.stages[:length]) for length in range(1, len(self.stages) + 1)]

    def __str__(self) -> str:
        return " -> ".join(self.stages) or VANILLA


def as_strategy(strategy: str | Strategy, available: Collection[str]) -> Strategy:
    """Parses a text; returns an already parsed strategy as it is, after checking that its stages exist.

    Raises:
        StrategyError: If a text cannot be parsed, or a stage is unknown.
    """
    if not isinstance(strategy, Strategy):
        return Strategy.parse(strategy, available)
    unknown = [name for name in strategy.stages if name not in available]
    if unknown:
        hint = did_you_mean(unknown[0], available)
        raise StrategyError(f"{_unknown_stage(unknown[0])}{hint}; {_listed(available)}")
    return strategy


def distinct_stages(strategies: Iterable[Strategy]) -> list[Strategy]:
    """Returns each stage of some strategies once, as the strategy up to and including it; parents come before children.

    Strategies that begin with the same stages share them, so these are all the stages that must be run.
    """
    prefixes = {prefix for strategy in strategies for prefix in strategy.prefixes()}
    return sorted(prefixes, key=lambda prefix: (len(prefix.stages), prefix.stages))


@final
@dataclass(frozen=True, slots=True)
class _Token:
    text: str
    at: int


@final
class _Parser:
    """Parses one strategy from left to right."""

    def __init__(self, text: str, available: Collection[str]) -> None:
        self._text, self._available = text, available
        self._tokens = [_Token(match.group(), match.start()) for match in _TOKEN.finditer(text)]
        self._position = 0
        self._depth = 0

    def parse(self) -> tuple[str, ...]:
        stages = self._strategy()
        if (rest := self._peek()) is not None:
            self._fail("this parenthesis closes nothing" if rest.text == ")" else "'->' is missing", rest)
        return stages

    def _strategy(self) -> tuple[str, ...]:
        stages = self._term()
        while (arrow := self._peek()) is not None and self._accept("->"):
            stages += self._term()
            if len(stages) > MAX_STAGES:
                self._fail(f"a strategy has at most {MAX_STAGES} stages", arrow)
        return stages

    def _term(self) -> tuple[str, ...]:
        opening = self._peek()
        if self._accept("("):
            self._depth += 1
            if self._depth > _MAX_DEPTH:
                self._fail(f"parentheses are nested more than {_MAX_DEPTH} deep", opening)
            stages = self._strategy()
            self._depth -= 1
            if not self._accept(")"):
                self._fail("this parenthesis is not closed", opening)
        else:
            stages = (self._name(),)
        return self._repeated(stages)

    def _name(self) -> str:
        token = self._peek()
        if token is None or token.text in {"->", "(", ")", "*"}:
            hint = f"; write {VANILLA!r} for a run without stages" if not self._text.strip() else ""
            self._fail(f"a stage name is missing{hint}", token)
        if token.text not in self._available:
            self._fail(f"{_unknown_stage(token.text)}{_intended(token.text, self._available)}", token)
        self._position += 1
        return token.text

    def _repeated(self, stages: tuple[str, ...]) -> tuple[str, ...]:
        while self._accept("*"):
            token = self._peek()
            digits = token.text.lstrip("0") if token and token.text.isascii() and token.text.isdigit() else ""
            if not digits:
                self._fail("'*' needs a number of repetitions after it, such as 2", token)
            count = int(digits[:6])  # a longer number is too large in any case
            if len(stages) * count > MAX_STAGES:
                self._fail(f"a strategy has at most {MAX_STAGES} stages", token)
            self._position += 1
            stages *= count
        return stages

    def _peek(self) -> _Token | None:
        return self._tokens[self._position] if self._position < len(self._tokens) else None

    def _accept(self, text: str) -> bool:
        token = self._peek()
        matches = token is not None and token.text == text
        self._position += matches
        return matches

    def _fail(self, problem: str, token: _Token | None) -> NoReturn:
        at = len(self._text.rstrip()) if token is None else token.at
        first, last = max(0, at - _CONTEXT), at + _CONTEXT
        before = "…" * (first > 0) + self._text[first:at]
        line = _line(before + self._text[at:last]) + "…" * (last < len(self._text))
        raise StrategyError(f"{problem}; {_listed(self._available)}\n  {line}\n  {' ' * len(before)}^")


def _unknown_stage(name: str) -> str:
    return f"no stage is called {shown(name, 100)}"


def _intended(name: str, available: Collection[str]) -> str:
    """Says what was probably meant: stages without the arrow between them, or one whose name is close."""
    stages = re.split(r"\s*(?:[,;>→⇒+/\s]|=>|-)\s*", name)
    stages = list(name) if len(stages) == 1 else stages  # "pwp"
    if len(stages) > 1 and all(stage in available for stage in stages):
        return f"; write {' -> '.join(stages)!r}"
    return did_you_mean(name, available)


def _listed(available: Collection[str]) -> str:
    return f"the stages are {shorten(', '.join(sorted(available)), 500)}"


def _line(text: str) -> str:
    """Returns the text on one line, character for character, without terminal control characters."""
    return "".join(clean_text("\0" if character in "\t\r\n\x85\u2028\u2029" else character) for character in text)
