"""Late-interaction retrieval: ColBERT checkpoints, indexes over token vectors, and retrievers built on them.

Passages and queries are encoded as one vector per token. The score of a passage is the sum, over the vectors of the
query, of the largest dot product with any vector of the passage (MaxSim; Khattab and Zaharia 2020, arXiv 2004.12832).
`load_retriever` imports a retriever's modules only when it creates that retriever.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lmpipe.errors import ConfigError
from lmpipe.retriever import Retriever
from lmpipe.text.secrets import redact_spec
from lmpipe.validation.arguments import check_type


def load_retriever(spec: str | Path, passages: str | Path | None = None, *, header: bool = False) -> Retriever:
    """Creates a retriever from a short description.

    Args:
        spec: Description of the retriever. A folder, or ``"index:FOLDER"``: an index of `lmpipe.retrieval.index`.
            ``"http://HOST:PORT"``: a server, which is sent the token in ``$LMPIPE_TOKEN`` if that variable is set.
            ``"bm25:PASSAGES"``: BM25 over a file of passages (`lmpipe.retrieval.passages.read_passages`).
            ``"dense:PASSAGES"``: vectors of the bundled sentence encoder, which are cached in ``$LMPIPE_CACHE``.
        passages: File of passages, if `spec` does not name one (as in ``"bm25"``).
        header: Whether the first line of the file of passages is a header; see
            `lmpipe.retrieval.passages.read_passages`.

    Raises:
        ConfigError: If `spec` does not describe a retriever, or the retriever cannot be created.
        CorruptBlob: If an index is damaged.
    """
    check_type("spec", spec, (str, Path), "load_retriever('bm25:passages.jsonl')")
    spec = str(spec)
    kind, _, rest = spec.partition(":")
    if kind in ("bm25", "dense"):
        return _load_from_passages(kind, rest or passages, header)
    if header:
        raise ConfigError(f"header applies to 'bm25:PASSAGES' and 'dense:PASSAGES' only, not to {redact_spec(spec)!r}")
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


def _load_from_passages(kind: str, path: str | Path | None, header: bool) -> Retriever:
    """Creates a retriever that is built from a file of passages each time."""
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
    """Turns an ImportError into a ConfigError that says what to install."""
    try:
        yield
    except ImportError as error:
        raise ConfigError(f"{error}; this retriever needs: pip install 'lmpipe[retrieval]'") from error
