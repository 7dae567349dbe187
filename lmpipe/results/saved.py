"""A saved session: a folder with a state, its adapters, and the LMs and settings that programs ran with.

    FOLDER/session.json    LMs, settings, and the digests of the other files; the file has a checksum
    FOLDER/state.json      prompts and names of weights
    FOLDER/adapter/        tuned weights in PEFT's or transformers' format; with several, one folder each
    FOLDER/README.md       model card

The folder gets its name when it is complete. Loads no LMs: see `lmpipe.loading`.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from pydantic import BaseModel, ConfigDict, ValidationError

from lmpipe._version import __version__
from lmpipe.errors import ConfigError, CorruptBlob
from lmpipe.lm import LMSource, Sampling
from lmpipe.results.model_card import CardFacts, SavedAdapter, render_card
from lmpipe.runtime.session import Session
from lmpipe.state import ProgramState
from lmpipe.storage.blobs import is_intact
from lmpipe.storage.checksummed_json import read_checksummed, write_checksummed
from lmpipe.storage.files import (
    UNFINISHED_PREFIX,
    delete,
    explain_read_errors,
    explain_write_errors,
    read_json_object,
    write_atomically,
)
from lmpipe.storage.hashing import jsonable
from lmpipe.text.secrets import strip_credentials

SESSION_FILE = "session.json"
STATE_FILE = "state.json"

_FORMAT = 1
_SECRETS = ("key", "token", "password", "secret")  # ends of the names of options that are not saved
_NOT_IN_NAME = re.compile(r"[^\w.-]")  # characters that are replaced in the name of a folder


@final
class SavedLM(BaseModel):
    """An LM of a saved session.

    Attributes:
        name: Name of the LM.
        spec: Spec by which `lmpipe.load_lm` loads it, without credentials; None if it cannot be loaded by one.
        options: Options of its engine, without credentials.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    spec: str | None = None
    options: dict[str, Any] = {}

    @classmethod
    def create(cls, name: str, source: LMSource | None) -> SavedLM:
        """Describes an LM.

        Args:
            name: Name of the LM.
            source: How it was loaded; None if it was made otherwise.
        """
        if source is None:
            return cls(name=name)
        options = {key: value for key, value in source.options.items() if not key.endswith(_SECRETS)}
        if str(options.get("dtype")).startswith("torch."):
            options["dtype"] = str(options["dtype"]).removeprefix("torch.")
        kind, _, rest = source.spec.partition(":")
        spec: str | None = source.spec
        if kind == "openai":
            spec = _without_credentials(source.spec)
        elif kind in ("hf", "vllm") and os.path.isdir(rest):
            spec, options = f"{kind}:{os.path.abspath(rest)}", {"name": name, **options}
        try:
            return cls(name=name, spec=spec, options=jsonable(options) if spec else {})
        except ConfigError:  # an option is an object that JSON cannot hold
            return cls(name=name)


@final
class SavedSession(BaseModel):
    """The LMs and settings of a session.

    Attributes:
        lm: Role → LM.
        seed: Seed of the session.
        sampling: Sampling settings.
        structured: Whether completions are constrained to the format that can be parsed.
        max_concurrency: Largest number of examples in flight at once.
        retriever: Name of the retriever, or None.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    lm: dict[str, SavedLM]
    seed: int = 0
    sampling: Sampling = Sampling()
    structured: bool = False
    max_concurrency: int = 256
    retriever: str | None = None

    @classmethod
    def of(cls, session: Session) -> SavedSession:
        """Describes a session; in a stage, with the seed of the run."""
        return cls(
            lm={role: SavedLM.create(lm.name, lm.loaded_from) for role, lm in session.roles.items()},
            seed=session.run_seed,
            sampling=session.sampling,
            structured=session.structured,
            max_concurrency=session.max_concurrency,
            retriever=None if session.retriever is None else session.retriever.name,
        )


@final
class _SessionFile(BaseModel):
    """The content of ``session.json``.

    Attributes:
        format: Version of the format.
        lmpipe: Version of lmpipe that wrote the folder.
        state: Digest of the state.
        adapters: Digest of each adapter → name of its folder.
        session: LMs and settings.
    """

    format: int = _FORMAT
    lmpipe: str = __version__
    state: str
    adapters: dict[str, str]
    session: SavedSession


@final
@dataclass(frozen=True)
class SavedState:
    """A state with everything that it runs on.

    Attributes:
        state: Prompts and weights.
        session: LMs and settings.
        adapters: Digest → folder of each adapter of the state.
    """

    state: ProgramState
    session: SavedSession
    adapters: Mapping[str, Path]


def adapter_keys(state: ProgramState) -> dict[str, list[str]]:
    """Returns the digest of each adapter of a state → the keys of the weights that use it."""
    keys: dict[str, list[str]] = {}
    for key, weights in state.weights.items():
        if weights.adapter is not None:
            keys.setdefault(weights.adapter, []).append(key)
    return keys


def check_adapter(folder: Path, adapter: str) -> Path:
    """Returns the folder of an adapter, after comparing its content with its digest.

    Args:
        folder: The folder.
        adapter: Digest of the adapter.

    Raises:
        CorruptBlob: If the folder is missing or damaged.
    """
    with explain_read_errors(folder):
        if folder.is_dir() and is_intact(folder, adapter):
            return folder
    raise CorruptBlob(
        f"the adapter in {folder} is missing or damaged; copy the whole folder again from where it was made, or delete "
        "what is left of it and start again there: the training is then done again"
    )


def write_saved(
    target: Path,
    state: ProgramState,
    session: SavedSession,
    adapter_folder: Callable[[str], Path],
    facts: CardFacts,
) -> None:
    """Writes a folder that `read_saved` reads. A folder that holds the same state and session stays as it is.

    Args:
        target: Path of the folder.
        state: Prompts and weights.
        session: LMs and settings.
        adapter_folder: Function that returns the folder of an adapter by its digest.
        facts: What the model card says about the state.

    Raises:
        ConfigError: If `target` exists and holds anything else.
        CorruptBlob: If an adapter is missing or damaged.
        StoreError: If the folder cannot be written.
    """
    target = Path(os.path.abspath(target))
    names = _folder_names(state)
    content = _SessionFile(state=state.digest, adapters=names, session=session).model_dump(mode="json")
    if os.path.lexists(target):
        if (target / SESSION_FILE).is_file() and read_checksummed(target / SESSION_FILE) == content:
            read_saved(target)
            return
        raise ConfigError(f"{target} already exists and holds something else; name another folder, or delete it first")
    unfinished = target.with_name(UNFINISHED_PREFIX + target.name)
    with explain_write_errors(target):
        delete(unfinished)
        unfinished.mkdir(parents=True)
    try:
        for adapter, name in names.items():
            source = check_adapter(adapter_folder(adapter), adapter)
            with explain_write_errors(target):
                shutil.copytree(source, unfinished / name)
        text = json.dumps(state.model_dump(mode="json"), indent=2, ensure_ascii=False) + "\n"
        write_atomically(unfinished / STATE_FILE, text.encode(errors="backslashreplace"))
        card = render_card(facts, state, content["session"], _adapters(unfinished, state))
        write_atomically(unfinished / "README.md", card.encode())
        write_checksummed(unfinished / SESSION_FILE, content)
        with explain_write_errors(target):
            unfinished.rename(target)
    finally:
        delete(unfinished)


def read_saved(folder: Path) -> SavedState:
    """Reads a folder that `write_saved` wrote.

    Raises:
        ConfigError: If another version of lmpipe wrote the folder.
        CorruptBlob: If a file is missing, damaged or was edited.
    """
    values = read_checksummed(folder / SESSION_FILE)
    if (version := values.get("format")) != _FORMAT:
        raise ConfigError(
            f"{folder} is of another version: its format is {version!r}, and this lmpipe reads {_FORMAT}; load it with "
            f"lmpipe {values.get('lmpipe')}, or save it again"
        )
    try:
        content = _SessionFile.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise ConfigError(f"{folder / SESSION_FILE} is invalid: {where}: {first['msg']}; save it again") from None
    state = _read_state(folder / STATE_FILE)
    if state is None or state.digest != content.state:
        raise CorruptBlob(
            f"{folder / STATE_FILE} is damaged or was edited; restore it from a copy, or change the state in code: "
            "session.using(session.state.with_prompt(...))"
        )
    adapters = {adapter: check_adapter(folder / name, adapter) for adapter, name in content.adapters.items()}
    return SavedState(state, content.session, adapters)


def _read_state(path: Path) -> ProgramState | None:
    """Reads a state; returns None if the JSON is not that of a state."""
    try:
        return ProgramState.model_validate(read_json_object(path))
    except ConfigError:
        return None


def _without_credentials(spec: str) -> str | None:
    """Removes the credentials from the URLs of ``openai:MODEL@URL,URL``; returns None if there is no URL."""
    match = re.fullmatch(r"(.+?)@(https?://.+)", spec)
    if match is None:
        return None
    urls = re.split(r"\s*,\s*(?=https?://)", match[2].strip())
    return f"{match[1]}@{','.join(map(strip_credentials, urls))}"


def _folder_names(state: ProgramState) -> dict[str, str]:
    """Returns the digest of each adapter → name of its folder: ``adapter`` or, with several, one by role and module."""
    keys = adapter_keys(state)
    if len(keys) == 1:
        return dict.fromkeys(keys, "adapter")
    names = {adapter: "adapter-" + _NOT_IN_NAME.sub("-", used_by[0]) for adapter, used_by in keys.items()}
    lowered = [name.lower() for name in names.values()]
    return {
        adapter: name if lowered.count(name.lower()) == 1 else f"{name}-{adapter[:8]}"
        for adapter, name in names.items()
    }


def _adapters(folder: Path, state: ProgramState) -> list[SavedAdapter]:
    """Describes the adapters in a folder for its model card."""
    keys, adapters = adapter_keys(state), []
    for adapter, name in _folder_names(state).items():
        path = folder / name / "adapter_config.json"
        config = read_json_object(path) if path.is_file() else None
        adapters.append(SavedAdapter(name, adapter, keys[adapter], config))
    return adapters
