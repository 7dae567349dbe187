"""What the measurements name: the processor; and work alone and beside a competitor."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping

import psutil
import pytest

from benchmarks.performance.metrics_table import Measurement, show_measurements
from benchmarks.performance.processor import instruction_sets_of, processor_name
from benchmarks.performance.shared_cores import compare


def test_a_competitor_runs_beside_every_second_measurement_and_ends() -> None:
    process = psutil.Process()
    before = len(process.children())

    def measure() -> dict[str, float]:
        return {"cpu_seconds": 1.0 + len(process.children()) - before, "seconds": 1.0}

    comparison = compare(measure, 2, os.sched_getaffinity(0))
    assert [run["cpu_seconds"] for run in comparison.alone] == [1.0, 1.0]
    assert [run["cpu_seconds"] for run in comparison.beside] == [2.0, 2.0]
    assert comparison.ratio == 2.0
    assert len(process.children()) == before


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [
        ({"avx2": True, "avx512_f": False, "num_sockets": 1}, ["AVX2"]),
        ({"avx2": True, "avx512_f": True, "avx512_bf16": True, "avx_vnni": True}, ["AVX2", "AVX-512", "bf16", "VNNI"]),
        ({"amx_tile": True, "amx_bf16": True}, ["bf16", "AMX"]),
        ({"architecture": "aarch64"}, []),
    ],
)
def test_instruction_sets_are_those_that_the_processor_has(
    capabilities: Mapping[str, object], expected: list[str]
) -> None:
    assert instruction_sets_of(capabilities) == expected


def test_the_json_object_names_the_processor(capsys: pytest.CaptureFixture[str]) -> None:
    name = processor_name()
    show_measurements("speed", {"speed": Measurement(2.0, 1.0, "higher", "×")}, as_json=True, processor=name)
    shown = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert shown == {"figures": {"speed": {"value": 2.0, "goal": 1.0, "met": True}}, "processor": name}
    assert name.endswith(")")
