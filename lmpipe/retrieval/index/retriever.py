"""Retrievers over indexes: passages are ranked by the token vectors of a ColBERT encoder.

Does not depend on how an index was built, or on how vectors are compared.
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
        encoder: Encoder of the queries.
        passages: Texts of the passages, in parts; passages are numbered through all parts, from 0.
        index: Index that ranks the passages by their numbers.
        name: Name of the retriever; see `Retriever.name`.
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
        positions = [position for position, query in enumerate(queries) if query.strip()]
        results: list[list[Passage] | EngineError] = [[] for _ in queries]
        if positions:
            vectors = self._encoder.encode_queries([queries[position] for position in positions])
            finite = vectors.isfinite().flatten(1).all(1)
            rankings = iter(self._index.search(vectors[finite], k))
            for position, is_finite in zip(positions, finite.tolist(), strict=True):
                results[position] = (
                    self._passages(next(rankings)) if is_finite else _not_finite_error(queries[position])
                )
        return results

    def _passages(self, ranking: Ranking) -> list[Passage]:
        passages = []
        for number, score in zip(*ranking, strict=True):
            part = bisect.bisect_right(self._starts, number) - 1
            passage = self._parts[part][number - self._starts[part]]
            passages.append(Passage(passage.id, passage.titled_text, score))
        return passages


def _not_finite_error(query: str) -> EngineError:
    return EngineError(f"the encoder returned values that are not finite for the query {query[:80]!r}")


def open_index(
    folder: str | Path,
    *,
    encoder: ColbertEncoder | None = None,
    verify: bool = True,
    settings: Callable[[int, int], SearchSettings] = SearchSettings.of,
) -> ColbertRetriever:
    """Opens an index that `build_index` or ``lmpipe index build`` built.

    Args:
        folder: Folder of the index.
        encoder: Encoder of the queries; by default the encoder that the index names is loaded.
        verify: Whether to compare all files with their checksums first, which takes about a second per gigabyte.
        settings: For a PLAID index, a function that returns the search settings for k and the number of bits.

    Raises:
        ConfigError: If the folder contains no finished index, or the index was built with another encoder.
        CorruptBlob: If a file of the index is missing or damaged.
    """
    folder = Path(folder)
    manifest = Manifest.read(folder)
    if verify:
        manifest.verify(folder)
    built_with = manifest.encoder
    encoder = encoder or load_encoder(built_with.spec)
    if encoder.digest != built_with.digest:
        raise ConfigError(
            f"{folder} was built with the encoder {built_with.spec!r} ({built_with.digest}), and this one is "
            f"{encoder.name!r} ({encoder.digest}); open it with the former, or build it again"
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
    """Opens an index that the package colbert-ai built.

    Such an index has no checksums, so damage is detected only if its files contradict each other.

    Args:
        folder: Folder of the index, with ``metadata.json``.
        passages: File of passages that the index was built from; by default the file that the index names.
        encoder: Encoder of the queries; by default the checkpoint that the index names is loaded.
        settings: Function that returns the search settings for k and the number of bits.
        header: Whether the first line of the file of passages is a header; see `read_passages`.

    Raises:
        ConfigError: If the file of passages or the checkpoint does not exist.
        StoreError: If the folder contains no index, the index is damaged, or the number of its passages differs from
            that of the file.
    """
    folder = Path(folder)
    config = read_metadata(folder)["config"]
    collection = passages or config.get("collection")
    if not isinstance(collection, (str, Path)):
        raise ConfigError(f"{folder} does not name its file of passages; pass passages=...")
    index, texts = PlaidIndex(folder, settings), list(read_passages(collection, header=header))
    if len(texts) != len(index):
        raise StoreError(
            f"{folder} has {len(index)} passages and {collection} has {len(texts)}; pass the file it was built from"
        )
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
    """Identifies the settings in the retriever's name; settings without an identity get a new name each time."""
    return identity(settings=settings) or uuid4().hex
