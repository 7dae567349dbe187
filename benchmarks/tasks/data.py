"""Reads records of benchmark data from gzipped JSON Lines or from the hub. Knows nothing about tasks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from lmpipe.errors import ConfigError
from lmpipe.storage.lines import numbered_lines, parse_json_object

T = TypeVar("T")


def read_records(path: Path, convert: Callable[[dict[str, Any]], T]) -> tuple[T, ...]:
    """Converts each JSON object of a ``.jsonl.gz`` file, in order; `lmpipe.storage.lines` documents the format.

    Args:
        path: Path of the file.
        convert: Converts an object; it raises a ConfigError for an object that it cannot use.

    Raises:
        ConfigError: If the file cannot be read, or a line is not a JSON object that can be used; the message names the
            file and the line.
    """
    return tuple(_converted(line, convert, f"{path}, line {number}") for number, line in numbered_lines(path))


def _converted(line: bytes, convert: Callable[[dict[str, Any]], T], place: str) -> T:
    try:
        return convert(parse_json_object(line))
    except ValueError as error:
        raise ConfigError(f"{place}: {error}") from None


def load_hub(name: str, config: str, parts: Sequence[str]) -> list[Any]:
    """Loads parts of a data set on the hub.

    Args:
        name: Name of the data set, or a folder that the package datasets can load.
        config: Name of the data set's configuration.
        parts: Names of the parts.

    Returns:
        A ``datasets.Dataset`` for each part.

    Raises:
        ConfigError: If a part cannot be loaded.
    """
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ConfigError(f"{error}; run: pip install 'lmpipe[hub]', or pass --data") from error
    try:
        return [load_dataset(name, config, split=part) for part in parts]
    except (OSError, ValueError) as error:
        raise ConfigError(f"{name!r} cannot be loaded from the hub ({error}); or pass --data") from error
