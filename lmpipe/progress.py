"""Where the progress of long work is shown. Knows nothing of the work, or of terminals."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from lmpipe.text.display import escape_controls


class Progress(Protocol):
    """Shows bars; `rich.progress.Progress` is one."""

    def add_task(self, description: str, *, total: float | None = None) -> Any: ...
    def advance(self, task_id: Any, advance: float = 1) -> None: ...
    def remove_task(self, task_id: Any) -> None: ...


@contextmanager
def show_progress(progress: Progress | None, description: str, total: int) -> Iterator[Callable[[float], None]]:
    """Shows a bar while the block runs; the block calls what it is given to advance it. None shows nothing."""
    if progress is None:
        yield lambda done: None
        return
    task = progress.add_task(escape_controls(description), total=total)
    try:
        yield lambda done: progress.advance(task, done)
    finally:
        progress.remove_task(task)
