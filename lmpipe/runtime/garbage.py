"""Spares the garbage collector the objects that existed before an optimizer ran.

A full collection visits all objects of the process. An optimizer makes many objects that stay, so collections are
frequent while it runs, and each would visit everything that was imported or made before.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock
from typing import final


@final
class _Freezer:
    """Freezes the objects of the process while blocks run; blocks may be nested and run in several threads."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._blocks = 0

    @contextmanager
    def freeze(self) -> Iterator[None]:
        """See `existing_objects_frozen`."""
        with self._lock:
            counted = self._blocks > 0 or (gc.isenabled() and not gc.get_freeze_count())
            self._blocks += counted
            if counted and self._blocks == 1:
                gc.freeze()
        try:
            yield
        finally:
            with self._lock:
                self._blocks -= counted
                if counted and not self._blocks:
                    gc.unfreeze()


existing_objects_frozen = _Freezer().freeze
"""Keeps the garbage collector from visiting objects that existed before a block, until the block ends.

Objects that are made in the block are collected as always. The collector belongs to the process: the first of several
blocks that run at the same time freezes, and the last one unfreezes. Nothing happens if the collector is disabled, or
if something else has frozen objects.
"""
