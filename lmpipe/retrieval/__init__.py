"""Late-interaction retrieval: ColBERT checkpoints, indexes over token vectors, and the retrievers made of them.

A passage is a row of token vectors; a query is another; the score of a passage is the sum, over the query's vectors, of
the largest product with any vector of the passage (MaxSim; Khattab and Zaharia 2020, arXiv 2004.12832). Nothing here is
imported before it is made: see `load_retriever`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lmpipe.errors import ConfigError
from lmpipe.retriever import Retriever
from lmpipe.text.secrets import redact_spec


def load_retriever(spec: str | Path, passages: str | Path | None = None, *, header: bool = False) -> Retriever:
    """Makes the retriever that a short text names.

    Args:
        spec: A folder, or ``"index:FOLDER"``, for an index of `lmpipe.retrieval.index`; ``"http://HOST:PORT"`` for a
            server, which is sent the token in ``$LMPIPE_TOKEN`` if that is set; ``"bm25:PASSAGES"`` for BM25 over a
            file of passages (`lmpipe.retrieval.passages.read_passages`); ``"dense:PASSAGES"`` for the vectors of the
            bundled encoder, which are kept in ``$LMPIPE_CACHE``.
        passages: The file for a spec that names none, such as ``"bm25"``.
        header: Of a file of passages; see `lmpipe.retrieval.passages.read_passages`.

    Raises:
        ConfigError: If the text names no retriever, or it cannot be made.
        CorruptBlob: If an index is damaged.
    """
    spec = str(spec)
    kind, _, rest = spec.partition(":")
    if kind in ("bm25", "dense"):
        return _over_passages(kind, rest or passages, header)
    if header:
        raise ConfigError(f"header is for 'bm25:PASSAGES' and 'dense:PASSAGES', not {redact_spec(spec)!r}")
    if kind in ("http", "https"):
        with _needs_extra():
            from lmpipe.retrieval.remote import RemoteRetriever
        return RemoteRetriever(spec, token=os.environ.get("LMPIPE_TOKEN", ""))
    if kind == "index" or os.path.isdir(spec):
        from lmpipe.retrieval.index import open_index

        return open_index(rest or spec)
    raise ConfigError(
        f"unknown retriever {redact_spec(spec)!r}; write the FOLDER of an index, 'http://HOST:PORT', 'bm25:PASSAGES' "
        "or 'dense:PASSAGES'"
    )


def _over_passages(kind: str, path: str | Path | None, header: bool) -> Retriever:
    """A retriever that is made anew from a file of passages each time."""
    if path is None:
        raise ConfigError(f"{kind!r} searches a file of passages; write '{kind}:PASSAGES'")
    from lmpipe.retrieval.passages import read_passages

    texts = list(read_passages(path, header=header))
    if kind == "dense":
        from lmpipe.engines import load_embedder
        from lmpipe.engines.bundled_files import cache_folder
        from lmpipe.retrieval.dense import DenseRetriever

        return DenseRetriever(texts, load_embedder("bundled"), cache_folder())
    with _needs_extra():
        from lmpipe.retrieval.bm25 import BM25Retriever
    return BM25Retriever(texts)


@contextmanager
def _needs_extra() -> Iterator[None]:
    """Says what to install where an import fails."""
    try:
        yield
    except ImportError as error:
        raise ConfigError(f"{error}; this retriever needs: pip install 'lmpipe[retrieval]'") from error
