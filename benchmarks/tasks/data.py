"""Records of benchmark data: from a folder of gzipped JSON Lines, or from the hub. Knows nothing of tasks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from lmpipe.errors import ConfigError
from lmpipe.storage.lines import json_object, numbered_lines

T = TypeVar("T")


def read_records(path: Path, make: Callable[[dict[str, Any]], T]) -> tuple[T, ...]:
    """What is made of each JSON object of a ``.jsonl.gz`` file, in order. `lmpipe.storage.lines` says what is read.

    Args:
        path: The file.
        make: Raises a ConfigError for an object that it cannot use.

    Raises:
        ConfigError: If it cannot be read, or a line is no JSON object or none that can be used; it names file and line.
    """
    return tuple(_made(line, make, f"{path}, line {number}") for number, line in numbered_lines(path))


def _made(line: bytes, make: Callable[[dict[str, Any]], T], where: str) -> T:
    try:
        return make(json_object(line))
    except ValueError as error:
        raise ConfigError(f"{where}: {error}") from None


def load_hub(name: str, config: str, parts: Sequence[str]) -> list[Any]:
    """Parts of a data set of the hub.

    Args:
        name: Of the data set, or of a folder that the package datasets can load.
        config: Which form of it.
        parts: Their names.

    Returns:
        A ``datasets.Dataset`` for each part.

    Raises:
        ConfigError: If they cannot be loaded.
    """
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ConfigError(f"{error}; run: pip install 'lmpipe[hub]', or give --data") from error
    try:
        return [load_dataset(name, config, split=part) for part in parts]
    except (OSError, ValueError) as error:
        raise ConfigError(f"{name!r} cannot be loaded from the hub ({error}); or give --data") from error
