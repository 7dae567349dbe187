"""A Jupyter kernel that runs cells, as a notebook does."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, final

from jupyter_client.blocking.client import BlockingKernelClient
from jupyter_client.manager import KernelManager, start_new_kernel

_SECONDS = 60  # for one cell

HANGING = "hanging"
"""Text that a cell prints when it is to be interrupted."""


class CellError(Exception):
    """A cell raised an exception: its name and message."""


@final
class Notebook:
    """A running kernel; its variables stay from cell to cell."""

    def __init__(self, manager: KernelManager, client: BlockingKernelClient) -> None:
        self._manager, self._client = manager, client

    def run(self, cell: str) -> str:
        """Runs a cell, which is interrupted when it prints `HANGING`.

        Returns:
            What the cell printed, and the text of its value.

        Raises:
            CellError: If the cell raised an exception.
        """
        texts: list[str] = []

        def collect(message: dict[str, Any]) -> None:
            content = message["content"]
            texts.append(content.get("text", "") or content.get("data", {}).get("text/plain", ""))
            if message["header"]["msg_type"] == "stream" and HANGING in content["text"]:
                self._manager.interrupt_kernel()

        reply = self._client.execute_interactive(cell, timeout=_SECONDS, output_hook=collect)["content"]
        if reply["status"] != "ok":
            raise CellError(f"{reply['ename']}: {reply['evalue']}")
        return "".join(texts)


@contextmanager
def notebook(folder: Path) -> Iterator[Notebook]:
    """Starts a kernel in a folder, and ends it after the block."""
    manager, client = start_new_kernel(cwd=str(folder))
    try:
        yield Notebook(manager, client)
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
