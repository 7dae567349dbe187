"""Checks that `optimizers` and `programs` are those of lmpipe, and not folders of the user with the same names."""

from __future__ import annotations

import importlib.util
import logging
from pathlib import Path

logger = logging.getLogger("lmpipe")

_ROOT = Path(__file__).resolve().parents[1]


def warn_about_other_packages(*names: str) -> None:
    """Warns about packages that Python finds elsewhere than beside lmpipe.

    Args:
        names: Names of packages that are installed with lmpipe.
    """
    for name in names:
        try:
            spec = importlib.util.find_spec(name)
        except ValueError:  # a module without a spec, such as one that was made by hand
            continue
        found = [] if spec is None else [*(spec.submodule_search_locations or ()), *filter(None, [spec.origin])]
        if found and not any(Path(place).resolve().is_relative_to(_ROOT / name) for place in found):
            logger.warning(
                "`import %s` finds %s, which is not the package of lmpipe; rename it, or move it into a package of "
                "your own (such as my_project.%s)",
                name,
                found[0],
                name,
            )
