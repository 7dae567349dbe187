"""The comparison of optimizers with DSPy's: the workloads, and a measured search of lmpipe."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.performance.optimizers import MeasurementCache, iris_workload, search_workload
from benchmarks.tasks.iris import IrisTask
from tests.processes import run


def test_a_search_of_the_workload_is_measured(tmp_path: Path) -> None:
    work = search_workload()
    assert (len(work["train"]), len(work["val"]), work["num_candidate_programs"]) == (100, 250, 6)
    small = {**work, "train": work["train"][:4], "val": work["val"][:3], "num_candidate_programs": 2}
    path = MeasurementCache(tmp_path, again=False).workload("small", small)
    found = json.loads(run("-m", "benchmarks.performance.workers.random_search", path, "8").stdout)
    assert found["scores"] == [1.0] * 5
    assert found["calls"] % 3 == 0
    assert found["cpu_seconds"] > 0


def test_both_sides_have_the_same_iris_examples() -> None:
    work, settings = iris_workload(), IrisTask().settings_for("bundled")
    split = IrisTask().split(settings.train, settings.val, settings.test, 0)
    assert [row["inputs"] for row in work["test"]] == [dict(example.inputs) for example in split.test]
    assert (len(work["search_train"]), len(work["search_val"])) == (settings.num_train, settings.num_val)
    assert all(row in work["train"] for row in work["search_train"])


def test_a_measurement_is_kept_until_it_is_asked_for_again(tmp_path: Path) -> None:
    values = iter([{"seconds": 1}, {"seconds": 2}])
    cache = MeasurementCache(tmp_path, again=False)
    assert [cache.cached("a", lambda: next(values)) for _ in range(2)] == [{"seconds": 1}] * 2
    assert MeasurementCache(tmp_path, again=True).cached("a", lambda: next(values)) == {"seconds": 2}
