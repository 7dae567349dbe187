"""How a ColBERT checkpoint wants texts to be tokenised, as the two formats in use write it down.

Knows nothing of tokenizers or weights.
"""

from __future__ import annotations

import string
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

from lmpipe.errors import ConfigError
from lmpipe.validation.arguments import check_items, check_whole_number


@final
@dataclass(frozen=True)
class ColbertSettings:
    """What belongs to a checkpoint beside its weights and vocabulary.

    Attributes:
        query_prefix: Token that stands second in every query; none if empty.
        doc_prefix: Token that stands second in every passage; none if empty.
        query_maxlen: Of every query, markers included: longer ones are cut.
        doc_maxlen: Most of a passage, markers included.
        skipped: Words without a vector in passages: punctuation.
        expands: Whether short queries are filled with [MASK], each of which gets a vector (query augmentation).
        attends_to_masks: Whether other tokens see those.

    Raises:
        ConfigError: If a marker is no text, a number of tokens no whole number, or a skipped word no text.
    """

    query_prefix: str = "[unused0]"
    doc_prefix: str = "[unused1]"
    query_maxlen: int = 32
    doc_maxlen: int = 220
    skipped: tuple[str, ...] = tuple(string.punctuation)
    expands: bool = True
    attends_to_masks: bool = False

    def __post_init__(self) -> None:
        check_whole_number("query_maxlen", self.query_maxlen)
        check_whole_number("doc_maxlen", self.doc_maxlen)
        check_items("skipped", self.skipped, str)
        if not isinstance(self.query_prefix, str) or not isinstance(self.doc_prefix, str):
            raise ConfigError(f"markers are texts, not {self.query_prefix!r} and {self.doc_prefix!r}")

    @classmethod
    def from_metadata(cls, record: Mapping[str, Any]) -> ColbertSettings:
        """Of ColBERTv2's ``artifact.metadata``, where what is missing is as in the colbert-ai package."""
        record = record.get("config", record)
        punctuation = string.punctuation if record.get("mask_punctuation", True) else ""
        return cls(
            query_prefix=record.get("query_token_id", cls.query_prefix),
            doc_prefix=record.get("doc_token_id", cls.doc_prefix),
            query_maxlen=int(record.get("query_maxlen", cls.query_maxlen)),
            doc_maxlen=int(record.get("doc_maxlen", cls.doc_maxlen)),
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
            query_prefix=given.get("query_prefix", "[Q] "),
            doc_prefix=given.get("document_prefix", "[D] "),
            query_maxlen=int(given.get("query_length", 32)),
            doc_maxlen=int(given.get("document_length", 180)),
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
            "query_token_id": self.query_prefix,
            "doc_token_id": self.doc_prefix,
            "query_token": "[Q]",
            "doc_token": "[D]",
            "query_maxlen": self.query_maxlen,
            "doc_maxlen": self.doc_maxlen,
            "dim": dim,
            "mask_punctuation": bool(self.skipped),
            "attend_to_mask_tokens": self.attends_to_masks,
            "similarity": "cosine",
            "interaction": "colbert",
            "skiplist_words": list(self.skipped),
            "do_query_expansion": self.expands,
        }
