"""The training loop: transformers' `Trainer` on packed batches, with checkpoints from which a killed training resumes.

Knows nothing about the origin of the rows or the destination of the weights.
"""

from __future__ import annotations

import math
import os
import random
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any, final

import numpy as np
import torch
from peft import PeftModel
from transformers import EarlyStoppingCallback, PrinterCallback, TrainingArguments
from transformers import Trainer as HFTrainer

from lmpipe.engines.local.adapters import no_peft_warnings, prefix_key_values, swapped_parameters
from lmpipe.engines.precision import multiplies_bfloat16
from lmpipe.engines.training.batch_sampler import StratifiedSampler, tokens_per_step, train_eval_split
from lmpipe.engines.training.callbacks import ObserverCallback, TrainingObserver
from lmpipe.engines.training.checkpoints import (
    SAVE_ERRORS,
    CheckpointMarkerCallback,
    checkpoint_folder,
    last_complete_checkpoint,
)
from lmpipe.engines.training.divergence import DivergenceCallback, divergence_error
from lmpipe.engines.training.fused_decoder import FusedTrainingDecoder
from lmpipe.engines.training.losses import num_items, summed_loss, with_reference_logprobs
from lmpipe.engines.training.packed_batch import PackedBatch, Targets, TokenizedRow, collate
from lmpipe.engines.tuning_config import TuningConfig
from lmpipe.storage.files import explain_write_errors
from lmpipe.trainer import Objective


@final
@dataclass(frozen=True)
class FitResult:
    """The losses and costs of a training; see `lmpipe.trainer.TrainingResult` for the units of the losses.

    Attributes:
        losses: Loss of each optimizer step.
        eval_losses: Loss on held-out rows after each epoch; empty if no rows were held out.
        tokens: Number of tokens in the rows of all steps.
        stopped: Reason why the training was stopped early; empty if it was not.
        gpu_seconds: Seconds on all GPUs together, without the time before a kill.
    """

    losses: tuple[float, ...]
    eval_losses: tuple[float, ...] = ()
    tokens: int = 0
    stopped: str = ""
    gpu_seconds: float = 0.0


def fit(
    model: Any,
    rows: Sequence[TokenizedRow],
    tuning: TuningConfig,
    seed: int,
    folder: Path,
    objective: Objective,
    observer: TrainingObserver,
) -> FitResult:
    """Trains the parameters that require gradients, starting from the last complete checkpoint if there is one.

    Args:
        model: A `PeftModel` with one adapter, or a causal LM, with lmpipe's attention. In its current state, it is the
            reference model of objectives that have one.
        rows: Rows to train on and to hold out, at least one.
        tuning: Settings of the training.
        seed: Seed of every random choice.
        folder: Folder of the checkpoints.
        objective: Loss to minimize.
        observer: Receives progress; may stop the training.

    Returns:
        The losses of all steps, including those before a kill.

    Raises:
        StoreError: If a checkpoint cannot be written.
        TrainingDiverged: If a loss, a gradient, a weight or a reference is NaN or infinite.
    """
    started = perf_counter()
    virtual_tokens = tuning.virtual_tokens if tuning.method == "prefix" else 0
    collator = partial(collate, virtual_tokens=virtual_tokens, num_items=partial(num_items, objective))
    arguments = _arguments(tuning, seed, folder, model.device)
    fused = None
    if not (tuning.gradient_checkpointing or arguments.world_size > 1):
        fused = FusedTrainingDecoder.create(model, torch.bfloat16 if arguments.bf16 else torch.float32)
    bfloat16_weights = _bfloat16_weights(model) if arguments.bf16 and fused is None else {}
    logits_of = partial(_logits_without_gradients, model, fused, collator, bf16=arguments.bf16)
    with swapped_parameters(model, bfloat16_weights):
        micro_batch_size = tuning.batch_size // tuning.gradient_accumulation_steps
        rows = with_reference_logprobs(objective, rows, micro_batch_size, logits_of)
    if not all(math.isfinite(value) for row in rows for value in row.reference_logprobs):
        raise divergence_error("the log-probabilities under the initial weights are NaN or infinite", tuning, 0)
    train_rows, eval_rows = train_eval_split(rows, tuning.eval_fraction, seed)
    tokens = tokens_per_step(train_rows, tuning, arguments.seed, arguments.world_size)
    observer_callback = ObserverCallback(observer, tokens, has_eval_rows=bool(eval_rows))
    divergence = DivergenceCallback(tuning, (weight for weight in model.parameters() if weight.requires_grad))
    checkpoint = last_complete_checkpoint(folder)
    completed_steps = int(checkpoint.rpartition("-")[2]) if checkpoint else 0
    if 0 < completed_steps < len(tokens) and observer_callback.stops_after(completed_steps):
        arguments.max_steps = completed_steps  # otherwise the trainer would do one more step
    trainer = _PackedTrainer(
        fused,
        model=model,
        args=arguments,
        train_dataset=train_rows,
        eval_dataset=eval_rows or None,
        data_collator=collator,
        compute_loss_func=partial(_loss, objective),
        callbacks=[
            divergence,
            observer_callback,
            CheckpointMarkerCallback(),
            *([EarlyStoppingCallback(tuning.patience)] if eval_rows else []),
        ],
    )
    trainer.remove_callback(PrinterCallback)
    checkpointing = _gradient_checkpointing(model) if tuning.gradient_checkpointing else nullcontext()
    try:
        with no_peft_warnings(), swapped_parameters(model, bfloat16_weights), checkpointing:
            trainer.train(resume_from_checkpoint=checkpoint)
            logits, _ = logits_of(train_rows[:1])  # no loss was computed since the last step changed the weights
            problems = [] if bool(torch.isfinite(logits).all()) else ["the logits are NaN or infinite"]
            divergence.check(problems, trainer.state)  # the weights may also be those of a checkpoint
    finally:  # otherwise the model would compute in bfloat16 from now on
        trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    losses, eval_losses = _logged(trainer, "loss"), _logged(trainer, "eval_loss")
    gpu_seconds = 0.0 if arguments.use_cpu else arguments.world_size * (perf_counter() - started)
    return FitResult(
        losses, eval_losses, observer_callback.tokens_after(len(losses)), observer_callback.stopped, gpu_seconds
    )


def _logged(trainer: HFTrainer, name: str) -> tuple[float, ...]:
    return tuple(round(entry[name], 6) for entry in trainer.state.log_history if name in entry)


def _arguments(tuning: TuningConfig, seed: int, folder: Path, device: torch.device) -> TrainingArguments:
    has_eval_rows, cpu = tuning.eval_fraction > 0, device.type == "cpu"
    micro_batch_size = tuning.batch_size // tuning.gradient_accumulation_steps
    return TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=micro_batch_size,
        per_device_eval_batch_size=micro_batch_size,
        gradient_accumulation_steps=tuning.gradient_accumulation_steps,
        num_train_epochs=tuning.epochs,
        learning_rate=tuning.learning_rate,
        lr_scheduler_type=tuning.schedule,
        warmup_steps=tuning.warmup_steps,
        adam_beta2=tuning.beta2,
        weight_decay=tuning.weight_decay,
        bf16=tuning.bf16 and multiplies_bfloat16(device),
        use_cpu=cpu,
        ddp_backend="gloo" if cpu and "WORLD_SIZE" in os.environ else None,
        seed=seed % 2**32,
        logging_steps=1,
        logging_nan_inf_filter=False,  # the filter would log 0 instead of NaN or infinity
        save_strategy="epoch" if has_eval_rows else "steps",
        save_steps=tuning.checkpoint_steps,
        save_total_limit=2,
        eval_strategy="epoch" if has_eval_rows else "no",
        load_best_model_at_end=has_eval_rows,
        metric_for_best_model="eval_loss" if has_eval_rows else None,
        restore_callback_states_from_checkpoint=has_eval_rows,  # otherwise patience would start again
        prediction_loss_only=True,
        dataloader_pin_memory=False,
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
    )


def _loss(
    objective: Objective, outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None
) -> torch.Tensor:
    """Returns the summed loss divided by the number of items in the step; there is one label for each item."""
    count = len(labels) - 1 if num_items_in_batch is None else num_items_in_batch
    return summed_loss(objective, outputs["logits"], outputs["targets"]) / count


def _logits_without_gradients(
    model: Any,
    fused: FusedTrainingDecoder | None,
    collator: Callable[[Sequence[TokenizedRow]], dict[str, Any]],
    rows: Sequence[TokenizedRow],
    *,
    bf16: bool,
) -> tuple[torch.Tensor, Targets]:
    """Returns the logits and targets of rows under the current model, computed as in training."""
    inputs = collator(rows)
    targets: Targets = inputs.pop("targets").to(model.device)
    inputs = {
        name: value.to(model.device) if isinstance(value, torch.Tensor | PackedBatch) else value
        for name, value in inputs.items()
        if name != "labels"
    }
    with torch.no_grad(), torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
        return _logits(model.eval(), fused, inputs), targets


def _logits(model: Any, fused: FusedTrainingDecoder | None, inputs: dict[str, Any]) -> torch.Tensor:
    """Returns the logits at the positions in ``logits_to_keep``, shape (positions, vocabulary)."""
    if fused is not None:
        names = ("input_ids", "position_ids", "logits_to_keep", "forward_batch")
        return fused.logits(*(inputs[name] for name in names))
    if isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning:
        inputs["forward_batch"].past = prefix_key_values(model)
        model = model.get_base_model()
    logits: torch.Tensor = model(**inputs)["logits"]
    return logits[0]


@final
class _PackedTrainer(HFTrainer):
    def __init__(self, fused: FusedTrainingDecoder | None, **options: Any) -> None:
        super().__init__(**options)
        self._fused = fused

    def _get_train_sampler(self, train_dataset: Any = None) -> torch.utils.data.Sampler[int]:
        rows: Any = self.train_dataset
        return StratifiedSampler(rows, self.args.seed)

    def floating_point_ops(self, inputs: Any) -> int:
        """Returns 0: nothing uses the number, for which transformers counts all parameters in every step."""
        return 0

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        with explain_write_errors(checkpoint_folder(self.args, self.state.global_step), SAVE_ERRORS):
            super()._save_checkpoint(model, trial)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        forward: Any = partial(self._forward, model)
        return super().compute_loss(forward, inputs, return_outputs, num_items_in_batch)

    def _forward(self, model: Any, targets: Targets, **inputs: Any) -> dict[str, Any]:
        """Computes the inputs of the loss function."""
        with self.accelerator.autocast():  # the trainer applies it to the whole model, but not to the base model
            return {"logits": _logits(model, self._fused, inputs), "targets": targets}


def _bfloat16_weights(model: Any) -> dict[str, torch.Tensor]:
    """Casts frozen float32 weights of linear layers to bfloat16, as autocast would do in every forward pass."""
    tied = {id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Embedding)}
    return {
        f"{name}.weight": module.weight.detach().to(torch.bfloat16)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
        and module.weight.dtype == torch.float32
        and not module.weight.requires_grad
        and id(module.weight) not in tied
    }


@contextmanager
def _gradient_checkpointing(model: Any) -> Iterator[None]:
    """Enables gradient checkpointing; transformers' old method names work in all supported versions."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)
        model.gradient_checkpointing_enable({"use_reentrant": False})
        try:
            yield
        finally:
            model.gradient_checkpointing_disable()


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seeds the global random generators, which PEFT and the training loop use, and restores them afterwards."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)
