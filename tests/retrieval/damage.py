"""Damage to the files of an index, one place after the other: what opening and searching it says.

`damaged` is a loop that other checks can run longer than the tests do.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from lmpipe.errors import LmpipeError

T = TypeVar("T")


@dataclass
class Outcomes:
    """What came of some damages.

    Attributes:
        refused: Damages that were said with an error of lmpipe that names the file or its folder.
        harmless: Damages after which the same was found.
        wrong: What happened in all other cases.
    """

    refused: int = 0
    harmless: int = 0
    wrong: list[str] = field(default_factory=list)

    @property
    def counts(self) -> Counter[str]:
        return Counter(refused=self.refused, harmless=self.harmless, wrong=len(self.wrong))


def damaged(folder: Path, use: Callable[[], T], times: int, seed: int = 0) -> Outcomes:
    """Damages the files below a folder, each in turn, uses what is there, and repairs it.

    Args:
        folder: With at least one file.
        use: Reads the files and gives something that can be compared.
        times: How many damages.
        seed: Of where they are.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    whole, outcomes, rng = use(), Outcomes(), random.Random(seed)
    for number in range(times):
        path = files[number % len(files)]
        before = path.read_bytes()
        how, after = rng.choice(list(_damages(before, rng)))
        try:
            if after is None:
                path.unlink()
            else:
                path.write_bytes(after)
            if use() == whole:
                outcomes.harmless += 1
            else:
                outcomes.wrong.append(f"{how} of {path}: something else was found")
        except LmpipeError as error:
            named = str(path) in str(error) or str(path.parent) in str(error)
            outcomes.refused += named
            if not named:
                outcomes.wrong.append(f"{how} of {path}: not named by {error}")
        except Exception as error:  # noqa: BLE001 (no error of a library may come through)
            outcomes.wrong.append(f"{how} of {path}: {error!r}")
        finally:
            path.write_bytes(before)
    return outcomes


def _damages(data: bytes, rng: random.Random) -> Iterator[tuple[str, bytes | None]]:
    place = rng.randrange(max(1, len(data)))
    yield (
        "a changed bit",
        data[:place] + bytes(byte ^ 1 << rng.randrange(8) for byte in data[place : place + 1]) + data[place + 1 :],
    )
    yield "a changed byte", data[:place] + bytes([rng.randrange(256)]) + data[place + 1 :]
    yield "a lost half", data[:place]
    yield "a lost byte", data[:place] + data[place + 1 :]
    yield "zeros", data[:place] + bytes(min(64, len(data) - place)) + data[place + 64 :]
    yield "all of it lost", b""
    yield "the file lost", None
