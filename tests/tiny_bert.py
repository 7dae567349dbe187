"""Tiny ColBERT checkpoints for tests: a BERT with random weights and a real WordPiece vocabulary."""

from __future__ import annotations

import json
import re
import string
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lmpipe.retrieval.colbert.checkpoint import Checkpoint
from lmpipe.retrieval.colbert.settings import ColbertSettings

TEXTS = [
    "Kicksend | Kicksend was a file-sharing company, founded in 2011; it shut down in 2014.",
    "The Bonobo (Pan paniscus), formerly called the pygmy chimpanzee, is a great ape.",
    "Who directed the film?",
    '«Ünïcödé» – dashes… and quotes: "don\'t!"',
    "",
    "a",
    "?!,.",
    "Marty Raybon has had more solo albums than Greg Graffin, hasn't he? " * 12,
]


def tiny_checkpoint(
    settings: ColbertSettings | None = None,
    dim: int = 16,
    positions: int = 128,
    *,
    texts: Sequence[str] = TEXTS,
    seed: int = 0,
    word_by_word: bool = False,
) -> Checkpoint:
    """Creates a checkpoint in memory; the same arguments create equal checkpoints.

    Args:
        settings: Settings of the tokenization.
        dim: Number of components of a token vector.
        positions: Maximum number of tokens.
        texts: Texts whose words are in the vocabulary.
        seed: Seed of the weights.
        word_by_word: Whether a token's vector depends mainly on its word, so that texts are found by their words.
    """
    import torch
    from transformers import BertConfig, BertModel, BertTokenizer

    words = re.findall("[a-z]+", " ".join(texts).lower())
    letters = [*string.ascii_lowercase, *string.digits]
    pieces = {*letters, *(f"##{letter}" for letter in letters), *string.punctuation, *(word[:5] for word in words)}
    special = ["[PAD]", "[unused0]", "[unused1]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocabulary = {word: number for number, word in enumerate([*special, *sorted(pieces)])}
    tokenizer: Any = BertTokenizer(vocab=vocabulary, model_max_length=positions)
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=positions,
        initializer_range=0.02 if word_by_word else 0.3,
    )
    weights = BertModel(config).state_dict()
    if word_by_word:
        torch.nn.init.normal_(weights["embeddings.word_embeddings.weight"])
    projection = torch.randn(dim, config.hidden_size)
    return Checkpoint(settings or ColbertSettings(doc_maxlen=40), config, tokenizer, weights, projection)


def as_pylate(checkpoint: Checkpoint, folder: Path, **settings: Any) -> Path:
    """Saves a checkpoint as sentence-transformers and PyLate save models."""
    from safetensors.torch import save_file

    checkpoint.config.save_pretrained(folder)
    checkpoint.tokenizer.save_pretrained(folder)
    save_file(dict(checkpoint.weights), folder / "model.safetensors", {"format": "pt"})
    dense = folder / "1_Dense"
    dense.mkdir()
    save_file({"linear.weight": checkpoint.projection}, dense / "model.safetensors")
    identity = {"bias": False, "activation_function": "torch.nn.modules.linear.Identity"}
    kinds = (("", "sentence_transformers.models.Transformer"), ("1_Dense", "pylate.models.Dense.Dense"))
    modules = [{"idx": number, "path": path, "type": kind} for number, (path, kind) in enumerate(kinds)]
    records = {dense / "config.json": identity, folder / "modules.json": modules}
    records[folder / "config_sentence_transformers.json"] = settings
    for path, record in records.items():
        path.write_text(json.dumps(record))
    return folder
