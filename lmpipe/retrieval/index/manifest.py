"""The contents of an index folder, recorded in ``index.json``. A build writes this file last, when it is finished.

    INDEX/index.json      engine, encoder, segments, deletions; with a checksum
    INDEX/blobs/DIGEST    content-addressed folders: segments, and PLAID's files
    INDEX/journal.*       the finished steps of a build: see `lmpipe.storage.store`

Does not depend on encoding or search.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Final, Literal, final

from pydantic import BaseModel, ConfigDict

from lmpipe.errors import ConfigError, CorruptBlob
from lmpipe.retrieval.file_errors import read_json, reporting_damage
from lmpipe.retrieval.passages import REBUILD
from lmpipe.storage.files import write_atomically
from lmpipe.storage.hashing import digest, file_digests

logger = logging.getLogger(__name__)

_FORMAT: Final = 1
_SUFFIXES = (".jsonl", ".npy", ".json", ".pt")  # of the files in blobs; files with other suffixes are ignored


class _FrozenModel(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


@final
class EncoderIdentity(_FrozenModel):
    """The encoder that an index was built with.

    Attributes:
        spec: Argument of `lmpipe.retrieval.colbert.encoder.load_encoder` that loads the encoder.
        digest: Digest of the encoder's content; an encoder with another digest is refused.
        dim: Number of components of a token vector.
    """

    spec: str
    digest: str
    dim: int


@final
class SegmentIdentity(_FrozenModel):
    """A segment of an index: the digest of its blob, and its numbers of passages and tokens."""

    digest: str
    passages: int
    tokens: int


@final
class PlaidIdentity(_FrozenModel):
    """The files of PLAID: the digest of their blob, and the bits per component of a residual."""

    digest: str
    bits: int


@final
class Manifest(_FrozenModel):
    """The contents of an index.

    Attributes:
        format: Version of the index format.
        encoder: Encoder of the passages, which must also encode the queries.
        segments: Segments in the order in which passages are numbered, from 0. The segments of a PLAID index have no
            vectors.
        deleted: Numbers of deleted passages, ascending.
        plaid: The compressed vectors; None if the index is exact.
    """

    format: Literal[1] = _FORMAT
    encoder: EncoderIdentity
    segments: tuple[SegmentIdentity, ...]
    deleted: tuple[int, ...] = ()
    plaid: PlaidIdentity | None = None

    @property
    def engine(self) -> str:
        """The engine that searches the index: ``exact`` or ``plaid``."""
        return "plaid" if self.plaid else "exact"

    @property
    def passages(self) -> int:
        """Number of passages, without deleted ones."""
        return sum(segment.passages for segment in self.segments) - len(self.deleted)

    @property
    def tokens(self) -> int:
        """Number of token vectors, including those of deleted passages."""
        return sum(segment.tokens for segment in self.segments)

    @property
    def digest(self) -> str:
        """Digest of the contents."""
        return digest(self.model_dump(mode="json"))

    def folders(self, index: Path) -> list[Path]:
        """Returns the folders of the segments, in order, followed by the folder of PLAID's files, if any."""
        parts = [segment.digest for segment in self.segments] + ([self.plaid.digest] if self.plaid else [])
        return [index / "blobs" / part for part in parts]

    def write(self, index: Path) -> None:
        """Writes ``index.json``, atomically.

        Raises:
            StoreError: If the file cannot be written.
        """
        record = {"index": self.model_dump(mode="json"), "sum": self.digest}
        write_atomically(index / "index.json", json.dumps(record, indent=2).encode())

    @staticmethod
    def read(index: Path) -> Manifest:
        """Reads ``index.json``.

        Raises:
            ConfigError: If the folder contains no index, an unfinished one, or one of another format version.
            CorruptBlob: If the file is damaged.
        """
        path = index / "index.json"
        if not path.exists():
            unfinished = (index / "config.json").exists()
            problem = (
                "an unfinished index; run the command that builds it again to resume it" if unfinished else "no index"
            )
            raise ConfigError(f"{index} contains {problem}")
        with reporting_damage(path, REBUILD):
            record = read_json(path)
            checksum, content = record["sum"], record["index"]
            actual = digest(content)
        if actual != checksum:
            raise CorruptBlob(f"{path} does not match its checksum; {REBUILD}")
        if isinstance(content, dict) and content.get("format") != _FORMAT:
            raise ConfigError(
                f"{index} has the format {content.get('format')!r} and this version of lmpipe reads {_FORMAT}; open it "
                "with the version that built it, or build it again"
            )
        with reporting_damage(path, REBUILD):
            return Manifest.model_validate_json(json.dumps(content))

    def verify(self, index: Path) -> None:
        """Compares every file with its checksum. Files that do not belong to an index are reported in a warning.

        Raises:
            CorruptBlob: If folders are missing or damaged; the message names them.
        """
        damaged = []
        for folder in self.folders(index):
            with reporting_damage(folder, REBUILD):
                digests = file_digests(folder)
            expected = {name: value for name, value in digests.items() if name.endswith(_SUFFIXES) and name[0] != "."}
            if digest(expected) != folder.name:
                damaged.append(str(folder))
            elif strays := digests.keys() - expected.keys():
                names = ", ".join(sorted(strays))
                logger.warning("%s contains files that do not belong to the index and are ignored: %s", folder, names)
        if damaged:
            raise CorruptBlob(f"{', '.join(damaged)}: missing or damaged; {REBUILD}")
