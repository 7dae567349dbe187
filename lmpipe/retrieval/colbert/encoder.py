"""The encoder for late interaction, which computes the same token vectors as the colbert-ai package.

Does not depend on indexes or search.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Literal, final

import torch
from torch import Tensor

from lmpipe.engines.onednn_linear import OneDnnLinear
from lmpipe.engines.precision import multiplies_bfloat16
from lmpipe.errors import ConfigError
from lmpipe.retrieval.colbert.bundled import NAME, bundled_checkpoint
from lmpipe.retrieval.colbert.checkpoint import Checkpoint, load_checkpoint
from lmpipe.retrieval.colbert.network import ColbertNetwork
from lmpipe.retrieval.colbert.tokenizer import ColbertTokenizer
from lmpipe.retrieval.vectors import TokenEmbeddings
from lmpipe.validation.arguments import check_items, check_whole_number

DEFAULT = "colbert-ir/colbertv2.0"
_BATCH_TOKENS = {"cpu": 4_096, "cuda": 131_072}  # tokens per forward pass; larger batches are not faster


@final
class ColbertEncoder:
    """A ColBERT checkpoint in this process; threads may share it.

    Queries are encoded in float32. Passages are sorted by length, so that batches contain little padding.

    Args:
        checkpoint: Weights, vocabulary and settings.
        name: Name for display.
        device: Torch device; by default the GPU if there is one, else the CPU.
        precision: Precision in which passages are encoded. ``"auto"`` is bfloat16 if the device computes it faster than
            float32. On a CPU, ``"float32"`` reproduces the vectors of colbert-ai to 1e-5.

    Raises:
        ConfigError: If the settings of the checkpoint do not match its vocabulary, or the device or precision does not
            exist.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        name: str,
        *,
        device: str | None = None,
        precision: Literal["auto", "float32", "bfloat16"] = "auto",
    ) -> None:
        self._checkpoint, self._name = checkpoint, name
        if precision not in {"auto", "float32", "bfloat16"}:
            raise ConfigError(f"precision is {precision!r}; it must be 'auto', 'float32' or 'bfloat16'")
        try:
            self._device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        except RuntimeError as error:
            raise ConfigError(f"there is no device {device!r} ({error}); write 'cpu' or 'cuda'") from error
        self._bfloat16 = precision == "bfloat16" or (precision == "auto" and multiplies_bfloat16(self._device))
        self._batch_tokens = _BATCH_TOKENS.get(self._device.type, _BATCH_TOKENS["cpu"])
        self._tokenizer = ColbertTokenizer(checkpoint)

    @property
    def name(self) -> str:
        """Name of the checkpoint for display: hub id, folder or ``"bundled"``."""
        return self._name

    @property
    def digest(self) -> str:
        """Digest of the checkpoint. Encoders with the same digest compute the same vectors, up to rounding."""
        return self._checkpoint.digest

    @property
    def checkpoint(self) -> Checkpoint:
        """The checkpoint that the encoder was created from."""
        return self._checkpoint

    @property
    def dim(self) -> int:
        """Number of components of a vector."""
        return int(self._checkpoint.projection.shape[0])

    @property
    def query_maxlen(self) -> int:
        """Number of vectors of a query."""
        return self._tokenizer.query_maxlen

    @torch.inference_mode()
    def encode_queries(self, texts: Sequence[str]) -> Tensor:
        """Encodes queries. Control characters and halves of surrogate pairs in texts are replaced by U+FFFD.

        Returns:
            ``[queries, query tokens, dim]``, float32, on the CPU. Vectors of padding are zero; only checkpoints without
            query expansion have padding.
        """
        ids, attention = self._tokenizer.tokenize_queries(check_items("texts", texts, str))
        vectors = torch.empty(*ids.shape, self.dim)
        step = max(1, self._batch_tokens // self.query_maxlen)
        network, packed = self._query_network
        with packed:
            for start in range(0, len(ids), step):
                part = slice(start, start + step)
                vectors[part] = network(ids[part].to(self._device), attention[part].to(self._device)).cpu()
        return vectors if self._checkpoint.settings.do_query_expansion else vectors * attention[..., None]

    @torch.inference_mode()
    def encode_passages(
        self, texts: Sequence[str], advance: Callable[[int], None] = lambda passages: None
    ) -> TokenEmbeddings:
        """Encodes passages. Characters are replaced as in `encode_queries`.

        Args:
            texts: Texts to encode, such as `PassageText.titled_text`.
            advance: Called after every batch with its number of passages.

        Returns:
            The token vectors in the order of the texts, float32, on the CPU.
        """
        rows = self._tokenizer.tokenize_passages(check_items("texts", texts, str))
        masks = [self._tokenizer.has_vector(torch.tensor(row)) for row in rows]
        lengths = torch.tensor([int(mask.sum()) for mask in masks], dtype=torch.long)
        starts = (lengths.cumsum(0) - lengths).tolist()
        vectors = torch.empty(int(lengths.sum()), self.dim)
        network, packed = self._passage_network
        with packed:
            for batch in _batches(rows, self._batch_tokens):
                ids, attention = self._tokenizer.pad([rows[number] for number in batch])
                unpadded = len(rows[batch[0]]) == ids.shape[1]  # attention is faster without a mask
                outputs = network(ids.to(self._device), None if unpadded else attention.to(self._device)).cpu()
                for number, output in zip(batch, outputs, strict=True):
                    selected = output[: len(masks[number])][masks[number]]
                    vectors[starts[number] : starts[number] + len(selected)] = selected
                advance(len(batch))
        return TokenEmbeddings(vectors, lengths)

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes the checkpoint in the format of ColBERTv2.

        Raises:
            ConfigError: If the folder exists and is not empty.
            StoreError: If the folder cannot be written.
        """
        self._checkpoint.save(Path(folder))

    @cached_property
    def _query_network(self) -> tuple[ColbertNetwork, OneDnnLinear]:
        return self._network(torch.float32)

    @cached_property
    def _passage_network(self) -> tuple[ColbertNetwork, OneDnnLinear]:
        return self._network(torch.bfloat16) if self._bfloat16 else self._query_network

    def _network(self, dtype: torch.dtype) -> tuple[ColbertNetwork, OneDnnLinear]:
        network = ColbertNetwork(self._checkpoint).to(self._device, dtype)
        return network, OneDnnLinear(network)


def load_encoder(
    spec: str = DEFAULT,
    *,
    query_maxlen: int | None = None,
    doc_maxlen: int | None = None,
    device: str | None = None,
    precision: Literal["auto", "float32", "bfloat16"] = "auto",
) -> ColbertEncoder:
    """Loads a ColBERT checkpoint.

    Args:
        spec: ``"bundled"`` for the checkpoint that comes with lmpipe[bundled]; else a hub id or a local folder, in the
            format of ColBERTv2 or of sentence-transformers and PyLate.
        query_maxlen: Number of tokens of a query; by default that of the checkpoint.
        doc_maxlen: Maximum number of tokens of a passage; by default that of the checkpoint.
        device: Torch device; see `ColbertEncoder`.
        precision: Precision in which passages are encoded; see `ColbertEncoder`.

    Raises:
        ConfigError: If the checkpoint does not exist or is damaged, or if a setting is invalid.
    """
    checkpoint = bundled_checkpoint() if spec == NAME else load_checkpoint(spec)
    settings = checkpoint.settings
    lengths = replace(
        settings,
        query_maxlen=(
            settings.query_maxlen if query_maxlen is None else check_whole_number("query_maxlen", query_maxlen)
        ),
        doc_maxlen=(settings.doc_maxlen if doc_maxlen is None else check_whole_number("doc_maxlen", doc_maxlen)),
    )
    return ColbertEncoder(replace(checkpoint, settings=lengths), spec, device=device, precision=precision)


def _batches(rows: Sequence[Sequence[int]], tokens: int) -> Iterator[list[int]]:
    """Yields batches of row numbers, sorted by length: at most `tokens` tokens with padding, but at least one row."""
    batch: list[int] = []
    for number in sorted(range(len(rows)), key=lambda number: len(rows[number])):
        if batch and (len(batch) + 1) * len(rows[number]) > tokens:
            yield batch
            batch = []
        batch.append(number)
    if batch:
        yield batch
