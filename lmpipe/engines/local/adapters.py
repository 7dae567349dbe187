"""Tuned weights on one resident base model: registered, switched and trained in place.

The base is loaded once and never changed. Tuned weights are a folder: an adapter in PEFT's format (its layers are put
into the model, or its learned prefix is handed out), or a whole model in transformers' format, whose tensors are put in
the place of the base's while they are active. Knows nothing of requests or of how weights are trained.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from threading import RLock
from typing import Any, final

import torch
from peft import PeftConfig, PeftModel, PeftModelForCausalLM, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file

from lmpipe.engines.chat import unregistered
from lmpipe.engines.loading import loading
from lmpipe.errors import EngineError

KeyValues = list[tuple[torch.Tensor, torch.Tensor]]


@final
@dataclass(frozen=True, slots=True)
class Active:
    """A model with some weights switched on.

    Attributes:
        model: The transformers model.
        prefix: Learned keys and values before every prompt in each layer, shape (key heads, tokens, size); often none.
    """

    model: Any
    prefix: KeyValues = field(default_factory=list)


@final
@dataclass(frozen=True, slots=True)
class _Loaded:
    """Tuned weights in memory: nothing here if they are layers in the model."""

    prefix: KeyValues = field(default_factory=list)
    tensors: Mapping[str, torch.Tensor] = field(default_factory=dict)

    @property
    def are_layers(self) -> bool:
        return not (self.prefix or self.tensors)


@final
class AdapterPool:
    """The tuned weights of one model; one thread at a time uses it.

    Args:
        model: A transformers causal LM; PEFT puts its layers into it.
        max_loaded: Most tuned weights in memory at once; what was used longest ago leaves first.
    """

    def __init__(self, model: Any, max_loaded: int = 8) -> None:
        self._model = model
        self._peft: PeftModel | None = None
        self._max_loaded = max_loaded
        self._lock = RLock()
        self._folders: dict[str, Path] = {}
        self._loaded: OrderedDict[str, _Loaded] = OrderedDict()

    def register(self, adapter: str, folder: Path) -> None:
        """Says where tuned weights lie; they are loaded when first used."""
        self._folders[adapter] = folder

    @contextmanager
    def active(self, adapter: str | None) -> Iterator[Active]:
        """The model with tuned weights, or the bare base, switched on.

        Raises:
            EngineError: If the adapter is not registered, cannot be loaded or has weights that are NaN or infinite.
        """
        with self._lock:
            self._model.eval()
            loaded = None if adapter is None else self._load(adapter)
            if adapter is not None and loaded is not None and loaded.are_layers and self._peft is not None:
                self._peft.set_adapter(adapter)
                yield Active(self._model)
                return
            bare = self._peft.disable_adapter() if self._peft else nullcontext()
            with bare, in_place_of(self._model, loaded.tensors if loaded else {}):
                yield Active(self._model, loaded.prefix if loaded else [])

    @contextmanager
    def trainable(self, config: PeftConfig | None, start: str | None) -> Iterator[Any]:
        """The model with weights to train; afterwards the base is as it was.

        Args:
            config: Shape of an adapter, or none to train all weights.
            start: Tuned weights of that shape to start from, or none to start afresh.

        Yields:
            A `PeftModel` with this adapter alone, or the model itself.

        Raises:
            EngineError: If `start` is not registered, cannot be loaded or has weights that are NaN or infinite.
        """
        with self._lock:
            self._unload_layers()
            folder = None if start is None else self.folder(start)
            try:
                with self._all_weights(folder) if config is None else self._one_adapter(config, folder) as model:
                    yield model
            finally:
                self._model.requires_grad_(False).eval()

    @contextmanager
    def _all_weights(self, folder: Path | None) -> Iterator[Any]:
        tuned = {} if folder is None else self._whole_model(folder)
        copies = {
            name: tuned.get(name, weight).detach().to(weight, copy=True)
            for name, weight in self._model.named_parameters()
        }
        with in_place_of(self._model, copies):
            yield self._model.requires_grad_(True)

    @contextmanager
    def _one_adapter(self, config: PeftConfig, folder: Path | None) -> Iterator[PeftModel]:
        with ExitStack() as undo:
            if not config.is_prompt_learning:
                undo.callback(_take_layers_out, self._model)
            with quiet(), loading("an adapter to train", folder or config.peft_type, EngineError):
                if folder is None or config.is_prompt_learning:  # PEFT does not load learned prefixes to train them
                    peft: PeftModel = PeftModelForCausalLM(self._model, config)
                else:
                    peft = PeftModel.from_pretrained(self._model, folder, is_trainable=True)
                if folder is not None:
                    set_peft_model_state_dict(peft, _tensors(folder))
            yield peft

    def folder(self, adapter: str) -> Path:
        """Where registered weights lie.

        Raises:
            EngineError: If they are not registered.
        """
        if adapter not in self._folders:
            raise unregistered(adapter)
        return self._folders[adapter]

    def _load(self, adapter: str) -> _Loaded:
        if adapter not in self._loaded:
            folder = self.folder(adapter)
            if len(self._loaded) >= self._max_loaded:
                self._drop(next(iter(self._loaded)))
            with ExitStack() as undo:
                undo.callback(self._forget_layers)
                with quiet(), loading("tuned weights", folder, EngineError):
                    self._loaded[adapter] = self._read(adapter, folder)
                undo.pop_all()
        self._loaded.move_to_end(adapter)
        loaded = self._loaded[adapter]
        if loaded.tensors:
            self._unload_layers()  # their layers give the model's weights other names
        return loaded

    def _read(self, adapter: str, folder: Path) -> _Loaded:
        if not (folder / "adapter_config.json").is_file():
            return _Loaded(tensors={name: x.to(self._model.device) for name, x in self._whole_model(folder).items()})
        _tensors(folder)
        if json.loads((folder / "adapter_config.json").read_text())["peft_type"] == "PREFIX_TUNING":
            tuned = PeftModel.from_pretrained(self._model, folder)
            return _Loaded(prefix=[(k.detach(), v.detach()) for k, v in learned_prefix(tuned)])
        if self._peft is None:
            self._peft = PeftModel.from_pretrained(self._model, folder, adapter_name=adapter)
        else:
            self._peft.load_adapter(folder, adapter_name=adapter)
        return _Loaded()

    def _whole_model(self, folder: Path) -> dict[str, torch.Tensor]:
        """All weights of a tuned model, which fit in the place of the base's.

        Raises:
            EngineError: If they do not, or are NaN or infinite.
        """
        tensors = _tensors(folder)
        shapes = {name: weight.shape for name, weight in self._model.named_parameters()}
        others = sorted(name for name, tensor in tensors.items() if name in shapes and shapes[name] != tensor.shape)
        if others or shapes.keys().isdisjoint(tensors):
            problem = f"{', '.join(others[:3])} of another shape" if others else "none of its names"
            raise EngineError(
                f"{folder} holds the weights of another model: {problem}; train on this one, or load that"
            )
        return tensors

    def _drop(self, adapter: str) -> None:
        """Removes tuned weights from memory; with the last adapter PEFT's layers leave the model."""
        if not self._loaded.pop(adapter).are_layers or self._peft is None:
            return
        others = [name for name, loaded in self._loaded.items() if loaded.are_layers]
        if others:
            self._peft.set_adapter(others[0])
            self._peft.delete_adapter(adapter)
        else:
            self._peft.unload()
            self._peft = None

    def _forget_layers(self) -> None:
        """Takes all layers out after a failure, which may have left some; they are loaded again when next used."""
        self._loaded = OrderedDict((name, loaded) for name, loaded in self._loaded.items() if not loaded.are_layers)
        self._peft = None
        _take_layers_out(self._model)

    def _unload_layers(self) -> None:
        for adapter in [name for name, loaded in self._loaded.items() if loaded.are_layers]:
            self._drop(adapter)


def save(model: Any, folder: Path, base: str) -> Path:
    """Writes the weights of a training into a new folder, in bytes that depend on nothing but their content."""
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(str(folder), **({"save_embedding_layers": False} if isinstance(model, PeftModel) else {}))
    (folder / "README.md").unlink(missing_ok=True)
    path = folder / "adapter_config.json"
    if path.is_file():
        config = json.loads(path.read_text())
        config["base_model_name_or_path"] = base
        for name in ("target_modules", "feedforward_modules"):
            if isinstance(config.get(name), list):
                config[name] = sorted(config[name])
        path.write_text(json.dumps(config, indent=2, sort_keys=True))
    return folder


def learned_prefix(model: PeftModel) -> KeyValues:
    """Keys and values of a prefix-tuned model in each layer, shape (key heads, virtual tokens, size)."""
    cache: Any = model.get_prompt(batch_size=1)
    return [(layer.keys[0], layer.values[0]) for layer in cache.layers]


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of tuned weights, which may be in several files of safetensors.

    Raises:
        EngineError: If one of them holds NaN or infinity, or there is none.
    """
    found = {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}
    if not found:
        raise EngineError(f"{folder} holds no weights (*.safetensors); copy it again, or save it in that format")
    if wrong := sorted(name for name, tensor in found.items() if not tensor.isfinite().all()):
        raise EngineError(
            f"{folder} holds NaN or infinity in {len(wrong)} of {len(found)} weights, such as {wrong[0]}; train them "
            "again, with a lower learning rate if that diverged"
        )
    return found


def _take_layers_out(model: Any) -> None:
    """Puts the layers that PEFT replaced back into their places, also after it failed half way."""
    replaced = {name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}
    for name, module in replaced.items():
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, module.get_base_layer())
    vars(model).pop("peft_config", None)


@contextmanager
def in_place_of(model: Any, tensors: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Puts tensors in the place of the parameters of their names; nothing is copied."""
    replaced = {name: weight for name, weight in model.named_parameters() if name in tensors}
    originals = {name: weight.data for name, weight in replaced.items()}
    try:
        for name, weight in replaced.items():
            weight.data = tensors[name]
        yield
    finally:
        for name, weight in replaced.items():
            weight.data, weight.grad = originals[name], None


@contextmanager
def quiet() -> Iterator[None]:
    """Hides what PEFT says of transformers' deprecations, and of a base recorded by its name instead of a path."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning, message=".*is_gradient_checkpointing.*")
        warnings.filterwarnings("ignore", message=".*base model.*")
        warnings.filterwarnings("ignore", message="Could not find a config file.*")
        yield
