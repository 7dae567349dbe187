"""How threads wait: they spin briefly and then sleep, unless the user chose otherwise or imported torch first."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
SHOW = f"import os; print({{name: os.environ[name] for name in {VARIABLES} if name in os.environ}})"


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs code in a fresh interpreter whose environment says nothing about waiting threads but what is passed."""
    inherited = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    return subprocess.run(
        [sys.executable, "-c", code], env={**inherited, **environment}, capture_output=True, text=True, check=True
    )


def test_torch_reads_that_threads_hardly_spin() -> None:
    shown = python("import lmpipe, torch", OMP_DISPLAY_ENV="verbose").stderr
    if "GOMP_SPINCOUNT" not in shown:
        pytest.skip("torch does not use GNU's OpenMP here")
    assert "GOMP_SPINCOUNT = '1000'" in shown
    assert "OMP_WAIT_POLICY = 'PASSIVE'" in shown


def test_processes_of_this_one_inherit_the_setting() -> None:
    child = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {SHOW!r}], check=True)"
    assert (
        python(f"import lmpipe; {child}").stdout.strip() == "{'OMP_WAIT_POLICY': 'PASSIVE', 'GOMP_SPINCOUNT': '1000'}"
    )


@pytest.mark.parametrize("name", VARIABLES)
def test_the_choice_of_the_user_stays(name: str) -> None:
    assert python(f"import lmpipe; {SHOW}", **{name: "7"}).stdout.strip() == repr({name: "7"})


@pytest.mark.parametrize(("first", "lines"), [("torch", 1), ("lmpipe", 0)])
def test_an_engine_says_once_if_torch_was_imported_too_early(first: str, lines: int, tiny_folder: Path) -> None:
    load = f"from lmpipe import load_lm; [load_lm('hf:{tiny_folder}', quiet=True) for _ in range(2)]"
    shown = python(f"import {first}, logging; logging.basicConfig(level=logging.INFO); {load}").stderr
    assert shown.count("import lmpipe first") == lines
