"""Records of benchmark data: from a folder of gzipped JSON Lines, or from the hub. Knows nothing of tasks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lmpipe.errors import ConfigError
from lmpipe.lines import json_object, numbered_lines


def read_records(path: Path) -> list[dict[str, Any]]:
    """The JSON objects of a ``.jsonl.gz`` file, in its order. See `lmpipe.lines` for what is read.

    Raises:
        ConfigError: If it cannot be read, or a line is no JSON object; it names file and line.
    """
    return [_record(line, f"{path}, line {number}") for number, line in numbered_lines(path)]


def _record(line: bytes, where: str) -> dict[str, Any]:
    try:
        return json_object(line)
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
