"""HotPotQA: ``python -m benchmarks.hotpotqa --data DIR --lm bundled --strategy "p -> w -> p" --out runs/hotpotqa``."""

from __future__ import annotations

from benchmarks.experiments.command_line import main
from benchmarks.tasks.hotpotqa import HotpotTask

if __name__ == "__main__":
    main(HotpotTask())
