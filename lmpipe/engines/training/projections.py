"""Products with frozen linear layers and their LoRA adapters, forward and backward, for `fused_decoder`.

Frozen weights are in oneDNN's layout, once for each direction. Adapters are copied to the dtype of the products once
per batch. Knows nothing about the order of layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

import torch

from lmpipe.engines.local.decoder import is_lora
from lmpipe.engines.local.forward_batch import spans

_ROWS = 1024  # input rows that the layout of frozen weights is optimized for


@final
@dataclass(frozen=True, slots=True)
class Lora:
    """The adapter of one linear layer: ``scaling * x @ down.T @ up.T`` is added to its output.

    Attributes:
        down: Trainable weight, shape (rank, inputs).
        up: Trainable weight, shape (outputs, rank).
        scaling: Factor.
        outputs: The layer's part of the outputs of its projection.
        scaled_down: ``scaling * down`` in the dtype of the products.
        cast_up: `up` in the dtype of the products.
    """

    down: torch.nn.Parameter
    up: torch.nn.Parameter
    scaling: float
    outputs: slice
    scaled_down: torch.Tensor
    cast_up: torch.Tensor


@torch.no_grad()
def load_adapters(adapters: Sequence[Lora]) -> None:
    """Copies the trainable weights as they are now to where `Projection` reads them."""
    if adapters:
        copies = [copy for lora in adapters for copy in (lora.scaled_down, lora.cast_up)]
        torch._foreach_copy_(copies, [weight for lora in adapters for weight in (lora.down, lora.up)])
        torch._foreach_mul_([lora.scaled_down for lora in adapters], [lora.scaling for lora in adapters])


@final
class Projection:
    """Linear layers of the same input, frozen but for their adapters; the outputs are side by side.

    Args:
        modules: The layers: `torch.nn.Linear`, or PEFT's LoRA layers.
        dtype: Dtype of the products.

    Attributes:
        adapters: The adapters; `load_adapters` must have read their weights before a pass.
    """

    def __init__(self, modules: Sequence[Any], dtype: torch.dtype) -> None:
        bases = [module.base_layer if is_lora(module) else module for module in modules]
        weight = torch.cat([base.weight.detach().to(dtype) for base in bases])
        self._forward = torch.ops.mkldnn._reorder_linear_weight(weight, _ROWS)
        self._backward = torch.ops.mkldnn._reorder_linear_weight(weight.t().contiguous(), _ROWS)
        self._bias = None
        if any(base.bias is not None for base in bases):
            biases = [base.weight.new_zeros(len(base.weight)) if base.bias is None else base.bias for base in bases]
            self._bias = torch.cat([bias.detach().to(dtype) for bias in biases])
        outputs = spans([base.out_features for base in bases])
        tuned = [(module, span) for module, span in zip(modules, outputs, strict=True) if is_lora(module)]
        names = [module.active_adapters[0] for module, _ in tuned]
        self._ranks = [len(module.lora_A[name].weight) for (module, _), name in zip(tuned, names, strict=True)]
        self._downs = torch.empty(sum(self._ranks), weight.shape[1], dtype=dtype)
        self.adapters = [
            Lora(
                module.lora_A[name].weight,
                up := module.lora_B[name].weight,
                module.scaling[name],
                slice(span.start, span.stop),
                scaled_down,
                torch.empty_like(up, dtype=dtype, requires_grad=False),
            )
            for (module, span), name, scaled_down in zip(tuned, names, self._split(self._downs, dim=0), strict=True)
        ]
        scalings = [lora.scaling for lora, rank in zip(self.adapters, self._ranks, strict=True) for _ in range(rank)]
        self._scalings = torch.tensor(scalings)[:, None]

    def __call__(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Returns the outputs, shape (tokens, outputs), and what the backward pass needs besides the input."""
        y: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, self._forward, self._bias, "none", [], "")
        if not self.adapters:
            return y, None
        low = x @ self._downs.t()
        for lora, part in zip(self.adapters, self._split(low), strict=True):
            y[:, lora.outputs].addmm_(part, lora.cast_up.t())
        return y, low

    def backward(
        self, gradient: torch.Tensor, x: torch.Tensor, low: torch.Tensor | None, *, needs_input: bool
    ) -> tuple[torch.Tensor | None, list[torch.Tensor]]:
        """Returns the gradient of the input, if it is needed, and those of the adapters: down and up of each."""
        out: torch.Tensor | None = None
        if needs_input:
            out = torch.ops.mkldnn._linear_pointwise(gradient, self._backward, None, "none", [], "")
        if low is None:
            return out, []
        ups, low_gradient = [], torch.empty_like(low)
        for lora, part, part_gradient in zip(self.adapters, self._split(low), self._split(low_gradient), strict=True):
            slope = gradient[:, lora.outputs]
            ups.append((slope.t() @ part).float())
            torch.mm(slope, lora.cast_up, out=part_gradient)
        downs = self._split((low_gradient.t() @ x) * self._scalings, dim=0)
        if out is not None:
            out.addmm_(low_gradient, self._downs)
        return out, [tensor for pair in zip(downs, ups, strict=True) for tensor in pair]

    def _split(self, x: torch.Tensor, dim: int = 1) -> Sequence[torch.Tensor]:
        """Splits the ranks of all adapters into those of each."""
        return torch.split_with_sizes(x, self._ranks, dim)
