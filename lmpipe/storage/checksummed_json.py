"""JSON files that people read and programs trust: an object whose field ``sum`` is a checksum of all others.

Knows nothing of what the other fields are.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lmpipe.errors import ConfigError, CorruptBlob
from lmpipe.storage.files import read_json_object, write_atomically
from lmpipe.storage.hashing import canonical_json, digest_bytes

SUM = "sum"
"""The field that holds the digest of the canonical JSON of all others."""


def write_checksummed(path: Path, values: Mapping[str, Any], indent: int = 2) -> None:
    """Writes some fields and their checksum; the file is whole, or as it was.

    Args:
        path: The file.
        values: Everything but the checksum, which JSON can hold.
        indent: Spaces before each level.

    Raises:
        StoreError: If it cannot be written.
    """
    read = json.loads(json.dumps(values))
    text = json.dumps(read | {SUM: _sum(read)}, indent=indent, ensure_ascii=False) + "\n"
    write_atomically(path, text.encode(errors="backslashreplace"))


def read_checksummed(path: Path) -> dict[str, Any]:
    """The fields of such a file, without the checksum.

    Raises:
        ConfigError: If it has no checksum.
        CorruptBlob: If it is not there, or not as it was written.
    """
    values = read_json_object(path)
    if SUM not in values:
        raise ConfigError(f"{path} has no checksum: it is of another version, or was written by hand; {_ADVICE}")
    if values.pop(SUM) != _sum(values):
        raise CorruptBlob(f"{path} is damaged or was edited: its checksum is that of another text; {_ADVICE}")
    return values


_ADVICE = "restore it from a copy, or run the command that made it again, which recalls what it has finished"


def _sum(values: Mapping[str, Any]) -> str:
    return digest_bytes(canonical_json(values).encode(errors="backslashreplace"))
