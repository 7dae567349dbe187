"""Settings of fine-tuning: the method and its hyperparameters.

Knows nothing about models or rows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal, final

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from lmpipe.errors import ConfigError
from lmpipe.text.reprs import settings_repr
from lmpipe.validation.checks import check_settings

if TYPE_CHECKING:
    from peft import PeftConfig

Method = Literal["lora", "qlora", "dora", "ia3", "prefix", "full"]
LORA_METHODS: tuple[Method, ...] = ("lora", "qlora", "dora")
Fraction = Annotated[float, Field(ge=0, lt=1)]
"""Type of a setting from 0, included, to 1, excluded."""


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
            full names; for IA³, PEFT chooses the layers. A list becomes a tuple.
        top_layers: Share of the transformer layers, in (0, 1], that LoRA adapts, counted from the last one. No
            gradients are computed below them, so adapting half of the layers takes about half the time.
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
    rank: PositiveInt = 32
    alpha: PositiveInt = 64
    dropout: Fraction = 0.0
    target_modules: str | tuple[str, ...] = ("q_proj", "k_proj")
    top_layers: Annotated[float, Field(gt=0, le=1)] = 1.0
    virtual_tokens: PositiveInt = 32
    learning_rate: PositiveFloat = 1e-5
    schedule: Literal["constant_with_warmup", "linear", "cosine"] = "linear"
    warmup_steps: NonNegativeInt = 0
    beta2: Fraction = 0.999
    weight_decay: NonNegativeFloat = 0.0
    epochs: PositiveInt = 5
    batch_size: PositiveInt = 8
    micro_batch_size: PositiveInt | None = None
    bf16: bool = True
    gradient_checkpointing: bool = False
    checkpoint_steps: PositiveInt = 50
    eval_fraction: Fraction = 0.0
    patience: PositiveInt = 1

    def __post_init__(self) -> None:
        if isinstance(self.target_modules, list):
            object.__setattr__(self, "target_modules", tuple(self.target_modules))
        check_settings(self)
        if self.top_layers < 1 and self.method not in LORA_METHODS:
            raise ConfigError(
                f"top_layers={self.top_layers} is for LoRA, and method is {self.method!r}; leave it out, or choose "
                f"{' or '.join(map(repr, LORA_METHODS))}"
            )
        if self.batch_size % self.gradient_accumulation_steps:
            raise ConfigError(
                f"batch_size={self.batch_size} is not a multiple of micro_batch_size={self.micro_batch_size}"
            )

    def __repr__(self) -> str:
        return settings_repr(self)

    @property
    def gradient_accumulation_steps(self) -> int:
        """Number of micro-batches per optimizer step."""
        return -(-self.batch_size // (self.micro_batch_size or self.batch_size))

    def peft_config(self, layers: int) -> PeftConfig | None:
        """Returns the PEFT configuration of the method; None for full fine-tuning.

        Args:
            layers: Number of transformer layers of the model.
        """
        from peft import IA3Config, LoraConfig, PrefixTuningConfig

        if self.method == "full":
            return None
        if self.method == "ia3":
            return IA3Config(task_type="CAUSAL_LM")
        if self.method == "prefix":
            return PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=self.virtual_tokens)
        targets = self.target_modules if isinstance(self.target_modules, str) else list(self.target_modules)
        frozen = range(layers - math.ceil(self.top_layers * layers))
        return LoraConfig(
            task_type="CAUSAL_LM",
            r=self.rank,
            lora_alpha=self.alpha,
            lora_dropout=self.dropout,
            target_modules=targets,
            exclude_modules=rf"\D*\.({'|'.join(map(str, frozen))})\..*" if frozen else None,
            use_dora=self.method == "dora",
        )
