"""``lmpipe serve-index``: a retriever for programs on other machines."""

from __future__ import annotations

from typing import Annotated

import typer

from lmpipe.errors import ConfigError


def serve_index(
    spec: Annotated[str, typer.Argument(help="Folder of an index, or `bm25:PASSAGES`.")],
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for all of this machine.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.")] = 8893,
) -> None:
    """Serves an index over HTTP, in the JSON of ColBERT's own server."""
    try:
        import uvicorn

        from lmpipe.retrieval.serve import application
    except ImportError as error:
        raise ConfigError(f"{error}; run: pip install 'lmpipe[serve]'") from error
    from lmpipe.retrieval import load_retriever

    uvicorn.run(application(load_retriever(spec)), host=host, port=port, log_level="warning", access_log=False)
