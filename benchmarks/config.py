"""The file of ``--config``: options of the command line and settings, as TOML."""

from __future__ import annotations

import sys
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from lmpipe.errors import ConfigError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


@final
@dataclass(frozen=True)
class Config:
    """What a file says.

    Attributes:
        options: Option of the command line → value.
        settings: Setting → value; `benchmarks.settings.Settings` knows what is right.
    """

    options: dict[str, Any]
    settings: dict[str, Any]


def read_config(path: Path, known: Collection[str] | None = None) -> Config:
    """Reads a file.

    Args:
        path: Of it.
        known: The options that there are; by default any.

    Raises:
        ConfigError: If it cannot be read, or names an option that there is not.
    """
    try:
        found = tomllib.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"--config {path} cannot be read: {error}") from error
    settings = found.pop("settings", {})
    options = {name.replace("-", "_"): value for name, value in found.items()}
    unknown = [name for name in options if known is not None and name not in known]
    if unknown:
        raise ConfigError(f"--config {path}: there is no option {unknown[0]!r}; settings go under [settings]")
    return Config(options, settings)
