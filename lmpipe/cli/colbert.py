"""``lmpipe colbert``: fine-tunes ColBERT checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from lmpipe.cli.index import ENCODER_HELP, HEADER_HELP
from lmpipe.cli.terminal import new_console, progress_bars, styled

app = typer.Typer(no_args_is_help=True, help="Fine-tune ColBERT checkpoints.")
console = new_console()

QUESTIONS_HELP = "JSON Lines with question and titles, or in HotPotQA's fields; may be .gz."


@app.callback()
def group() -> None:
    """Makes ``train`` a command of its own, though it is the only one yet."""


@app.command()
def train(
    passages: Annotated[Path, typer.Option(help="JSON Lines with pid, text and title, or ColBERT's TSV; may be .gz.")],
    questions: Annotated[Path, typer.Option(help=f"To train on: {QUESTIONS_HELP}")],
    out: Annotated[Path, typer.Option(help="Folder of the new checkpoint.")],
    encoder: Annotated[str, typer.Option(help=ENCODER_HELP)] = "colbert-ir/colbertv2.0",
    validation: Annotated[Path | None, typer.Option(help="Questions to choose the best round by.")] = None,
    rounds: Annotated[int, typer.Option(help="How often negatives are mined anew and trained on.")] = 1,
    epochs: Annotated[int, typer.Option(help="Of a round.")] = 1,
    batch_size: Annotated[int, typer.Option(help="Questions of a step.")] = 16,
    negatives: Annotated[int, typer.Option(help="Mined ones of each question.")] = 2,
    learning_rate: Annotated[float, typer.Option(help="Of the encoder.")] = 1e-4,
    projection_rate: Annotated[float, typer.Option(help="Learning rate of the projection.")] = 1e-3,
    temperature: Annotated[float, typer.Option(help="What scores are divided by in the loss.")] = 0.2,
    seed: Annotated[int, typer.Option(help="Of every random choice.")] = 0,
    header: Annotated[bool, typer.Option(help=HEADER_HELP)] = False,
) -> None:
    """Fine-tunes a checkpoint on questions and their gold passages. Run again after an interruption, it goes on."""
    from lmpipe.retrieval.colbert import load_encoder
    from lmpipe.retrieval.passages import read_passages
    from lmpipe.retrieval.training.fit import ColbertTrainingConfig
    from lmpipe.retrieval.training.questions import read_questions
    from lmpipe.retrieval.training.train import KS, TrainingData, train_encoder

    data = TrainingData(
        list(read_passages(passages, header=header)),
        read_questions(questions),
        read_questions(validation) if validation else (),
    )
    tuning = ColbertTrainingConfig(
        rounds=rounds,
        epochs=epochs,
        batch_size=batch_size,
        negatives=negatives,
        learning_rate=learning_rate,
        projection_rate=projection_rate,
        temperature=temperature,
    )
    with progress_bars() as progress:
        results = train_encoder(load_encoder(encoder), data, out, tuning, seed=seed, progress=progress)
    table = Table("round", "first loss", "last loss", *(f"recall@{k}" for k in KS), title=styled(str(out)))
    for result in results:
        losses = [f"{result.losses[place]:.3f}" for place in (0, -1)] if result.losses else ["", ""]
        table.add_row(str(result.number), *losses, *(f"{share:.3f}" for share in result.recall.values()))
    console.print(table)
