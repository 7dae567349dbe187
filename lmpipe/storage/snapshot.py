"""Reads the finished work in a run directory as it is now: without its lock, without writing, while others write it.

Knows nothing about what the work is.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lmpipe.storage.files import explain_read_errors
from lmpipe.storage.journal import read_journal, usable_records


def read_finished(folder: Path) -> dict[str, Any]:
    """Returns key → result of the finished work in a run directory, in the order in which the work was first recorded.

    Results that refer to blobs which do not exist are left out, with a warning. The content of blobs is not checked.

    Args:
        folder: Path of the directory.

    Raises:
        StoreError: If the directory cannot be read.
        CorruptBlob: If a line of the journal is damaged.
    """
    records, _ = read_journal(folder / "journal.jsonl")
    blobs = folder / "blobs"
    with explain_read_errors(blobs):  # after the journal, since blobs are written before the records that refer to them
        names = {path.name for path in blobs.iterdir()} if blobs.is_dir() else set[str]()
    return {key: record.value for key, record in usable_records(records, names, folder).items()}
