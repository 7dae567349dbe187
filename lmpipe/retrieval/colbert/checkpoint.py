"""ColBERT checkpoints: reading them from folders or the hub, and writing them, in the format of ColBERTv2.

    CHECKPOINT/config.json, tokenizer.json, …    as transformers saves models
    CHECKPOINT/model.safetensors                 weights of the encoder, and linear.weight [dim, hidden size]
    CHECKPOINT/artifact.metadata                 settings of the tokenization, as JSON

Folders of sentence-transformers and PyLate can be read too: there, modules.json names the folder of the linear layer,
and config_sentence_transformers.json contains the settings. Does not depend on texts or vectors.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
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

from lmpipe.engines.library_errors import ErrorTranslator
from lmpipe.errors import ConfigError
from lmpipe.retrieval.colbert.settings import ColbertSettings
from lmpipe.retrieval.file_errors import read_json, reporting_damage
from lmpipe.storage.files import explain_write_errors
from lmpipe.storage.hashing import canonical_json
from lmpipe.text.cleaning import clean_text

_METADATA, _MODULES, _PYLATE = "artifact.metadata", "modules.json", "config_sentence_transformers.json"
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
_LINEAR = "linear.weight"
_POOLER = "pooler."  # prefix of weights of the encoder that do not affect token vectors
_ADVICE = "download or save the checkpoint again"


def reading_checkpoint(path: Path) -> ErrorTranslator:
    """Returns a context manager for a block that reads a file of a checkpoint; damage raises a ConfigError."""
    return reporting_damage(path, _ADVICE, ConfigError, (SafetensorError, StrictDataclassError))


@final
@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A ColBERT checkpoint in memory.

    Attributes:
        settings: Settings of the tokenization.
        config: Config of the encoder, from transformers.
        tokenizer: Fast tokenizer, from transformers.
        weights: Weights of the encoder by name, float32.
        projection: Projection of the last hidden states to token vectors: ``[dim, hidden size]``, float32.
    """

    settings: ColbertSettings
    config: Any = field(repr=False)
    tokenizer: Any = field(repr=False)
    weights: Mapping[str, Tensor] = field(repr=False)
    projection: Tensor = field(repr=False)

    @cached_property
    def digest(self) -> str:
        """Digest of everything that determines the vectors: weights, vocabulary and settings."""
        hasher = blake2b(digest_size=16)
        hasher.update(canonical_json([self.settings.identity, self.tokenizer.get_vocab()]).encode())
        for name, weight in [*sorted(self.weights.items()), (_LINEAR, self.projection)]:
            if not name.startswith(_POOLER):
                hasher.update(f"{name} {tuple(weight.shape)}".encode())
                hasher.update(weight.detach().cpu().contiguous().numpy().data)
        return hasher.hexdigest()

    def save(self, folder: Path) -> None:
        """Writes the checkpoint in the format of ColBERTv2. The folder appears only when it is complete.

        Raises:
            ConfigError: If the folder exists and is not empty.
            StoreError: If the folder cannot be written.
        """
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ConfigError(f"{folder} already exists; delete it or choose another folder")
        with explain_write_errors(folder, (OSError, SafetensorError)):
            folder.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder.parent, prefix="unfinished-") as unfinished:
                temporary = Path(unfinished) / "checkpoint"
                temporary.mkdir()
                self._write(temporary)
                os.replace(temporary, folder)

    def _write(self, folder: Path) -> None:
        prefix = _empty_encoder(self.config).base_model_prefix
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
        ConfigError: If the checkpoint does not exist, or a file is missing or damaged; the message names the file.
    """
    folder = os.path.expanduser(id_or_path)
    if os.path.isdir(folder):
        return _read(Path(folder))
    if os.path.isabs(folder) or os.path.exists(folder) or id_or_path.startswith((".", "~")):
        raise ConfigError(f"{id_or_path} is not a folder; name the folder of a ColBERT checkpoint or its id on the hub")
    return _read(_download(id_or_path))


def _download(name: str) -> Path:
    """Downloads a checkpoint to the hub's cache, with its weights in only one format, and returns its folder."""
    small_files = ["*.json", "*.txt", "*.model", _METADATA]
    try:
        folder = Path(snapshot_download(name, allow_patterns=[*small_files, "*.safetensors"]))
        if not any((folder / weights).is_file() for weights in _WEIGHTS):
            folder = Path(snapshot_download(name, allow_patterns=[*small_files, "*.bin"]))
    except (OSError, ValueError, HTTPError) as error:
        raise ConfigError(
            f"cannot load the checkpoint {name!r} from the hub ({clean_text(str(error))}); check the id and the "
            "network, or name a local folder"
        ) from error
    return folder


def _read(folder: Path) -> Checkpoint:
    modules = _read_modules(folder) if not (folder / _METADATA).is_file() else {}
    base = folder / modules.get("Transformer", "")
    with reading_checkpoint(base / "config.json"):
        config = AutoConfig.from_pretrained(base)
        encoder = _empty_encoder(config)
    tokenizer = _read_tokenizer(base, len(encoder.get_input_embeddings().weight))
    path, weights = _read_weights(base)
    if modules:
        with reading_checkpoint(folder / _PYLATE):
            settings, dim = ColbertSettings.from_sentence_transformers(read_json(folder / _PYLATE)), None
        projection = _read_projection(folder / modules["Dense"])
    else:
        with reading_checkpoint(folder / _METADATA):
            metadata = read_json(folder / _METADATA)
            settings, dim = ColbertSettings.from_metadata(metadata), metadata.get("dim")
        projection = weights.get(_LINEAR, torch.empty(0, 0))
    if projection.shape != (dim or len(projection), config.hidden_size):
        raise ConfigError(f"{path} has no {_LINEAR} of the shape in config.json and {_METADATA}; {_ADVICE}")
    encoder_weights = _select_weights(encoder, weights, path)
    all_weights = {**encoder_weights, _LINEAR: projection}
    if damaged := [name for name, weight in all_weights.items() if not weight.isfinite().all()]:
        raise ConfigError(f"{path}: {damaged[0]} contains values that are not finite; {_ADVICE}")
    return Checkpoint(settings, config, tokenizer, encoder_weights, projection.float())


def _read_tokenizer(folder: Path, embeddings: int) -> Any:
    """Reads a fast tokenizer, and checks that each of its tokens has an embedding."""
    with reading_checkpoint(folder / "tokenizer.json"):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        largest = max(tokenizer.get_vocab().values(), default=0)
    if not tokenizer.is_fast:
        raise ConfigError(f"{folder} has no tokenizer.json or vocab.txt for a fast tokenizer; {_ADVICE}")
    if largest >= embeddings:
        raise ConfigError(
            f"the tokenizer of {folder} has a token with the id {largest}, and the encoder has {embeddings} "
            f"embeddings; they do not belong together: {_ADVICE}"
        )
    return tokenizer


def _read_modules(folder: Path) -> dict[str, str]:
    """Returns the folder of each kind of module, from the file that sentence-transformers writes."""
    if not (folder / _MODULES).is_file():
        raise ConfigError(
            f"{folder} has neither {_METADATA} nor {_MODULES}, so it is not a ColBERT checkpoint; {_ADVICE}"
        )
    with reading_checkpoint(folder / _MODULES):
        modules = [
            (str(module["type"]).rpartition(".")[2], str(module["path"])) for module in read_json(folder / _MODULES)
        ]
    kinds = [kind for kind, _ in modules if kind != "Normalize"]  # vectors are always normalised
    if kinds != ["Transformer", "Dense"]:
        raise ConfigError(f"{folder / _MODULES} names {kinds}; a ColBERT checkpoint has one Transformer and one Dense")
    return dict(modules)


def _read_projection(folder: Path) -> Tensor:
    """Reads the weight of a Dense module, which must be a linear layer without bias or activation."""
    path, weights = _read_weights(folder)
    with reading_checkpoint(folder / "config.json"):
        config = read_json(folder / "config.json")
        is_linear = str(config.get("activation_function", "Identity")).endswith("Identity")
        is_linear = is_linear and not config.get("use_residual")
    if set(weights) != {_LINEAR} or not is_linear:
        raise ConfigError(
            f"{path} is not one linear layer without bias and activation, as ColBERT's projection must be"
        )
    return weights[_LINEAR]


def _read_weights(folder: Path) -> tuple[Path, dict[str, Tensor]]:
    """Returns the path of the weights in a folder, and the weights."""
    path = next((folder / name for name in _WEIGHTS if (folder / name).is_file()), None)
    if path is None:
        raise ConfigError(f"{folder} has no file {' or '.join(_WEIGHTS)}; {_ADVICE}")
    with reading_checkpoint(path):
        if path.suffix == ".safetensors":
            return path, load_file(path)
        loaded = dict(torch.load(path, map_location="cpu", weights_only=True))
        if not all(isinstance(name, str) and isinstance(weight, Tensor) for name, weight in loaded.items()):
            raise TypeError("the file does not contain a dictionary of tensors by name")
    return path, loaded


def _select_weights(encoder: Any, weights: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Checks that no weight of the encoder is missing, and returns its weights by name."""
    expected, prefix = encoder.state_dict(), f"{encoder.base_model_prefix}."
    named = {name.removeprefix(prefix): weight.float() for name, weight in weights.items()}
    missing = [
        name
        for name, weight in expected.items()
        if not name.startswith(_POOLER) and (name not in named or named[name].shape != weight.shape)
    ]
    if missing:
        raise ConfigError(f"{path} lacks {missing[0]}, or its shape differs from config.json; {_ADVICE}")
    return {name: named[name] for name in expected if name in named}


def _empty_encoder(config: Any) -> Any:
    """Returns the encoder with weights on the meta device, which have shapes but no values."""
    with torch.device("meta"):
        return AutoModel.from_config(config)  # type: ignore[no-untyped-call]
