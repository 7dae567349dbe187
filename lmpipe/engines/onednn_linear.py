"""Linear layers computed by oneDNN with prepacked weights.

On a CPU, PyTorch multiplies float32 matrices with MKL, which uses only half the speed of some processors. oneDNN with
weights in its own memory layout is up to 2.3 times as fast at the same precision, and a sixth faster in bfloat16.
PyTorch uses it for compiled models only. `OneDnnLinear` uses it for any model, while the mode is active and gradients
are disabled.

Does not depend on anything in a model but its linear layers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, final

import psutil
import torch
from torch.overrides import TorchFunctionMode

_BATCH_ROWS = 64  # input rows that the weight layout is optimized for; other numbers are as fast


@final
class OneDnnLinear(TorchFunctionMode):
    """Computes linear layers with prepacked copies of their weights.

    Args:
        model: Model whose weights must neither change nor move while this mode is used. A weight is copied when it is
            used first. The copies double the memory of the weights. They are created only on a CPU, and only if they
            fit in a quarter of the free memory.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self._weights: dict[int, torch.Tensor] = {}  # address of a weight that may be packed → the weight
        self._packed: dict[tuple[int, ...], torch.Tensor] = {}  # addresses of weights → their packed copy, in one
        if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
            return
        supports_bfloat16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()  # packing fails where it does not
        dtypes = (torch.float32, torch.bfloat16) if supports_bfloat16 else (torch.float32,)
        weights = {
            module.weight.data_ptr(): module.weight.detach()
            for module in model.modules()
            if type(module) is torch.nn.Linear and module.weight.dtype in dtypes
        }
        max_bytes = psutil.virtual_memory().available // 4
        fits = sum(weight.nbytes for weight in weights.values()) <= max_bytes
        on_cpu = all(weight.device.type == "cpu" for weight in weights.values())
        if fits and on_cpu:
            self._weights = weights

    def linear(
        self, x: torch.Tensor, weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor | None]
    ) -> torch.Tensor:
        """Returns the outputs of linear layers with the same input side by side, shape (rows, all outputs).

        Args:
            x: Input, shape (rows, size).
            weights: Weight of each layer, shape (outputs, size).
            biases: Bias of each layer, or None.
        """
        packed = self._packed_copy(x, weights)
        if packed is None:
            outputs = [torch.nn.functional.linear(x, *layer) for layer in zip(weights, biases, strict=True)]
            return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)
        bias = None
        if any(bias is not None for bias in biases):
            bias = torch.cat([w.new_zeros(len(w)) if b is None else b for w, b in zip(weights, biases, strict=True)])
        return torch.as_tensor(torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], ""))

    def _packed_copy(self, x: torch.Tensor, weights: Sequence[torch.Tensor]) -> torch.Tensor | None:
        """Returns the packed copy of weights, one below the other; None if they must not be packed."""
        key = tuple(weight.data_ptr() for weight in weights)
        packed = self._packed.get(key)
        if packed is None and all(address in self._weights for address in key):
            joined = weights[0].detach() if len(weights) == 1 else torch.cat([weight.detach() for weight in weights])
            packed = self._packed[key] = torch.ops.mkldnn._reorder_linear_weight(joined, _BATCH_ROWS)
        return packed if x.dtype == weights[0].dtype else None

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is torch.nn.functional.linear and not kwargs and not torch.is_grad_enabled():
            x, weight, *bias = args
            packed = self._packed_copy(x, [weight])
            if packed is not None:
                return torch.ops.mkldnn._linear_pointwise(x, packed, bias[0] if bias else None, "none", [], "")
        return func(*args, **(kwargs or {}))
