"""How a command ends: with its errors in a line, and soon after Ctrl-C or SIGTERM, whatever hangs.

A signal is a KeyboardInterrupt in the main thread, so that what runs can put itself right. Whatever has not ended two
seconds later is ended: a store may be killed at any time, and goes on from what it has recorded. Knows nothing of what
commands do.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from time import monotonic
from types import FrameType
from typing import NoReturn, final

from rich.console import Console

from lmpipe.cli.terminal import show_error, show_warnings, spell_what_cannot_be_written
from lmpipe.errors import LmpipeError

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_GRACE = 2.0  # seconds in which what runs may end by itself
_LONG_GRACE = 10.0  # where something else handles the signal, such as a server that answers what it has begun
_FLUSH = 0.2  # seconds in which output may still be taken
_SAID = "interrupted; started again with the same command, it goes on: what was finished is kept\n"


def run_command(command: Callable[[], object], console: Console) -> None:
    """Runs a command line in the main thread of this process.

    Errors that lmpipe raises on purpose end it with their message and exit code 1. Ctrl-C ends it with 130 and SIGTERM
    with 143, within three seconds, and a line that says that it can be started again; a second signal ends it at once.

    Args:
        command: What it does.
        console: Where errors and warnings are shown.
    """
    spell_what_cannot_be_written()
    show_warnings(console)
    ending = _Ending()
    try:
        command()
    except LmpipeError as error:
        if not ending.begun:
            show_error(error, console)
            sys.exit(1)
    finally:
        if ending.begun:
            ending.end()


@final
class _Ending:
    """Takes the signals that end a command; those that the process was started to ignore stay ignored."""

    def __init__(self) -> None:
        self._number: int | None = None
        self._raised = False
        self._to_say = threading.Lock()
        self._signals, waking = socket.socketpair()
        waking.setblocking(False)
        self._waking = waking  # open as long as signals are written to it
        signal.set_wakeup_fd(waking.fileno(), warn_on_full_buffer=False)
        for number in _SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._interrupt)
        threading.Thread(target=self._watch, daemon=True).start()

    @property
    def begun(self) -> bool:
        """Whether there was a signal."""
        return self._number is not None

    def end(self) -> NoReturn:
        """Ends the process, without waiting for threads or for whoever reads its output."""
        if self._to_say.acquire(blocking=False):
            flushing = threading.Thread(target=_flush, daemon=True)
            flushing.start()
            flushing.join(_FLUSH)
            shown = "\r\x1b[2K\x1b[?25h" if os.isatty(2) else ""  # over what is left of a progress bar
            with suppress(OSError):
                os.write(2, (shown + _SAID).encode())
        os._exit(128 + (self._number or signal.SIGINT))

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        self._number = self._number or number
        if not self._raised:
            self._raised = True
            raise KeyboardInterrupt

    def _watch(self) -> None:
        """Learns of signals while the main thread is in code that does not return to Python."""
        number = self._next_signal(None)
        handled_here = signal.getsignal(number) == self._interrupt
        self._number = self._number or number
        with suppress(TimeoutError):
            self._next_signal(monotonic() + (_GRACE if handled_here else _LONG_GRACE))
        self.end()

    def _next_signal(self, deadline: float | None) -> int:
        """Raises:
        TimeoutError: If there is none before the deadline.
        """
        while True:
            self._signals.settimeout(None if deadline is None else max(0.001, deadline - monotonic()))
            (number,) = self._signals.recv(1)
            if number in _SIGNALS and signal.getsignal(number) != signal.SIG_IGN:
                return int(number)


def _flush() -> None:
    with suppress(OSError, ValueError):
        sys.stdout.flush()
