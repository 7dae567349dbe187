"""JSON files with a checksum: an object whose field ``sum`` is a digest of all its other fields.

Knows nothing about the other fields.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lmpipe.errors import ConfigError, CorruptBlob
from lmpipe.storage.files import read_json_object, write_atomically
from lmpipe.storage.hashing import canonical_json, digest_bytes

_CHECKSUM_FIELD = "sum"
"""Name of the field with the digest of the canonical JSON of all other fields."""


def write_checksummed(path: Path, values: Mapping[str, Any], indent: int = 2) -> None:
    """Writes fields and their checksum to a file; if that fails, the file stays as it was.

    Args:
        path: Path of the file.
        values: All fields but the checksum, as JSON values.
        indent: Number of spaces by which each level is indented.

    Raises:
        StoreError: If the file cannot be written.
    """
    fields = json.loads(json.dumps(values))
    text = json.dumps(fields | {_CHECKSUM_FIELD: _checksum(fields)}, indent=indent, ensure_ascii=False) + "\n"
    write_atomically(path, text.encode(errors="backslashreplace"))


def read_checksummed(path: Path) -> dict[str, Any]:
    """Reads the fields of a file that `write_checksummed` wrote, without the checksum.

    Raises:
        ConfigError: If the file has no checksum.
        CorruptBlob: If the file does not exist, or was changed since it was written.
    """
    values = read_json_object(path)
    if _CHECKSUM_FIELD not in values:
        raise ConfigError(f"{path} has no checksum: another version wrote it, or it was written by hand; {_ADVICE}")
    if values.pop(_CHECKSUM_FIELD) != _checksum(values):
        raise CorruptBlob(f"{path} is damaged or was edited: its checksum does not match its content; {_ADVICE}")
    return values


_ADVICE = "restore it from a copy, or repeat the command that wrote it, which reuses all finished work"


def _checksum(values: Mapping[str, Any]) -> str:
    return digest_bytes(canonical_json(values).encode(errors="backslashreplace"))
