"""What a stage cost, added up as it happens: calls, tokens, failures, traces, time and memory, and where it went.

A ledger may have a parent, to which everything is passed on, and a limit. Knows nothing of who spends.
"""

from __future__ import annotations

import math
import operator
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from time import perf_counter, process_time
from typing import Any, final

from lmpipe.errors import StoreError
from lmpipe.validation.arguments import check_finite_number, check_whole_number

if sys.platform != "win32":
    import resource

MEASURED = ("cached_calls", "seconds", "cpu_seconds", "gpu_seconds", "peak_memory")
"""The fields of a `Cost` that differ from run to run."""


@final
@dataclass(frozen=True, slots=True)
class ModuleCost:
    """What the calls of one module cost.

    Attributes:
        calls: LM calls made.
        prompt_tokens: Tokens read by them.
        completion_tokens: Tokens written by them.
        parse_errors: Calls whose completion could not be read.
        engine_errors: Calls and retrievals that could not be answered.
        kept: Calls that became demonstrations or training rows, or could have.
        retrievals: Searches made, or recalled.
        replaced: Characters of inputs and completions that were no text and were replaced by U+FFFD.
    """

    calls: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    parse_errors: int = 0
    engine_errors: int = 0
    kept: int = 0
    retrievals: int = 0
    replaced: int = 0

    def __add__(self, other: ModuleCost) -> ModuleCost:
        return ModuleCost(*map(operator.add, _counts(self), _counts(other)))

    @classmethod
    def total(cls, costs: Iterable[ModuleCost]) -> ModuleCost:
        """The sum of several, in one pass."""
        return cls(*map(sum, zip(*map(_counts, costs), strict=True)))


_counts = operator.attrgetter(*(f.name for f in fields(ModuleCost)))


@final
@dataclass(frozen=True, slots=True)
class Cost:
    """What something cost. Costs are equal if all is that does not differ from run to run (`MEASURED`).

    Attributes:
        lm_calls: LM calls made.
        cached_calls: How many of them a cache of completions answered.
        prompt_tokens: Tokens read by them.
        completion_tokens: Tokens written by them.
        training_tokens: Tokens that went forward and backward in training.
        parse_errors: Calls whose completion could not be read.
        engine_errors: Calls and retrievals that could not be answered.
        retrievals: Searches made, or recalled.
        replaced: Characters of inputs and completions that were no text and were replaced by U+FFFD.
        traces_tried: Runs made to learn from.
        traces_kept: How many of them were.
        seconds: Wall time.
        cpu_seconds: CPU time of this process.
        gpu_seconds: Time of generating and training here on GPUs, for each of them; that of servers is not seen.
        peak_memory: Most bytes of memory that this process has had resident so far.
        modules: Module path → its share.

    A figure that is below zero or no finite number, as a broken engine can give it, counts as 0: it would take away
    from what others have spent, and hold no limit.
    """

    lm_calls: int = 0
    cached_calls: int = field(default=0, compare=False)
    prompt_tokens: int = 0
    completion_tokens: int = 0
    training_tokens: int = 0
    parse_errors: int = 0
    engine_errors: int = 0
    retrievals: int = 0
    replaced: int = 0
    traces_tried: int = 0
    traces_kept: int = 0
    seconds: float = field(default=0.0, compare=False)
    cpu_seconds: float = field(default=0.0, compare=False)
    gpu_seconds: float = field(default=0.0, compare=False)
    peak_memory: int = field(default=0, compare=False)
    modules: Mapping[str, ModuleCost] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in _FIGURES:
            if not 0 <= getattr(self, name) < math.inf:
                object.__setattr__(self, name, 0)

    def __add__(self, other: Cost) -> Cost:
        summed = {name: getattr(self, name) + getattr(other, name) for name in _SUMMED}
        more = {path: self.modules.get(path, ModuleCost()) + cost for path, cost in other.modules.items()}
        modules = {**self.modules, **more} if more else self.modules
        return Cost(**summed, peak_memory=max(self.peak_memory, other.peak_memory), modules=modules)

    @property
    def tokens(self) -> int:
        """Tokens read, written and trained on."""
        return self.prompt_tokens + self.completion_tokens + self.training_tokens

    def to_json(self) -> dict[str, Any]:
        """Plain JSON, times to the millisecond."""
        times = {name: round(getattr(self, name), 3) for name in ("seconds", "cpu_seconds", "gpu_seconds")}
        return {**asdict(self), **times, "modules": {path: asdict(self.modules[path]) for path in sorted(self.modules)}}

    @classmethod
    def from_json(cls, known: Mapping[str, Any]) -> Cost:
        """Reads what `to_json` wrote; what an older version did not count is 0.

        Raises:
            StoreError: If it is something else.
        """
        try:
            modules = {path: ModuleCost(**cost) for path, cost in known["modules"].items()}
            cost = cls(**{**known, "modules": modules})
        except (TypeError, LookupError, AttributeError) as error:
            raise StoreError(f"{known!r:.200} is no record of costs of this version of lmpipe: {error}") from error
        figures = [getattr(cost, name) for name in _FIGURES]
        figures += [figure for module in modules.values() for figure in _counts(module)]
        if not all(type(figure) in (int, float) and 0 <= figure < math.inf for figure in figures):
            raise StoreError(f"{known!r:.200} is no record of costs: figures must be numbers from 0 on")
        return cost


_SUMMED = tuple(f.name for f in fields(Cost) if f.name not in ("peak_memory", "modules"))
_FIGURES = (*_SUMMED, "peak_memory")


@final
@dataclass(frozen=True)
class Budget:
    """How much may be spent; what has no limit is none.

    Args:
        max_lm_calls: LM calls; none is made beyond it.
        max_tokens: Tokens read, written and trained on; the batch that passes it is the last one.
        max_seconds: Wall time; likewise, and calls that are under way then are ended. The one limit under which two
            runs may differ.

    Raises:
        ConfigError: If a limit is no finite number from 0 on; one of 0 leaves nothing to spend.
    """

    max_lm_calls: int | None = None
    max_tokens: int | None = None
    max_seconds: float | None = None

    def __post_init__(self) -> None:
        for name, checked in (
            ("max_lm_calls", check_whole_number),
            ("max_tokens", check_whole_number),
            ("max_seconds", check_finite_number),
        ):
            limit = getattr(self, name)
            if limit is not None:
                object.__setattr__(self, name, checked(name, limit, 0))

    def reached_limit(self, cost: Cost) -> str:
        """Which limit a cost has reached, in words; empty if none."""
        pairs = (
            ("max_lm_calls", self.max_lm_calls, cost.lm_calls),
            ("max_tokens", self.max_tokens, cost.tokens),
            ("max_seconds", self.max_seconds, cost.seconds),
        )
        return next(
            (f"{name}={most} is spent" for name, most, so_far in pairs if most is not None and so_far >= most), ""
        )


@final
@dataclass
class Ledger:
    """A running total that threads may add to.

    Its clocks run from when it is made; times are added only for work that was done in an earlier process.

    Args:
        parent: Where everything is added as well, or none.
        limit: How much may be spent here.
    """

    parent: Ledger | None = None
    limit: Budget | None = None
    _total: Cost = field(default=Cost())
    _started: float = field(default_factory=perf_counter)
    _cpu_started: float = field(default_factory=process_time)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def child(self, limit: Budget | None = None) -> Ledger:
        """A ledger whose costs are costs of this one too."""
        return Ledger(self, limit)

    def add(self, cost: Cost) -> None:
        """Adds to the total, here and in all parents."""
        for ledger in self._chain():
            with ledger._lock:
                ledger._total += cost

    @property
    def total(self) -> Cost:
        """Everything added so far, the time since the ledger was made, and the memory."""
        return self._total + Cost(
            seconds=perf_counter() - self._started,
            cpu_seconds=process_time() - self._cpu_started,
            peak_memory=_peak_memory(),
        )

    @property
    def limits(self) -> list[Budget]:
        """Of this ledger and its parents."""
        return [ledger.limit for ledger in self._chain() if ledger.limit is not None]

    def reached_limit(self, more: Cost = Cost()) -> str:
        """Which limit is reached, here or in a parent, in words; empty if none.

        Args:
            more: What is spent already and not yet added.
        """
        found = (
            ledger.limit.reached_limit(ledger.total + more) for ledger in self._chain() if ledger.limit is not None
        )
        return next((reason for reason in found if reason), "")

    def calls_left(self, more: Cost = Cost()) -> int | None:
        """How many LM calls the limits leave, or none if there is no limit."""
        return self._left((limit.max_lm_calls, total.lm_calls + more.lm_calls) for limit, total in self._limited())

    @property
    def seconds_left(self) -> float | None:
        """How much wall time the limits leave, or none if there is no limit; below zero when it is over."""
        left = (
            ledger.limit.max_seconds - ledger.total.seconds
            for ledger in self._chain()
            if ledger.limit is not None and ledger.limit.max_seconds is not None
        )
        return min(left, default=None)

    def tokens_left(self) -> int | None:
        """How many tokens the limits leave, or none if there is no limit."""
        return self._left((limit.max_tokens, total.tokens) for limit, total in self._limited())

    def _limited(self) -> Iterator[tuple[Budget, Cost]]:
        """The limits of the chain, and what counts towards each."""
        return ((ledger.limit, ledger._total) for ledger in self._chain() if ledger.limit is not None)

    @staticmethod
    def _left(most_and_spent: Iterable[tuple[int | None, int]]) -> int | None:
        left = [most - spent for most, spent in most_and_spent if most is not None]
        return max(0, min(left)) if left else None

    def _chain(self) -> Iterator[Ledger]:
        ledger: Ledger | None = self
        while ledger is not None:
            yield ledger
            ledger = ledger.parent


def _peak_memory() -> int:
    """Bytes, 0 where the system does not say; macOS counts in bytes and Linux in KiB."""
    if sys.platform == "win32":
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
