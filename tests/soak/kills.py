"""Kills at random moments: after a restart, a run must write the same bytes as one that was not killed."""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Any

from tests.killable import content, run
from tests.tally import Tally


def kills(folder: Path, times: int, seed: int, **how: Any) -> Tally:
    """Kills and restarts runs, and compares their files with those of a run that was not killed.

    Args:
        folder: Folder of the runs.
        times: Number of kills in all.
        seed: Seed of the moments.
        how: Fields of `tests.killable.Start`, such as the model.
    """
    tally, rng = Tally(), random.Random(seed)
    run(folder / "first", **how)  # the first one waits for the imports of the process that starts the others
    began = time.perf_counter()
    undisturbed = folder / "undisturbed"
    if run(undisturbed, **how).status:
        raise RuntimeError("the run does not end without any kill")
    whole, expected, number = time.perf_counter() - began, content(undisturbed), 0
    while True:
        path = folder / str(number)
        left = times - tally.tried
        end = run(path, **how, **({"seconds": rng.uniform(0, whole)} if left else {}))
        if end.killed:
            tally.tried += 1
            continue
        if end.status:
            tally.wrong.append(f"{path}: ended with {end.status}: {end.error}")
        elif content(path) != expected:
            tally.wrong.append(f"{path}: ended in other bytes")
        else:
            tally.harmless = tally.tried
        if not left:
            return tally
        number += 1
