"""What the measurements of the engine show of other libraries: those that run, and the errors of those that do not."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.performance.engine import compare
from benchmarks.performance.processes import EngineProcesses


def test_a_baseline_whose_environment_cannot_be_built_is_named_and_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    assert EngineProcesses(1, 1, "model", "workload").baseline("no-such-environment", "trl_train.py") == []
    shown = " ".join(capsys.readouterr().out.split())
    assert "trl_train.py is left out: no-such-environment cannot be built" in shown


def test_engines_that_did_not_run_have_no_figures() -> None:
    run = {"cpu_seconds": 3.0, "tokens": [[1], [2]]}
    runs: dict[str, list[dict[str, Any]]] = {"lmpipe": [run]}
    assert {name: figure.value for name, figure in compare("float32", runs, 2.0, 1.5).items()} == {
        "float32: CPU time over the floor": 1.5
    }
    runs |= {"vLLM CPU": [run | {"cpu_seconds": 4.0}], "padded generate": [run | {"tokens": [[1], [3]]}]}
    figures = compare("float32", runs, 2.0, 1.5)
    assert figures["float32: CPU time over vLLM's"].value == 0.75
    assert figures["float32: answers equal to generate's"].value == 0.5
