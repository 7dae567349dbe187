"""Texts as token ids, the way a checkpoint wants them: markers, masks, and which tokens have a vector.

Knows nothing of weights.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Any, final

import torch
from tokenizers import Tokenizer
from torch import Tensor

from lmpipe.errors import ConfigError
from lmpipe.retrieval.colbert.checkpoint import Checkpoint
from lmpipe.text.cleaning import clean

logger = logging.getLogger(__name__)

_PIECE = 1024  # texts tokenised at once


@final
class ColbertTokens:
    """The tokenisation of a checkpoint (Santhanam et al. 2022, arXiv 2112.01488, section 3.1).

    The first text that is too long is warned of; all such are cut. Special tokens that a text spells out, such as
    [SEP], are read as those tokens, as colbert-ai does in training and in search.

    Args:
        checkpoint: Its vocabulary and settings.

    Attributes:
        query_maxlen: Of every query: what the settings say, or as many as the encoder has positions for.
        doc_maxlen: Most of a passage, likewise.

    Raises:
        ConfigError: If the vocabulary lacks a marker or [MASK], or no token fits beside the markers.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        settings, tokenizer = checkpoint.settings, checkpoint.tokenizer
        positions = min(tokenizer.model_max_length, getattr(checkpoint.config, "max_position_embeddings", 512))
        self.query_maxlen: int = min(settings.query_maxlen, positions)
        self.doc_maxlen: int = min(settings.doc_maxlen, positions)
        self._settings = settings
        self.expands = settings.expands
        self._queries = _side(tokenizer, settings.query_prefix, self.query_maxlen)
        self._passages = _side(tokenizer, settings.doc_prefix, self.doc_maxlen)
        self._pad = tokenizer.pad_token_id
        self._mask = tokenizer.mask_token_id if settings.expands else self._pad
        if self._mask is None or self._pad is None:
            raise ConfigError(
                f"the tokenizer of {tokenizer.name_or_path} has no [MASK] or no [PAD]; it is no ColBERT's"
            )
        skipped = {
            number for word in settings.skipped for number in tokenizer.encode(word, add_special_tokens=False)[:1]
        }
        self._skipped = torch.tensor(sorted({*skipped, self._pad}))
        self._warned: set[str] = set()

    def queries(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Queries of one length: filled with [MASK], or with padding if the checkpoint does not expand queries.

        Returns:
            Ids and attention, both ``[queries, query tokens]``, int64.
        """
        ids = torch.full((len(texts), self.query_maxlen), self._mask)
        attention = torch.full_like(ids, self._settings.attends_to_masks)
        for number, row in enumerate(self._encode(texts, "query", *self._queries)):
            ids[number, : len(row)] = torch.tensor(row)
            attention[number, : len(row)] = 1
        if self._settings.expands:
            ids[ids == self._pad] = self._mask
        return ids, attention

    def passages(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each passage, without padding."""
        return list(self._encode(texts, "passage", *self._passages))

    def padded(self, rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Passages filled up to the longest: ids and attention, both ``[passages, tokens]``, int64."""
        ids = torch.full((len(rows), max(map(len, rows))), self._pad)
        attention = torch.zeros_like(ids)
        for number, row in enumerate(rows):
            ids[number, : len(row)] = torch.tensor(row)
            attention[number, : len(row)] = 1
        return ids, attention

    def has_vector(self, ids: Tensor) -> Tensor:
        """Which ids of passages have a vector: all but punctuation and padding. Bool, of the same shape."""
        return ~torch.isin(ids, self._skipped)

    def _encode(self, texts: Sequence[str], kind: str, tokenizer: Tokenizer, marker: list[int]) -> Iterator[list[int]]:
        for start in range(0, len(texts), _PIECE):
            for row in tokenizer.encode_batch_fast([clean(text) for text in texts[start : start + _PIECE]]):
                if row.overflowing and kind not in self._warned:
                    self._warned.add(kind)
                    longest = len(row.ids) + len(marker)
                    logger.warning("a %s has more than %d tokens; it is cut, as are others like it", kind, longest)
                yield [*row.ids[:1], *marker, *row.ids[1:]]


def _side(tokenizer: Any, marker: str, length: int) -> tuple[Tokenizer, list[int]]:
    """A tokenizer that leaves room for a marker, and the marker's id."""
    if marker and marker not in tokenizer.get_vocab():
        raise ConfigError(f"the tokenizer of {tokenizer.name_or_path} has no token {marker!r}, which the settings name")
    ids = [tokenizer.convert_tokens_to_ids(marker)] if marker else []
    special: int = tokenizer.num_special_tokens_to_add()
    if length <= len(ids) + special:
        raise ConfigError(f"{length} tokens of a text leave no room beside its {len(ids) + special} markers")
    own = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    own.no_padding()
    own.enable_truncation(length - len(ids))
    return own, ids
