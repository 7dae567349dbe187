"""Turns texts into token ids as a checkpoint requires: with markers, masks, and the tokens that have a vector.

Does not depend on weights.
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
from lmpipe.text.cleaning import clean_text

logger = logging.getLogger(__name__)

_BATCH = 1024  # texts that are tokenized at once


@final
class ColbertTokenizer:
    """The tokenizer of a checkpoint (Santhanam et al. 2022, arXiv 2112.01488, section 3.1).

    Texts that are too long are truncated; the first is reported in a warning. Special tokens that a text spells out,
    such as [SEP], are read as those tokens, as in colbert-ai's training and search.

    Args:
        checkpoint: Checkpoint with the vocabulary and settings.

    Attributes:
        query_maxlen: Number of tokens of every query: that of the settings, or the encoder's maximum if it is lower.
        doc_maxlen: Maximum number of tokens of a passage, limited in the same way.
        do_query_expansion: Whether queries are filled with [MASK].

    Raises:
        ConfigError: If the vocabulary lacks a marker or [MASK], or if the markers leave no room for other tokens.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        settings, tokenizer = checkpoint.settings, checkpoint.tokenizer
        positions = min(tokenizer.model_max_length, getattr(checkpoint.config, "max_position_embeddings", 512))
        self.query_maxlen: int = min(settings.query_maxlen, positions)
        self.doc_maxlen: int = min(settings.doc_maxlen, positions)
        self._settings = settings
        self.do_query_expansion = settings.do_query_expansion
        self._queries = _truncating_tokenizer(tokenizer, settings.query_prefix, self.query_maxlen)
        self._passages = _truncating_tokenizer(tokenizer, settings.doc_prefix, self.doc_maxlen)
        self._pad = tokenizer.pad_token_id
        self._mask = tokenizer.mask_token_id if settings.do_query_expansion else self._pad
        if self._mask is None or self._pad is None:
            raise ConfigError(
                f"the tokenizer of {tokenizer.name_or_path} has no [MASK] or no [PAD], so it is not ColBERT's"
            )
        skipped = {
            token for word in settings.skiplist_words for token in tokenizer.encode(word, add_special_tokens=False)[:1]
        }
        self._skipped = torch.tensor(sorted({*skipped, self._pad}))
        self._warned: set[str] = set()

    def tokenize_queries(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Tokenizes queries to one length: fills them with [MASK], or with padding if queries are not expanded.

        Returns:
            Token ids and attention mask, both ``[queries, query tokens]``, int64.
        """
        ids = torch.full((len(texts), self.query_maxlen), self._mask)
        attention = torch.full_like(ids, self._settings.attend_to_mask_tokens)
        for number, row in enumerate(self._encode(texts, "query", *self._queries)):
            ids[number, : len(row)] = torch.tensor(row)
            attention[number, : len(row)] = 1
        if self._settings.do_query_expansion:
            ids[ids == self._pad] = self._mask
        return ids, attention

    def tokenize_passages(self, texts: Sequence[str]) -> list[list[int]]:
        """Returns the token ids of each passage, without padding."""
        return list(self._encode(texts, "passage", *self._passages))

    def pad(self, rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Pads passages to the longest. Returns ids and attention mask, both ``[passages, tokens]``, int64."""
        ids = torch.full((len(rows), max(map(len, rows))), self._pad)
        attention = torch.zeros_like(ids)
        for number, row in enumerate(rows):
            ids[number, : len(row)] = torch.tensor(row)
            attention[number, : len(row)] = 1
        return ids, attention

    def has_vector(self, ids: Tensor) -> Tensor:
        """Returns which tokens of passages have a vector: all but skipped words and padding. Bool, same shape."""
        return ~torch.isin(ids, self._skipped)

    def _encode(self, texts: Sequence[str], kind: str, tokenizer: Tokenizer, marker: list[int]) -> Iterator[list[int]]:
        for start in range(0, len(texts), _BATCH):
            for row in tokenizer.encode_batch_fast([clean_text(text) for text in texts[start : start + _BATCH]]):
                if row.overflowing and kind not in self._warned:
                    self._warned.add(kind)
                    length = len(row.ids) + len(marker)
                    logger.warning("a %s has more than %d tokens; longer texts are truncated", kind, length)
                yield [*row.ids[:1], *marker, *row.ids[1:]]


def _truncating_tokenizer(tokenizer: Any, marker: str, length: int) -> tuple[Tokenizer, list[int]]:
    """Returns a tokenizer that truncates texts and leaves room for a marker, and the id of the marker."""
    if marker and marker not in tokenizer.get_vocab():
        raise ConfigError(f"the tokenizer of {tokenizer.name_or_path} has no token {marker!r}, which the settings use")
    ids = [tokenizer.convert_tokens_to_ids(marker)] if marker else []
    special: int = tokenizer.num_special_tokens_to_add()
    if length <= len(ids) + special:
        raise ConfigError(f"a length of {length} tokens leaves no room for text after {len(ids) + special} markers")
    copy = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    copy.no_padding()
    copy.enable_truncation(length - len(ids))
    return copy, ids
