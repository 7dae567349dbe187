"""Kernels in C for the local engine on a CPU: what PyTorch computes in many passes, each in one.

They are compiled at first use, which takes one to two CPU seconds, for the processor at hand, and kept in the cache
folder. Where no compiler is found, the engine uses PyTorch's own functions, which are slower.
"""

from lmpipe.engines.kernels.functions import (
    Segments,
    add_rms_norm,
    append,
    argmax,
    attend,
    attend_backward,
    can_attend,
    draw,
    has_kernels,
    rms_norm_backward,
    rotate,
    silu_mul,
    silu_mul_backward,
)

__all__ = [
    "Segments",
    "add_rms_norm",
    "append",
    "argmax",
    "attend",
    "attend_backward",
    "can_attend",
    "draw",
    "has_kernels",
    "rms_norm_backward",
    "rotate",
    "silu_mul",
    "silu_mul_backward",
]
