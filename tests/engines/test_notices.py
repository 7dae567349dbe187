"""What loading says: nothing that libraries say of themselves, and the time if it takes long."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from huggingface_hub.utils import are_progress_bars_disabled
from transformers.utils.logging import is_progress_bar_enabled

from lmpipe import load_lm
from lmpipe.engines.local import LocalLM


def test_loading_shows_no_bar_of_weights_and_leaves_the_settings_of_the_library(
    tiny_folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert is_progress_bar_enabled()
    assert isinstance(load_lm(f"hf:{tiny_folder}"), LocalLM)
    assert capfd.readouterr() == ("", "")
    assert is_progress_bar_enabled()
    assert not are_progress_bars_disabled()


def test_only_one_notice_of_bitsandbytes_is_dropped(caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    logger.warning("Failed to load CPU gemm_4bit_forward from kernels-community: %s. Please install it", "no module")
    logger.warning("another warning")
    assert caplog.messages == ["another warning"]
