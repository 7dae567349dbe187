"""ColBERT checkpoints and their encoders: texts in, token vectors out."""

from lmpipe.retrieval.colbert.encoder import ColbertEncoder, load_encoder

__all__ = ["ColbertEncoder", "load_encoder"]
