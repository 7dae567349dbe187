"""The training loop of encoders: transformers' `Trainer`, with checkpoints that a killed training goes on from.

Knows nothing of where examples come from.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, final

import torch
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from transformers import PrinterCallback, TrainerCallback, TrainingArguments
from transformers import Trainer as HFTrainer

from lmpipe.engines.precision import multiplies_bfloat16
from lmpipe.engines.training.checkpoints import (
    SAVE_ERRORS,
    CheckpointMarkerCallback,
    checkpoint_folder,
    last_complete_checkpoint,
)
from lmpipe.engines.training.fit import seeded
from lmpipe.errors import TrainingDiverged
from lmpipe.retrieval.colbert.network import ColbertNetwork
from lmpipe.retrieval.training.loss import Batch, Collator, batch_loss
from lmpipe.retrieval.training.mining import TrainingExample
from lmpipe.storage.files import explain_write_errors
from lmpipe.validation.checks import check_settings

_BelowOne = Annotated[float, Field(ge=0, lt=1)]


@final
@dataclass(frozen=True)
class ColbertTrainingConfig:
    """How an encoder is trained.

    Args:
        rounds: How often negatives are mined anew, by the encoder as it is then, and trained on.
        epochs: Of a round.
        batch_size: Questions of a step; the passages of all are negatives of the others.
        negatives: Mined ones of each question and epoch, drawn from the first `depth`.
        depth: See `negatives`.
        learning_rate: Of the encoder; falls linearly to 0 in each round.
        projection_rate: Of the projection, likewise.
        warmup: Share of a round's steps in which the rates rise.
        weight_decay: Of all weights.
        temperature: What scores are divided by in the loss.
        dropout: Share of activations that are dropped; the checkpoint's own is passed over.
        checkpoint_steps: Steps between two points that a killed training goes on from.

    Raises:
        ConfigError: If a number is out of its range.
    """

    rounds: PositiveInt = 1
    epochs: PositiveInt = 1
    batch_size: PositiveInt = 16
    negatives: NonNegativeInt = 2
    depth: PositiveInt = 50
    learning_rate: NonNegativeFloat = 1e-4
    projection_rate: NonNegativeFloat = 1e-3
    warmup: _BelowOne = 0.1
    weight_decay: NonNegativeFloat = 0.01
    temperature: PositiveFloat = 0.2
    dropout: _BelowOne = 0.0
    checkpoint_steps: PositiveInt = 50

    def __post_init__(self) -> None:
        check_settings(self)


def fit(
    network: ColbertNetwork,
    collator: Collator,
    examples: Sequence[TrainingExample],
    tuning: ColbertTrainingConfig,
    seed: int,
    folder: Path,
    advance: Callable[[int], None] = lambda steps: None,
) -> list[float]:
    """Trains on examples in their order, going on from the last whole checkpoint.

    Args:
        network: Is trained in place, on the GPU if there is one.
        collator: Makes batches of examples.
        examples: At least one.
        tuning: Settings.
        seed: Of dropout.
        folder: Where checkpoints go, and come from.
        advance: Is told of steps.

    Returns:
        The loss of each step, those before a kill included.

    Raises:
        TrainingDiverged: If a loss, a gradient or a weight becomes NaN or infinite.
        StoreError: If a checkpoint cannot be written.
    """
    groups = [
        {"params": list(network.backbone.parameters()), "lr": tuning.learning_rate},
        {"params": list(network.projection.parameters()), "lr": tuning.projection_rate},
    ]
    for module in network.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = tuning.dropout
    with seeded(seed):
        trainer = _Trainer(
            model=network,
            args=_arguments(tuning, seed, len(examples), folder),
            train_dataset=list(examples),
            data_collator=collator,
            optimizers=(torch.optim.AdamW(groups, weight_decay=tuning.weight_decay), None),
            callbacks=[_Steps(advance), _Finite(), CheckpointMarkerCallback()],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.temperature, trainer.expands = tuning.temperature, collator.tokens.expands
        try:
            trainer.train(resume_from_checkpoint=last_complete_checkpoint(folder))
        finally:  # or the network would compute in bfloat16 for ever
            trainer.accelerator.unwrap_model(network, keep_fp32_wrapper=False)
            network.eval()
    if not all(bool(weight.isfinite().all()) for weight in network.parameters()):
        raise _diverged(trainer.state.global_step, "a weight")
    return [round(entry["loss"], 6) for entry in trainer.state.log_history if "loss" in entry]


def _diverged(step: int, what: str) -> TrainingDiverged:
    return TrainingDiverged(
        f"the training of the encoder diverged: {what} was NaN or infinite at step {step}; train with a lower "
        "learning_rate or projection_rate, or a higher temperature, into another folder",
        step,
    )


def step_count(examples: int, tuning: ColbertTrainingConfig) -> int:
    """How many steps `fit` makes of so many examples."""
    return -(-examples // tuning.batch_size)


def _arguments(tuning: ColbertTrainingConfig, seed: int, examples: int, folder: Path) -> TrainingArguments:
    cuda = torch.cuda.is_available()
    return TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=tuning.batch_size,
        num_train_epochs=1,  # the examples are those of all epochs
        learning_rate=tuning.learning_rate,
        warmup_steps=round(tuning.warmup * step_count(examples, tuning)),
        bf16=multiplies_bfloat16(torch.device("cuda" if cuda else "cpu")),
        use_cpu=not cuda,
        seed=seed % 2**32,
        logging_steps=1,
        logging_nan_inf_filter=False,  # or a loss that is no number would be logged as the mean of the others
        save_strategy="steps",
        save_steps=tuning.checkpoint_steps,
        save_total_limit=1,
        dataloader_pin_memory=False,
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
    )


@final
class _Steps(TrainerCallback):
    """Tells of steps, those before a kill included."""

    def __init__(self, advance: Callable[[int], None]) -> None:
        self._advance, self._told = advance, 0

    def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        self._advance(state.global_step - self._told)
        self._told = state.global_step


@final
class _Finite(TrainerCallback):
    """Ends a training that diverges, before anything of that step is saved."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **others: Any) -> None:
        for name, what in (("loss", "the loss"), ("grad_norm", "the norm of the gradient")):
            if not math.isfinite(float((logs or {}).get(name) or 0)):
                raise _diverged(state.global_step, what)


@final
class _Trainer(HFTrainer):
    temperature: float
    expands: bool

    def _get_train_sampler(self, train_dataset: Any = None) -> torch.utils.data.Sampler[int]:
        examples: Any = self.train_dataset
        return torch.utils.data.SequentialSampler(examples)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        with explain_write_errors(checkpoint_folder(self.args, self.state.global_step), SAVE_ERRORS):
            super()._save_checkpoint(model, trial)

    def compute_loss(
        self, model: Any, inputs: Batch, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        return batch_loss(model, inputs, self.temperature, expands=self.expands)
