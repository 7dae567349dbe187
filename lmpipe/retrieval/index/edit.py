"""Adds passages to an exact index, and deletes some; both take effect at once and as a whole.

A retriever that was opened before does not see the change.
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
    """Adds passages, as a segment of their own.

    Args:
        folder: Of the index.
        passages: At least one; the index has none of their ids.
        encoder: The one that the index was made with.
        progress: Where to show progress.

    Returns:
        What the index consists of now.

    Raises:
        ConfigError: If there is no passage, an id is there already or twice, the encoder is another, or the index is
            not exact.
        StoreError: If the index cannot be written, or another process writes it.
    """
    passages = check_items("passages", passages, PassageText)
    if not passages:
        raise ConfigError("there are no passages to add")
    with _edited(Path(folder)) as (store, manifest):
        if encoder.digest != manifest.encoder.digest:
            raise ConfigError(f"{folder} was made with the encoder {manifest.encoder.spec!r}, not {encoder.name!r}")
        known = _numbers(store.path, manifest).keys()
        ids = Counter(passage.id for passage in passages)
        if twice := sorted(name for name, times in ids.items() if name in known or times > 1):
            raise ConfigError(f"{folder} would have these passages twice: {', '.join(twice)}; delete them first")
        with show_progress(progress, "encoding passages", len(passages)) as advance:
            segment = new_segment(store, passages, encoder, advance)
        changed = manifest.model_copy(update={"segments": (*manifest.segments, segment)})
        changed.write(store.path)
    return changed


def delete_passages(folder: str | Path, ids: Iterable[str]) -> Manifest:
    """Deletes passages: they are not found any more. Their vectors stay until the index is built again.

    Args:
        folder: Of the index.
        ids: Of passages that it has, as texts.

    Returns:
        What the index consists of now.

    Raises:
        ConfigError: If `ids` is a single text, an id is not there, or the index is not exact.
        StoreError: If the index cannot be written, or another process writes it.
    """
    ids = check_items("ids", ids, str)
    with _edited(Path(folder)) as (store, manifest):
        numbers = _numbers(store.path, manifest)
        if absent := sorted(set(ids) - numbers.keys()):
            raise ConfigError(f"{folder} has no passages {', '.join(absent)}")
        deleted = {*manifest.deleted, *(numbers[name] for name in ids)}
        changed = manifest.model_copy(update={"deleted": tuple(sorted(deleted))})
        changed.write(store.path)
    return changed


@contextmanager
def _edited(folder: Path) -> Iterator[tuple[RunStore, Manifest]]:
    """The index's store, held by this process, and what it consists of."""
    manifest = Manifest.read(folder)
    if manifest.plaid is not None:
        raise ConfigError(f"{folder} is a PLAID index, which cannot be changed; build it again")
    with closing(RunStore(folder, read_json_object(folder / "config.json"))) as store:
        yield store, Manifest.read(folder)


def _numbers(index: Path, manifest: Manifest) -> dict[str, int]:
    """Id → number of every passage that is not deleted."""
    deleted, number = set(manifest.deleted), count()
    named = ((passage.id, next(number)) for part in manifest.folders(index) for passage in PassageTexts(part))
    return {name: place for name, place in named if place not in deleted}
