"""Adds passages to an exact index, and deletes passages from it. Each change takes effect at once and as a whole.

A retriever that was opened before a change does not see it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from itertools import count
from pathlib import Path

from lmpipe.errors import ConfigError
from lmpipe.progress import Progress, show_progress
from lmpipe.retrieval.colbert import ColbertEncoder
from lmpipe.retrieval.index.build import new_segment
from lmpipe.retrieval.index.manifest import Manifest
from lmpipe.retrieval.passages import PassageText, PassageTexts
from lmpipe.storage.files import read_json_object
from lmpipe.storage.store import RunStore
from lmpipe.validation.arguments import check_items


def add_passages(
    folder: str | Path, passages: Iterable[PassageText], encoder: ColbertEncoder, progress: Progress | None = None
) -> Manifest:
    """Adds passages to an index, as a new segment.

    Args:
        folder: Folder of the index.
        passages: Passages to add, at least one; their ids must not be in the index.
        encoder: Encoder that the index was built with.
        progress: Display of the progress, or None.

    Returns:
        The contents of the changed index.

    Raises:
        ConfigError: If there are no passages, if an id occurs twice or is already in the index, if the index was built
            with another encoder, or if it is not exact.
        StoreError: If the index cannot be written, or another process is writing to it.
    """
    passages = check_items("passages", passages, PassageText)
    if not passages:
        raise ConfigError("there are no passages to add")
    with _open_for_edit(Path(folder)) as (store, manifest):
        if encoder.digest != manifest.encoder.digest:
            raise ConfigError(f"{folder} was built with the encoder {manifest.encoder.spec!r}, not {encoder.name!r}")
        existing = _numbers_by_id(store.path, manifest).keys()
        counts = Counter(passage.id for passage in passages)
        if duplicates := sorted(name for name, count in counts.items() if name in existing or count > 1):
            raise ConfigError(f"{folder} would have these passages twice: {', '.join(duplicates)}; delete them first")
        with show_progress(progress, "encoding passages", len(passages)) as advance:
            segment = new_segment(store, passages, encoder, advance)
        changed = manifest.model_copy(update={"segments": (*manifest.segments, segment)})
        changed.write(store.path)
    return changed


def delete_passages(folder: str | Path, ids: Iterable[str]) -> Manifest:
    """Deletes passages from an index: searches no longer return them. Their vectors stay until the index is rebuilt.

    Args:
        folder: Folder of the index.
        ids: Ids of passages of the index.

    Returns:
        The contents of the changed index.

    Raises:
        ConfigError: If `ids` is a single text, if an id is not in the index, or if the index is not exact.
        StoreError: If the index cannot be written, or another process is writing to it.
    """
    ids = check_items("ids", ids, str)
    with _open_for_edit(Path(folder)) as (store, manifest):
        numbers = _numbers_by_id(store.path, manifest)
        if absent := sorted(set(ids) - numbers.keys()):
            raise ConfigError(f"{folder} has no passages {', '.join(absent)}")
        deleted = {*manifest.deleted, *(numbers[name] for name in ids)}
        changed = manifest.model_copy(update={"deleted": tuple(sorted(deleted))})
        changed.write(store.path)
    return changed


@contextmanager
def _open_for_edit(folder: Path) -> Iterator[tuple[RunStore, Manifest]]:
    """Opens the store of an exact index, which locks it, and reads its manifest."""
    manifest = Manifest.read(folder)
    if manifest.plaid is not None:
        raise ConfigError(f"{folder} is a PLAID index, which cannot be changed; build it again")
    with closing(RunStore(folder, read_json_object(folder / "config.json"), shared=False)) as store:
        yield store, Manifest.read(folder)


def _numbers_by_id(index: Path, manifest: Manifest) -> dict[str, int]:
    """Maps the id of every passage that is not deleted to its number."""
    deleted, numbers = set(manifest.deleted), count()
    pairs = ((passage.id, next(numbers)) for part in manifest.folders(index) for passage in PassageTexts(part))
    return {passage_id: number for passage_id, number in pairs if number not in deleted}
