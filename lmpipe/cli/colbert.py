"""``lmpipe colbert``: fine-tunes ColBERT checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from lmpipe.cli.index import ENCODER_HELP, HEADER_HELP, PASSAGES_HELP
from lmpipe.cli.terminal import new_console, styled
from lmpipe.reporter import Reporter

app = typer.Typer(no_args_is_help=True, help="Fine-tunes ColBERT checkpoints.")
console = new_console()

QUESTIONS_HELP = "JSON Lines with the fields question and titles, or those of HotPotQA; may be gzipped."


@app.callback()
def group() -> None:
    """Makes ``train`` a subcommand even though it is the only command of the group."""


@app.command()
def train(
    passages: Annotated[Path, typer.Option(help=PASSAGES_HELP)],
    questions: Annotated[Path, typer.Option(help=f"Training questions: {QUESTIONS_HELP}")],
    out: Annotated[Path, typer.Option(help="Folder of the new checkpoint.")],
    encoder: Annotated[str, typer.Option(help=ENCODER_HELP)] = "colbert-ir/colbertv2.0",
    validation: Annotated[
        Path | None, typer.Option(help="Validation questions, in the same format; they select the best round.")
    ] = None,
    rounds: Annotated[int, typer.Option(help="Number of rounds; in each, negatives are mined and trained on.")] = 1,
    epochs: Annotated[int, typer.Option(help="Epochs per round.")] = 1,
    batch_size: Annotated[int, typer.Option(help="Questions per training step.")] = 16,
    negatives: Annotated[int, typer.Option(help="Mined negatives per question.")] = 2,
    learning_rate: Annotated[float, typer.Option(help="Learning rate of the encoder.")] = 1e-4,
    projection_rate: Annotated[float, typer.Option(help="Learning rate of the projection.")] = 1e-3,
    temperature: Annotated[float, typer.Option(help="Divisor of the scores in the loss.")] = 0.2,
    seed: Annotated[int, typer.Option(help="Seed of all random choices.")] = 0,
    header: Annotated[bool, typer.Option(help=HEADER_HELP)] = False,
) -> None:
    """Fine-tunes a checkpoint on questions and their gold passages. Run the command again to resume a training."""
    from lmpipe.retrieval.colbert import load_encoder
    from lmpipe.retrieval.passages import read_passages
    from lmpipe.retrieval.training.fit import ColbertTrainingConfig
    from lmpipe.retrieval.training.questions import read_questions
    from lmpipe.retrieval.training.train import RECALL_CUTOFFS, TrainingData, train_encoder

    data = TrainingData(
        list(read_passages(passages, header=header)),
        read_questions(questions),
        read_questions(validation) if validation else (),
    )
    config = ColbertTrainingConfig(
        rounds=rounds,
        epochs=epochs,
        batch_size=batch_size,
        negatives=negatives,
        learning_rate=learning_rate,
        projection_rate=projection_rate,
        temperature=temperature,
    )
    results = train_encoder(load_encoder(encoder), data, out, config, seed=seed, progress=Reporter())
    table = Table("round", "first loss", "last loss", *(f"recall@{k}" for k in RECALL_CUTOFFS), title=styled(str(out)))
    for result in results:
        losses = [f"{loss:.3f}" for loss in (result.losses[0], result.losses[-1])] if result.losses else ["", ""]
        table.add_row(str(result.number), *losses, *(f"{recall:.3f}" for recall in result.recall.values()))
    console.print(table)
