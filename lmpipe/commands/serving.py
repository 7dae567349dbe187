"""``lmpipe serve-index``: a retriever for programs on other machines."""

from __future__ import annotations

from typing import Annotated

import typer

from lmpipe.commands.index import HEADER_HELP
from lmpipe.commands.terminal import new_console, styled
from lmpipe.errors import ConfigError
from lmpipe.secrets import hide_in_spec

console = new_console(soft_wrap=True)


def serve_index(
    spec: Annotated[str, typer.Argument(help="Folder of an index, or `bm25:PASSAGES`.")],
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for all of this machine.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.")] = 8893,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(help="Name that clients may call this server by, beside --host; may be repeated; `*` for any."),
    ] = None,
    token: Annotated[
        str | None,
        typer.Option(envvar="LMPIPE_TOKEN", help="That clients must send. The variable hides it from `ps`."),
    ] = None,
    header: Annotated[bool, typer.Option(help=HEADER_HELP)] = False,
    max_body: Annotated[int, typer.Option(help="Most bytes of a request.")] = 1 << 20,
    max_queries: Annotated[int, typer.Option(help="Most queries of a request.")] = 1024,
    max_characters: Annotated[int, typer.Option(help="Most characters of a query.")] = 8192,
    max_k: Annotated[int, typer.Option(help="Most passages for a query.")] = 1000,
    max_passages: Annotated[int, typer.Option(help="Most passages for all queries of a request.")] = 20_000,
    max_seconds: Annotated[int, typer.Option(help="In which a request must have come and be answered.")] = 60,
    max_requests: Annotated[int, typer.Option(help="Most requests that are answered, or wait, at the same time.")] = 64,
    max_searches: Annotated[int, typer.Option(help="Most of them that search at the same time.")] = 8,
    max_idle: Annotated[int, typer.Option(help="Seconds after which a connection of a silent client is closed.")] = 15,
) -> None:
    """Serves an index over HTTP, in the JSON of ColBERT's own server."""
    try:
        from lmpipe.retrieval.listen import listening, server
        from lmpipe.retrieval.serve import Access, Limits, application
    except ImportError as error:
        raise ConfigError(f"{error}; run: pip install 'lmpipe[serve]'") from error
    from lmpipe.retrieval import load_retriever

    limits = Limits(
        max_body,
        max_queries,
        max_characters,
        max_k,
        max_passages,
        max_seconds,
        max_requests,
        max_searches,
        max_idle,
    )
    access = Access.of(host, allow_host or (), token)
    retriever = load_retriever(spec, header=header)
    with listening(host, port) as accepting:
        url = f"http://{f'[{host}]' if ':' in host else host}:{accepting.getsockname()[1]}"
        console.print(styled(f"serving {hide_in_spec(spec)} on {url}" + (" with a token" if token else "")))
        server(application(retriever, limits, access), limits.idle).run(sockets=[accepting])
