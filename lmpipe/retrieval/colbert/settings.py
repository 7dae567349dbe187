"""Settings of a ColBERT checkpoint, as the two common formats of checkpoints store them.

Does not depend on tokenizers or weights.
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
    """Settings of the tokenization, which a checkpoint contains in addition to its weights and vocabulary.

    Attributes:
        query_prefix: Marker token after [CLS] in every query; no token if empty.
        doc_prefix: Marker token after [CLS] in every passage; no token if empty.
        query_maxlen: Number of tokens of every query, including markers; longer queries are truncated.
        doc_maxlen: Maximum number of tokens of a passage, including markers; longer passages are truncated.
        skiplist_words: Words that get no vector in passages, such as punctuation.
        do_query_expansion: Whether short queries are filled with [MASK], each of which gets a vector (query
            augmentation).
        attend_to_mask_tokens: Whether other tokens attend to these [MASK] tokens.

    Raises:
        ConfigError: If a prefix or a word is not text, or a length is not a whole number.
    """

    query_prefix: str = "[unused0]"
    doc_prefix: str = "[unused1]"
    query_maxlen: int = 32
    doc_maxlen: int = 220
    skiplist_words: tuple[str, ...] = tuple(string.punctuation)
    do_query_expansion: bool = True
    attend_to_mask_tokens: bool = False

    def __post_init__(self) -> None:
        check_whole_number("query_maxlen", self.query_maxlen)
        check_whole_number("doc_maxlen", self.doc_maxlen)
        check_items("skiplist_words", self.skiplist_words, str)
        if not isinstance(self.query_prefix, str) or not isinstance(self.doc_prefix, str):
            raise ConfigError(f"prefixes must be text, not {self.query_prefix!r} and {self.doc_prefix!r}")

    @property
    def identity(self) -> dict[str, Any]:
        """The settings as hashed in the digest of a checkpoint, which indexes store; the keys must never change."""
        return {
            "type": "ColbertSettings",
            "query_marker": self.query_prefix,
            "passage_marker": self.doc_prefix,
            "query_tokens": self.query_maxlen,
            "passage_tokens": self.doc_maxlen,
            "skipped": list(self.skiplist_words),
            "expands": self.do_query_expansion,
            "attends_to_masks": self.attend_to_mask_tokens,
        }

    @classmethod
    def from_metadata(cls, record: Mapping[str, Any]) -> ColbertSettings:
        """Reads ColBERTv2's ``artifact.metadata``; missing entries get the defaults of the colbert-ai package."""
        record = record.get("config", record)
        punctuation = string.punctuation if record.get("mask_punctuation", True) else ""
        return cls(
            query_prefix=record.get("query_token_id", cls.query_prefix),
            doc_prefix=record.get("doc_token_id", cls.doc_prefix),
            query_maxlen=int(record.get("query_maxlen", cls.query_maxlen)),
            doc_maxlen=int(record.get("doc_maxlen", cls.doc_maxlen)),
            skiplist_words=tuple(record.get("skiplist_words", punctuation)),
            do_query_expansion=bool(record.get("do_query_expansion", True)),
            attend_to_mask_tokens=bool(record.get("attend_to_mask_tokens", False)),
        )

    @classmethod
    def from_sentence_transformers(cls, record: Mapping[str, Any]) -> ColbertSettings:
        """Reads ``config_sentence_transformers.json``; missing entries get the defaults of PyLate."""
        entries = {name: value for name, value in record.items() if value is not None}
        do_query_expansion = bool(entries.get("do_query_expansion", True))
        return cls(
            query_prefix=entries.get("query_prefix", "[Q] "),
            doc_prefix=entries.get("document_prefix", "[D] "),
            query_maxlen=int(entries.get("query_length", 32)),
            doc_maxlen=int(entries.get("document_length", 180)),
            skiplist_words=tuple(entries.get("skiplist_words", string.punctuation)),
            do_query_expansion=do_query_expansion,
            attend_to_mask_tokens=do_query_expansion and bool(entries.get("attend_to_expansion_tokens", False)),
        )

    def metadata(self, dim: int) -> dict[str, Any]:
        """Returns the content of ``artifact.metadata``; colbert-ai ignores the last two entries.

        Args:
            dim: Number of components of a vector.
        """
        return {
            "query_token_id": self.query_prefix,
            "doc_token_id": self.doc_prefix,
            "query_token": "[Q]",
            "doc_token": "[D]",
            "query_maxlen": self.query_maxlen,
            "doc_maxlen": self.doc_maxlen,
            "dim": dim,
            "mask_punctuation": bool(self.skiplist_words),
            "attend_to_mask_tokens": self.attend_to_mask_tokens,
            "similarity": "cosine",
            "interaction": "colbert",
            "skiplist_words": list(self.skiplist_words),
            "do_query_expansion": self.do_query_expansion,
        }
