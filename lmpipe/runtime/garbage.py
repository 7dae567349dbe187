"""Spares the garbage collector work that would free nothing.

A full collection visits all objects of the process. While an optimizer runs or a model is loaded, many objects are made
that stay, so full collections are frequent, and each would visit everything that was imported or made before.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Lock
from typing import final

_YOUNG = 20_000  # objects that gather before the youngest are collected; Python begins with 700 or 2,000


@final
class _SharedChange:
    """A change of the process's collector while blocks run; blocks may be nested and run in several threads.

    The first of several blocks that run at the same time makes the change, and the last one undoes it.

    Args:
        applies: Whether the change may be made; otherwise nothing happens.
        make: Makes the change.
        undo: Undoes it.
    """

    def __init__(self, applies: Callable[[], bool], make: Callable[[], None], undo: Callable[[], None]) -> None:
        self._applies, self._make, self._undo = applies, make, undo
        self._lock = Lock()
        self._blocks = 0

    @contextmanager
    def block(self) -> Iterator[None]:
        """Makes the change until the block ends."""
        with self._lock:
            counted = self._blocks > 0 or self._applies()
            self._blocks += counted
            if counted and self._blocks == 1:
                self._make()
        try:
            yield
        finally:
            with self._lock:
                self._blocks -= counted
                if counted and not self._blocks:
                    self._undo()


@final
class _Sparing:
    """Freezes what exists, and lets more new objects gather before the youngest are collected."""

    def __init__(self) -> None:
        self._threshold = gc.get_threshold()

    def applies(self) -> bool:
        """Whether the collector is on, and nothing else has frozen objects."""
        return gc.isenabled() and gc.get_threshold()[0] > 0 and not gc.get_freeze_count()

    def make(self) -> None:
        """Makes the change."""
        self._threshold = gc.get_threshold()
        gc.set_threshold(max(_YOUNG, self._threshold[0]), *self._threshold[1:])
        gc.freeze()

    def undo(self) -> None:
        """Undoes it."""
        gc.unfreeze()
        gc.set_threshold(*self._threshold)


_sparing = _Sparing()

existing_objects_frozen = _SharedChange(_sparing.applies, _sparing.make, _sparing.undo).block
"""Keeps the garbage collector from visiting objects that existed before a block, until the block ends.

Objects that are made in the block are collected, but less often than usual, since most of them are traces,
which stay. Nothing happens if the collector is disabled, or if something else has frozen objects.
"""

collector_paused = _SharedChange(gc.isenabled, gc.disable, gc.enable).block
"""Collects no garbage until the block ends, for imports and loads, which leave next to none."""
