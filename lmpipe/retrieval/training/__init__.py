"""Fine-tuning of ColBERT checkpoints on questions with gold passages."""

from lmpipe.retrieval.training.fit import ColbertTuning
from lmpipe.retrieval.training.train import TrainingData, train_encoder

__all__ = ["ColbertTuning", "TrainingData", "train_encoder"]
