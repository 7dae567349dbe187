"""LoRA fine-tuning of the resident model of a `LocalLM` (Hu et al. 2021, arXiv 2106.09685), through PEFT.

The loop is transformers' `Trainer`; what is ours is the forward pass: the beginning that all rows of a batch share is
computed once, and logits only where there is a completion. Knows nothing of programs or traces.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, final

import numpy as np
import torch
from peft import LoraConfig, PeftModel
from transformers import PrinterCallback, TrainerCallback, TrainingArguments
from transformers import Trainer as HFTrainer

from lmpipe.engines.batch import PrefixBatch, common_prefix, forward
from lmpipe.engines.local import LocalLM
from lmpipe.errors import ConfigError, SessionError
from lmpipe.ledger import Cost
from lmpipe.session import Session
from lmpipe.splits import stratified
from lmpipe.state import WeightState
from lmpipe.trainer import Trainer, TrainingResult, TrainingRow


@final
@dataclass(frozen=True)
class LoraTrainer(Trainer):
    """Trains LoRA adapters; the defaults are the paper's (arXiv 2407.10930).

    Args:
        lm: The engine whose model is trained in place; its base weights are left as they are.
        rank: Rank of the update.
        alpha: Scale of the update, divided by the rank.
        dropout: On the adapter's input.
        target_modules: Names of the layers to adapt, or ``"all-linear"``.
        learning_rate: Peak learning rate of AdamW.
        schedule: How the learning rate goes on from its peak.
        warmup_steps: Steps to reach the peak.
        beta2: Decay of AdamW's second moment.
        epochs: Passes over the rows.
        batch_size: Rows per optimizer step.
        bf16: Whether products are computed in bfloat16; weights and optimizer stay as they are.
    """

    lm: LocalLM = field(repr=False)
    rank: int = 32
    alpha: int = 64
    dropout: float = 0.0
    target_modules: str | tuple[str, ...] = ("q_proj", "k_proj")
    learning_rate: float = 1e-5
    schedule: Literal["constant_with_warmup", "linear", "cosine"] = "linear"
    warmup_steps: int = 0
    beta2: float = 0.999
    epochs: int = 5
    batch_size: int = 8
    bf16: bool = True

    def train(self, rows: Sequence[TrainingRow], start: WeightState, session: Session) -> TrainingResult:
        if session.store is None:
            raise SessionError("training needs a place for the adapter; make the session with a store")
        if not rows:
            raise ConfigError("there are no rows to train on")
        encoded = [self._encode(row) for row in rows]
        folder = session.store.new_folder()
        total = -(-len(rows) // self.batch_size) * self.epochs
        targets = self.target_modules if isinstance(self.target_modules, str) else list(self.target_modules)
        config = LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,
            lora_dropout=self.dropout,
            target_modules=targets,
            task_type="CAUSAL_LM",
        )
        with (
            session.track("training", total) as advance,
            _seeded(session.seed),
            self.lm.adapters.trainable(config, start.adapter) as model,
        ):
            losses = self._fit(model, encoded, session.seed, folder, advance)
            _save(model, folder, self.lm.name)
        tokens = self.epochs * sum(len(row.tokens) for row in encoded)
        session.ledger.add(Cost(training_tokens=tokens))
        weights = WeightState(base=self.lm.name, adapter=session.store.put_folder(folder))
        return TrainingResult(weights, len(losses), tokens, tuple(losses))

    def _encode(self, row: TrainingRow) -> _Row:
        """Tokens of the prompt exactly as in inference, then the completion and the token that ends it."""
        prompt = self.lm.encode(row.messages)
        completion = [*self.lm.encode_text(row.completion), self.lm.end_token]
        return _Row((*prompt, *completion), len(completion), row.group)

    def _fit(
        self, model: PeftModel, rows: Sequence[_Row], seed: int, folder: Path, advance: Callable[[int], None]
    ) -> list[float]:
        arguments = TrainingArguments(
            output_dir=str(folder),
            per_device_train_batch_size=self.batch_size,
            num_train_epochs=self.epochs,
            learning_rate=self.learning_rate,
            lr_scheduler_type=self.schedule,
            warmup_steps=self.warmup_steps,
            adam_beta2=self.beta2,
            bf16=self.bf16,
            use_cpu=self.lm.model.device.type == "cpu",
            seed=seed % 2**32,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            remove_unused_columns=False,
        )
        trainer = _PrefixTrainer(
            model=model,
            args=arguments,
            train_dataset=list(rows),
            data_collator=_collate,
            callbacks=[_Advance(advance)],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        return [round(entry["loss"], 6) for entry in trainer.state.log_history if "loss" in entry]


@final
@dataclass(frozen=True, slots=True)
class _Row:
    tokens: tuple[int, ...]
    trained: int  # how many last tokens carry the loss
    group: str


@final
class _SpreadSampler(torch.utils.data.Sampler[int]):
    """The rows in another order each epoch, their groups spread evenly, so that each batch has a share of each.

    Without that an LM that is to learn a choice among few labels swings from one constant answer to the next.
    """

    def __init__(self, rows: Sequence[_Row], seed: int) -> None:
        self._rows = rows
        self._rng = random.Random(seed)

    def __iter__(self) -> Iterator[int]:
        return iter(stratified(range(len(self._rows)), lambda number: self._rows[number].group, self._rng))

    def __len__(self) -> int:
        return len(self._rows)


@final
class _PrefixTrainer(HFTrainer):
    def _get_train_sampler(self, train_dataset: Any = None) -> torch.utils.data.Sampler[int]:
        rows: Any = self.train_dataset
        return _SpreadSampler(rows, self.args.seed)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Mean cross-entropy of the completion tokens, in nats."""
        batch, labels = inputs["batch"], inputs["labels"]
        logits = forward(model, batch, keep=labels.shape[1] + 1).logits[:, :-1]
        chosen = labels >= 0
        return torch.nn.functional.cross_entropy(logits[chosen].float(), labels[chosen])


@final
class _Advance(TrainerCallback):
    def __init__(self, advance: Callable[[int], None]) -> None:
        self._advance = advance

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._advance(1)


def _collate(rows: Sequence[_Row]) -> dict[str, Any]:
    """One batch over the part of the prompt that all its rows share, and the labels of its last columns."""
    shared = min(common_prefix([row.tokens for row in rows]), *(len(row.tokens) - row.trained - 1 for row in rows))
    longest = max(row.trained for row in rows)
    labels = [[-1] * (longest - row.trained) + list(row.tokens[-row.trained :]) for row in rows]
    suffixes = tuple(row.tokens[shared:] for row in rows)
    batch = PrefixBatch(tuple(range(len(rows))), rows[0].tokens[:shared], suffixes)
    return {"batch": batch, "labels": torch.tensor(labels)}


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Lends the global generators, which PEFT and the training loop draw from, and gives them back as they were."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


def _save(model: PeftModel, folder: Path, base: str) -> None:
    """Writes the adapter alone, in bytes that depend on nothing but its content."""
    name = str(model.active_adapter)
    model.save_pretrained(str(folder / "all"), selected_adapters=[name], save_embedding_layers=False)
    written = folder / "all" / name
    config = json.loads((written / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = base
    config["target_modules"] = sorted(config["target_modules"])
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True))
    (written / "adapter_model.safetensors").rename(folder / "adapter_model.safetensors")
    shutil.rmtree(folder / "all")
