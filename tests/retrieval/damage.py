"""Damages the files of an index, one after the other, and checks that reading them reports it.

Other checks can run `damaged` for longer than the tests do.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from lmpipe.errors import LmpipeError
from tests.damage import DAMAGES
from tests.tally import Tally

T = TypeVar("T")

GONE = "the file is gone"


def damaged(folder: Path, use: Callable[[], T], times: int, seed: int = 0) -> Tally:
    """Damages each file below a folder in turn, reads the folder, and restores the file.

    An error must name the file or its folder.

    Args:
        folder: Folder with at least one file.
        use: Reads the files and returns a value that can be compared.
        times: Number of files to damage.
        seed: Seed of the kinds and places of damage.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    whole, tally, rng = use(), Tally(tried=times), random.Random(seed)
    for number in range(times):
        path = files[number % len(files)]
        before = path.read_bytes()
        how = rng.choice([*DAMAGES, GONE])
        try:
            path.unlink() if how == GONE else path.write_bytes(DAMAGES[how](before, rng) if before else b"?")
            if use() == whole:
                tally.harmless += 1
            else:
                tally.wrong.append(f"{how}: {path}: the result changed")
        except LmpipeError as error:
            if str(path) in str(error) or str(path.parent) in str(error):
                tally.refused += 1
            else:
                tally.wrong.append(f"{how}: {path}: not named by {error}")
        except Exception as error:  # noqa: BLE001 (no error of a library may get through)
            tally.wrong.append(f"{how}: {path}: {error!r}")
        finally:
            path.write_bytes(before)
    return tally
