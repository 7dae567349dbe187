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

SECONDS = 6.0  # of the 3 that are promised, twice as many for a machine that is busy
CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}


def hanging(how: str, path: Path) -> subprocess.Popen[str]:
    """A command that hangs."""
    command = [sys.executable, "-m", "tests.endable", how, str(path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "hanging\n"
    return process


def ended(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """Exit code and output of a process that has to end in time."""
    started = time.monotonic()
    out, error = process.communicate(timeout=60)
    assert time.monotonic() - started < SECONDS
    return process.returncode, out, error


INTERRUPTED = [(how, signal.SIGINT) for how in HANGING]


@pytest.mark.parametrize(("how", "number"), [*INTERRUPTED, ("pool", signal.SIGTERM), ("native", signal.SIGTERM)])
def test_a_command_that_hangs_ends_in_time_with_one_line(how: str, number: signal.Signals, tmp_path: Path) -> None:
    process = hanging(how, tmp_path)
    process.send_signal(number)
    code, _, error = ended(process)
    assert code == CODES[number]
    assert error.count("interrupted; started again with the same command, it goes on") == 1
    assert "Traceback" not in error
    assert len([line for line in error.splitlines() if line.strip()]) == 1
    RunStore(tmp_path).close()


def test_a_second_signal_ends_it_at_once(tmp_path: Path) -> None:
    process = hanging("handled", tmp_path)
    process.send_signal(signal.SIGINT)
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    assert ended(process)[0] == 130, "the first signal alone leaves ten seconds"


def test_a_script_that_catches_the_interrupt_goes_on_with_its_store(tmp_path: Path) -> None:
    process = hanging("library", tmp_path)
    process.send_signal(signal.SIGINT)
    code, out, error = ended(process)
    assert (code, out, error.count("Traceback")) == (0, "went on\n", 0)
    with RunStore(tmp_path) as again:
        assert again.get("interrupted") is True
