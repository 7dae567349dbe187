"""The model of a checkpoint: an encoder of transformers, and the projection of its last states to token vectors.

Knows nothing of tokenizers, batches or devices.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, final

import torch
from torch import Tensor
from transformers import AutoModel

from lmpipe.retrieval.colbert.checkpoint import Checkpoint


@final
class ColbertNetwork(torch.nn.Module):
    """A model with weights of its own, float32, on the CPU, for inference.

    Args:
        checkpoint: Where they are copied from.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__()
        self.backbone: Any = AutoModel.from_config(checkpoint.config, dtype=torch.float32)  # type: ignore[no-untyped-call]
        self.backbone.load_state_dict(checkpoint.weights, strict=False)
        dim, hidden = checkpoint.projection.shape
        self.projection = torch.nn.Linear(hidden, dim, bias=False)
        self.projection.load_state_dict({"weight": checkpoint.projection})
        self.eval()

    def forward(self, ids: Tensor, attention: Tensor | None = None) -> Tensor:
        """Token vectors.

        Args:
            ids: ``[texts, tokens]``.
            attention: Of the same shape: 1 where others may look, 0 elsewhere; everywhere if there is none.

        Returns:
            ``[texts, tokens, dim]``, float32, each of length 1.
        """
        states = self.backbone(input_ids=ids, attention_mask=attention).last_hidden_state
        return torch.nn.functional.normalize(self.projection(states).float(), dim=-1)

    def checkpoint(self, like: Checkpoint) -> Checkpoint:
        """A copy of its weights as a checkpoint.

        Args:
            like: Has everything but the weights.
        """
        weights = {name: value.detach().cpu().clone() for name, value in self.backbone.state_dict().items()}
        kept = {name: weights[name] for name in like.weights}
        return replace(like, weights=kept, projection=self.projection.weight.detach().cpu().clone())
