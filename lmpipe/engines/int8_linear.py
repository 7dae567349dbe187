"""Linear layers whose products are computed in int8: weights rounded once, inputs at every call.

The scheme is W8A8 with dynamic scales: one scale for each output of the weights, and one for each row of the input
(vector-wise quantization; Dettmers et al. 2022, arXiv 2208.07339, without its outlier columns). Sums of products are
exact integers, so the output of a row does not depend on the rows that it is computed with.

Does not depend on anything in a model but its linear layers.
"""

from __future__ import annotations

from typing import Any, final

import torch
from torch.nn.functional import linear

_LARGEST = 127  # largest absolute value of a rounded weight or input; -128 is not used
_SMALLEST = 1e-30  # keeps rows of zeros from being divided by zero
_BATCH_ROWS = 64  # input rows that the weight layout is optimized for; other numbers are as fast


@final
class Int8Linear(torch.nn.Linear):
    """A linear layer that computes in int8 in inference mode, and with its own weights otherwise, as in training.

    It is a `torch.nn.Linear` because PEFT adapts no other layers; an adapter is added to the result in its own dtype.
    While the weights are swapped for others, the layer computes with those, without rounding them.

    Args:
        layer: Layer to replace; its parameters are shared, and must not change.
    """

    def __init__(self, layer: torch.nn.Linear) -> None:
        super().__init__(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        self.weight, self.bias = layer.weight, layer.bias
        weight = layer.weight.detach().float()
        scales = weight.abs().amax(1).clamp_(min=_SMALLEST) / _LARGEST
        rounded = (weight / scales[:, None]).round().to(torch.int8)
        self._address = layer.weight.data_ptr()
        self._packed = torch.ops.onednn.qlinear_prepack(rounded, [_BATCH_ROWS, layer.in_features])
        # oneDNN multiplies uint8 by int8, so 128 is added to every input and its product subtracted from the result
        self._scales = scales / _LARGEST
        self._zero_points = torch.zeros(layer.out_features, dtype=torch.int32)
        self._correction = -128 * self._scales * rounded.sum(1)

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002 – the name in torch
        """Computes the outputs, shape (…, outputs), of inputs of shape (…, inputs)."""
        if not torch.is_inference_mode_enabled() or self.weight.data_ptr() != self._address:
            return linear(input, self.weight, self.bias)
        x = input.float()
        largest = x.abs().amax(-1, keepdim=True).clamp_(min=_SMALLEST)
        rounded = (x * (_LARGEST / largest)).round_().to(torch.int8)
        product: torch.Tensor = torch.ops.onednn.qlinear_pointwise(
            rounded.bitwise_xor_(-128).view(torch.uint8),  # adds 128
            1.0,
            0,
            self._packed,
            self._scales,
            self._zero_points,
            self._correction,
            1.0,
            0,
            torch.float32,
            "none",
            [],
            "",
        ).mul_(largest)
        if self.bias is not None:
            product += self.bias
        return product.to(input.dtype)


def quantize_linear_layers(model: Any) -> int:
    """Replaces the linear layers of a causal LM by `Int8Linear`, except the last one, which computes the logits.

    Args:
        model: A transformers causal LM on a CPU.

    Returns:
        The number of replaced layers.
    """
    last = model.get_output_embeddings()
    layers = {
        name: module for name, module in model.named_modules() if type(module) is torch.nn.Linear and module is not last
    }
    for name, layer in layers.items():
        model.set_submodule(name, Int8Linear(layer))
    return len(layers)


def has_int8_layers(model: Any) -> bool:
    """Whether linear layers of a model have been replaced by `quantize_linear_layers`."""
    return any(isinstance(module, Int8Linear) for module in model.modules())
