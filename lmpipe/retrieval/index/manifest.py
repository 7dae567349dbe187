"""What an index folder says of itself, in ``index.json``: the last file of a build, so an interrupted one has none.

    INDEX/index.json      engine, encoder, segments, deletions; with a checksum
    INDEX/blobs/DIGEST    content-addressed folders: segments, and PLAID's files
    INDEX/journal.*       what a build has finished: see `lmpipe.storage.store`

Knows nothing of encoding or search.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Final, Literal, final

from pydantic import BaseModel, ConfigDict

from lmpipe.errors import ConfigError, CorruptBlob
from lmpipe.retrieval.file_errors import read_json, undamaged
from lmpipe.retrieval.passages import REBUILD
from lmpipe.storage.files import write_whole
from lmpipe.storage.hashing import digest, file_digests

logger = logging.getLogger(__name__)

_FORMAT: Final = 1
_OURS = (".jsonl", ".npy", ".json", ".pt")  # what the files of blobs end in; the others are strays


class _Value(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


@final
class EncoderIdentity(_Value):
    """The encoder that an index was made with.

    Attributes:
        spec: What loads it; see `lmpipe.retrieval.colbert.encoder.load_encoder`.
        digest: Of its content; an encoder of another digest is refused.
        dim: Length of a token's vector.
    """

    spec: str
    digest: str
    dim: int


@final
class SegmentIdentity(_Value):
    """A part of an index: a blob, and what is in it."""

    digest: str
    passages: int
    tokens: int


@final
class Plaid(_Value):
    """PLAID's files: a blob, and the bits that a component of a residual takes."""

    digest: str
    bits: int


@final
class Manifest(_Value):
    """What an index consists of.

    Attributes:
        encoder: Makes the vectors of queries.
        segments: In the order in which passages are numbered, from 0. Without vectors where there is PLAID.
        deleted: Numbers of passages that are not found any more, ascending.
        plaid: The compressed vectors, or none where the index is exact.
    """

    format: Literal[1] = _FORMAT
    encoder: EncoderIdentity
    segments: tuple[SegmentIdentity, ...]
    deleted: tuple[int, ...] = ()
    plaid: Plaid | None = None

    @property
    def engine(self) -> str:
        """How it is searched: ``exact`` or ``plaid``."""
        return "plaid" if self.plaid else "exact"

    @property
    def passages(self) -> int:
        """How many passages can be found."""
        return sum(segment.passages for segment in self.segments) - len(self.deleted)

    @property
    def tokens(self) -> int:
        """How many token vectors there are, those of deleted passages included."""
        return sum(segment.tokens for segment in self.segments)

    @property
    def digest(self) -> str:
        """Identity by content."""
        return digest(self.model_dump(mode="json"))

    def folders(self, index: Path) -> list[Path]:
        """Where the parts lie: segments in their order, then PLAID's files if there are any."""
        parts = [segment.digest for segment in self.segments] + ([self.plaid.digest] if self.plaid else [])
        return [index / "blobs" / part for part in parts]

    def write(self, index: Path) -> None:
        """Makes this what the folder says of itself, at once and as a whole.

        Raises:
            StoreError: If it cannot be written.
        """
        record = {"index": self.model_dump(mode="json"), "sum": self.digest}
        write_whole(index / "index.json", json.dumps(record, indent=2).encode())

    @staticmethod
    def read(index: Path) -> Manifest:
        """What a folder says of itself.

        Raises:
            ConfigError: If it holds no index, or one that was not finished, or that another version has written.
            CorruptBlob: If it was damaged.
        """
        path = index / "index.json"
        if not path.exists():
            unfinished = (index / "config.json").exists()
            what = "an unfinished index: run the command that builds it again, it goes on" if unfinished else "no index"
            raise ConfigError(f"{index} holds {what}")
        with undamaged(path, REBUILD):
            record = read_json(path)
            stated, known = record["sum"], record["index"]
            made = digest(known)
        if made != stated:
            raise CorruptBlob(f"{path} does not match its checksum; {REBUILD}")
        if isinstance(known, dict) and known.get("format") != _FORMAT:
            raise ConfigError(
                f"{index} has the format {known.get('format')!r} and this version of lmpipe reads {_FORMAT}; open it "
                "with the version that built it, or build it again"
            )
        with undamaged(path, REBUILD):
            return Manifest.model_validate_json(json.dumps(known))

    def verify(self, index: Path) -> None:
        """Compares every file with its checksum. Files that are none of an index are named in a warning.

        Raises:
            CorruptBlob: If one is missing or damaged; it names them.
        """
        damaged = []
        for folder in self.folders(index):
            with undamaged(folder, REBUILD):
                digests = file_digests(folder)
            own = {name: value for name, value in digests.items() if name.endswith(_OURS) and name[0] != "."}
            if digest(own) != folder.name:
                damaged.append(str(folder))
            elif strays := digests.keys() - own.keys():
                logger.warning("%s holds %s: no part of the index, and left alone", folder, ", ".join(sorted(strays)))
        if damaged:
            raise CorruptBlob(f"{', '.join(damaged)}: missing or damaged; {REBUILD}")
