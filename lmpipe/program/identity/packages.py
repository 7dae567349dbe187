"""Package and version of a module.

The standard library, all modules in ``site-packages``, and lmpipe itself are packages. Every other module is the user's
own code: scripts, notebooks, and projects that are installed in editable mode.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import sys
import sysconfig
from functools import lru_cache
from pathlib import Path

from lmpipe._version import __version__

_OURS = ("lmpipe", "optimizers")
_SCRIPTS = ("__main__", "__mp_main__")
_INSTALLED = {"site-packages", "dist-packages"}
_STDLIB = tuple({Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "platstdlib")})


@lru_cache(maxsize=4096)
def package_of(module: str) -> str | None:
    """Returns name and version of the package of a module, or None for the user's own modules.

    Args:
        module: Full name of the module, such as ``numpy.linalg``; it need not be imported.
    """
    top = module.partition(".")[0]
    if top in _SCRIPTS:  # the file that Python was started with
        return None
    if top in _OURS:
        return f"lmpipe {__version__}"
    if top in sys.builtin_module_names:
        return _PYTHON
    origin = _origin(top)
    if origin in ("built-in", "frozen"):
        return _PYTHON
    if origin is None:
        return None
    path = Path(origin).resolve()
    if _INSTALLED & set(path.parts):
        version = _version(top)
        return f"{top} {version}" if version else None
    return _PYTHON if any(folder in path.parents for folder in _STDLIB) else None


_PYTHON = f"python {'.'.join(platform.python_version_tuple()[:2])}"


def _origin(top: str) -> str | None:
    """File or folder of a top-level module, or ``built-in`` or ``frozen``; None if it has no location."""
    if top in sys.modules:
        module = sys.modules[top]
        spec = getattr(module, "__spec__", None)
        locations = [getattr(module, "__file__", None), *list(getattr(module, "__path__", []))[:1]]
    else:
        try:
            spec = importlib.util.find_spec(top)
        except (ImportError, ValueError):
            return None
        locations = [*list(spec.submodule_search_locations or [])[:1]] if spec else []
    if locations := [location for location in locations if isinstance(location, str)]:
        return locations[0]
    return spec.origin if spec else None


def _version(top: str) -> str | None:
    """Version of the distribution of a top-level module."""
    try:
        return importlib.metadata.version(top)
    except importlib.metadata.PackageNotFoundError:
        names = _distributions().get(top, [])
        return ", ".join(sorted(f"{name} {importlib.metadata.version(name)}" for name in set(names))) or None


@lru_cache(maxsize=1)
def _distributions() -> dict[str, list[str]]:
    """Top-level module → names of its distributions; slow, so only called if module and distribution names differ."""
    return dict(importlib.metadata.packages_distributions())
