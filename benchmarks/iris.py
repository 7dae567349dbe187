"""Iris: ``python -m benchmarks.iris --lm bundled --strategy "p -> w -> p" --seeds 0 --out runs/iris``."""

from __future__ import annotations

from benchmarks.experiments.command_line import main
from benchmarks.tasks.iris import IrisTask

if __name__ == "__main__":
    main(IrisTask())
