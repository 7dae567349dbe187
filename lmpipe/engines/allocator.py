"""How much freed memory the process keeps, instead of giving it back to the system at once.

A pass through a model allocates and frees the same hundreds of megabytes again and again. Memory that comes back from
the system has to be cleared page by page, which took a tenth of the CPU time of training a small model. The setting is
that of glibc, which PyTorch allocates with on Linux. It holds for each of glibc's arenas, of which threads have their
own. Does not import torch.
"""

from __future__ import annotations

import ctypes
import os
import platform
from functools import cache

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # numbers of the parameters in glibc's malloc.h
_KEPT = 256 * 2**20  # bytes
_LARGEST = 32 * 2**20  # bytes; glibc allows no more


@cache
def keep_freed_memory() -> bool:
    """Makes the process keep up to 256 MiB of freed memory, and also blocks of up to 32 MiB, in its heap.

    Returns:
        Whether it does; not if the C library is another one, or the environment has settings for glibc's `malloc`.
    """
    chosen = any(name.startswith("MALLOC_") for name in os.environ) or "malloc" in os.environ.get("GLIBC_TUNABLES", "")
    if chosen or platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(_MMAP_THRESHOLD, _LARGEST) and mallopt(_TRIM_THRESHOLD, _KEPT))
