"""Settings of fine-tuning: the method and its hyperparameters.

Knows nothing about models or rows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Literal, final, get_type_hints

from pydantic import TypeAdapter, ValidationError

from lmpipe.errors import ConfigError
from lmpipe.text.reprs import settings_repr

if TYPE_CHECKING:
    from peft import PeftConfig

Method = Literal["lora", "qlora", "dora", "ia3", "prefix", "full"]


@final
@dataclass(frozen=True)
class TuningConfig:
    """Settings of fine-tuning; the defaults are those of BetterTogether (arXiv 2407.10930).

    Args:
        method: ``"lora"`` (Hu et al. 2021, arXiv 2106.09685); ``"qlora"``: LoRA on a base in 4 bits (Dettmers et
            al. 2023, arXiv 2305.14314); ``"dora"`` (Liu et al. 2024, arXiv 2402.09353); ``"ia3"`` (Liu et al. 2022,
            arXiv 2205.05638); ``"prefix"``: learned keys and values before the prompt (Li and Liang 2021,
            arXiv 2101.00190); ``"full"``: all weights.
        rank: Rank of a LoRA update.
        alpha: Scale of a LoRA update, divided by the rank.
        dropout: Dropout probability at the input of a LoRA adapter.
        target_modules: Names of the layers that LoRA adapts, or ``"all-linear"``, or a regular expression for their
            full names; for IA³, PEFT chooses the layers.
        virtual_tokens: Length of a learned prefix.
        learning_rate: Peak learning rate of AdamW.
        schedule: Learning-rate schedule after the peak.
        warmup_steps: Number of steps until the peak.
        beta2: Decay rate of AdamW's second moment.
        weight_decay: Weight decay of AdamW.
        epochs: Number of passes over the rows.
        batch_size: Number of rows per optimizer step and process.
        micro_batch_size: Number of rows per forward pass, by default the whole batch; a step accumulates the gradients
            of its micro-batches.
        bf16: Whether matrix products are computed in bfloat16, unless the device would only emulate it. The data types
            of weights and optimizer state do not change.
        gradient_checkpointing: Whether to recompute activations in the backward pass, which saves memory.
        checkpoint_steps: Number of steps between checkpoints, from which a killed training resumes.
        eval_fraction: Fraction of the rows, in [0, 1), that is held out of the training. The loss on them is measured
            after each epoch, and the weights of the best epoch are kept.
        patience: Number of epochs without a better held-out loss after which the training stops.

    Raises:
        ConfigError: If a value is out of range or has the wrong type.
    """

    method: Method = "lora"
    rank: int = 32
    alpha: int = 64
    dropout: float = 0.0
    target_modules: str | tuple[str, ...] = ("q_proj", "k_proj")
    virtual_tokens: int = 32
    learning_rate: float = 1e-5
    schedule: Literal["constant_with_warmup", "linear", "cosine"] = "linear"
    warmup_steps: int = 0
    beta2: float = 0.999
    weight_decay: float = 0.0
    epochs: int = 5
    batch_size: int = 8
    micro_batch_size: int | None = None
    bf16: bool = True
    gradient_checkpointing: bool = False
    checkpoint_steps: int = 50
    eval_fraction: float = 0.0
    patience: int = 1

    def __post_init__(self) -> None:
        self._check_types()
        sizes = (self.rank, self.alpha, self.virtual_tokens, self.epochs, self.batch_size, self.checkpoint_steps)
        micro_batch_size = 1 if self.micro_batch_size is None else self.micro_batch_size
        if min(*sizes, micro_batch_size, self.patience) < 1 or self.warmup_steps < 0:
            raise ConfigError(
                f"{self}: rank, alpha, virtual_tokens, epochs, batch_size, micro_batch_size, checkpoint_steps and "
                "patience must be at least 1, warmup_steps at least 0"
            )
        if self.batch_size % self.gradient_accumulation_steps:
            raise ConfigError(
                f"batch_size={self.batch_size} is not a multiple of micro_batch_size={self.micro_batch_size}"
            )
        if not (0 < self.learning_rate < math.inf and 0 <= self.weight_decay < math.inf):
            raise ConfigError(f"{self}: learning_rate must be above 0 and weight_decay at least 0, both finite")
        if not all(0 <= share < 1 for share in (self.dropout, self.beta2, self.eval_fraction)):
            raise ConfigError(f"{self}: dropout, beta2 and eval_fraction must be in [0, 1)")

    def __repr__(self) -> str:
        return settings_repr(self)

    def _check_types(self) -> None:
        types = get_type_hints(type(self))
        for field in fields(self):
            value = getattr(self, field.name)
            try:
                TypeAdapter(types[field.name]).validate_python(value, strict=True)
            except ValidationError as error:
                raise ConfigError(f"{field.name}={value!r} of a TuningConfig: {error.errors()[0]['msg']}") from error

    @property
    def gradient_accumulation_steps(self) -> int:
        """Number of micro-batches per optimizer step."""
        return -(-self.batch_size // (self.micro_batch_size or self.batch_size))

    def peft_config(self) -> PeftConfig | None:
        """Returns the PEFT configuration of the method; None for full fine-tuning."""
        from peft import IA3Config, LoraConfig, PrefixTuningConfig

        if self.method == "full":
            return None
        if self.method == "ia3":
            return IA3Config(task_type="CAUSAL_LM")
        if self.method == "prefix":
            return PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=self.virtual_tokens)
        targets = self.target_modules if isinstance(self.target_modules, str) else list(self.target_modules)
        return LoraConfig(
            task_type="CAUSAL_LM",
            r=self.rank,
            lora_alpha=self.alpha,
            lora_dropout=self.dropout,
            target_modules=targets,
            use_dora=self.method == "dora",
        )
