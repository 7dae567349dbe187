"""Loads saved sessions and the outcomes of runs: a state, with the LMs and settings that it runs on.

Knows nothing about how states are found; `lmpipe.results.saved` reads and writes the folders.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from lmpipe.embedder import Embedder
from lmpipe.engines import load_lm
from lmpipe.errors import ConfigError
from lmpipe.lm import LM
from lmpipe.results.export import session_of
from lmpipe.results.saved import (
    SESSION_FILE,
    SavedLM,
    SavedSession,
    SavedState,
    adapter_keys,
    check_adapter,
    read_saved,
)
from lmpipe.retriever import Retriever
from lmpipe.run_directory import open_run
from lmpipe.runtime.session import Session
from lmpipe.state import ProgramState, WeightState
from lmpipe.storage.hashing import canonical_json
from lmpipe.validation.arguments import check_type, check_whole_number


def load(
    folder: str | Path,
    lm: LM | str | Mapping[str, LM | str] | None = None,
    *,
    strategy: str | None = None,
    seed: int | None = None,
    retriever: Retriever | None = None,
    embedder: Embedder | None = None,
) -> Session:
    """Loads a state with the LMs and settings that it runs on: ``with lmpipe.load("folder"): program(…)``.

    The session has no store; ``dataclasses.replace(session, store=RunStore(…))`` gives it one, to optimize further. Its
    adapters stay in the folder. A folder names the LM to load, which may be a server: pass `lm` for a folder from
    somebody whom you do not trust.

    Args:
        folder: Folder that `OptimizeResult.save` or ``lmpipe export`` wrote, or a run directory.
        lm: LM or its spec, or one for some of the roles; by default the LMs that were saved. Prompts run on any LM;
            tuned weights only on the LM that they were tuned on.
        strategy: Strategy of a run; by default the one with the best validation score.
        seed: Seed of a run; by default its first one.
        retriever: Retriever, if the program retrieves.
        embedder: Embedder, if prompts show the demonstrations that are nearest to an input.

    Raises:
        ConfigError: If the folder holds no saved session and no finished run, an LM cannot be loaded or is not the one
            that weights were tuned on, or a retriever or an embedder is needed and not passed.
        CorruptBlob: If a file is missing, damaged or was edited.
    """
    check_type("folder", folder, (str, Path), "lmpipe.load('folder')")
    path = Path(folder).absolute()  # adapters are read when they are needed, perhaps from another working directory
    saved = _read(path, strategy, None if seed is None else check_whole_number("seed", seed, None))
    lms = _load_lms(path, saved.session, lm)
    _check_embedder(path, saved.state, embedder)
    if saved.session.retriever is not None and retriever is None:
        raise ConfigError(
            f"the program of {path} searches with the retriever {saved.session.retriever!r}; pass it: "
            "lmpipe.load(..., retriever=lmpipe.load_retriever(...))"
        )
    session = Session(
        lm=lms["lm"] if lms.keys() == {"lm"} else lms,
        state=_with_bases(path, saved.state, lms),
        seed=saved.session.seed,
        sampling=saved.session.sampling,
        max_concurrency=saved.session.max_concurrency,
        structured=saved.session.structured,
        embedder=embedder,
        retriever=retriever,
    )
    return session.with_adapters(saved.adapters)


def _read(path: Path, strategy: str | None, seed: int | None) -> SavedState:
    """Reads a saved session, or the outcome of a run."""
    if (path / SESSION_FILE).exists():
        if strategy is not None or seed is not None:
            raise ConfigError(f"{path} holds one saved state, not a run; leave out strategy and seed")
        return read_saved(path)
    if not path.is_dir():
        raise ConfigError(
            f"{path} is not a folder; pass one that result.save(...) or lmpipe export wrote, or a run directory"
        )
    run = open_run(path)
    outcome = run.outcome(strategy, seed)
    adapters = {adapter: check_adapter(run.adapter_folder(adapter), adapter) for adapter in adapter_keys(outcome.state)}
    return SavedState(outcome.state, session_of(run, outcome), adapters)


def _load_lms(path: Path, saved: SavedSession, lm: LM | str | Mapping[str, LM | str] | None) -> dict[str, LM]:
    """Returns role → LM: the one that is given, or the one that was saved. Roles with the same spec share an LM."""
    if not isinstance(lm, Mapping) and lm is not None and saved.lm.keys() != {"lm"}:
        raise ConfigError(f"{path} has the roles {', '.join(saved.lm)}; pass their LMs by role: lm={{'lm': ...}}")
    given = lm if isinstance(lm, Mapping) else {} if lm is None else {"lm": lm}
    for role, value in given.items():
        check_type(f"the LM of role {role!r}", value, (LM, str))
        if role not in saved.lm:
            raise ConfigError(f"{path} has no role {role!r}; its roles are {', '.join(saved.lm)}")
    loaded: dict[str, LM] = {}
    lms: dict[str, LM] = {}
    for role, described in saved.lm.items():
        value = given.get(role, "")
        if isinstance(value, LM):
            lms[role] = value
            continue
        key = value or canonical_json([described.spec, described.options])
        lms[role] = loaded[key] = loaded.get(key) or (load_lm(value) if value else _load_lm(path, role, described))
    return lms


def _load_lm(path: Path, role: str, saved: SavedLM) -> LM:
    if saved.spec is None:
        lm = "..." if role == "lm" else f"{{{role!r}: ...}}"
        raise ConfigError(
            f"it is not known how to load the LM {saved.name!r} of {path}, since load_lm did not make it or its server "
            f"was not recorded; pass the LM or its spec: lmpipe.load({str(path)!r}, lm={lm})"
        )
    try:
        return load_lm(saved.spec, **saved.options)
    except ConfigError as error:
        raise ConfigError(
            f"the LM of {path} cannot be loaded: {error}; if it is elsewhere now, pass it: "
            f"lmpipe.load({str(path)!r}, lm=load_lm(..., name={saved.name!r}))"
        ) from error


def _with_bases(path: Path, state: ProgramState, lms: Mapping[str, LM]) -> ProgramState:
    """Returns the state on the bases of some LMs.

    Raises:
        ConfigError: If a role has no LM, or weights were tuned on another base.
    """
    weights: dict[str, WeightState] = {}
    for key, value in state.weights.items():
        role = key.partition("/")[0]
        if role not in lms:
            raise ConfigError(f"the state in {path} needs an LM of role {role!r}, which its session does not have")
        name = lms[role].name
        if value.adapter is not None and value.base != name:
            raise ConfigError(
                f"the weights of {key!r} in {path} were tuned on {value.base!r}, and this LM is {name!r}; pass the LM "
                "that they were tuned on, or, if it is the same model under another name, give it that name: "
                f"load_lm(..., name={value.base!r})"
            )
        weights[key] = value.model_copy(update={"base": name})
    return ProgramState(prompts=state.prompts, weights=weights)


def _check_embedder(path: Path, state: ProgramState, embedder: Embedder | None) -> None:
    """Checks that the embedder is the one by which prompts select their demonstrations."""
    for name in {prompt.nearest.embedder for prompt in state.prompts.values() if prompt.nearest is not None}:
        if embedder is None or embedder.name != name:
            other = "none was passed" if embedder is None else f"this one is {embedder.name!r}"
            raise ConfigError(
                f"the prompts in {path} select their demonstrations with the embedder {name!r}, and {other}; write "
                "lmpipe.load(..., embedder=load_embedder(...))"
            )
