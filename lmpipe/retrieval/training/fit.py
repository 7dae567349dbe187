"""The training loop of encoders: transformers' `Trainer`, with checkpoints from which a killed training is resumed.

Does not depend on how examples are created.
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
    """Settings of the training of an encoder.

    Args:
        rounds: Number of rounds; in each, negatives are mined with the current encoder and then trained on.
        epochs: Epochs per round.
        batch_size: Questions per step; each question's passages are negatives for the other questions.
        negatives: Mined negatives per question and epoch, drawn at random from the start of its ranking.
        depth: Number of passages at the start of a ranking from which negatives are drawn.
        learning_rate: Learning rate of the encoder; decays linearly to 0 in each round.
        projection_rate: Learning rate of the projection; decays in the same way.
        warmup: Share of a round's steps in which the learning rates increase.
        weight_decay: Weight decay of all weights.
        temperature: Divisor of the scores in the loss.
        dropout: Dropout rate; replaces that of the checkpoint.
        checkpoint_steps: Steps between two points from which a killed training is resumed.

    Raises:
        ConfigError: If a setting is out of range.
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
    config: ColbertTrainingConfig,
    seed: int,
    folder: Path,
    advance: Callable[[int], None] = lambda steps: None,
) -> list[float]:
    """Trains on examples in the given order, resuming from the last complete checkpoint.

    Args:
        network: Network that is trained in place, on the GPU if there is one.
        collator: Creates batches of examples.
        examples: Training examples, at least one.
        config: Training settings.
        seed: Seed of dropout.
        folder: Folder of the checkpoints.
        advance: Called with the number of steps since the last call.

    Returns:
        The loss of each step, including the steps before an interruption.

    Raises:
        TrainingDiverged: If a loss, a gradient or a weight becomes NaN or infinite.
        StoreError: If a checkpoint cannot be written.
    """
    groups = [
        {"params": list(network.backbone.parameters()), "lr": config.learning_rate},
        {"params": list(network.projection.parameters()), "lr": config.projection_rate},
    ]
    for module in network.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = config.dropout
    with seeded(seed):
        trainer = _ColbertTrainer(
            model=network,
            args=_arguments(config, seed, len(examples), folder),
            train_dataset=list(examples),
            data_collator=collator,
            optimizers=(torch.optim.AdamW(groups, weight_decay=config.weight_decay), None),
            callbacks=[_ProgressCallback(advance), _DivergenceCallback(), CheckpointMarkerCallback()],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.temperature = config.temperature
        trainer.query_expansion = collator.colbert_tokenizer.do_query_expansion
        try:
            trainer.train(resume_from_checkpoint=last_complete_checkpoint(folder))
        finally:  # otherwise the network would stay wrapped in bfloat16 autocasting
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


def step_count(examples: int, config: ColbertTrainingConfig) -> int:
    """Returns the number of steps in which `fit` trains on a number of examples."""
    return -(-examples // config.batch_size)


def _arguments(config: ColbertTrainingConfig, seed: int, examples: int, folder: Path) -> TrainingArguments:
    cuda = torch.cuda.is_available()
    return TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=config.batch_size,
        num_train_epochs=1,  # the examples of all epochs are in the data set
        learning_rate=config.learning_rate,
        warmup_steps=round(config.warmup * step_count(examples, config)),
        bf16=multiplies_bfloat16(torch.device("cuda" if cuda else "cpu")),
        use_cpu=not cuda,
        seed=seed % 2**32,
        logging_steps=1,
        logging_nan_inf_filter=False,  # otherwise a NaN loss would be logged as the mean of the others
        save_strategy="steps",
        save_steps=config.checkpoint_steps,
        save_total_limit=1,
        dataloader_pin_memory=False,
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
    )


@final
class _ProgressCallback(TrainerCallback):
    """Reports the progress of steps, including the steps before an interruption."""

    def __init__(self, advance: Callable[[int], None]) -> None:
        self._advance, self._reported = advance, 0

    def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        self._advance(state.global_step - self._reported)
        self._reported = state.global_step


@final
class _DivergenceCallback(TrainerCallback):
    """Stops a training that diverges, before the step is saved."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **others: Any) -> None:
        for name, what in (("loss", "the loss"), ("grad_norm", "the norm of the gradient")):
            if not math.isfinite(float((logs or {}).get(name) or 0)):
                raise _diverged(state.global_step, what)


@final
class _ColbertTrainer(HFTrainer):
    temperature: float
    query_expansion: bool

    def _get_train_sampler(self, train_dataset: Any = None) -> torch.utils.data.Sampler[int]:
        examples: Any = self.train_dataset
        return torch.utils.data.SequentialSampler(examples)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        with explain_write_errors(checkpoint_folder(self.args, self.state.global_step), SAVE_ERRORS):
            super()._save_checkpoint(model, trial)

    def compute_loss(
        self, model: Any, inputs: Batch, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        return batch_loss(model, inputs, self.temperature, query_expansion=self.query_expansion)
