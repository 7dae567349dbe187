"""Fine-tuning of the model of the local engine."""

from lmpipe.engines.training.trainer import LocalTrainer
from lmpipe.engines.tuning_config import TuningConfig

__all__ = ["LocalTrainer", "TuningConfig"]
