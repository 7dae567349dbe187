"""Tuned weights on one resident base model: registered, switched and trained in place.

The base is loaded once and never changed. Tuned weights are a folder of one of two kinds: an adapter in PEFT's format,
whose layers are put into the model or whose learned prefix is used; or a whole model in transformers' format, whose
tensors replace those of the base while they are active. Knows nothing about requests or how weights are trained.
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

from lmpipe.engines.chat import unregistered_adapter_error
from lmpipe.engines.loading import loading_errors
from lmpipe.engines.notices import no_weight_bars
from lmpipe.errors import EngineError

KeyValues = list[tuple[torch.Tensor, torch.Tensor]]


@final
@dataclass(frozen=True, slots=True)
class ActiveModel:
    """A model whose tuned weights are active.

    Attributes:
        model: The transformers model.
        prefix: Keys and values of the learned prefix in each layer, shape (key heads, tokens, size); often empty.
    """

    model: Any
    prefix: KeyValues = field(default_factory=list)


@final
@dataclass(frozen=True, slots=True)
class _LoadedWeights:
    """Tuned weights in memory; both fields are empty if the weights are PEFT layers in the model."""

    prefix: KeyValues = field(default_factory=list)
    tensors: Mapping[str, torch.Tensor] = field(default_factory=dict)

    @property
    def are_peft_layers(self) -> bool:
        return not (self.prefix or self.tensors)


@final
class AdapterPool:
    """The tuned weights of one model. Only one thread at a time can use them.

    Args:
        model: A transformers causal LM, which PEFT adds its layers to.
        max_loaded: Maximum number of tuned weights in memory; the least recently used ones are evicted first.
    """

    def __init__(self, model: Any, max_loaded: int = 8) -> None:
        self._model = model
        self._peft: PeftModel | None = None
        self._max_loaded = max_loaded
        self._lock = RLock()
        self._folders: dict[str, Path] = {}
        self._loaded: OrderedDict[str, _LoadedWeights] = OrderedDict()

    def register(self, adapter: str, folder: Path) -> None:
        """Registers the folder of tuned weights; they are loaded at the first use."""
        self._folders[adapter] = folder

    @contextmanager
    def active(self, adapter: str | None) -> Iterator[ActiveModel]:
        """Activates tuned weights, or the bare base if `adapter` is None, within the block.

        Raises:
            EngineError: If the adapter is not registered, cannot be loaded, or has NaN or infinite weights.
        """
        with self._lock:
            self._model.eval()
            loaded = None if adapter is None else self._load(adapter)
            if adapter is not None and loaded is not None and loaded.are_peft_layers and self._peft is not None:
                self._peft.set_adapter(adapter)
                yield ActiveModel(self._model)
                return
            bare = self._peft.disable_adapter() if self._peft else nullcontext()
            with bare, swapped_parameters(self._model, loaded.tensors if loaded else {}):
                yield ActiveModel(self._model, loaded.prefix if loaded else [])

    @contextmanager
    def trainable(self, config: PeftConfig | None, start: str | None) -> Iterator[Any]:
        """Prepares the model for training within the block; afterwards the base is restored.

        Args:
            config: PEFT configuration of the adapter to train, or None to train all weights.
            start: Tuned weights of the same configuration to start from, or None.

        Yields:
            A `PeftModel` with this adapter only, or the model itself.

        Raises:
            EngineError: If `start` is not registered, cannot be loaded, or has NaN or infinite weights.
        """
        with self._lock:
            self._unload_peft_layers()
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
        with swapped_parameters(self._model, copies):
            yield self._model.requires_grad_(True)

    @contextmanager
    def _one_adapter(self, config: PeftConfig, folder: Path | None) -> Iterator[PeftModel]:
        with ExitStack() as undo:
            if not config.is_prompt_learning:
                undo.callback(_remove_peft_layers, self._model)
            with no_peft_warnings(), loading_errors("an adapter to train", folder or config.peft_type, EngineError):
                if folder is None or config.is_prompt_learning:  # PEFT does not load learned prefixes to train them
                    peft: PeftModel = PeftModelForCausalLM(self._model, config)
                else:
                    peft = PeftModel.from_pretrained(self._model, folder, is_trainable=True)
                if folder is not None:
                    set_peft_model_state_dict(peft, _load_tensors(folder))
            yield peft

    def folder(self, adapter: str) -> Path:
        """Returns the folder of registered weights.

        Raises:
            EngineError: If they are not registered.
        """
        if adapter not in self._folders:
            raise unregistered_adapter_error(adapter)
        return self._folders[adapter]

    def _load(self, adapter: str) -> _LoadedWeights:
        if adapter not in self._loaded:
            folder = self.folder(adapter)
            if len(self._loaded) >= self._max_loaded:
                self._unload(next(iter(self._loaded)))
            with ExitStack() as undo:
                undo.callback(self._discard_peft_layers)
                with no_peft_warnings(), loading_errors("tuned weights", folder, EngineError):
                    self._loaded[adapter] = self._read(adapter, folder)
                undo.pop_all()
        self._loaded.move_to_end(adapter)
        loaded = self._loaded[adapter]
        if loaded.tensors:
            self._unload_peft_layers()  # PEFT layers rename the parameters of the model
        return loaded

    def _read(self, adapter: str, folder: Path) -> _LoadedWeights:
        if not (folder / "adapter_config.json").is_file():
            return _LoadedWeights(
                tensors={name: x.to(self._model.device) for name, x in self._whole_model(folder).items()}
            )
        _load_tensors(folder)
        if json.loads((folder / "adapter_config.json").read_text())["peft_type"] == "PREFIX_TUNING":
            tuned = PeftModel.from_pretrained(self._model, folder)
            return _LoadedWeights(prefix=[(k.detach(), v.detach()) for k, v in prefix_key_values(tuned)])
        if self._peft is None:
            self._peft = PeftModel.from_pretrained(self._model, folder, adapter_name=adapter)
        else:
            self._peft.load_adapter(folder, adapter_name=adapter)
        return _LoadedWeights()

    def _whole_model(self, folder: Path) -> dict[str, torch.Tensor]:
        """Reads all weights of a tuned model.

        Raises:
            EngineError: If their names or shapes do not match those of the base, or if any are NaN or infinite.
        """
        tensors = _load_tensors(folder)
        shapes = {name: weight.shape for name, weight in self._model.named_parameters()}
        mismatched = sorted(name for name, tensor in tensors.items() if name in shapes and shapes[name] != tensor.shape)
        if mismatched or shapes.keys().isdisjoint(tensors):
            names = ", ".join(mismatched[:3])
            problem = f"the shapes of {names} differ" if names else "none has a name of this model's weights"
            raise EngineError(
                f"{folder} holds the weights of another model: {problem}; train this model, or load the other one"
            )
        return tensors

    def _unload(self, adapter: str) -> None:
        """Removes tuned weights from memory, and PEFT's layers from the model if no other adapter uses them."""
        if not self._loaded.pop(adapter).are_peft_layers or self._peft is None:
            return
        others = [name for name, loaded in self._loaded.items() if loaded.are_peft_layers]
        if others:
            self._peft.set_adapter(others[0])
            self._peft.delete_adapter(adapter)
        else:
            self._peft.unload()
            self._peft = None

    def _discard_peft_layers(self) -> None:
        """Removes all PEFT layers after a failure, which may have left some; the next use loads them again."""
        self._loaded = OrderedDict(
            (name, loaded) for name, loaded in self._loaded.items() if not loaded.are_peft_layers
        )
        self._peft = None
        _remove_peft_layers(self._model)

    def _unload_peft_layers(self) -> None:
        for adapter in [name for name, loaded in self._loaded.items() if loaded.are_peft_layers]:
            self._unload(adapter)


def save_weights(model: Any, folder: Path, base: str) -> Path:
    """Saves trained weights to a new folder, byte for byte the same for the same weights.

    Args:
        model: A `PeftModel` with one adapter, or a causal LM.
        folder: Folder to write; it is replaced if it exists.
        base: Name of the base weights.

    Returns:
        The folder.
    """
    shutil.rmtree(folder, ignore_errors=True)
    with no_weight_bars():
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


def prefix_key_values(model: PeftModel) -> KeyValues:
    """Returns the prefix of a prefix-tuned model: each layer's keys and values, (key heads, virtual tokens, size)."""
    cache: Any = model.get_prompt(batch_size=1)
    return [(layer.keys[0], layer.values[0]) for layer in cache.layers]


def _load_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Loads the tensors of tuned weights from all safetensors files of a folder.

    Raises:
        EngineError: If there are no tensors, or if any hold NaN or infinity.
    """
    tensors = {
        name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()
    }
    if not tensors:
        raise EngineError(f"{folder} holds no weights (*.safetensors); copy it again, or save it in that format")
    if wrong := sorted(name for name, tensor in tensors.items() if not tensor.isfinite().all()):
        raise EngineError(
            f"{folder} holds NaN or infinity in {len(wrong)} of {len(tensors)} weights, such as {wrong[0]}; train them "
            "again, with a lower learning rate if training diverged"
        )
    return tensors


def _remove_peft_layers(model: Any) -> None:
    """Restores the layers that PEFT replaced, even if PEFT failed halfway."""
    peft_layers = {name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}
    for name, module in peft_layers.items():
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, module.get_base_layer())
    vars(model).pop("peft_config", None)


@contextmanager
def swapped_parameters(model: Any, tensors: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Swaps parameters for the tensors with their names within the block, without a copy."""
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
def no_peft_warnings() -> Iterator[None]:
    """Hides PEFT's warnings about deprecations in transformers, and about a base that is recorded by name, not path."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning, message=".*is_gradient_checkpointing.*")
        warnings.filterwarnings("ignore", message=".*base model.*")
        warnings.filterwarnings("ignore", message="Could not find a config file.*")
        yield
