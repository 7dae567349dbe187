"""What a stage cost: LM calls, tokens, failures and time, added up as they happen.

Knows nothing of who spends.
"""

from __future__ import annotations

import threading
from dataclasses import asdict, dataclass, field
from time import perf_counter
from typing import Any, final

from lmpipe.lm import Usage


@final
@dataclass(frozen=True, slots=True)
class Cost:
    """What something cost.

    Attributes:
        lm_calls: LM calls made.
        prompt_tokens: Tokens read by them.
        completion_tokens: Tokens written by them.
        training_tokens: Tokens that went forward and backward in training.
        parse_errors: Calls whose completion could not be read.
        engine_errors: Calls that the engine could not answer.
        seconds: Wall time; the one figure here that differs from run to run.
    """

    lm_calls: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    training_tokens: int = 0
    parse_errors: int = 0
    engine_errors: int = 0
    seconds: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        mine, theirs = asdict(self), asdict(other)
        return Cost(**{name: mine[name] + theirs[name] for name in mine})

    def to_json(self) -> dict[str, Any]:
        """Plain JSON, seconds to the millisecond."""
        return {**asdict(self), "seconds": round(self.seconds, 3)}


@final
@dataclass
class Ledger:
    """A running total that threads may add to.

    Its clock runs from when it is made; seconds are added only for work that was done in an earlier process.
    """

    _total: Cost = field(default=Cost())
    _started: float = field(default_factory=perf_counter)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def add(self, cost: Cost) -> None:
        """Adds to the total."""
        with self._lock:
            self._total += cost

    @property
    def added(self) -> Cost:
        """Everything added so far, without the clock."""
        return self._total

    def add_usage(self, usage: Usage) -> None:
        """Adds the calls and tokens of LM calls."""
        self.add(Cost(usage.calls, usage.prompt_tokens, usage.completion_tokens))

    @property
    def total(self) -> Cost:
        """Everything added so far, and the wall time since the ledger was made."""
        return self._total + Cost(seconds=perf_counter() - self._started)
