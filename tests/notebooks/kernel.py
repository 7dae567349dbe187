"""A Jupyter kernel that runs cells, as a notebook does."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, final

from jupyter_client.blocking.client import BlockingKernelClient
from jupyter_client.manager import KernelManager

_SECONDS = 60  # for one cell, and for the start

HANGING = "hanging"
"""Text that a cell prints when it is to be interrupted."""


class CellError(Exception):
    """A cell raised an exception: its name and message."""


@final
class Notebook:
    """A running kernel; its variables stay from cell to cell."""

    def __init__(self, manager: KernelManager, client: BlockingKernelClient) -> None:
        self._manager, self._client = manager, client

    def run(self, *cells: str) -> str:
        """Runs cells, each of which is interrupted when it prints `HANGING`.

        Returns:
            What the last cell printed, also to the standard error, and the text of its value.

        Raises:
            CellError: If a cell raised an exception.
        """
        texts: list[str] = []
        for cell in cells:
            texts.clear()
            reply = self._client.execute_interactive(
                cell, timeout=_SECONDS, output_hook=lambda message: texts.append(self._output(message))
            )["content"]
            if reply["status"] != "ok":
                raise CellError(f"{reply['ename']}: {reply['evalue']}")
        return "".join(texts)

    def _output(self, message: dict[str, Any]) -> str:
        content = message["content"]
        text = str(content.get("text", "") or content.get("data", {}).get("text/plain", ""))
        if message["header"]["msg_type"] == "stream" and HANGING in text:
            self._manager.interrupt_kernel()
        return text


@contextmanager
def notebook(folder: Path) -> Iterator[Notebook]:
    """Starts a kernel in a folder, and ends it after the block."""
    manager = KernelManager(transport="ipc", ip=str(folder / "kernel"), connection_file=str(folder / "kernel.json"))
    manager.start_kernel(cwd=str(folder), env={**os.environ, "IPYTHONDIR": str(folder / "ipython")})
    client = manager.client()
    client.start_channels()
    try:
        client.wait_for_ready(timeout=_SECONDS)
        yield Notebook(manager, client)
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
