"""Notices of libraries that a user of lmpipe can do nothing about, which are kept from standard error.

Does not import the libraries before they are needed.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


def hide_kernel_notice() -> None:
    """Drops the warning of bitsandbytes, when it is imported, that a package for faster 4-bit products is missing."""
    logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(_is_no_kernel_notice)


def _is_no_kernel_notice(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith("Failed to load CPU gemm_4bit_forward")


@contextmanager
def no_weight_bars() -> Iterator[None]:
    """Hides transformers' bars while weights are read into a model; downloads from the hub still show theirs."""
    import huggingface_hub.utils
    import transformers.utils.logging

    hub: Any = huggingface_hub.utils
    loading: Any = transformers.utils.logging
    shown = loading.is_progress_bar_enabled()
    restore_downloads = hub.disable_progress_bars if hub.are_progress_bars_disabled() else hub.enable_progress_bars
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that an environment variable of the hub's library has precedence
        loading.disable_progress_bar()
        restore_downloads()
    try:
        yield
    finally:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if shown:
                loading.enable_progress_bar()
            restore_downloads()
