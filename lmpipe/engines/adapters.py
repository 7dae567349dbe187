"""LoRA adapters on one resident base model: registered, switched and trained in place.

The base is loaded once and its weights are never touched; an adapter is a folder in PEFT's format. Knows nothing
of requests or of how adapters are trained.
"""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from threading import RLock
from typing import Any, final

from peft import PeftConfig, PeftModel

from lmpipe.errors import EngineError

_IN_TRAINING = "in_training"


@final
class AdapterPool:
    """The adapters of one model; one thread at a time uses it.

    Args:
        model: A transformers causal LM; PEFT puts its layers into it.
        max_loaded: Most adapters in memory at once; the one used longest ago leaves first.
    """

    def __init__(self, model: Any, max_loaded: int = 8) -> None:
        self._model = model
        self._peft: PeftModel | None = None
        self._max_loaded = max_loaded
        self._lock = RLock()
        self._folders: dict[str, Path] = {}
        self._loaded: OrderedDict[str, None] = OrderedDict()

    def register(self, adapter: str, folder: Path) -> None:
        """Says where an adapter lies; it is loaded when first used."""
        self._folders[adapter] = folder

    @contextmanager
    def active(self, adapter: str | None) -> Iterator[Any]:
        """The model with one adapter, or the bare base, switched on.

        Raises:
            EngineError: If the adapter is not registered.
        """
        with self._lock:
            self._model.eval()
            if adapter is None:
                with self._peft.disable_adapter() if self._peft else nullcontext():
                    yield self._model
                return
            self._load(adapter)
            if self._peft is not None:
                self._peft.set_adapter(adapter)
            yield self._model

    @contextmanager
    def trainable(self, config: PeftConfig, start: str | None) -> Iterator[PeftModel]:
        """The model with a new adapter to train, which is gone from memory afterwards.

        Args:
            config: Shape of the adapter.
            start: An adapter whose weights it starts from, or none to start afresh.

        Raises:
            EngineError: If `start` is not registered.
        """
        with self._lock:
            peft = self._add(config, start)
            try:
                peft.set_adapter(_IN_TRAINING)
                yield peft
            finally:
                self._drop(_IN_TRAINING)
                self._model.eval()

    def _add(self, config: PeftConfig, start: str | None) -> PeftModel:
        name = _IN_TRAINING
        if start is not None:
            peft = self._insert(name, self._folder(start), trainable=True)
        elif self._peft is None:
            with _quiet():
                peft = self._peft = PeftModel(self._model, config, adapter_name=name)
        else:
            peft = self._peft
            peft.add_adapter(name, config)
        return peft

    def _folder(self, adapter: str) -> Path:
        if adapter not in self._folders:
            raise EngineError(f"adapter {adapter} is not registered with this LM; register_adapter() it first")
        return self._folders[adapter]

    def _load(self, adapter: str) -> None:
        if adapter not in self._loaded:
            if len(self._loaded) >= self._max_loaded:
                oldest, _ = self._loaded.popitem(last=False)
                self._drop(oldest)
            self._insert(adapter, self._folder(adapter), trainable=False)
        self._loaded[adapter] = None
        self._loaded.move_to_end(adapter)

    def _drop(self, name: str) -> None:
        """Removes an adapter from memory; with the last one PEFT's layers leave the model."""
        if self._peft is None:
            return
        if self._loaded:
            self._peft.set_adapter(next(iter(self._loaded)))
            self._peft.delete_adapter(name)
        else:
            self._peft.unload()
            self._peft = None

    def _insert(self, name: str, folder: Path, *, trainable: bool) -> PeftModel:
        with _quiet():
            if self._peft is None:
                self._peft = PeftModel.from_pretrained(self._model, folder, adapter_name=name, is_trainable=trainable)
            else:
                self._peft.load_adapter(folder, adapter_name=name, is_trainable=trainable)
        return self._peft


@contextmanager
def _quiet() -> Iterator[None]:
    """Hides what PEFT says of transformers' deprecations, and of a base recorded by its name instead of a path."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning, message=".*is_gradient_checkpointing.*")
        warnings.filterwarnings("ignore", message=".*base model.*")
        yield
