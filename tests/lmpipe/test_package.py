"""The package as a whole."""

from __future__ import annotations

import subprocess
import sys
from types import ModuleType

import lmpipe


def test_all_names_the_public_interface() -> None:
    public = {name for name, value in vars(lmpipe).items() if name[0] != "_" and not isinstance(value, ModuleType)}
    assert public - {"annotations"} == set(lmpipe.__all__)
    assert len(lmpipe.__all__) <= 43


def test_every_public_name_is_documented() -> None:
    undocumented = [name for name in lmpipe.__all__ if not (getattr(lmpipe, name).__doc__ or "").strip()]
    assert undocumented == ["Metric"]  # an alias, whose docstring is below it in metrics.py


def test_import_is_light() -> None:
    code = "import sys, lmpipe, optimizers, programs; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "lmpipe" in loaded
    assert not {"torch", "transformers", "numpy", "rich", "optuna", "gepa"} & set(loaded)
