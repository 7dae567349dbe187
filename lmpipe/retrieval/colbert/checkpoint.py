"""ColBERT checkpoints: read from folders or the hub, and written, in the format of ColBERTv2.

    CHECKPOINT/config.json, tokenizer.json, …    as transformers saves models
    CHECKPOINT/model.safetensors                 the encoder, and linear.weight [dim, hidden size]
    CHECKPOINT/artifact.metadata                 how texts are tokenised, as JSON

Folders of sentence-transformers and PyLate are read too: modules.json names a folder with the linear layer, and
config_sentence_transformers.json has the rest. Knows nothing of texts or vectors.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Any, final

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HTTPError, StrictDataclassError  # type: ignore[attr-defined]
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoTokenizer

from lmpipe.engines.library_errors import Renamed
from lmpipe.errors import ConfigError
from lmpipe.retrieval.colbert.settings import ColbertSettings
from lmpipe.retrieval.file_errors import read_json, undamaged
from lmpipe.storage.files import writing
from lmpipe.storage.hashing import canonical_json, describe
from lmpipe.text.cleaning import clean

_METADATA, _MODULES, _PYLATE = "artifact.metadata", "modules.json", "config_sentence_transformers.json"
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
_LINEAR = "linear.weight"
_TOP = "pooler."  # of the encoder: its weights change no vector
_WHAT_TO_DO = "download or save the checkpoint again"


def checkpoint_file(path: Path) -> Renamed:
    """A block that reads a file of a checkpoint, or its folder; one that is damaged is a ConfigError."""
    return undamaged(path, _WHAT_TO_DO, ConfigError, (SafetensorError, StrictDataclassError))


@final
@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A ColBERT checkpoint in memory.

    Attributes:
        settings: How texts are tokenised.
        config: The encoder's, of transformers.
        tokenizer: Of transformers; a fast one.
        weights: The encoder's by their names in it, float32.
        projection: Of its last states: ``[dim, hidden size]``, float32.
    """

    settings: ColbertSettings
    config: Any = field(repr=False)
    tokenizer: Any = field(repr=False)
    weights: Mapping[str, Tensor] = field(repr=False)
    projection: Tensor = field(repr=False)

    @cached_property
    def digest(self) -> str:
        """Of all that vectors depend on: weights, vocabulary and settings."""
        hasher = blake2b(digest_size=16)
        hasher.update(canonical_json([describe(self.settings), self.tokenizer.get_vocab()]).encode())
        for name, weight in [*sorted(self.weights.items()), (_LINEAR, self.projection)]:
            if not name.startswith(_TOP):
                hasher.update(f"{name} {tuple(weight.shape)}".encode())
                hasher.update(weight.detach().cpu().contiguous().numpy().data)
        return hasher.hexdigest()

    def save(self, folder: Path) -> None:
        """Writes it in the format of ColBERTv2; the folder is whole as soon as it is there.

        Raises:
            ConfigError: If the folder is there and holds something.
            StoreError: If it cannot be written.
        """
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ConfigError(f"{folder} is there already; delete it or choose another folder")
        with writing(folder, (OSError, SafetensorError)):
            folder.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder.parent, prefix="unfinished-") as unfinished:
                made = Path(unfinished) / "checkpoint"
                made.mkdir()
                self._write(made)
                os.replace(made, folder)

    def _write(self, folder: Path) -> None:
        prefix = _skeleton(self.config).base_model_prefix
        named = {f"{prefix}.{name}": weight.detach().cpu().contiguous() for name, weight in self.weights.items()}
        save_file(
            {**named, _LINEAR: self.projection.detach().cpu().contiguous()},
            folder / _WEIGHTS[0],
            metadata={"format": "pt"},
        )
        self.tokenizer.save_pretrained(folder)
        config = {**json.loads(self.config.to_json_string()), "architectures": ["HF_ColBERT"], "dtype": "float32"}
        metadata = self.settings.metadata(len(self.projection))
        for name, record in (("config.json", config), (_METADATA, metadata)):
            (folder / name).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def load_checkpoint(id_or_path: str) -> Checkpoint:
    """Reads a checkpoint from a local folder or the hub.

    Raises:
        ConfigError: If there is none, or a part of it is missing or damaged; it names the file.
    """
    folder = os.path.expanduser(id_or_path)
    if os.path.isdir(folder):
        return _read(Path(folder))
    if os.path.isabs(folder) or os.path.exists(folder) or id_or_path.startswith((".", "~")):
        raise ConfigError(f"{id_or_path} is no folder; name a ColBERT checkpoint's folder or its id on the hub")
    return _read(_download(id_or_path))


def _download(name: str) -> Path:
    """Its files in the hub's cache; of the weights one form only."""
    small = ["*.json", "*.txt", "*.model", _METADATA]
    try:
        folder = Path(snapshot_download(name, allow_patterns=[*small, "*.safetensors"]))
        if not any((folder / weights).is_file() for weights in _WEIGHTS):
            folder = Path(snapshot_download(name, allow_patterns=[*small, "*.bin"]))
    except (OSError, ValueError, HTTPError) as error:
        raise ConfigError(
            f"cannot get the checkpoint {name!r} from the hub ({clean(str(error))}); check the id and the network, or "
            "name a local folder"
        ) from error
    return folder


def _read(folder: Path) -> Checkpoint:
    modules = _modules(folder) if not (folder / _METADATA).is_file() else {}
    base = folder / modules.get("Transformer", "")
    with checkpoint_file(base / "config.json"):
        config = AutoConfig.from_pretrained(base)
        skeleton = _skeleton(config)
    tokenizer = _tokenizer(base, len(skeleton.get_input_embeddings().weight))
    path, weights = _weights(base)
    if modules:
        with checkpoint_file(folder / _PYLATE):
            settings, dim = ColbertSettings.from_sentence_transformers(read_json(folder / _PYLATE)), None
        projection = _dense(folder / modules["Dense"])
    else:
        with checkpoint_file(folder / _METADATA):
            metadata = read_json(folder / _METADATA)
            settings, dim = ColbertSettings.from_metadata(metadata), metadata.get("dim")
        projection = weights.get(_LINEAR, torch.empty(0, 0))
    if projection.shape != (dim or len(projection), config.hidden_size):
        raise ConfigError(f"{path} has no {_LINEAR} of the shape that config.json and {_METADATA} say; {_WHAT_TO_DO}")
    kept = _of_encoder(skeleton, weights, path)
    if damaged := [name for name, weight in {**kept, _LINEAR: projection}.items() if not weight.isfinite().all()]:
        raise ConfigError(f"{path}: {damaged[0]} holds values that are no finite numbers; {_WHAT_TO_DO}")
    return Checkpoint(settings, config, tokenizer, kept, projection.float())


def _tokenizer(folder: Path, embeddings: int) -> Any:
    """A fast tokenizer none of whose tokens lacks an embedding."""
    with checkpoint_file(folder / "tokenizer.json"):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        largest = max(tokenizer.get_vocab().values(), default=0)
    if not tokenizer.is_fast:
        raise ConfigError(f"{folder} has no tokenizer.json or vocab.txt for a fast tokenizer; {_WHAT_TO_DO}")
    if largest >= embeddings:
        raise ConfigError(
            f"the tokenizer of {folder} has a token of number {largest}, and the encoder {embeddings} embeddings; they "
            f"do not belong together: {_WHAT_TO_DO}"
        )
    return tokenizer


def _modules(folder: Path) -> dict[str, str]:
    """Kind of module → its folder, as sentence-transformers writes it."""
    if not (folder / _MODULES).is_file():
        raise ConfigError(f"{folder} has neither {_METADATA} nor {_MODULES}: no ColBERT checkpoint; {_WHAT_TO_DO}")
    with checkpoint_file(folder / _MODULES):
        modules = [
            (str(module["type"]).rpartition(".")[2], str(module["path"])) for module in read_json(folder / _MODULES)
        ]
    kinds = [kind for kind, _ in modules if kind != "Normalize"]  # which every vector is in any case
    if kinds != ["Transformer", "Dense"]:
        raise ConfigError(f"{folder / _MODULES} names {kinds}; a ColBERT checkpoint has one Transformer and one Dense")
    return dict(modules)


def _dense(folder: Path) -> Tensor:
    """The one layer of a Dense module, which must do nothing but multiply."""
    path, weights = _weights(folder)
    with checkpoint_file(folder / "config.json"):
        config = read_json(folder / "config.json")
        plain = str(config.get("activation_function", "Identity")).endswith("Identity")
        plain = plain and not config.get("use_residual")
    if set(weights) != {_LINEAR} or not plain:
        raise ConfigError(f"{path} is not one linear layer without bias and activation, which ColBERT projects with")
    return weights[_LINEAR]


def _weights(folder: Path) -> tuple[Path, dict[str, Tensor]]:
    """The file of weights in a folder, and what it holds."""
    path = next((folder / name for name in _WEIGHTS if (folder / name).is_file()), None)
    if path is None:
        raise ConfigError(f"{folder} has no file {' or '.join(_WEIGHTS)}; {_WHAT_TO_DO}")
    with checkpoint_file(path):
        if path.suffix == ".safetensors":
            return path, load_file(path)
        loaded = dict(torch.load(path, map_location="cpu", weights_only=True))
        if not all(isinstance(name, str) and isinstance(weight, Tensor) for name, weight in loaded.items()):
            raise TypeError("it holds something else than tensors by their names")
    return path, loaded


def _of_encoder(skeleton: Any, weights: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """The encoder's weights under their names in it."""
    wanted, prefix = skeleton.state_dict(), f"{skeleton.base_model_prefix}."
    found = {name.removeprefix(prefix): weight.float() for name, weight in weights.items()}
    missing = [name for name in _below_top(wanted) if name not in found or found[name].shape != wanted[name].shape]
    if missing:
        raise ConfigError(f"{path} lacks {missing[0]} or has it in another shape than config.json says; {_WHAT_TO_DO}")
    return {name: found[name] for name in wanted if name in found}


def _below_top(names: Iterable[str]) -> list[str]:
    return [name for name in names if not name.startswith(_TOP)]


def _skeleton(config: Any) -> Any:
    """The encoder without values."""
    with torch.device("meta"):
        return AutoModel.from_config(config)  # type: ignore[no-untyped-call]
