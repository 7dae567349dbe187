"""The colbert-ai package as a reference: its model, patched for current transformers and to need no compiler."""

from __future__ import annotations

import contextlib
import multiprocessing
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest


@contextlib.contextmanager
def reference(folder: Path) -> Iterator[Any]:
    """Yields colbert-ai's `Checkpoint` of a folder."""
    started = multiprocessing.get_start_method(allow_none=True)
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            from colbert.infra import ColBERTConfig
            from colbert.modeling import base_colbert
            from colbert.modeling.checkpoint import Checkpoint
            from colbert.modeling.colbert import ColBERT
        finally:  # colbert-ai sets the start method of the whole process when it is imported
            multiprocessing.set_start_method(started, force=True)
        plain = base_colbert.class_factory

        def with_post_init(name: str) -> type:
            """Adds a call that transformers 5 requires and colbert-ai does not make."""

            class Model(plain(name)):  # type: ignore[misc]
                def __init__(self, config: Any, colbert_config: Any) -> None:
                    super().__init__(config, colbert_config)
                    self.post_init()

            return Model

        patch.setattr(base_colbert, "class_factory", with_post_init)
        patch.setattr(
            ColBERT, "loaded_extensions", True, raising=False
        )  # otherwise it compiles an extension that encoding does not use
        yield Checkpoint(str(folder), ColBERTConfig.load_from_checkpoint(str(folder)), verbose=0)
