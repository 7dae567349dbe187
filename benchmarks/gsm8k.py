"""GSM8K: ``python -m benchmarks.gsm8k --data DIR --lm bundled --strategy "p -> w -> p" --out runs/gsm8k``."""

from __future__ import annotations

from benchmarks.experiments.command_line import main
from benchmarks.tasks.gsm8k import Gsm8kTask

if __name__ == "__main__":
    main(Gsm8kTask())
