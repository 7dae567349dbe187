"""Builds index folders chunk by chunk. An interrupted build is not mistaken for a finished one, and can be resumed.

Every chunk of passages is encoded once and stored as a segment of int8 vectors. The segments are the exact index; a
PLAID index is built from them. Does not depend on search.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal, final

import torch

from lmpipe.errors import ConfigError
from lmpipe.progress import Progress, show_progress
from lmpipe.retrieval.colbert import ColbertEncoder
from lmpipe.retrieval.index.manifest import EncoderIdentity, Manifest, PlaidIdentity, SegmentIdentity
from lmpipe.retrieval.passages import PassageText, PassageTexts, read_passages
from lmpipe.retrieval.plaid import build_plaid
from lmpipe.retrieval.segments import Segment
from lmpipe.storage.hashing import digest_file
from lmpipe.storage.store import RunStore
from lmpipe.validation.arguments import check_whole_number

MEMORY = 320_000_000
"""Size of the int8 vectors, in bytes, up to which an index is exact by default: about 30,000 passages."""


@final
@dataclass(frozen=True)
class BuildSettings:
    """Settings of the build of an index.

    Args:
        engine: ``exact`` stores int8 vectors, ``plaid`` compresses them; ``auto`` is exact up to `memory`.
        bits: Bits that PLAID stores per component of a vector: 2 or 4 (1 and 8 are possible too).
        memory: Size of the int8 vectors, in bytes, up to which ``auto`` chooses ``exact``.
        chunk: Number of passages that are encoded between two points from which a build can be resumed.
        seed: Seed of PLAID's random choices.

    Raises:
        ConfigError: If a setting is out of range.
    """

    engine: Literal["auto", "exact", "plaid"] = "auto"
    bits: int = 2
    memory: int = MEMORY
    chunk: int = 4096
    seed: int = 0

    def __post_init__(self) -> None:
        if self.engine not in ("auto", "exact", "plaid"):
            raise ConfigError(f"the engine of an index must be 'auto', 'exact' or 'plaid', not {self.engine!r}")
        if self.bits not in (1, 2, 4, 8) or isinstance(self.bits, bool):
            raise ConfigError(f"bits={self.bits}: it must be 1, 2, 4 or 8")
        for name, minimum in (("memory", 0), ("chunk", 1), ("seed", 0)):
            check_whole_number(name, getattr(self, name), minimum)


def build_index(
    passages: str | Path,
    out: str | Path,
    encoder: ColbertEncoder,
    settings: BuildSettings | None = None,
    *,
    on_malformed: Callable[[ConfigError], None] | None = None,
    progress: Progress | None = None,
    header: bool = False,
) -> Manifest:
    """Builds an index of a file of passages, or resumes an interrupted build.

    Args:
        passages: File of passages; see `read_passages`. All lines are checked before any passage is encoded.
        out: Folder of the index.
        encoder: Encoder of the passages.
        settings: Settings of the index; the defaults of `BuildSettings` if None.
        on_malformed: Called with the error of each line that is not a passage; the line is then skipped. By default
            the first such line raises its error.
        progress: Display of the progress, or None.
        header: Whether the first line of the file is a header; see `read_passages`.

    Returns:
        The contents of the index; `open_index` opens it.

    Raises:
        ConfigError: If a line is not a passage, if there are no passages, or if the file changes during the build.
        ConfigChanged: If the build in this folder was started with other passages, settings or another encoder.
        StoreError: If the folder cannot be written, or another process is writing to it.
    """
    settings, passages, out = settings or BuildSettings(), Path(passages), Path(out)
    content = digest_file(passages) if passages.is_file() else ""
    total = sum(1 for _ in read_passages(passages, on_malformed, header=header))
    if not total:
        raise ConfigError(f"{passages} contains no passages")
    identity: dict[str, Any] = {"passages": content, "encoder": encoder.digest, "settings": vars(settings)}
    identity |= {"header": True} if header else {}
    with closing(RunStore(out, identity, shared=False)) as store:
        if (out / "index.json").exists():
            return Manifest.read(out)
        with show_progress(progress, "encoding passages", total) as advance:
            texts = read_passages(passages, _ignore, header=header, on_replaced=_ignore)
            segments = tuple(_encode_segments(store, texts, encoder, settings.chunk, advance))
        if digest_file(passages) != content:
            raise ConfigError(f"{passages} changed while it was being read; build the index again")
        manifest = Manifest(
            encoder=EncoderIdentity(spec=encoder.name, digest=encoder.digest, dim=encoder.dim), segments=segments
        )
        if _is_compressed(manifest, settings):
            with show_progress(progress, "compressing vectors, %", 100) as advance:
                manifest = _compress(store, manifest, settings, lambda share: advance(100 * share))
        manifest.write(out)
        drop_unused(store, manifest)
    return manifest


def _ignore(problem: ConfigError | str) -> None:
    """Does nothing: malformed lines and replaced characters have already been reported."""


def _is_compressed(manifest: Manifest, settings: BuildSettings) -> bool:
    size = manifest.tokens * manifest.encoder.dim
    return settings.engine == "plaid" or (settings.engine == "auto" and size > settings.memory)


def _encode_segments(
    store: RunStore,
    passages: Iterator[PassageText],
    encoder: ColbertEncoder,
    chunk: int,
    advance: Callable[[int], None],
) -> Iterator[SegmentIdentity]:
    """Encodes the passages chunk by chunk, except for the segments that the store already holds."""
    number = 0
    while texts := list(islice(passages, chunk)):
        key = f"segment {number}"
        if (record := store.get(key)) is None:
            record = new_segment(store, texts, encoder, advance).model_dump()
            store.put({key: record})
        else:
            advance(len(texts))
        yield SegmentIdentity.model_validate(record)
        number += 1


def new_segment(
    store: RunStore, passages: Sequence[PassageText], encoder: ColbertEncoder, advance: Callable[[int], None]
) -> SegmentIdentity:
    """Encodes passages and stores them as a segment, shortest passage first."""
    encoded = encoder.encode_passages([passage.titled_text for passage in passages], advance)
    order = torch.argsort(encoded.lengths, stable=True)
    folder = store.new_folder()
    Segment.write(folder, [passages[number] for number in order.tolist()], encoded.select(order))
    return SegmentIdentity(digest=store.put_folder(folder), passages=len(passages), tokens=len(encoded.vectors))


def _compress(store: RunStore, exact: Manifest, settings: BuildSettings, advance: Callable[[float], None]) -> Manifest:
    """Compresses the vectors of an exact index with PLAID, and returns the manifest of the PLAID index."""
    folders = exact.folders(store.path)
    out = store.path / "plaid"  # if the build is killed, the folder stays and the build is resumed there
    build_plaid([Segment(folder) for folder in folders], out, bits=settings.bits, seed=settings.seed, advance=advance)
    segments = []
    for segment, folder in zip(exact.segments, folders, strict=True):
        texts = store.new_folder()
        PassageTexts.copy(folder, texts)
        segments.append(segment.model_copy(update={"digest": store.put_folder(texts)}))
    plaid = PlaidIdentity(digest=store.put_folder(out), bits=settings.bits)
    return exact.model_copy(update={"segments": tuple(segments), "plaid": plaid})


def drop_unused(store: RunStore, manifest: Manifest) -> None:
    """Deletes the blobs that do not belong to the index."""
    used = {folder.name for folder in manifest.folders(store.path)}
    store.delete_blobs(lambda name: name not in used)
