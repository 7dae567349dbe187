"""Builds index folders chunk by chunk. An interrupted build looks unfinished, and goes on where it was.

Every chunk of passages is encoded once and kept as a segment of int8 vectors. That is the exact index; PLAID's files
are made of its segments. Knows nothing of search.
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
from lmpipe.retrieval.index.manifest import EncoderIdentity, Manifest, Plaid, SegmentIdentity
from lmpipe.retrieval.passages import PassageText, PassageTexts, read_passages
from lmpipe.retrieval.plaid import build_plaid
from lmpipe.retrieval.segments import Segment
from lmpipe.storage.hashing import digest_file
from lmpipe.storage.store import RunStore
from lmpipe.validation.arguments import check_whole_number

MEMORY = 320_000_000
"""Bytes of int8 vectors up to which an index is exact by default: about 30,000 passages."""


@final
@dataclass(frozen=True)
class BuildSettings:
    """How an index is built.

    Args:
        engine: ``exact`` keeps int8 vectors, ``plaid`` compresses them; ``auto`` is exact up to `memory`.
        bits: That PLAID keeps of a component: 2 or 4.
        memory: Bytes of int8 vectors up to which ``auto`` is exact.
        chunk: Passages that are encoded between two points that a build can go on from.
        seed: Of what PLAID draws at random.

    Raises:
        ConfigError: If a number is out of its range.
    """

    engine: Literal["auto", "exact", "plaid"] = "auto"
    bits: int = 2
    memory: int = MEMORY
    chunk: int = 4096
    seed: int = 0

    def __post_init__(self) -> None:
        if self.engine not in ("auto", "exact", "plaid"):
            raise ConfigError(f"the engine of an index is 'auto', 'exact' or 'plaid', not {self.engine!r}")
        if self.bits not in (1, 2, 4, 8) or isinstance(self.bits, bool):
            raise ConfigError(f"bits={self.bits}: they must be 1, 2, 4 or 8")
        for name, least in (("memory", 0), ("chunk", 1), ("seed", 0)):
            check_whole_number(name, getattr(self, name), least)


def build_index(
    passages: str | Path,
    out: str | Path,
    encoder: ColbertEncoder,
    settings: BuildSettings | None = None,
    *,
    malformed: Callable[[ConfigError], None] | None = None,
    progress: Progress | None = None,
    header: bool = False,
) -> Manifest:
    """Builds an index of a file of passages, or finishes one that was interrupted.

    Args:
        passages: See `read_passages`. All lines are checked before anything is encoded.
        out: Folder of the index.
        encoder: Makes the vectors.
        settings: See there.
        malformed: Is told of each line that is no passage, which is then left out; by default the first one raises.
        progress: Where to show progress.
        header: See `read_passages`.

    Returns:
        What the index consists of; `open_index` searches it.

    Raises:
        ConfigError: If a line is no passage, or there are none, or the file changes meanwhile.
        ConfigChanged: If the folder was begun with other passages, another encoder or other settings.
        StoreError: If it cannot be written, or another process writes it.
    """
    settings, passages, out = settings or BuildSettings(), Path(passages), Path(out)
    content = digest_file(passages) if passages.is_file() else ""
    total = sum(1 for _ in read_passages(passages, malformed, header=header))
    if not total:
        raise ConfigError(f"{passages} holds no passages")
    identity: dict[str, Any] = {"passages": content, "encoder": encoder.digest, "settings": vars(settings)}
    identity |= {"header": True} if header else {}
    with closing(RunStore(out, identity)) as store:
        if (out / "index.json").exists():
            return Manifest.read(out)
        with show_progress(progress, "encoding passages", total) as advance:
            texts = read_passages(passages, _ignored, header=header, replaced=_ignored)
            segments = tuple(_segments(store, texts, encoder, settings.chunk, advance))
        if digest_file(passages) != content:
            raise ConfigError(f"{passages} was changed while it was read; build the index again")
        manifest = Manifest(
            encoder=EncoderIdentity(spec=encoder.name, digest=encoder.digest, dim=encoder.dim), segments=segments
        )
        if _compressed(manifest, settings):
            with show_progress(progress, "compressing vectors, %", 100) as advance:
                manifest = _plaid(store, manifest, settings, lambda share: advance(100 * share))
        manifest.write(out)
        drop_unused(store, manifest)
    return manifest


def _ignored(problem: ConfigError | str) -> None:
    """The caller was told of malformed lines and replaced characters already."""


def _compressed(manifest: Manifest, settings: BuildSettings) -> bool:
    size = manifest.tokens * manifest.encoder.dim
    return settings.engine == "plaid" or (settings.engine == "auto" and size > settings.memory)


def _segments(
    store: RunStore,
    passages: Iterator[PassageText],
    encoder: ColbertEncoder,
    chunk: int,
    advance: Callable[[int], None],
) -> Iterator[SegmentIdentity]:
    """Encodes chunk by chunk what the store does not have yet."""
    number = 0
    while texts := list(islice(passages, chunk)):
        key = f"segment {number}"
        if (known := store.get(key)) is None:
            known = new_segment(store, texts, encoder, advance).model_dump()
            store.put({key: known})
        else:
            advance(len(texts))
        yield SegmentIdentity.model_validate(known)
        number += 1


def new_segment(
    store: RunStore, passages: Sequence[PassageText], encoder: ColbertEncoder, advance: Callable[[int], None]
) -> SegmentIdentity:
    """Encodes passages and puts them, shortest first, into the store."""
    encoded = encoder.encode_passages([passage.full for passage in passages], advance)
    order = torch.argsort(encoded.lengths, stable=True)
    folder = store.new_folder()
    Segment.write(folder, [passages[number] for number in order.tolist()], encoded.taken(order))
    return SegmentIdentity(digest=store.put_folder(folder), passages=len(passages), tokens=len(encoded.vectors))


def _plaid(store: RunStore, exact: Manifest, settings: BuildSettings, advance: Callable[[float], None]) -> Manifest:
    """The same passages, their vectors compressed by PLAID."""
    folders = exact.folders(store.path)
    made = store.path / "plaid"  # stays there after a kill, and is gone on with
    build_plaid([Segment(folder) for folder in folders], made, bits=settings.bits, seed=settings.seed, advance=advance)
    texts = []
    for segment, folder in zip(exact.segments, folders, strict=True):
        kept = store.new_folder()
        PassageTexts.copy(folder, kept)
        texts.append(segment.model_copy(update={"digest": store.put_folder(kept)}))
    plaid = Plaid(digest=store.put_folder(made), bits=settings.bits)
    return exact.model_copy(update={"segments": tuple(texts), "plaid": plaid})


def drop_unused(store: RunStore, manifest: Manifest) -> None:
    """Deletes the blobs that are not part of the index."""
    used = {folder.name for folder in manifest.folders(store.path)}
    store.delete_blobs(lambda name: name not in used)
