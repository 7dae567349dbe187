"""Which precisions a device multiplies by itself. Others are emulated, many times slower than float32."""

from __future__ import annotations

from functools import cache

import torch


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether the device itself multiplies matrices of bfloat16.

    Of CPUs these are such with AVX-512 BF16 or AMX, of NVIDIA's GPUs those since Ampere.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu":
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return False


@cache
def multiplies_int8() -> bool:
    """Whether the CPU itself multiplies matrices of int8: by the instructions that x86 calls VNNI, or by AMX."""
    has = torch.cpu.get_capabilities()
    return any(has.get(name) for name in ("avx512_vnni", "avx_vnni", "amx_int8"))
