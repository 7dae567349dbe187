"""Linear layers whose products are computed in int8: weights rounded once, inputs at every call.

The scheme is W8A8 with dynamic scales: one scale for each output of the weights, and one for each row of the input.
Columns in which inputs are much larger than in others would take most of a row's range, so they are divided by factors
that the weights are multiplied by, as in SmoothQuant (Xiao et al. 2023, arXiv 2211.10438). A forward pass over a short
text finds them. Sums of products are exact integers, so the output of a row does not depend on the rows that it is
computed with.

Does not depend on anything in a model but its linear layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, final

import torch
from torch.nn.functional import linear

_LARGEST = 127  # largest absolute value of a rounded weight or input; -128 is not used
_SMALLEST = 1e-30  # keeps rows of zeros from being divided by zero
_MAX_EXPONENT = 20  # of the factors, for columns that the text does not reach
_CALIBRATION_TEXT = """You are a helpful assistant. Answer the question in a few words, and give a reason.
question: Which river flows through Paris, Rouen and Le Havre? answer: the Seine
petal_length: 4.7, petal_width: 1.5 -> {"species": "versicolor", "sure": true}
Tom has 12 apples. He gives 5 of them to Ann and buys 3 more, so he has 12 - 5 + 3 = 10 apples. #### 10
def area(radius: float) -> float:
    return 3.14159 * radius ** 2
"""
_BATCH_ROWS = 64  # input rows that the weight layout is optimized for; other numbers are as fast


@final
class Int8Linear(torch.nn.Linear):
    """A linear layer that computes in int8 in inference mode, and with its own weights otherwise, as in training.

    It is a `torch.nn.Linear` because PEFT adapts no other layers; an adapter is added to the result in its own dtype.
    While the weights are swapped for others, the layer computes with those, without rounding them.

    Args:
        layer: Layer to replace; its parameters are shared, and must not change.
        largest_inputs: Largest absolute values of typical inputs in each column, shape (inputs); None if unknown.
    """

    def __init__(self, layer: torch.nn.Linear, largest_inputs: torch.Tensor | None = None) -> None:
        super().__init__(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        self.weight, self.bias = layer.weight, layer.bias
        weight = layer.weight.detach().float()
        factors = torch.ones(layer.in_features) if largest_inputs is None else _factors(weight, largest_inputs)
        weight, self._factors = weight * factors, 1 / factors
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
        x = input.float() * self._factors
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


def quantize_linear_layers(model: Any, tokenizer: Any) -> int:
    """Replaces the linear layers of a causal LM by `Int8Linear`, except the last one, which computes the logits.

    Args:
        model: A transformers causal LM on a CPU.
        tokenizer: Tokenizer of the model.

    Returns:
        The number of replaced layers.
    """
    last = model.get_output_embeddings()
    layers = {
        name: module for name, module in model.named_modules() if type(module) is torch.nn.Linear and module is not last
    }
    largest_inputs = _largest_inputs(model, layers, tokenizer(_CALIBRATION_TEXT, return_tensors="pt")["input_ids"])
    for name, layer in layers.items():
        model.set_submodule(name, Int8Linear(layer, largest_inputs.get(name)))
    return len(layers)


@torch.inference_mode()
def _largest_inputs(
    model: Any, layers: Mapping[str, torch.nn.Linear], input_ids: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Returns the largest absolute input of each layer in each column; layers without inputs are missing."""
    largest: dict[str, torch.Tensor] = {}

    def record(name: str, _: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        values = inputs[0].abs().flatten(end_dim=-2).float()
        if len(values):
            largest[name] = values.amax(0)

    handles = [layer.register_forward_pre_hook(partial(record, name)) for name, layer in layers.items()]
    try:
        model.eval()(input_ids=input_ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return largest


def _factors(weight: torch.Tensor, largest_inputs: torch.Tensor) -> torch.Tensor:
    """Returns the factors by which inputs are divided: powers of two, which do not round anything, shape (inputs)."""
    largest_weights = weight.abs().amax(0).clamp_(min=_SMALLEST)
    ratios = largest_inputs.clamp(min=_SMALLEST) / largest_weights
    return torch.exp2((ratios.log2() / 2).round().clamp(-_MAX_EXPONENT, _MAX_EXPONENT))


def has_int8_layers(model: Any) -> bool:
    """Whether linear layers of a model have been replaced by `quantize_linear_layers`."""
    return any(isinstance(module, Int8Linear) for module in model.modules())
