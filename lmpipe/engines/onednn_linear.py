"""Linear layers computed by oneDNN with prepacked weights.

On a CPU, PyTorch multiplies float32 matrices with MKL, which uses only half the speed of some processors. oneDNN with
weights in its own memory layout is up to 2.3 times as fast at the same precision, and a sixth faster in bfloat16.
PyTorch uses it for compiled models only. `OneDnnLinear` uses it for any model, while the mode is active and gradients
are disabled.

Does not depend on anything in a model but its linear layers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, final

import psutil
import torch
from torch.overrides import TorchFunctionMode

_BATCH_ROWS = 64  # input rows that the weight layout is optimized for; other numbers are as fast


@final
class OneDnnLinear(TorchFunctionMode):
    """Computes linear layers with prepacked copies of their weights.

    Args:
        model: Model whose weights must neither change nor move while this mode is used. The copies double the
            memory of the weights. They are created only on a CPU, and only if they fit in a quarter of the free memory.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self._packed: dict[int, torch.Tensor] = {}  # address of a weight → its packed copy
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
            for address, weight in weights.items():
                self._packed[address] = torch.ops.mkldnn._reorder_linear_weight(weight, _BATCH_ROWS)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is torch.nn.functional.linear and not kwargs and not torch.is_grad_enabled():
            x, weight, *bias = args
            packed = self._packed.get(weight.data_ptr()) if x.dtype == weight.dtype else None
            if packed is not None:
                return torch.ops.mkldnn._linear_pointwise(x, packed, bias[0] if bias else None, "none", [], "")
        return func(*args, **(kwargs or {}))
