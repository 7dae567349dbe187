"""A run Π → Θ → Π on a vLLM server: the server generates, and loads the adapter that the local engine trains."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from lmpipe.engines.bundled import NAME

SIZES = ["--train", "40", "--val", "12", "--test", "50", "--strategy", "p", "--strategy", "p -> w -> p"]


def scores(out: Path, *options: str) -> list[float]:
    """Returns the test scores of both strategies."""
    command = [sys.executable, "-m", "benchmarks.iris", "--out", str(out), *SIZES, *options]
    subprocess.run(command, check=True, capture_output=True)
    return [row["test"]["mean"] for row in json.loads((out / "result.json").read_text())["strategies"]]


def test_a_run_on_a_server_learns_like_one_in_this_process(
    url: str, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    served = scores(tmp_path / "server", "--lm", f"openai:{NAME}@{url}", "--train-lm", "bundled")
    local = scores(tmp_path / "local", "--lm", "bundled")
    record_property("Iris, p and p -> w -> p, on the server", served)
    record_property("Iris, p and p -> w -> p, in this process", local)
    for prompts, alternated in (served, local):
        assert alternated > prompts + 0.15
    assert abs(served[1] - local[1]) < 0.2
