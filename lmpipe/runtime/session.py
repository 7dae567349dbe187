"""The session: the LMs and the retriever that programs run on, with a seed, a store and further settings.

A session is a frozen value. Each stage of an optimization gets a session of its own, with its own seed and ledger. This
module knows nothing about modules, or about how a program runs on one example: see `lmpipe.runtime.call_context`.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import NoneType, TracebackType
from typing import Any, final

from lmpipe.embedder import Embedder, Vector, require_embedder
from lmpipe.errors import EngineError, SessionError
from lmpipe.events import Callback, Event
from lmpipe.ledger import Budget, Cost, Ledger
from lmpipe.lm import LM, Completion, Message, Request, Sampling, complete_batch
from lmpipe.progress import Progress, show_progress
from lmpipe.prompting.demo_selection import select_demos
from lmpipe.prompting.signature import Signature
from lmpipe.prompting.template import Template
from lmpipe.reporter import Reporter
from lmpipe.retriever import Passages, Retriever
from lmpipe.runtime.deadline import run_before_deadline
from lmpipe.runtime.embedding_cache import EmbeddingCache
from lmpipe.runtime.history import CallHistory
from lmpipe.runtime.search_cache import SearchCache
from lmpipe.runtime.trace import Step
from lmpipe.state import ProgramState, PromptState, WeightState
from lmpipe.storage.hashing import canonical_json, derive_seed, describe_settings
from lmpipe.storage.store import RunStore
from lmpipe.text.display import did_you_mean
from lmpipe.text.reprs import short_repr
from lmpipe.validation.arguments import check_items, check_type, check_whole_number

_MAX_HISTORY = 100  # LM calls that a session remembers


@final
@dataclass(frozen=True)
class _Scope:
    """The internal part of a session, which users do not set.

    Attributes:
        ledger: Adds up costs, and may limit them.
        stage: Name of the stage that the session is for; empty outside of a stage.
        run_seed: Seed of the session that the stages were derived from; None outside of a stage.
        calls: The last LM calls; shared with child sessions.
        adapters: Digest → folder of adapters that are not in the session's store.
        results: Results of finished work by key, for sessions without a store; shared with child sessions.
        embeddings: Embeddings computed so far; shared with child sessions.
        searches: Results of recent searches; shared with child sessions.
        reporter: Reports events and progress; shared with child sessions.
    """

    ledger: Ledger = field(default_factory=Ledger)
    stage: str = ""
    run_seed: int | None = None
    calls: deque[Step] = field(default_factory=partial(deque[Step], maxlen=_MAX_HISTORY))
    adapters: Mapping[str, Path] = field(default_factory=dict)
    results: dict[str, Any] = field(default_factory=dict)
    embeddings: EmbeddingCache = field(default_factory=EmbeddingCache)
    searches: SearchCache = field(default_factory=SearchCache)
    reporter: Reporter = field(default_factory=Reporter)


@final
@dataclass(frozen=True)
class Session:
    """Runs programs: ``with Session(lm=lm): program(question="…")``.

    A session is a value: `dataclasses.replace` makes another one with some of these arguments changed, which shares the
    caches and the ledger of the first.

    Args:
        lm: The LM, or one for each role that the program's predictors name (``{"lm": …, "judge": …}``).
        state: Prompts and weights that programs run with, and that `lmpipe.evaluate` scores and optimizers start from
            unless they get another state. By default programs are untuned.
        seed: Seed that every random choice derives from.
        sampling: Sampling settings of predictors that have none of their own.
        store: Run directory. It makes stages resumable and holds adapters.
        max_concurrency: Largest number of examples in flight at once.
        structured: Whether completions are constrained to the format that the template can parse. Engines that support
            this (all in `lmpipe.engines` do) then return no unreadable completion.
        embedder: Decides which demonstrations are nearest to an input, for prompts that show the nearest ones.
        retriever: Searches passages, for programs that `Retrieve`.
        template: Renders prompts and parses completions.
        progress: Shows progress bars in place of the session's own.
        callbacks: Functions that are called with each event, such as the end of a stage; see `lmpipe.events`.
        quiet: Whether nothing is reported. By default events and progress are reported on standard error
            (`lmpipe.reporter.Reporter`).
    """

    lm: LM | Mapping[str, LM]
    state: ProgramState | None = None
    seed: int = 0
    sampling: Sampling = field(default=Sampling())
    store: RunStore | None = None
    max_concurrency: int = 256
    structured: bool = False
    embedder: Embedder | None = None
    retriever: Retriever | None = None
    template: Template = field(default=Template(), repr=False)
    progress: Progress | None = field(default=None, repr=False)
    callbacks: tuple[Callback, ...] = field(default=(), repr=False)
    quiet: bool = field(default=False, repr=False)
    _scope: _Scope = field(default_factory=_Scope, repr=False, kw_only=True)

    def __post_init__(self) -> None:
        for role, lm in self.roles.items():
            check_type("the name of a role", role, str)
            name, around = ("lm", "lm={}") if lm is self.lm else (f"the LM of role {role!r}", f"lm={{{role!r}: {{}}}}")
            check_type(name, lm, LM, f"Session({around})")
            check_type(f"the name of {name}", lm.name, str)
        optional = {"state": ProgramState, "store": RunStore, "embedder": Embedder, "retriever": Retriever}
        for name, kind in {"sampling": Sampling, "template": Template, **optional}.items():
            kinds = (kind, NoneType) if name in optional else kind
            check_type(name, getattr(self, name), kinds, f"Session(…, {name}={{}})")
        if self.retriever is not None:
            check_type("the name of the retriever", self.retriever.name, str)
        check_type("progress", self.progress, (Progress, NoneType), "Session(…, quiet=True) to report nothing")
        for name in ("structured", "quiet"):
            check_type(name, getattr(self, name), bool, f"{name}=True or {name}=False")
        for name, least in (("seed", None), ("max_concurrency", 1)):
            object.__setattr__(self, name, check_whole_number(name, getattr(self, name), least))
        object.__setattr__(self, "callbacks", tuple(check_items("callbacks", self.callbacks, Callable)))  # type: ignore[arg-type]

    def __repr__(self) -> str:
        return short_repr(
            self,
            lm=self.lm if isinstance(self.lm, LM) else dict(self.lm),
            seed=self.seed,
            state=self.state,
            store=self.store,
            retriever=self.retriever,
            sampling=None if self.sampling == Sampling() else self.sampling,
        )

    @property
    def roles(self) -> Mapping[str, LM]:
        """Role → LM."""
        return self.lm if isinstance(self.lm, Mapping) else {"lm": self.lm}

    def lm_of(self, role: str) -> LM:
        """Returns the LM of a role.

        Raises:
            SessionError: If the session has no LM for that role.
        """
        try:
            return self.roles[role]
        except KeyError:
            known = ", ".join(self.roles)
            raise SessionError(
                f"no LM for role {role!r}; this session has {known}{did_you_mean(role, self.roles)}; write "
                f"Session(lm={{…, {role!r}: lm}})"
            ) from None

    def complete(self, role: str, requests: Sequence[Request]) -> list[Completion | EngineError]:
        """Answers a batch of requests with the LM of a role, in order.

        Raises:
            SessionError: If the session has no LM for that role.
            EngineError: If the LM failed as a whole, or broke its contract.
            BudgetSpent: If the deadline of the call under way passes.
        """
        return run_before_deadline(partial(complete_batch, self.lm_of(role), requests))

    def search(self, queries: Sequence[str], k: int) -> list[Passages | EngineError]:
        """Searches up to `k` passages for each query, or recalls an earlier search; returns them in order.

        Raises:
            SessionError: If the session has no retriever.
            EngineError: If the retriever failed as a whole, or broke its contract.
            BudgetSpent: If the deadline of the call under way passes.
        """
        if self.retriever is None:
            raise SessionError("the program retrieves; write: Session(…, retriever=load_retriever('bm25:PASSAGES'))")
        return run_before_deadline(partial(self._scope.searches.search, self.retriever, queries, k))

    def inference_settings(self) -> Any:
        """Returns, as JSON, the settings that decide prompts, completions and passages, for keys of recorded work."""
        names = [None if engine is None else engine.name for engine in (self.retriever, self.embedder)]
        return [describe_settings(self.sampling), self.structured, *names]

    def render_messages(
        self, signature: Signature, prompt: PromptState, inputs: Mapping[str, Any]
    ) -> tuple[Message, ...]:
        """Renders a module's prompt and inputs as the messages for the LM, at inference and in fine-tuning rows.

        Raises:
            SessionError: If the prompt needs an embedder that the session lacks.
        """
        if prompt.nearest is None:
            return self.template.messages(signature, prompt, inputs)

        def embed(name: str, texts: Sequence[str]) -> Sequence[Vector]:
            return self._scope.embeddings.embed(require_embedder(self.embedder, name), texts)

        return self.template.messages(signature, select_demos(signature, prompt, inputs, embed), inputs)

    def untuned_weights(self) -> dict[str, WeightState]:
        """Returns role → weights of its LM without an adapter."""
        return {role: WeightState(base=lm.name) for role, lm in self.roles.items()}

    @property
    def ledger(self) -> Ledger:
        """Adds up the costs of the session, and holds the limits on them."""
        return self._scope.ledger

    @property
    def stage(self) -> str:
        """Name of the stage that the session is for; empty outside of a stage."""
        return self._scope.stage

    @property
    def run_seed(self) -> int:
        """The seed of the run: in a stage, that of the session which the stage was derived from."""
        return self.seed if self._scope.run_seed is None else self._scope.run_seed

    def using(self, state: ProgramState) -> Session:
        """Returns the session with another state, which programs run with: ``with session.using(state): …``."""
        return replace(self, state=state)

    def history(self, n: int = 1) -> CallHistory:
        """Returns the last LM calls as they were sent and answered, the oldest first; printing them shows them.

        The calls of rollouts count once all rollouts of a batch have ended.

        Args:
            n: Number of calls; at most the last 100 are kept.
        """
        return CallHistory(tuple(self._scope.calls)[-check_whole_number("n", n) :])

    def remember_calls(self, steps: Iterable[Step]) -> None:
        """Adds LM calls to the history."""
        self._scope.calls.extend(steps)

    def for_stage(self, stage: str) -> Session:
        """Returns a session for one stage, with its own ledger and a seed derived from this seed and the name."""
        scope = replace(self._scope, ledger=self.ledger.child(), stage=stage, run_seed=self.run_seed)
        return replace(self, seed=derive_seed(self.seed, stage), _scope=scope)

    def limited(self, budget: Budget) -> Session:
        """Returns the session with a limit on its costs; an optimizer then stops at its best state so far."""
        return self._with_ledger(self.ledger.child(budget))

    def metered(self) -> Session:
        """Returns the session with a ledger of its own that starts at 0; this session's ledger counts its costs too."""
        return self._with_ledger(self.ledger.child())

    def _with_ledger(self, ledger: Ledger) -> Session:
        return replace(self, _scope=replace(self._scope, ledger=ledger))

    def notify(self, event: Event) -> None:
        """Reports an event, unless the session is quiet, and calls the callbacks with it."""
        if not self.quiet:
            self._scope.reporter(event)
        for callback in self.callbacks:
            callback(event)

    def register_adapters(self, state: ProgramState) -> None:
        """Registers the adapters of a state with their LMs, and checks that the session fits the state.

        Raises:
            SessionError: If weights belong to another LM, if the state has an adapter and the session has no store, or
                if a prompt needs another embedder.
        """
        for prompt in state.prompts.values():
            if prompt.nearest is not None:
                require_embedder(self.embedder, prompt.nearest.embedder)
        for key, weights in state.weights.items():
            lm = self.lm_of(key.partition("/")[0])
            if weights.base != lm.name:
                raise SessionError(
                    f"the weights of {key!r} belong to {weights.base!r}, but its LM is {lm.name!r}; load the LM that "
                    "the state was made with, or start from initial_state(program, session)"
                )
            if weights.adapter is not None:
                lm.register_adapter(weights.adapter, self.adapter_folder(weights.adapter))

    def adapter_folder(self, adapter: str) -> Path:
        """Returns the folder of an adapter, by its digest.

        Raises:
            SessionError: If neither the session's store has the adapter, nor was it loaded with the session.
        """
        if adapter in self._scope.adapters:
            return self._scope.adapters[adapter]
        if self.store is None:
            raise SessionError(
                f"the state runs on adapter {adapter}; pass the session the store that has it: "
                "Session(…, store=RunStore('the run directory that it was trained in'))"
            )
        if not self.store.has_blob(adapter):
            raise SessionError(
                f"the state runs on adapter {adapter}, and the session's store {self.store.path} does not have it; "
                "pass the store that it was trained in, or copy its work with store.merge_from('that run directory')"
            )
        return self.store.folder(adapter)

    def with_adapters(self, folders: Mapping[str, Path]) -> Session:
        """Returns the session with adapters that are not in its store.

        Args:
            folders: Digest → folder of the adapter in PEFT's format.
        """
        return replace(self, _scope=replace(self._scope, adapters={**self._scope.adapters, **folders}))

    def cached(
        self, key: str | None, work: Callable[[Session], Any], keep: Callable[[Any], bool] = lambda value: True
    ) -> Any:
        """Does a piece of work, or recalls its result from this session or, with a store, from any session on it.

        Its cost is added to the ledger in both cases, so a resumed run counts the same costs as an uninterrupted one.

        Args:
            key: Identifies the work by everything that decides its result (`lmpipe.program.identity.work_key`). Work
                without a key is always done, and its result is not recorded.
            work: Does the work in the session that it is called with, and returns JSON.
            keep: Whether a result is complete and may be recorded; a result that a budget cut short is not.

        Returns:
            The result of the work.
        """
        recorded, value = self.recall(key)
        if recorded:
            return value
        inner = self.metered()
        value = json.loads(canonical_json(work(inner)))  # exactly what a later call will recall
        if keep(value):
            self.record({key: (value, inner.ledger.total)})
        return value

    def recall(self, key: str | None) -> tuple[bool, Any]:
        """Returns whether a result is recorded under a key, and the result; its cost is added to the ledger."""
        if key is None:
            return False, None
        record = self._scope.results.get(key) if self.store is None else self.store.get(key)
        if record is None:
            return False, None
        self.ledger.add(Cost.from_json(record["cost"]))
        return True, record["value"]

    def record(self, results: Mapping[str | None, tuple[Any, Cost]]) -> None:
        """Records results of finished work with their costs, by key. A result whose key is None is not recorded."""
        records = {
            key: {"value": value, "cost": cost.to_json()} for key, (value, cost) in results.items() if key is not None
        }
        if self.store is None:
            self._scope.results.update(records)
        elif records:
            self.store.put(records)

    def track(self, description: str, total: int) -> AbstractContextManager[Callable[[float], None]]:
        """Shows a progress bar during a block. The block receives a function that advances the bar."""
        reporter = None if self.quiet else self._scope.reporter
        return show_progress(reporter if self.progress is None else self.progress, description, total)

    def __enter__(self) -> Session:
        _sessions.set((*_sessions.get(), self))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        _sessions.set(_sessions.get()[:-1])


_sessions: ContextVar[tuple[Session, ...]] = ContextVar("lmpipe_sessions", default=())


def in_session() -> bool:
    """Whether a session is active."""
    return bool(_sessions.get())


def current_session() -> Session:
    """Returns the innermost active session.

    Raises:
        SessionError: If no session is active; the message says what to write.
    """
    sessions = _sessions.get()
    if not sessions:
        raise SessionError("no session is active; write: with Session(lm=lm): program(…)")
    return sessions[-1]
