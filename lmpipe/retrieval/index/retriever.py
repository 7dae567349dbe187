"""Indexes opened: passages that are found by the token vectors of a ColBERT encoder.

Knows nothing of how an index was built, or how vectors are compared.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import final
from uuid import uuid4

from lmpipe.errors import ConfigError, EngineError, StoreError
from lmpipe.program.identity import identity
from lmpipe.retrieval.colbert import ColbertEncoder, load_encoder
from lmpipe.retrieval.index.exact import ExactIndex
from lmpipe.retrieval.index.manifest import Manifest
from lmpipe.retrieval.passages import PassageText, PassageTexts, read_passages
from lmpipe.retrieval.plaid import PlaidIndex, SearchSettings
from lmpipe.retrieval.plaid.colbert_ai import read_metadata
from lmpipe.retrieval.segments import Segment
from lmpipe.retrieval.vectors import Ranking, TokenIndex
from lmpipe.retriever import Passage, Retriever
from lmpipe.storage.hashing import digest, digest_path
from lmpipe.validation.arguments import check_items, check_whole_number


@final
class ColbertRetriever(Retriever):
    """Searches passages by the token vectors of an encoder.

    Args:
        encoder: Makes the vectors of queries.
        passages: Texts in parts; passages are numbered through the parts, from 0.
        index: Ranks the numbers.
        name: See `Retriever.name`.
    """

    def __init__(
        self, encoder: ColbertEncoder, passages: Sequence[Sequence[PassageText]], index: TokenIndex, name: str
    ) -> None:
        self._encoder, self._parts, self._index, self._name = encoder, passages, index, name
        self._starts = [0, *accumulate(map(len, passages))]

    @property
    def name(self) -> str:
        return self._name

    def search(self, queries: Sequence[str], k: int) -> list[list[Passage] | EngineError]:
        queries, k = check_items("queries", queries, str), check_whole_number("k", k)
        asked = [number for number, query in enumerate(queries) if query.strip()]
        found: list[list[Passage] | EngineError] = [[] for _ in queries]
        if asked:
            vectors = self._encoder.encode_queries([queries[number] for number in asked])
            finite = vectors.isfinite().flatten(1).all(1)
            rankings = iter(self._index.search(vectors[finite], k))
            for number, able in zip(asked, finite.tolist(), strict=True):
                found[number] = self._passages(next(rankings)) if able else _no_numbers(queries[number])
        return found

    def _passages(self, ranking: Ranking) -> list[Passage]:
        found = []
        for number, score in zip(*ranking, strict=True):
            part = bisect.bisect_right(self._starts, number) - 1
            passage = self._parts[part][number - self._starts[part]]
            found.append(Passage(passage.id, passage.full, score))
        return found


def _no_numbers(query: str) -> EngineError:
    return EngineError(f"the encoder gave values that are no finite numbers for the query {query[:80]!r}")


def open_index(
    folder: str | Path,
    *,
    encoder: ColbertEncoder | None = None,
    verify: bool = True,
    settings: Callable[[int, int], SearchSettings] = SearchSettings.of,
) -> ColbertRetriever:
    """Opens an index that `build_index` made, or its command ``lmpipe index build``.

    Args:
        folder: Of the index.
        encoder: Makes the vectors of queries; by default the one that the index names is loaded.
        verify: Whether all files are compared with their checksums first: about a second for a gigabyte.
        settings: How much a search for the best k looks at, if the index is PLAID's.

    Raises:
        ConfigError: If there is no finished index, or it was made with another encoder.
        CorruptBlob: If a file of it is missing or damaged.
    """
    folder = Path(folder)
    manifest = Manifest.read(folder)
    if verify:
        manifest.verify(folder)
    known = manifest.encoder
    encoder = encoder or load_encoder(known.spec)
    if encoder.digest != known.digest:
        raise ConfigError(
            f"{folder} was made with the encoder {known.spec!r} ({known.digest}), and this one is {encoder.name!r} "
            f"({encoder.digest}); open it with the former, or build it again"
        )
    parts = manifest.folders(folder)
    if manifest.plaid is None:
        segments = [Segment(part) for part in parts]
        exact = ExactIndex(segments, manifest.deleted)
        return ColbertRetriever(encoder, [segment.passages for segment in segments], exact, manifest.digest)
    plaid = PlaidIndex(parts[-1], settings)
    name = digest([manifest.digest, _identity(settings)])
    return ColbertRetriever(encoder, [PassageTexts(part) for part in parts[:-1]], plaid, name)


def open_colbert_index(
    folder: str | Path,
    *,
    passages: str | Path | None = None,
    encoder: ColbertEncoder | None = None,
    settings: Callable[[int, int], SearchSettings] = SearchSettings.of,
    header: bool = False,
) -> ColbertRetriever:
    """Opens an index that the package colbert-ai built. It has no checksums: damage is found only where it shows.

    Args:
        folder: The index, with ``metadata.json``.
        passages: The collection that it was built from; by default the file that it names.
        encoder: Makes the vectors of queries; by default the checkpoint that the index names is loaded.
        settings: How much a search for the best k looks at.
        header: Of the collection; see `read_passages`.

    Raises:
        ConfigError: If its collection or checkpoint is not there.
        StoreError: If there is no such index, or it is damaged, or has more or fewer passages than the collection.
    """
    folder = Path(folder)
    config = read_metadata(folder)["config"]
    collection = passages or config.get("collection")
    if not isinstance(collection, (str, Path)):
        raise ConfigError(f"{folder} does not name the file of its passages; pass passages=...")
    index, texts = PlaidIndex(folder, settings), list(read_passages(collection, header=header))
    if len(texts) != len(index):
        raise StoreError(f"{folder} has {len(index)} passages and {collection} {len(texts)}; pass what it was built of")
    if encoder is None:
        if not isinstance(checkpoint := config.get("checkpoint"), str):
            raise ConfigError(f"{folder} does not name its checkpoint; pass encoder=...")
        encoder = load_encoder(checkpoint)
    return ColbertRetriever(
        encoder,
        [texts],
        index,
        digest([digest_path(folder), _identity(settings)]),
    )


def _identity(settings: Callable[[int, int], SearchSettings]) -> str:
    """What recorded results are looked up by; if nothing identifies the settings, none will ever be found."""
    return identity(settings=settings) or uuid4().hex
