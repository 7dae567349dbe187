"""Costs and budgets: a ledger adds up calls, tokens, failures, traces, time and memory, in total and by module.

A ledger may have a budget, and a parent whose total includes its costs. Knows nothing about what causes the costs.
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
from lmpipe.text.reprs import settings_repr
from lmpipe.validation.arguments import check_finite_number, check_whole_number

if sys.platform != "win32":
    import resource

MEASURED = ("cached_calls", "seconds", "cpu_seconds", "gpu_seconds", "peak_memory")
"""Names of the fields of a `Cost` that are measured, and so differ from run to run."""


@final
@dataclass(frozen=True, slots=True)
class ModuleCost:
    """The cost of the calls of one module.

    Attributes:
        calls: Number of LM calls.
        prompt_tokens: Tokens of their prompts.
        completion_tokens: Tokens of their completions.
        parse_errors: Calls whose completion could not be parsed.
        engine_errors: Calls and retrievals that failed.
        kept: Calls that became demonstrations or training rows, or qualified for it.
        retrievals: Searches, including those answered from a cache.
        replaced: Characters of inputs and completions that were not valid text and were replaced by U+FFFD.
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

    def __sub__(self, part: ModuleCost) -> ModuleCost:
        return ModuleCost(*map(operator.sub, _counts(self), _counts(part)))

    @classmethod
    def total(cls, costs: Iterable[ModuleCost]) -> ModuleCost:
        """Returns the sum of several costs, computed in one pass."""
        return cls(*map(sum, zip(*map(_counts, costs), strict=True)))


_counts = operator.attrgetter(*(f.name for f in fields(ModuleCost)))


@final
@dataclass(frozen=True, slots=True)
class Cost:
    """A cost. Two costs are equal if all fields but the measured ones (`MEASURED`) are equal.

    A number that is negative or not finite, for instance from a broken engine, counts as 0: it would reduce the total
    of other costs, and budgets could not be enforced.

    Attributes:
        lm_calls: Number of LM calls.
        cached_calls: Number of these calls that a cache of completions answered.
        prompt_tokens: Tokens of their prompts.
        completion_tokens: Tokens of their completions.
        training_tokens: Tokens of forward and backward passes in training.
        parse_errors: Calls whose completion could not be parsed.
        engine_errors: Calls and retrievals that failed.
        retrievals: Searches, including those answered from a cache.
        replaced: Characters of inputs and completions that were not valid text and were replaced by U+FFFD.
        traces_tried: Rollouts made to collect training data.
        traces_kept: Number of these rollouts that were used.
        seconds: Wall time.
        cpu_seconds: CPU time of this process.
        gpu_seconds: GPU time of generation and training in this process, summed over GPUs; servers are not included.
        peak_memory: Largest resident memory of this process so far, in bytes.
        modules: Module path → cost of the module.
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

    def __repr__(self) -> str:
        return settings_repr(self)

    def __add__(self, other: Cost) -> Cost:
        summed = {name: getattr(self, name) + getattr(other, name) for name in _SUMMED}
        changed = {path: self.modules.get(path, ModuleCost()) + cost for path, cost in other.modules.items()}
        modules = {**self.modules, **changed} if changed else self.modules
        return Cost(**summed, peak_memory=max(self.peak_memory, other.peak_memory), modules=modules)

    def __sub__(self, part: Cost) -> Cost:
        """Returns the rest of a total without one of its parts; the peak memory stays that of the total."""
        rest = {name: getattr(self, name) - getattr(part, name) for name in _SUMMED}
        modules = {path: cost - part.modules.get(path, ModuleCost()) for path, cost in self.modules.items()}
        return Cost(**rest, peak_memory=self.peak_memory, modules=modules)

    @property
    def tokens(self) -> int:
        """Tokens of prompts, completions and training."""
        return self.prompt_tokens + self.completion_tokens + self.training_tokens

    def to_json(self) -> dict[str, Any]:
        """Returns the cost as plain JSON, with times rounded to milliseconds."""
        times = {name: round(getattr(self, name), 3) for name in ("seconds", "cpu_seconds", "gpu_seconds")}
        return {**asdict(self), **times, "modules": {path: asdict(self.modules[path]) for path in sorted(self.modules)}}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Cost:
        """Reads the JSON that `to_json` returned; fields that an older version did not have are 0.

        Raises:
            StoreError: If the JSON is not that of a cost.
        """
        try:
            modules = {path: ModuleCost(**cost) for path, cost in values["modules"].items()}
            cost = cls(**{**values, "modules": modules})
        except (TypeError, LookupError, AttributeError) as error:
            raise StoreError(f"{values!r:.200} is not a cost that this version of lmpipe can read: {error}") from error
        figures = [getattr(cost, name) for name in _FIGURES]
        figures += [figure for module in modules.values() for figure in _counts(module)]
        if not all(type(figure) in (int, float) and 0 <= figure < math.inf for figure in figures):
            raise StoreError(f"{values!r:.200} is not a cost: its numbers must be finite and at least 0")
        return cost


_SUMMED = tuple(f.name for f in fields(Cost) if f.name not in ("peak_memory", "modules"))
_FIGURES = (*_SUMMED, "peak_memory")


@final
@dataclass(frozen=True)
class Budget:
    """Limits on the cost of a run or a stage; None means no limit.

    Args:
        max_lm_calls: Maximum number of LM calls; no further call is made.
        max_tokens: Maximum number of prompt, completion and training tokens; the batch that exceeds it is the last.
        max_seconds: Maximum wall time; the batch that exceeds it is the last, and its running calls are stopped. Two
            runs with this limit may have different results.

    Raises:
        ConfigError: If a limit is negative or not a finite number; a limit of 0 allows nothing to be spent.
    """

    max_lm_calls: int | None = None
    max_tokens: int | None = None
    max_seconds: float | None = None

    def __post_init__(self) -> None:
        for name, check in (
            ("max_lm_calls", check_whole_number),
            ("max_tokens", check_whole_number),
            ("max_seconds", check_finite_number),
        ):
            limit = getattr(self, name)
            if limit is not None:
                object.__setattr__(self, name, check(name, limit, 0))

    def __repr__(self) -> str:
        return settings_repr(self)

    def reached_limit(self, cost: Cost) -> str:
        """Returns a clause that names the limit that a cost has reached; an empty string if it has reached none."""
        limits = (
            ("max_lm_calls", self.max_lm_calls, cost.lm_calls),
            ("max_tokens", self.max_tokens, cost.tokens),
            ("max_seconds", self.max_seconds, cost.seconds),
        )
        return next(
            (f"{name}={limit} is spent" for name, limit, spent in limits if limit is not None and spent >= limit), ""
        )


@final
@dataclass
class Ledger:
    """A running total of costs; threads may add to it concurrently.

    Its clocks start when it is created. The times of a cost are added only for work of an earlier process.

    Args:
        parent: Ledger to which every cost is also added, or None.
        limit: Budget of this ledger, or None.
    """

    parent: Ledger | None = None
    limit: Budget | None = None
    _total: Cost = field(default=Cost())
    _started: float = field(default_factory=perf_counter)
    _cpu_started: float = field(default_factory=process_time)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def child(self, limit: Budget | None = None) -> Ledger:
        """Returns a new ledger whose costs are also added to this one."""
        return Ledger(self, limit)

    def add(self, cost: Cost) -> None:
        """Adds a cost to the totals of this ledger and of all its parents."""
        for ledger in self._chain():
            with ledger._lock:
                ledger._total += cost

    @property
    def total(self) -> Cost:
        """All costs so far, with the time since the ledger was created and the peak memory."""
        return self._total + Cost(
            seconds=perf_counter() - self._started,
            cpu_seconds=process_time() - self._cpu_started,
            peak_memory=_peak_memory(),
        )

    @property
    def limits(self) -> list[Budget]:
        """Budgets of this ledger and of its parents."""
        return [ledger.limit for ledger in self._chain() if ledger.limit is not None]

    def reached_limit(self, pending: Cost = Cost()) -> str:
        """Returns a clause that names the limit that is reached, here or in a parent; an empty string if none is.

        Args:
            pending: Cost that is already spent but not yet added.
        """
        reasons = (
            ledger.limit.reached_limit(ledger.total + pending) for ledger in self._chain() if ledger.limit is not None
        )
        return next((reason for reason in reasons if reason), "")

    def calls_left(self, pending: Cost = Cost()) -> int | None:
        """Returns the number of LM calls that the limits leave, or None if there is no limit.

        Args:
            pending: Cost that is already spent but not yet added.
        """
        return self._left((limit.max_lm_calls, total.lm_calls + pending.lm_calls) for limit, total in self._limited())

    @property
    def seconds_left(self) -> float | None:
        """Wall time that the limits leave, in seconds; negative if it is exceeded, None if there is no limit."""
        left = (
            ledger.limit.max_seconds - ledger.total.seconds
            for ledger in self._chain()
            if ledger.limit is not None and ledger.limit.max_seconds is not None
        )
        return min(left, default=None)

    def tokens_left(self) -> int | None:
        """Returns the number of tokens that the limits leave, or None if there is no limit."""
        return self._left((limit.max_tokens, total.tokens) for limit, total in self._limited())

    def _limited(self) -> Iterator[tuple[Budget, Cost]]:
        """Budgets of this ledger and its parents, each with the total that counts towards it."""
        return ((ledger.limit, ledger._total) for ledger in self._chain() if ledger.limit is not None)

    @staticmethod
    def _left(limits_and_totals: Iterable[tuple[int | None, int]]) -> int | None:
        left = [limit - total for limit, total in limits_and_totals if limit is not None]
        return max(0, min(left)) if left else None

    def _chain(self) -> Iterator[Ledger]:
        ledger: Ledger | None = self
        while ledger is not None:
            yield ledger
            ledger = ledger.parent


def _peak_memory() -> int:
    """Peak resident memory in bytes; 0 on Windows. macOS reports bytes, Linux KiB."""
    if sys.platform == "win32":
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
