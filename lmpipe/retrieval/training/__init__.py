"""Fine-tuning of ColBERT checkpoints on questions whose gold passages are known."""

from lmpipe.retrieval.training.fit import ColbertTrainingConfig
from lmpipe.retrieval.training.train import TrainingData, train_encoder

__all__ = ["ColbertTrainingConfig", "TrainingData", "train_encoder"]
