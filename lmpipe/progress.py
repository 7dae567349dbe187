"""Progress bars for long tasks. Knows nothing about the tasks or about terminals."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable

from lmpipe.text.display import escape_controls


@runtime_checkable
class Progress(Protocol):
    """A display of progress bars, such as `lmpipe.reporter.Reporter` or `rich.progress.Progress`."""

    def add_task(self, description: str, *, total: float | None = None) -> Any: ...
    def advance(self, task_id: Any, advance: float = 1) -> None: ...
    def remove_task(self, task_id: Any) -> None: ...


@contextmanager
def show_progress(progress: Progress | None, description: str, total: int | None) -> Iterator[Callable[[float], None]]:
    """Shows a progress bar while the block runs and yields a function that advances it.

    Args:
        progress: The display; None shows nothing.
        description: Label of the bar.
        total: Number of steps of the task; None if there are none to count.
    """
    if progress is None:
        yield lambda steps: None
        return
    task = progress.add_task(escape_controls(description), total=total)
    try:
        yield lambda steps: progress.advance(task, steps)
    finally:
        progress.remove_task(task)
