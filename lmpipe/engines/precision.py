"""Precisions that a device supports in hardware; others are emulated, many times slower than float32."""

from __future__ import annotations

from functools import cache

import torch


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 matrices in hardware.

    CPUs with AVX-512 BF16 or AMX do, and NVIDIA GPUs since Ampere.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu":
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return False


@cache
def multiplies_int8() -> bool:
    """Whether the CPU multiplies int8 matrices in hardware, with x86's VNNI instructions or AMX."""
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name) for name in ("avx512_vnni", "avx_vnni", "amx_int8"))
