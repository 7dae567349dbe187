"""ColBERT checkpoints and their encoders, which turn texts into token vectors."""

from lmpipe.retrieval.colbert.encoder import ColbertEncoder, load_encoder

__all__ = ["ColbertEncoder", "load_encoder"]
