"""A tiny ColBERT checkpoint that tests make."""

from __future__ import annotations

import string
from pathlib import Path

from tests.rivers import CORPUS


def tiny_colbert(folder: Path, seed: int, dim: int = 16) -> Path:
    """Saves a BERT of one layer with random weights, and a vocabulary of letters and of the words of the rivers."""
    import torch
    from transformers import BertConfig, BertModel, BertTokenizerFast

    from lmpipe.retrieval.checkpoint import Checkpoint
    from lmpipe.retrieval.settings import ColbertSettings

    words = sorted({word for text in CORPUS for word in text.lower().strip(".").split()})
    letters = [*string.ascii_lowercase, *string.digits, *string.punctuation]
    special = ["[PAD]", "[unused0]", "[unused1]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocabulary = dict.fromkeys([*special, *letters, *(f"##{letter}" for letter in letters), *words])
    tokenizer = BertTokenizerFast(vocab={word: number for number, word in enumerate(vocabulary)})
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=512,
    )
    weights = BertModel(config, add_pooling_layer=False).state_dict()
    torch.nn.init.normal_(weights["embeddings.word_embeddings.weight"])  # so that a vector tells mostly its word
    settings = ColbertSettings(query_tokens=16, passage_tokens=64)
    Checkpoint(settings, config, tokenizer, weights, torch.randn(dim, 32)).save(folder)
    return folder
