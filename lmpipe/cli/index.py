"""``lmpipe index``: builds, inspects, searches and changes indexes of passages."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.table import Table

from lmpipe.cli.terminal import new_console, styled
from lmpipe.errors import ConfigError, EngineError
from lmpipe.reporter import Reporter

logger = logging.getLogger(__name__)
app = typer.Typer(no_args_is_help=True, help="Builds, inspects, searches and changes indexes of passages.")
console = new_console()

Folder = Annotated[Path, typer.Argument(help="Folder of the index.")]
PASSAGES_HELP = "File of passages: JSON Lines with pid, text and title, or ColBERT's TSV; may be gzipped."
ENCODER_HELP = "ColBERT checkpoint: a hub id, a folder, or `bundled`."
HEADER_HELP = "The first line of a .tsv file names its columns, and fields may be quoted, as in DPR's files."


@app.command()
def build(
    passages: Annotated[Path, typer.Argument(help=PASSAGES_HELP)],
    out: Folder,
    encoder: Annotated[str, typer.Option(help=ENCODER_HELP)] = "colbert-ir/colbertv2.0",
    engine: Annotated[
        Literal["auto", "exact", "plaid"],
        typer.Option(
            help="`exact` stores int8 vectors, `plaid` compresses them; `auto` is `exact` if the int8 vectors fit into "
            "--memory-mb."
        ),
    ] = "auto",
    bits: Annotated[int, typer.Option(help="Bits that `plaid` stores per component of a vector: 2 or 4.")] = 2,
    memory_mb: Annotated[int, typer.Option(help="Size in MB of the int8 vectors up to which `auto` is `exact`.")] = 320,
    chunk: Annotated[
        int, typer.Option(help="Number of passages between two points from which a build can be resumed.")
    ] = 4096,
    skip_malformed: Annotated[
        bool, typer.Option(help="Skip lines that are not passages, with a warning for each.")
    ] = False,
    header: Annotated[bool, typer.Option(help=HEADER_HELP)] = False,
) -> None:
    """Builds an index. Run the command again to resume an interrupted build."""
    from lmpipe.retrieval.colbert import load_encoder
    from lmpipe.retrieval.index import BuildSettings, build_index

    settings = BuildSettings(engine, bits, memory_mb * 1_000_000, chunk)
    build_index(
        passages,
        out,
        load_encoder(encoder),
        settings,
        on_malformed=_warn if skip_malformed else None,
        progress=Reporter(),
        header=header,
    )
    info(out)


@app.command()
def info(
    folder: Folder, verify: Annotated[bool, typer.Option(help="Compare all files with their checksums.")] = True
) -> None:
    """Shows the engine, encoder and size of an index."""
    from lmpipe.retrieval.index.manifest import Manifest

    manifest = Manifest.read(folder)
    if verify:
        manifest.verify(folder)
    size = sum(file.stat().st_size for part in manifest.folders(folder) for file in part.iterdir())
    table = Table(title=styled(str(folder)), show_header=False)
    for name, value in {
        "digest": manifest.digest,
        "engine": manifest.engine + (f", {manifest.plaid.bits} bits" if manifest.plaid else ""),
        "encoder": f"{manifest.encoder.spec} ({manifest.encoder.digest})",
        "passages": f"{manifest.passages:,}" + (f" ({len(manifest.deleted):,} deleted)" if manifest.deleted else ""),
        "token vectors": f"{manifest.tokens:,} of {manifest.encoder.dim} components",
        "size": f"{size / 1e6:,.1f} MB, {size / max(1, manifest.tokens):.1f} bytes per token, including texts",
        "checksums": "verified" if verify else "not verified",
    }.items():
        table.add_row(name, styled(value))
    console.print(table)


@app.command()
def search(
    folder: Folder,
    query: Annotated[list[str], typer.Argument(help="One or more queries.")],
    k: Annotated[int, typer.Option("-k", min=1, help="Maximum number of passages per query.")] = 5,
) -> None:
    """Searches an index."""
    from lmpipe.retrieval.index import open_index

    for text, passages in zip(query, open_index(folder).search(query, k), strict=True):
        if isinstance(passages, EngineError):
            raise passages
        table = Table("", "score", "id", "passage", title=styled(text), title_justify="left")
        for rank, passage in enumerate(passages, 1):
            table.add_row(str(rank), f"{passage.score:.2f}", styled(passage.id), styled(passage.text))
        console.print(table)


@app.command()
def add(
    folder: Folder,
    passages: Annotated[Path, typer.Argument(help=PASSAGES_HELP)],
    header: Annotated[bool, typer.Option(help=HEADER_HELP)] = False,
) -> None:
    """Adds passages to an exact index."""
    from lmpipe.retrieval.colbert import load_encoder
    from lmpipe.retrieval.index import add_passages
    from lmpipe.retrieval.index.manifest import Manifest
    from lmpipe.retrieval.passages import read_passages

    encoder = load_encoder(Manifest.read(folder).encoder.spec)
    add_passages(folder, list(read_passages(passages, header=header)), encoder, Reporter())
    info(folder, verify=False)


@app.command()
def delete(folder: Folder, ids: Annotated[list[str], typer.Argument(help="Ids of the passages to delete.")]) -> None:
    """Deletes passages from an exact index."""
    from lmpipe.retrieval.index import delete_passages

    delete_passages(folder, ids)
    info(folder, verify=False)


def _warn(problem: ConfigError) -> None:
    logger.warning("skipped: %s", problem)
