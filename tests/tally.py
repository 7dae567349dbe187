"""Counts the outcomes of many trials."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import final

from typing_extensions import Self


@final
@dataclass
class Tally:
    """The outcomes of many trials of one kind.

    Attributes:
        tried: Number of trials.
        refused: Number of trials that raised an error or a warning of lmpipe.
        harmless: Number of trials that changed nothing.
        wrong: Descriptions of all other trials: silently different results, lost work, or errors of a library.
    """

    tried: int = 0
    refused: int = 0
    harmless: int = 0
    wrong: list[str] = field(default_factory=list)

    def __iadd__(self, other: Tally) -> Self:
        self.tried += other.tried
        self.refused += other.refused
        self.harmless += other.harmless
        self.wrong += other.wrong
        return self
