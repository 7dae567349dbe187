"""Kills saves of a result at every line that writes: ``python -m tests.killed_saves FOLDER`` prints how they ended."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import lmpipe
from lmpipe import OptimizeResult, RunStore, Session
from lmpipe.errors import ConfigError
from tests.scripted import Colour, KeepingTrainer, examples, scheduler, scripted

WRITING = {
    str(Path(lmpipe.__file__).parent / name)
    for name in ("results/saved.py", "storage/files.py", "storage/checksummed_json.py")
}


def killed_at(line: int) -> Any:
    """Returns a trace function that kills the process before the line with this number of those that write."""
    count = 0

    def trace(frame: FrameType, event: str, argument: object) -> Any:
        nonlocal count
        if frame.f_code.co_filename not in WRITING:
            return None
        count += event == "line"
        if count == line:
            os.kill(os.getpid(), signal.SIGKILL)
        return trace

    return trace


def save_and_kill(result: OptimizeResult, folder: Path, line: int) -> bool:
    """Saves in a fork that is killed before a line; returns whether it was killed, and did not end before."""
    child = os.fork()
    if not child:
        sys.settrace(killed_at(line))
        result.save(folder)
        os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def loads(folder: Path) -> bool:
    """Whether there is a folder; if there is one, it must be complete."""
    try:
        lmpipe.load(folder, scripted())
    except ConfigError as error:
        if "is not a folder" in str(error):
            return False
        raise
    return True


def main(root: Path) -> None:
    with RunStore(root / "run") as store:
        session = Session(scripted(), store=store)
        result = scheduler(KeepingTrainer(), "p -> w").optimize(Colour(), None, examples(12), examples(8, 12), session)
        lines = absent = 0
        while save_and_kill(result, root / "saved", lines + 1) and not loads(root / "saved"):
            lines, absent = lines + 1, absent + 1
        result.save(root / "saved")
        sys.stdout.write(f"{absent} {loads(root / 'saved')} {sorted(path.name for path in root.iterdir())}\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
