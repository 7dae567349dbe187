"""The network of a checkpoint: a transformers encoder, and the projection of its last hidden states to token vectors.

Does not depend on tokenizers, batches or devices.
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
    """A network with a copy of a checkpoint's weights: float32, on the CPU, in evaluation mode.

    Args:
        checkpoint: Checkpoint whose weights are copied.
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
        """Computes token vectors.

        Args:
            ids: Token ids, ``[texts, tokens]``.
            attention: Attention mask of the same shape: 1 for tokens that are attended to, else 0; None if all are.

        Returns:
            ``[texts, tokens, dim]``, float32, unit length.
        """
        states = self.backbone(input_ids=ids, attention_mask=attention).last_hidden_state
        return torch.nn.functional.normalize(self.projection(states).float(), dim=-1)

    def checkpoint(self, like: Checkpoint) -> Checkpoint:
        """Returns a copy of the weights as a checkpoint.

        Args:
            like: Checkpoint with the settings, config, tokenizer and names of weights of the result.
        """
        state = {name: value.detach().cpu().clone() for name, value in self.backbone.state_dict().items()}
        weights = {name: state[name] for name in like.weights}
        return replace(like, weights=weights, projection=self.projection.weight.detach().cpu().clone())
