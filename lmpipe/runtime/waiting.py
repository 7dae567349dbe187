"""Whether the code of a program waits for something other than its calls: a tool, a server, a lock.

Code that never waits can share a thread with other jobs. This shows only while it runs, so at first every job has a
thread of its own. This module knows nothing about programs and batches.
"""

from __future__ import annotations

import sys
from time import perf_counter, thread_time
from typing import final

if sys.platform == "linux":
    from resource import RUSAGE_THREAD, getrusage

_JOBS_PER_THREAD = 16
_JOBS_OBSERVED = 64  # jobs that must have run before jobs share threads
_SHORT = 0.001  # seconds; shorter waits do not count
_TOTAL = 0.05  # code waits if its waits exceed this number of seconds in total,
_PER_JOB = 0.0005  # and this number for each job
_PER_EVICTION = 0.1  # seconds that another thread may keep the core after it has taken it


@final
class WaitRecord:
    """What has been seen of some code so far.

    Args:
        waits: Whether the code is known to wait.
        patience: Number of seconds without any progress after which the other jobs of a thread are run again.

    Attributes:
        waits: Whether the code has been seen to wait.
    """

    def __init__(self, *, waits: bool = False, patience: float = 5.0) -> None:
        self.waits = waits
        self.patience = patience
        self._jobs = 0
        self._seconds = 0.0

    @property
    def jobs_per_thread(self) -> int:
        """Number of jobs that may share a thread: one, unless many jobs have run and the code has never waited."""
        return 1 if self.waits or self._jobs < _JOBS_OBSERVED else _JOBS_PER_THREAD

    def add(self, *, jobs: int = 0, seconds: float = 0.0) -> None:
        """Adds jobs that have run, and seconds for which a thread has waited."""
        self._jobs += jobs
        self._seconds += seconds
        self.waits = self.waits or self._seconds > max(_TOTAL, _PER_JOB * self._jobs)


@final
class WaitClock:
    """Measures how long the calling thread waits from one moment to another."""

    def start(self) -> None:
        """Begins to measure."""
        self._evictions, self._wall, self._cpu = _evictions(), perf_counter(), thread_time()

    def stop(self) -> float:
        """Returns the seconds for which the thread has waited since the start.

        Each time that the system gave the core to another thread in the meantime, some of it was not waiting: otherwise
        a busy machine would look like waiting.
        """
        seconds = perf_counter() - self._wall - (thread_time() - self._cpu)
        seconds -= _PER_EVICTION * (_evictions() - self._evictions)
        return 0.0 if seconds < _SHORT else seconds


def _evictions() -> int:
    """How often the system has taken the core from the calling thread; 0 where the system does not count this."""
    return getrusage(RUSAGE_THREAD).ru_nivcsw if sys.platform == "linux" else 0
