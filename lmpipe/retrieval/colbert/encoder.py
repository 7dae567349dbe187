"""The encoder of late interaction: texts in, token vectors out, the same that the colbert-ai package makes.

Knows nothing of indexes or search.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Literal, final

import torch
from torch import Tensor

from lmpipe.engines.onednn_linear import PackedProducts
from lmpipe.engines.precision import multiplies_bfloat16
from lmpipe.errors import ConfigError
from lmpipe.retrieval.colbert.bundled import NAME, bundled_checkpoint
from lmpipe.retrieval.colbert.checkpoint import Checkpoint, load_checkpoint
from lmpipe.retrieval.colbert.network import ColbertNetwork
from lmpipe.retrieval.colbert.tokenizer import ColbertTokens
from lmpipe.retrieval.vectors import TokenVectors
from lmpipe.validation.arguments import items, whole_number

DEFAULT = "colbert-ir/colbertv2.0"
_BATCH = {"cpu": 4_096, "cuda": 131_072}  # tokens of a forward pass; more were no faster


@final
class ColbertEncoder:
    """A ColBERT checkpoint in this process; threads may share it.

    Queries are encoded in float32. Passages are sorted by length, so that batches hold little padding.

    Args:
        checkpoint: Weights, vocabulary and settings.
        name: For people.
        device: By default the GPU if there is one.
        precision: Of the products that passages are encoded by; ``"auto"`` is bfloat16 where the device computes it
            faster than float32. On a CPU, "float32" makes the vectors of colbert-ai to 1e-5.

    Raises:
        ConfigError: If the checkpoint's settings do not fit its vocabulary, or there is no such device or precision.
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
        self._halved = precision == "bfloat16" or (precision == "auto" and multiplies_bfloat16(self._device))
        self._batch = _BATCH.get(self._device.type, _BATCH["cpu"])
        self._tokens = ColbertTokens(checkpoint)

    @property
    def name(self) -> str:
        """What people call the checkpoint: hub id, folder or ``"bundled"``."""
        return self._name

    @property
    def digest(self) -> str:
        """Of weights, vocabulary and settings: two encoders of one digest make the same vectors, up to rounding."""
        return self._checkpoint.digest

    @property
    def checkpoint(self) -> Checkpoint:
        """What it was made from."""
        return self._checkpoint

    @property
    def dim(self) -> int:
        """Components of a vector."""
        return int(self._checkpoint.projection.shape[0])

    @property
    def query_maxlen(self) -> int:
        """Vectors of a query."""
        return self._tokens.query_maxlen

    @torch.inference_mode()
    def encode_queries(self, texts: Sequence[str]) -> Tensor:
        """Vectors of queries. Control characters and halves of surrogate pairs in them are read as U+FFFD.

        Returns:
            ``[queries, query tokens, dim]``, float32, on the CPU; a token of padding, which only checkpoints that do
            not expand queries have, is zero.
        """
        ids, attention = self._tokens.queries(items("texts", texts, str))
        made = torch.empty(*ids.shape, self.dim)
        step = max(1, self._batch // self.query_maxlen)
        network, packed = self._for_queries
        with packed:
            for start in range(0, len(ids), step):
                part = slice(start, start + step)
                made[part] = network(ids[part].to(self._device), attention[part].to(self._device)).cpu()
        return made if self._checkpoint.settings.expands else made * attention[..., None]

    @torch.inference_mode()
    def encode_passages(
        self, texts: Sequence[str], advance: Callable[[int], None] = lambda passages: None
    ) -> TokenVectors:
        """Vectors of passages, in their order. Their texts are read as those of queries are.

        Args:
            texts: What is indexed, such as `PassageText.full`.
            advance: Is told of every batch how many passages it held.

        Returns:
            float32, on the CPU.
        """
        rows = self._tokens.passages(items("texts", texts, str))
        kept = [self._tokens.has_vector(torch.tensor(row)) for row in rows]
        lengths = torch.tensor([int(keeps.sum()) for keeps in kept], dtype=torch.long)
        starts = (lengths.cumsum(0) - lengths).tolist()
        vectors = torch.empty(int(lengths.sum()), self.dim)
        network, packed = self._for_passages
        with packed:
            for batch in _batches(rows, self._batch):
                ids, attention = self._tokens.padded([rows[number] for number in batch])
                whole = len(rows[batch[0]]) == ids.shape[1]  # no padding: attention is faster without a mask
                made = network(ids.to(self._device), None if whole else attention.to(self._device)).cpu()
                for number, row in zip(batch, made, strict=True):
                    own = row[: len(kept[number])][kept[number]]
                    vectors[starts[number] : starts[number] + len(own)] = own
                advance(len(batch))
        return TokenVectors(vectors, lengths)

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes the checkpoint in the format of ColBERTv2.

        Raises:
            ConfigError: If the folder is there and holds something.
            StoreError: If it cannot be written.
        """
        self._checkpoint.save(Path(folder))

    @cached_property
    def _for_queries(self) -> tuple[ColbertNetwork, PackedProducts]:
        return self._network(torch.float32)

    @cached_property
    def _for_passages(self) -> tuple[ColbertNetwork, PackedProducts]:
        return self._network(torch.bfloat16) if self._halved else self._for_queries

    def _network(self, dtype: torch.dtype) -> tuple[ColbertNetwork, PackedProducts]:
        network = ColbertNetwork(self._checkpoint).to(self._device, dtype)
        return network, PackedProducts(network)


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
        spec: ``"bundled"`` for the one that comes with lmpipe[bundled]; else a hub id or a local folder, in the
            format of ColBERTv2 or of sentence-transformers and PyLate.
        query_maxlen: In place of what the checkpoint says.
        doc_maxlen: In place of what the checkpoint says.
        device: See `ColbertEncoder`.
        precision: See `ColbertEncoder`.

    Raises:
        ConfigError: If there is no such checkpoint, or it is damaged, or a setting cannot be.
    """
    checkpoint = bundled_checkpoint() if spec == NAME else load_checkpoint(spec)
    settings = checkpoint.settings
    lengths = replace(
        settings,
        query_maxlen=settings.query_maxlen if query_maxlen is None else whole_number("query_maxlen", query_maxlen),
        doc_maxlen=(settings.doc_maxlen if doc_maxlen is None else whole_number("doc_maxlen", doc_maxlen)),
    )
    return ColbertEncoder(replace(checkpoint, settings=lengths), spec, device=device, precision=precision)


def _batches(rows: Sequence[Sequence[int]], tokens: int) -> Iterator[list[int]]:
    """Numbers of rows by length, in batches of so many tokens at most, padding included; one row at least."""
    batch: list[int] = []
    for number in sorted(range(len(rows)), key=lambda number: len(rows[number])):
        if batch and (len(batch) + 1) * len(rows[number]) > tokens:
            yield batch
            batch = []
        batch.append(number)
    if batch:
        yield batch
