"""The training loop: transformers' `Trainer` over packed batches, with checkpoints that a killed training goes on from.

Knows nothing of where rows come from or where weights go.
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

from lmpipe.engines.local.adapters import in_place_of, learned_prefix, quiet
from lmpipe.engines.precision import multiplies_bfloat16
from lmpipe.engines.training.batch_sampler import SpreadSampler, split, step_tokens
from lmpipe.engines.training.callbacks import Watch, Watching
from lmpipe.engines.training.checkpoints import SAVING_FAILS, Seal, checkpoint_of, last_whole
from lmpipe.engines.training.divergence import Divergence, diverged
from lmpipe.engines.training.losses import items, total_loss, with_references
from lmpipe.engines.training.packed_batch import EncodedRow, Targets, TrainingLayout, collate
from lmpipe.engines.tuning_config import TuningConfig
from lmpipe.storage.files import writing
from lmpipe.trainer import Objective


@final
@dataclass(frozen=True)
class LossCurve:
    """Losses in the unit of the objective; see `lmpipe.trainer.TrainingResult`.

    Attributes:
        train: At each optimizer step.
        eval: After each epoch, if rows were held out.
        tokens: Of the rows of all steps.
        stopped: Why the training was stopped before it was through, or empty.
        gpu_seconds: That it took, the steps before a kill left out, for each GPU.
    """

    train: tuple[float, ...]
    eval: tuple[float, ...] = ()
    tokens: int = 0
    stopped: str = ""
    gpu_seconds: float = 0.0


def fit(
    model: Any,
    rows: Sequence[EncodedRow],
    tuning: TuningConfig,
    seed: int,
    folder: Path,
    objective: Objective,
    watch: Watch,
) -> LossCurve:
    """Trains what requires gradients, going on from the last whole checkpoint.

    Args:
        model: A `PeftModel` with one adapter, or a causal LM; under layouts. As it is now, it is the reference of
            objectives that have one.
        rows: At least one.
        tuning: Settings.
        seed: Of every random choice.
        folder: Where checkpoints go, and come from.
        objective: What is made of the rows.
        watch: Told how the training goes on; may stop it.

    Returns:
        The losses of all steps, those before a kill included.

    Raises:
        StoreError: If a checkpoint cannot be written.
        TrainingDiverged: If a loss, a gradient, a weight or a reference is NaN or infinite.
    """
    started = perf_counter()
    virtual = tuning.virtual_tokens if tuning.method == "prefix" else 0
    packed = partial(collate, virtual=virtual, items=partial(items, objective))
    arguments = _arguments(tuning, seed, folder, model.device)
    halved = _halved_weights(model) if arguments.bf16 else {}
    look = partial(_look, model, packed, bf16=arguments.bf16)
    with in_place_of(model, halved):
        rows = with_references(objective, rows, tuning.batch_size // tuning.passes, look)
    if not all(math.isfinite(value) for row in rows for value in row.reference):
        raise diverged("the log-probabilities under the weights that it starts from are NaN or infinite", tuning, 0)
    train, eval_rows = split(rows, tuning.eval_fraction, seed)
    tokens = step_tokens(train, tuning, arguments.seed, arguments.world_size)
    watching, divergence = Watching(watch, tokens, has_eval_rows=bool(eval_rows)), Divergence(tuning)
    checkpoint = last_whole(folder)
    done = int(checkpoint.rpartition("-")[2]) if checkpoint else 0
    if 0 < done < len(tokens) and watching.ends_after(done):
        arguments.max_steps = done  # or one more step would be made
    trainer = _PackedTrainer(
        model=model,
        args=arguments,
        train_dataset=train,
        eval_dataset=eval_rows or None,
        data_collator=packed,
        compute_loss_func=partial(_loss, objective),
        callbacks=[divergence, watching, Seal(), *([EarlyStoppingCallback(tuning.patience)] if eval_rows else [])],
    )
    trainer.remove_callback(PrinterCallback)
    recomputed = _recomputed(model) if tuning.gradient_checkpointing else nullcontext()
    try:
        with quiet(), in_place_of(model, halved), recomputed:
            trainer.train(resume_from_checkpoint=checkpoint)
            logits, _ = look(train[:1])  # of weights whose last step no loss has seen
            wrong = [] if bool(torch.isfinite(logits).all()) else ["the logits are NaN or infinite"]
            divergence.check(wrong, model, trainer.state)  # a checkpoint may be chosen, or be all that there is
    finally:  # or the model would compute in bfloat16 for ever
        trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    losses, eval_losses = _logged(trainer, "loss"), _logged(trainer, "eval_loss")
    on_gpu = 0.0 if arguments.use_cpu else arguments.world_size * (perf_counter() - started)
    return LossCurve(losses, eval_losses, watching.tokens(len(losses)), watching.stopped, on_gpu)


def _logged(trainer: HFTrainer, name: str) -> tuple[float, ...]:
    return tuple(round(entry[name], 6) for entry in trainer.state.log_history if name in entry)


def _arguments(tuning: TuningConfig, seed: int, folder: Path, device: torch.device) -> TrainingArguments:
    chosen, cpu = tuning.eval_fraction > 0, device.type == "cpu"
    return TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=tuning.batch_size // tuning.passes,
        per_device_eval_batch_size=tuning.batch_size // tuning.passes,
        gradient_accumulation_steps=tuning.passes,
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
        logging_nan_inf_filter=False,  # which shows 0 in the place of a loss that is NaN or infinite
        save_strategy="epoch" if chosen else "steps",
        save_steps=tuning.checkpoint_steps,
        save_total_limit=2,
        eval_strategy="epoch" if chosen else "no",
        load_best_model_at_end=chosen,
        metric_for_best_model="eval_loss" if chosen else None,
        restore_callback_states_from_checkpoint=chosen,  # or patience would begin anew
        prediction_loss_only=True,
        dataloader_pin_memory=False,
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
    )


def _loss(
    objective: Objective, outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None
) -> torch.Tensor:
    """Its mean over all passes of the step; there is a label for each item."""
    count = len(labels) - 1 if num_items_in_batch is None else num_items_in_batch
    return total_loss(objective, outputs["logits"], outputs["targets"]) / count


def _look(
    model: Any, packed: Callable[[Sequence[EncodedRow]], dict[str, Any]], rows: Sequence[EncodedRow], *, bf16: bool
) -> tuple[torch.Tensor, Targets]:
    """Logits and targets of some rows under the model as it is, computed as in training."""
    inputs = packed(rows)
    targets: Targets = inputs.pop("targets").to(model.device)
    inputs = {
        name: value.to(model.device) if isinstance(value, torch.Tensor | TrainingLayout) else value
        for name, value in inputs.items()
        if name != "labels"
    }
    with torch.no_grad(), torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
        return _logits(model.eval(), inputs), targets


def _logits(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    """Of the kept positions, shape (positions, vocabulary)."""
    if isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning:
        inputs["layout"].past = learned_prefix(model)
        model = model.get_base_model()
    logits: torch.Tensor = model(**inputs)["logits"]
    return logits[0]


@final
class _PackedTrainer(HFTrainer):
    def _get_train_sampler(self, train_dataset: Any = None) -> torch.utils.data.Sampler[int]:
        rows: Any = self.train_dataset
        return SpreadSampler(rows, self.args.seed)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        with writing(checkpoint_of(self.args, self.state.global_step), SAVING_FAILS):
            super()._save_checkpoint(model, trial)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        answer: Any = partial(self._answer, model)
        return super().compute_loss(answer, inputs, return_outputs, num_items_in_batch)

    def _answer(self, model: Any, targets: Targets, **inputs: Any) -> dict[str, Any]:
        """All that the loss is made of."""
        with self.accelerator.autocast():  # which the trainer puts around the model alone, not around its parts
            return {"logits": _logits(model, inputs), "targets": targets}


def _halved_weights(model: Any) -> dict[str, torch.Tensor]:
    """Frozen float32 weights of linear layers as the bfloat16 that autocast would turn them into at every pass."""
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
def _recomputed(model: Any) -> Iterator[None]:
    """Computes activations again in the backward pass; transformers' old names serve all versions in range."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)
        model.gradient_checkpointing_enable({"use_reentrant": False})
        try:
            yield
        finally:
            model.gradient_checkpointing_disable()


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Lends the global generators, which PEFT and the training loop draw from, and gives them back as they were."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
