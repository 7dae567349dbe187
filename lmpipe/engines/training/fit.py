"""The training loop: transformers' `Trainer` over packed batches, with checkpoints that a killed training goes on from.

Knows nothing of where rows come from or where weights go.
"""

from __future__ import annotations

import os
import random
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from peft import PeftModel
from transformers import EarlyStoppingCallback, PrinterCallback, TrainerCallback, TrainingArguments
from transformers import Trainer as HFTrainer

from lmpipe.engines.local.adapters import in_place_of, learned_prefix, quiet
from lmpipe.engines.training.checkpoints import SAVING_FAILS, Seal, checkpoint_of, last_whole
from lmpipe.engines.training.layout import EncodedRow, collate
from lmpipe.engines.training.tuning import Tuning
from lmpipe.files import writing
from lmpipe.hashing import derive_seed
from lmpipe.splits import stratified


@final
@dataclass(frozen=True)
class LossCurve:
    """Losses in nats per completion token.

    Attributes:
        train: At each optimizer step.
        held_out: After each epoch, if rows were held out.
    """

    train: tuple[float, ...]
    held_out: tuple[float, ...] = ()


def fit(
    model: Any,
    rows: Sequence[EncodedRow],
    tuning: Tuning,
    seed: int,
    folder: Path,
    advance: Callable[[int], None] = lambda steps: None,
) -> LossCurve:
    """Trains what requires gradients, going on from the last whole checkpoint.

    Args:
        model: A `PeftModel` with one adapter, or a causal LM; under layouts.
        rows: At least one.
        tuning: Settings.
        seed: Of every random choice.
        folder: Where checkpoints go, and come from.
        advance: Told how many steps were made.

    Returns:
        The losses of all steps, those before a kill included.

    Raises:
        StoreError: If a checkpoint cannot be written.
    """
    train, held_out = split(rows, tuning.held_out, seed)
    virtual = tuning.virtual_tokens if tuning.method == "prefix" else 0
    trainer = _PackedTrainer(
        model=model,
        args=_arguments(tuning, seed, folder, cpu=model.device.type == "cpu"),
        train_dataset=train,
        eval_dataset=held_out or None,
        data_collator=partial(collate, virtual=virtual),
        compute_loss_func=_loss,
        callbacks=[_Advance(advance), Seal(), *([EarlyStoppingCallback(tuning.patience)] if held_out else [])],
    )
    trainer.remove_callback(PrinterCallback)
    halved = _halved_weights(model) if tuning.bf16 else {}
    recomputed = _recomputed(model) if tuning.gradient_checkpointing else nullcontext()
    try:
        with quiet(), in_place_of(model, halved), recomputed:
            trainer.train(resume_from_checkpoint=last_whole(folder))
    finally:  # or the model would compute in bfloat16 for ever
        trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    history = trainer.state.log_history
    return LossCurve(
        tuple(round(entry["loss"], 6) for entry in history if "loss" in entry),
        tuple(round(entry["eval_loss"], 6) for entry in history if "eval_loss" in entry),
    )


def split(rows: Sequence[EncodedRow], held_out: float, seed: int) -> tuple[list[EncodedRow], list[EncodedRow]]:
    """Rows to train on, and rows to measure the loss on: a share of each group, where that leaves any to train on."""
    count = _held_out_count(len(rows), held_out)
    rng = random.Random(derive_seed(seed, "held out"))
    order = stratified(range(len(rows)), lambda number: rows[number].group, rng)
    chosen = set(order[:count])
    return (
        [row for number, row in enumerate(rows) if number not in chosen],
        [row for number, row in enumerate(rows) if number in chosen],
    )


def step_count(rows: int, tuning: Tuning) -> int:
    """How many optimizer steps a training in one process takes at most."""
    return -(-(rows - _held_out_count(rows, tuning.held_out)) // tuning.batch_size) * tuning.epochs


def _held_out_count(rows: int, share: float) -> int:
    return min(round(share * rows), rows - 1)


def _arguments(tuning: Tuning, seed: int, folder: Path, *, cpu: bool) -> TrainingArguments:
    chosen = tuning.held_out > 0
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
        bf16=tuning.bf16 and (cpu or torch.cuda.is_bf16_supported()),
        use_cpu=cpu,
        ddp_backend="gloo" if cpu and "WORLD_SIZE" in os.environ else None,
        seed=seed % 2**32,
        logging_steps=1,
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


def _loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None) -> torch.Tensor:
    """Cross-entropy of the completion tokens, in nats: its mean over all passes of the step."""
    wanted = labels[1:]
    total = torch.nn.functional.cross_entropy(outputs["logits"][0].float(), wanted, reduction="sum")
    return total / (len(wanted) if num_items_in_batch is None else num_items_in_batch)


@final
class _PackedTrainer(HFTrainer):
    def _get_train_sampler(self, train_dataset: Any = None) -> torch.utils.data.Sampler[int]:
        rows: Any = self.train_dataset
        return _SpreadSampler(rows, self.args.seed)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        with writing(checkpoint_of(self.args, self.state.global_step), SAVING_FAILS):
            super()._save_checkpoint(model, trial)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        if isinstance(self.model, PeftModel) and self.model.active_peft_config.is_prompt_learning:
            with self.accelerator.autocast():  # which the trainer puts around the PeftModel alone
                inputs["layout"].past = learned_prefix(self.model)
                return super().compute_loss(self.model.get_base_model(), inputs, return_outputs, num_items_in_batch)
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)


@final
class _SpreadSampler(torch.utils.data.Sampler[int]):
    """The rows in another order each epoch, their groups spread evenly, so that each batch has a share of each.

    Without that an LM that is to learn a choice among few labels swings from one constant answer to the next.
    """

    def __init__(self, rows: Sequence[EncodedRow], seed: int) -> None:
        self._rows, self._seed, self._epoch = rows, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Decides the order; the trainer calls it, also when it goes on from a checkpoint."""
        self._epoch = epoch

    def __iter__(self) -> Iterator[int]:
        rng = random.Random(derive_seed(self._seed, self._epoch))
        return iter(stratified(range(len(self._rows)), lambda number: self._rows[number].group, rng))

    def __len__(self) -> int:
        return len(self._rows)


@final
class _Advance(TrainerCallback):
    def __init__(self, advance: Callable[[int], None]) -> None:
        self._advance = advance

    def on_train_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        self._advance(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        self._advance(1)


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
