"""How a ColBERT checkpoint wants texts to be tokenised, as the two formats in use write it down.

Knows nothing of tokenizers or weights.
"""

from __future__ import annotations

import string
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

from lmpipe.errors import ConfigError
from lmpipe.validation.arguments import items, whole_number


@final
@dataclass(frozen=True)
class ColbertSettings:
    """What belongs to a checkpoint beside its weights and vocabulary.

    Attributes:
        query_marker: Token that stands second in every query; none if empty.
        passage_marker: Token that stands second in every passage; none if empty.
        query_tokens: Of every query, markers included: longer ones are cut.
        passage_tokens: Most of a passage, markers included.
        skipped: Words without a vector in passages: punctuation.
        expands: Whether short queries are filled with [MASK], each of which gets a vector (query augmentation).
        attends_to_masks: Whether other tokens see those.

    Raises:
        ConfigError: If a marker is no text, a number of tokens no whole number, or a skipped word no text.
    """

    query_marker: str = "[unused0]"
    passage_marker: str = "[unused1]"
    query_tokens: int = 32
    passage_tokens: int = 220
    skipped: tuple[str, ...] = tuple(string.punctuation)
    expands: bool = True
    attends_to_masks: bool = False

    def __post_init__(self) -> None:
        whole_number("query_tokens", self.query_tokens)
        whole_number("passage_tokens", self.passage_tokens)
        items("skipped", self.skipped, str)
        if not isinstance(self.query_marker, str) or not isinstance(self.passage_marker, str):
            raise ConfigError(f"markers are texts, not {self.query_marker!r} and {self.passage_marker!r}")

    @classmethod
    def from_metadata(cls, record: Mapping[str, Any]) -> ColbertSettings:
        """Of ColBERTv2's ``artifact.metadata``, where what is missing is as in the colbert-ai package."""
        record = record.get("config", record)
        punctuation = string.punctuation if record.get("mask_punctuation", True) else ""
        return cls(
            query_marker=record.get("query_token_id", cls.query_marker),
            passage_marker=record.get("doc_token_id", cls.passage_marker),
            query_tokens=int(record.get("query_maxlen", cls.query_tokens)),
            passage_tokens=int(record.get("doc_maxlen", cls.passage_tokens)),
            skipped=tuple(record.get("skiplist_words", punctuation)),
            expands=bool(record.get("do_query_expansion", True)),
            attends_to_masks=bool(record.get("attend_to_mask_tokens", False)),
        )

    @classmethod
    def from_sentence_transformers(cls, record: Mapping[str, Any]) -> ColbertSettings:
        """Of ``config_sentence_transformers.json``, where what is missing is as in PyLate."""
        given = {name: value for name, value in record.items() if value is not None}
        expands = bool(given.get("do_query_expansion", True))
        return cls(
            query_marker=given.get("query_prefix", "[Q] "),
            passage_marker=given.get("document_prefix", "[D] "),
            query_tokens=int(given.get("query_length", 32)),
            passage_tokens=int(given.get("document_length", 180)),
            skipped=tuple(given.get("skiplist_words", string.punctuation)),
            expands=expands,
            attends_to_masks=expands and bool(given.get("attend_to_expansion_tokens", False)),
        )

    def metadata(self, dim: int) -> dict[str, Any]:
        """As ``artifact.metadata``; the last two are passed over by colbert-ai.

        Args:
            dim: Components of a vector.
        """
        return {
            "query_token_id": self.query_marker,
            "doc_token_id": self.passage_marker,
            "query_token": "[Q]",
            "doc_token": "[D]",
            "query_maxlen": self.query_tokens,
            "doc_maxlen": self.passage_tokens,
            "dim": dim,
            "mask_punctuation": bool(self.skipped),
            "attend_to_mask_tokens": self.attends_to_masks,
            "similarity": "cosine",
            "interaction": "colbert",
            "skiplist_words": list(self.skipped),
            "do_query_expansion": self.expands,
        }
