"""Content-addressed files and folders: which names are digests, and whether what bears one is still what it was.

Knows nothing of who keeps blobs, or why.
"""

from __future__ import annotations

import re
from fnmatch import fnmatch
from pathlib import Path

from lmpipe.hashing import digest, digest_file, file_digests

DIGEST = re.compile("[0-9a-f]{32}")
"""What `lmpipe.hashing.content_digest` gives."""

_LEFT_BY_SYSTEMS = (".DS_Store", "._*", ".nfs*", ".fuse_hidden*", "Thumbs.db", "desktop.ini")


def is_blob(name: str) -> bool:
    """Whether a name is a digest; files of other names are no blobs."""
    return DIGEST.fullmatch(name) is not None


def is_whole(path: Path, name: str = "") -> bool:
    """Whether a file or folder has the content that its name says, or the name of the blob that it is to become.

    Of a folder, files do not count that file managers and network file systems leave everywhere, such as
    ``.DS_Store``. What is neither a file nor a folder, such as a pipe or a link to nothing, is not opened.

    Raises:
        OSError: If something in it cannot be read.
    """
    name = name or path.name
    if path.is_file():
        return digest_file(path) == name
    if not path.is_dir():
        return False
    files = file_digests(path)
    own = {file: value for file, value in files.items() if not _is_left_by_system(file.rpartition("/")[2])}
    return name in {digest(files), digest(own)}


def _is_left_by_system(name: str) -> bool:
    return any(fnmatch(name, pattern) for pattern in _LEFT_BY_SYSTEMS)
