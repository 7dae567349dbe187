"""How a command ends: on an error with one line, and soon after Ctrl-C or SIGTERM, even if something hangs.

A signal raises KeyboardInterrupt in the main thread, so that running code can clean up. If the process has not ended
after two seconds, it is ended. This is safe: a store may be killed at any time, and resumes from what it has recorded.
Does not depend on what commands do.
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

from lmpipe.cli.terminal import escape_unencodable, show_error, show_warnings
from lmpipe.errors import LmpipeError

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_GRACE_SECONDS = 2.0  # time for running code to end by itself
_LONG_GRACE_SECONDS = 10.0  # the same, if other code handles the signal, such as a server that still answers requests
_FLUSH_SECONDS = 0.2  # time to write buffered output
_MESSAGE = "interrupted; run the same command again to continue: finished work is kept\n"


def run_command(command: Callable[[], object], console: Console) -> None:
    """Runs a command line in the main thread of this process.

    An error of lmpipe ends the command with its message and exit code 1. Ctrl-C ends it with exit code 130 and SIGTERM
    with 143, within three seconds, and with a line that says that the command can be run again; a second signal ends it
    at once.

    Args:
        command: Function that runs the command line.
        console: Console for errors and warnings.
    """
    escape_unencodable()
    show_warnings(console)
    interrupts = _InterruptHandler()
    try:
        command()
    except LmpipeError as error:
        if not interrupts.received:
            show_error(error, console)
            sys.exit(1)
    finally:
        if interrupts.received:
            interrupts.exit()


@final
class _InterruptHandler:
    """Handles the signals that end a command. Signals that were ignored when the process started stay ignored."""

    def __init__(self) -> None:
        self._number: int | None = None
        self._raised = False
        self._message_lock = threading.Lock()
        self._signals, wakeup_socket = socket.socketpair()
        wakeup_socket.setblocking(False)
        self._wakeup_socket = wakeup_socket  # must stay open as long as signals are written to it
        signal.set_wakeup_fd(wakeup_socket.fileno(), warn_on_full_buffer=False)
        for number in _SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._interrupt)
        threading.Thread(target=self._watch, daemon=True).start()

    @property
    def received(self) -> bool:
        """Whether a signal was received."""
        return self._number is not None

    def exit(self) -> NoReturn:
        """Ends the process, without waiting for threads or for the reader of its output."""
        if self._message_lock.acquire(blocking=False):
            flushing = threading.Thread(target=_flush, daemon=True)
            flushing.start()
            flushing.join(_FLUSH_SECONDS)
            erase_line = "\r\x1b[2K\x1b[?25h" if os.isatty(2) else ""  # a progress bar may be left there
            with suppress(OSError):
                os.write(2, (erase_line + _MESSAGE).encode())
        os._exit(128 + (self._number or signal.SIGINT))

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        self._number = self._number or number
        if not self._raised:
            self._raised = True
            raise KeyboardInterrupt

    def _watch(self) -> None:
        """Receives signals, even while the main thread is in code that does not return to Python; ends the process."""
        number = self._next_signal(None)
        handled_here = signal.getsignal(number) == self._interrupt
        self._number = self._number or number
        with suppress(TimeoutError):
            self._next_signal(monotonic() + (_GRACE_SECONDS if handled_here else _LONG_GRACE_SECONDS))
        self.exit()

    def _next_signal(self, deadline: float | None) -> int:
        """Waits for the next signal, and raises a TimeoutError if none arrives before the deadline."""
        while True:
            self._signals.settimeout(None if deadline is None else max(0.001, deadline - monotonic()))
            (number,) = self._signals.recv(1)
            if number in _SIGNALS and signal.getsignal(number) != signal.SIG_IGN:
                return int(number)


def _flush() -> None:
    with suppress(OSError, ValueError):
        sys.stdout.flush()
