"""The models that an experiment runs on and trains, as plain values until they are loaded."""

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
from lmpipe.text.secrets import redact


@final
@dataclass(frozen=True)
class ModelSpec:
    """The models of an experiment, as `lmpipe.engines.load_lm` names them.

    Args:
        lm: LM that generates.
        train_lm: LM whose adapters are trained, if `lm` cannot be; a model in this process, of the same name.
        cache: File that keeps completions.
        dtype: Data type of models in this process.
        quantization: Quantization of models in this process.
    """

    lm: str
    train_lm: str | None = None
    cache: Path | None = None
    dtype: str | None = None
    quantization: str | None = None

    @property
    def identity(self) -> dict[str, str | None]:
        """The settings that decide results; the addresses of servers do not."""
        return {
            "lm": self.lm.partition("@http")[0],
            "train_lm": self.train_lm,
            "dtype": self.dtype,
            "quantization": self.quantization,
        }

    def load(self, *, to_train: bool, num_processes: int = 1) -> tuple[LM, LocalLM | None]:
        """Returns the LM that generates and, if there is one, the LM whose adapters are trained.

        Args:
            to_train: Whether weights are tuned.
            num_processes: Number of processes on this machine that load models at the same time; on a CPU, each uses
                its share of the memory.

        Raises:
            ConfigError: If weights are tuned, and the LM cannot be trained or `train_lm` is not the same model.
        """
        lm = self._load(self.lm, num_processes)
        trained = lm if self.train_lm is None else self._load(self.train_lm, num_processes)
        if not isinstance(trained, LocalLM):
            if not to_train:
                return self._cached(lm), None
            raise ConfigError(
                f"{redact(self.train_lm or self.lm)!r} cannot be fine-tuned here; add --train-lm with the same model, "
                "as 'bundled' or 'hf:ID_OR_PATH'"
            )
        if trained.name != lm.name:
            raise ConfigError(f"--lm is {lm.name!r} and --train-lm is {trained.name!r}; serve the model by that name")
        return self._cached(lm), trained

    def _load(self, spec: str, num_processes: int) -> LM:
        options: dict[str, Any] = {"dtype": self.dtype, "quantization": self.quantization}
        in_this_process = spec == "bundled" or spec.startswith("hf:")
        if in_this_process and num_processes > 1 and not torch.cuda.is_available():
            options["memory"] = default_memory(torch.device("cpu")) // num_processes
        return load_lm(
            spec, **{name: value for name, value in options.items() if in_this_process and value is not None}
        )

    def _cached(self, lm: LM) -> LM:
        return lm if self.cache is None else CachedLM(lm, self.cache)
