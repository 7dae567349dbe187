"""The models that a benchmark runs on and trains, as plain values until they are loaded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch

from lmpipe import LM
from lmpipe.engines import load_lm
from lmpipe.engines.cached import CachedLM
from lmpipe.engines.local import LocalLM
from lmpipe.engines.local.models import default_memory
from lmpipe.errors import ConfigError
from lmpipe.text.secrets import hide


@final
@dataclass(frozen=True)
class Models:
    """What a benchmark runs on.

    Args:
        lm: Generates.
        train_lm: Trains adapters, if `lm` cannot; a model in this process, of the same name.
        cache: File that keeps completions.
        dtype: Of what runs in this process.
        quantization: Of what runs in this process.
    """

    lm: str
    train_lm: str | None = None
    cache: Path | None = None
    dtype: str | None = None
    quantization: str | None = None

    @property
    def identity(self) -> dict[str, str | None]:
        """What decides results: not where servers are."""
        return {
            "lm": self.lm.partition("@http")[0],
            "train_lm": self.train_lm,
            "dtype": self.dtype,
            "quantization": self.quantization,
        }

    def load(self, *, to_train: bool, at_once: int = 1) -> tuple[LM, LocalLM | None]:
        """The LM that generates, and the one that trains if that is asked for.

        Args:
            to_train: Whether it is.
            at_once: How many processes of this machine do so: on a CPU, each takes its part of the memory.

        Raises:
            ConfigError: If the second cannot train, or is not the same model.
        """
        lm = self._made(self.lm, at_once)
        trained = lm if self.train_lm is None else self._made(self.train_lm, at_once)
        if not isinstance(trained, LocalLM):
            if not to_train:
                return self._cached(lm), None
            raise ConfigError(
                f"{hide(self.train_lm or self.lm)!r} cannot be fine-tuned here; add --train-lm with the same model, as "
                "'bundled' or 'hf:ID_OR_PATH'"
            )
        if trained.name != lm.name:
            raise ConfigError(f"--lm is {lm.name!r} and --train-lm is {trained.name!r}; serve the model by that name")
        return self._cached(lm), trained

    def _made(self, spec: str, at_once: int) -> LM:
        chosen: dict[str, Any] = {"dtype": self.dtype, "quantization": self.quantization}
        here = spec == "bundled" or spec.startswith("hf:")
        if here and at_once > 1 and not torch.cuda.is_available():
            chosen["memory"] = default_memory(torch.device("cpu")) // at_once
        return load_lm(spec, **{name: value for name, value in chosen.items() if here and value is not None})

    def _cached(self, lm: LM) -> LM:
        return lm if self.cache is None else CachedLM(lm, self.cache)
