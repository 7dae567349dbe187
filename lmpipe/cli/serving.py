"""``lmpipe serve-index``: a retriever for programs on other machines."""

from __future__ import annotations

from typing import Annotated

import typer

from lmpipe.cli.index import HEADER_HELP
from lmpipe.cli.terminal import new_console, styled
from lmpipe.errors import ConfigError
from lmpipe.retrieval.server.limits import Limits
from lmpipe.text.secrets import hide_in_spec

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
    max_body: Annotated[int, typer.Option(help="Most bytes of a request.")] = Limits.body,
    max_queries: Annotated[int, typer.Option(help="Most queries of a request.")] = Limits.queries,
    max_characters: Annotated[int, typer.Option(help="Most characters of a query.")] = Limits.characters,
    max_k: Annotated[int, typer.Option(help="Most passages for a query.")] = Limits.k,
    max_passages: Annotated[int, typer.Option(help="Most passages for all queries of a request.")] = Limits.passages,
    max_seconds: Annotated[
        int, typer.Option(help="In which a request must have come and be answered.")
    ] = Limits.seconds,
    max_requests: Annotated[
        int, typer.Option(help="Most requests that are answered, or wait, at the same time.")
    ] = Limits.requests,
    max_searches: Annotated[int, typer.Option(help="Most of them that search at the same time.")] = Limits.searches,
    max_idle: Annotated[
        int, typer.Option(help="Seconds after which a connection of a silent client is closed.")
    ] = Limits.idle,
) -> None:
    """Serves an index over HTTP, in the JSON of ColBERT's own server."""
    try:
        from lmpipe.retrieval.server.uvicorn_server import listening, server
        from lmpipe.retrieval.server.app import Access, application
    except ImportError as error:
        raise ConfigError(f"{error}; run: pip install 'lmpipe[serve]'") from error
    from lmpipe.retrieval import load_retriever

    limits = Limits(
        body=max_body,
        queries=max_queries,
        characters=max_characters,
        k=max_k,
        passages=max_passages,
        seconds=max_seconds,
        requests=max_requests,
        searches=max_searches,
        idle=max_idle,
    )
    access = Access.of(host, allow_host or (), token)
    retriever = load_retriever(spec, header=header)
    with listening(host, port) as accepting:
        url = f"http://{f'[{host}]' if ':' in host else host}:{accepting.getsockname()[1]}"
        console.print(styled(f"serving {hide_in_spec(spec)} on {url}" + (" with a token" if token else "")))
        server(application(retriever, limits, access), limits.idle).run(sockets=[accepting])
