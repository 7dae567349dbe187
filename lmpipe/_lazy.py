"""Module attributes that are imported when they are first used, because most need the packages of an extra."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

from lmpipe.errors import ConfigError


def lazy_attributes(module: str, sources: Mapping[str, tuple[str, str]]) -> Callable[[str], Any]:
    """Makes the ``__getattr__`` of a module (PEP 562). It raises a `ConfigError` if a package is not installed.

    Args:
        module: Name of the module.
        sources: Attribute → module that defines it, and the extra with the packages that this module imports.
    """

    def get(name: str) -> Any:
        if name not in sources:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        source, extra = sources[name]
        try:
            return getattr(import_module(source), name)
        except ModuleNotFoundError as error:
            if (error.name or "").partition(".")[0] == "lmpipe":
                raise
            raise ConfigError(
                f"{module}.{name} needs the package {error.name}; run: pip install lmpipe[{extra}]"
            ) from error

    return get
