"""What came of many tries."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import final

from typing_extensions import Self


@final
@dataclass
class Tally:
    """What came of many tries of one kind.

    Attributes:
        tried: How many there were.
        refused: How many were answered by an error of lmpipe, or counted.
        harmless: How many changed nothing.
        wrong: What happened in all other cases: another result without a word, lost work, or an error of a library.
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
