"""``lmpipe serve-index``: serves a retriever to programs on other machines."""

from __future__ import annotations

from typing import Annotated

import typer

from lmpipe.cli.index import HEADER_HELP
from lmpipe.cli.terminal import new_console, styled
from lmpipe.errors import ConfigError
from lmpipe.retrieval.server.limits import ServerLimits
from lmpipe.text.secrets import redact_spec

console = new_console(soft_wrap=True)


def serve_index(
    spec: Annotated[str, typer.Argument(help="Folder of an index, or `bm25:PASSAGES` for BM25 over a file.")],
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for all interfaces.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0 for any free port.")] = 8893,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(
            help="Host name that clients may use for this server, in addition to --host; can be repeated; `*` allows "
            "every name."
        ),
    ] = None,
    token: Annotated[
        str | None,
        typer.Option(
            envvar="LMPIPE_TOKEN", help="Token that clients must send. Set the variable to hide the token from `ps`."
        ),
    ] = None,
    header: Annotated[bool, typer.Option(help=HEADER_HELP)] = False,
    max_body: Annotated[int, typer.Option(help="Maximum size of a request in bytes.")] = ServerLimits.body,
    max_queries: Annotated[int, typer.Option(help="Maximum number of queries per request.")] = ServerLimits.queries,
    max_characters: Annotated[
        int, typer.Option(help="Maximum number of characters per query.")
    ] = ServerLimits.characters,
    max_k: Annotated[int, typer.Option(help="Maximum number of passages per query.")] = ServerLimits.k,
    max_passages: Annotated[
        int, typer.Option(help="Maximum number of passages per request, over all its queries.")
    ] = ServerLimits.passages,
    max_seconds: Annotated[
        int, typer.Option(help="Seconds within which a request must be received and answered.")
    ] = ServerLimits.seconds,
    max_requests: Annotated[
        int, typer.Option(help="Maximum number of requests in progress, including waiting ones.")
    ] = ServerLimits.requests,
    max_searches: Annotated[
        int, typer.Option(help="Maximum number of searches at the same time.")
    ] = ServerLimits.searches,
    max_idle: Annotated[
        int, typer.Option(help="Seconds after which an idle connection is closed.")
    ] = ServerLimits.idle,
) -> None:
    """Serves an index over HTTP, with the JSON API of ColBERT's own server."""
    try:
        from lmpipe.retrieval.server.access import AccessPolicy
        from lmpipe.retrieval.server.app import create_app
        from lmpipe.retrieval.server.uvicorn_server import bind_socket, make_server
    except ImportError as error:
        raise ConfigError(f"{error}; run: pip install 'lmpipe[serve]'") from error
    from lmpipe.retrieval import load_retriever

    limits = ServerLimits(
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
    access = AccessPolicy.for_host(host, allow_host or (), token)
    retriever = load_retriever(spec, header=header)
    with bind_socket(host, port) as listener:
        url = f"http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}"
        console.print(styled(f"serving {redact_spec(spec)} on {url}" + (" with a token" if token else "")))
        make_server(create_app(retriever, limits, access), limits.idle).run(sockets=[listener])
