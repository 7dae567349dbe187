"""The file of ``--config``: options of the command line, and settings, as TOML."""

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
class ConfigFile:
    """The content of a file.

    Attributes:
        options: Option of the command line → value.
        settings: Setting → value; `benchmarks.experiments.settings.Settings` checks them.
    """

    options: dict[str, Any]
    settings: dict[str, Any]


def read_config(path: Path, option_names: Collection[str] | None = None) -> ConfigFile:
    """Reads a file.

    Args:
        path: Path of the file.
        option_names: Names of the options that exist; by default any name is accepted.

    Raises:
        ConfigError: If the file cannot be read, or names an option that does not exist.
    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:  # not TOML, or not text
        raise ConfigError(f"--config {path} cannot be read: {error}") from error
    except RecursionError:
        raise ConfigError(f"--config {path} cannot be read: it is nested too deeply") from None
    settings = content.pop("settings", {})
    if not isinstance(settings, dict):
        raise ConfigError(f"--config {path}: settings = {settings!r} is not a table; settings go under [settings]")
    options: dict[str, Any] = {}
    for written, value in content.items():
        name = written.replace("-", "_")
        if option_names is not None and name not in option_names:
            raise ConfigError(f"--config {path}: there is no option {written!r}; settings go under [settings]")
        if name in options:
            raise ConfigError(f"--config {path}: the option {written!r} is set twice")
        if not _is_option(value):
            raise ConfigError(
                f"--config {path}: {written} = {value!r} is neither a text, a number, true or false, nor a "
                "list of texts"
            )
        options[name] = value
    return ConfigFile(options, settings)


def _is_option(value: object) -> bool:
    return isinstance(value, (str, int, float)) or (
        isinstance(value, list) and all(isinstance(item, str) for item in value)
    )
