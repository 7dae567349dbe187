"""Sentence encoders with transformers, and the bundled one: all-MiniLM-L6-v2, whose files come with a package.

The embedding of a text is the mean of the last hidden states of its tokens, normalized to unit length (Reimers and
Gurevych 2019, arXiv 1908.10084). Knows nothing about how embeddings are used.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, final

import torch
from transformers import AutoModel, AutoTokenizer

from lmpipe.embedder import Embedder
from lmpipe.engines.bundled_files import minilm_folder
from lmpipe.engines.library_errors import ErrorTranslator, library_message
from lmpipe.engines.loading import check_no_missing_weights, loading_errors, vocabulary_size
from lmpipe.engines.notices import no_weight_bars
from lmpipe.errors import ConfigError, EngineError
from lmpipe.text.cleaning import clean_text
from lmpipe.validation.arguments import check_items

NAME = "all-MiniLM-L6-v2"
_MAX_TOKENS = 256  # the length that the bundled model is meant for, though it has 512 positions


@final
class SentenceEncoder(Embedder):
    """A sentence encoder in this process. Texts are sorted by length, so that batches have little padding.

    Args:
        model: A transformers encoder.
        tokenizer: Tokenizer of the model.
        name: Name of the model; see `Embedder.name`.
        max_tokens: Length at which texts are truncated; by default the number of positions of the model.
        batch_size: Maximum number of texts in a forward pass.

    Raises:
        ConfigError: If the model is not an encoder, or its tokenizer has no padding token or too many tokens.
    """

    def __init__(
        self, model: Any, tokenizer: Any, name: str, *, max_tokens: int | None = None, batch_size: int = 64
    ) -> None:
        if model.config.is_encoder_decoder or tokenizer.pad_token is None:
            raise ConfigError(f"{name} ({type(model).__name__}) is not a sentence encoder with a padding token")
        vocabulary_size(model, tokenizer, name)
        self._model, self._tokenizer, self._name = model.eval(), tokenizer, name
        positions = min(tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", 512))
        self._max_tokens = min(max_tokens or positions, positions)
        self._batch_size = batch_size

    @classmethod
    def from_pretrained(
        cls, id_or_path: str, *, name: str = "", max_tokens: int | None = None, batch_size: int = 64
    ) -> SentenceEncoder:
        """Loads an encoder from the hub or a folder, onto the GPU if there is one.

        Args:
            id_or_path: Hub id or local folder.
            name: See `Embedder.name`; by default `id_or_path`.
            max_tokens: Length at which texts are truncated; by default the number of positions of the model.
            batch_size: Maximum number of texts in a forward pass.

        Raises:
            ConfigError: If the encoder does not exist or cannot be loaded.
        """
        device = "cuda" if torch.cuda.is_available() else "cpu"
        with loading_errors("an encoder", id_or_path), no_weight_bars():
            tokenizer = AutoTokenizer.from_pretrained(id_or_path)
            model, loading_info = AutoModel.from_pretrained(id_or_path, dtype=torch.float32, output_loading_info=True)
            model = model.to(device)
        check_no_missing_weights([key for key in loading_info["missing_keys"] if "pooler" not in key], id_or_path)
        return cls(model, tokenizer, name or id_or_path, max_tokens=max_tokens, batch_size=batch_size)

    @property
    def name(self) -> str:
        return self._name

    def embed(self, texts: Sequence[str]) -> list[list[float]]:
        texts = [clean_text(text) for text in check_items("texts", texts, str)]
        if not texts:
            return []
        with ErrorTranslator((IndexError, RuntimeError, TypeError, ValueError), self._failed):
            return self._embed(texts)

    def _failed(self, error: Exception) -> EngineError:
        return EngineError(f"{self.name} failed to embed texts: {library_message(error)}")

    def _embed(self, texts: list[str]) -> list[list[float]]:
        """Returns an embedding for each text; the name of a special token in it, such as [SEP], is ordinary text."""
        options = {"truncation": True, "max_length": self._max_tokens, "split_special_tokens": True}
        ids = self._tokenizer(texts, **options)["input_ids"]
        zeros = [0.0] * self._model.config.hidden_size  # embedding of a text without tokens, similar to no other
        vectors = {number: zeros for number, tokens in enumerate(ids) if not tokens}
        order = sorted(range(len(ids)), key=lambda number: len(ids[number]))[len(vectors) :]
        for start in range(0, len(order), self._batch_size):
            batch = order[start : start + self._batch_size]
            vectors.update(zip(batch, self._encode([ids[number] for number in batch]), strict=True))
        return [vectors[number] for number in range(len(ids))]

    @torch.inference_mode()
    def _encode(self, ids: list[list[int]]) -> list[list[float]]:
        """Returns the embedding of each text, from the token ids of the texts."""
        padded = self._tokenizer.pad({"input_ids": ids}, return_tensors="pt").to(self._model.device)
        hidden = self._model(**padded).last_hidden_state
        mask = padded["attention_mask"].unsqueeze(-1).to(hidden.dtype)
        means = (hidden * mask).sum(1) / mask.sum(1)
        if not means.isfinite().all():
            raise EngineError(f"embeddings of {self.name} are NaN or infinite; its weights are damaged: load it again")
        vectors: list[list[float]] = torch.nn.functional.normalize(means, dim=1).double().tolist()
        return vectors


def load_bundled_embedder(**options: Any) -> SentenceEncoder:
    """Loads the bundled encoder.

    Args:
        options: The options of `SentenceEncoder.from_pretrained`.

    Raises:
        ConfigError: If the package is not installed or one of its files is damaged.
    """
    return SentenceEncoder.from_pretrained(str(minilm_folder()), **{"name": NAME, "max_tokens": _MAX_TOKENS, **options})
