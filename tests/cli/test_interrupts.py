"""Commands end soon after Ctrl-C and SIGTERM, whatever hangs."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lmpipe import RunStore
from tests.endable import HANGING

SECONDS = 6.0  # twice the 3 seconds that are promised, for a busy machine
CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}


def start_hanging(how: str, path: Path) -> subprocess.Popen[str]:
    """Starts a command that hangs."""
    command = [sys.executable, "-m", "tests.endable", how, str(path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "hanging\n"
    return process


def wait_for_end(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """Waits for a process, which must end in time, and returns its exit code and output."""
    started = time.monotonic()
    out, error = process.communicate(timeout=60)
    assert time.monotonic() - started < SECONDS
    return process.returncode, out, error


INTERRUPTED = [(how, signal.SIGINT) for how in HANGING]


@pytest.mark.parametrize(("how", "number"), [*INTERRUPTED, ("pool", signal.SIGTERM), ("native", signal.SIGTERM)])
def test_a_command_that_hangs_ends_in_time_with_one_line(how: str, number: signal.Signals, tmp_path: Path) -> None:
    process = start_hanging(how, tmp_path)
    process.send_signal(number)
    code, _, error = wait_for_end(process)
    assert code == CODES[number]
    assert error.count("interrupted; run the same command again to continue") == 1
    assert "Traceback" not in error
    assert len([line for line in error.splitlines() if line.strip()]) == 1
    RunStore(tmp_path).close()


def test_a_second_signal_ends_it_at_once(tmp_path: Path) -> None:
    process = start_hanging("handled", tmp_path)
    process.send_signal(signal.SIGINT)
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    assert wait_for_end(process)[0] == 130, "the first signal alone leaves ten seconds"


def test_a_script_that_catches_the_interrupt_can_continue_with_its_store(tmp_path: Path) -> None:
    process = start_hanging("library", tmp_path)
    process.send_signal(signal.SIGINT)
    code, out, error = wait_for_end(process)
    assert (code, out, error.count("Traceback")) == (0, "went on\n", 0)
    with RunStore(tmp_path) as again:
        assert again.get("interrupted") is True
