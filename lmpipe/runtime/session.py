"""The session: which LMs and retriever a program runs on, and everything else a run needs that is not the program.

A session is a frozen value; stages get children of it with seeds and ledgers of their own. Knows nothing of modules,
or of how one example is run: see `lmpipe.runtime.call_context`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from functools import partial
from numbers import Integral
from types import NoneType, TracebackType
from typing import Any, final

from lmpipe.embedder import Embedder, Vector, require_embedder
from lmpipe.errors import EngineError, SessionError
from lmpipe.events import Callback, Event
from lmpipe.ledger import Budget, Cost, Ledger
from lmpipe.lm import LM, Completion, Message, Request, Sampling, ask
from lmpipe.progress import Progress, show_progress
from lmpipe.prompting.demo_selection import with_shown_demos
from lmpipe.prompting.signature import Signature
from lmpipe.prompting.template import Template
from lmpipe.retriever import Passages, Retriever
from lmpipe.runtime.deadline import in_time
from lmpipe.runtime.embedding_cache import EmbeddingCache
from lmpipe.runtime.search_cache import SearchCache
from lmpipe.state import ProgramState, PromptState, WeightState
from lmpipe.storage.hashing import canonical_json, derive_seed, describe
from lmpipe.storage.store import RunStore
from lmpipe.validation.arguments import items, of_kind, whole_number


@final
@dataclass(frozen=True)
class Session:
    """Runs programs: ``with Session(lm=lm): program(question="…")``.

    Args:
        lm: The LM, or one for each role that the program's predictors name (``{"lm": …, "judge": …}``).
        state: Prompts and weights of programs called directly; by default the untuned ones.
        seed: Every random choice of the run derives from it.
        sampling: How completions are drawn, unless a predictor says otherwise.
        store: CallContext directory; makes stages resumable and holds adapters.
        max_concurrency: Most examples in flight at once.
        structured: Whether completions are held to the form that the template can read. For engines that can do so
            (all in `lmpipe.engines`) no completion is then unreadable.
        embedder: Says which demonstrations are near an input, for prompts that show the nearest ones.
        retriever: Finds passages, for programs that `Retrieve`.
        template: Renders prompts and reads completions.
        progress: Where to show progress; none shows nothing.
        callbacks: Are told of stages, candidates and epochs as they end; see `lmpipe.events`.
        ledger: Counts what is spent, and may limit it.
        stage: Name of the stage that the session is for; empty outside of one.
        memory: What was done in this session and its children, where no store remembers it.
        embeddings: What was embedded in this session and its children.
        searches: What was found last, in this session and its children.
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
    ledger: Ledger = field(default_factory=Ledger, repr=False)
    stage: str = ""
    memory: dict[str, Any] = field(default_factory=dict, repr=False)
    embeddings: EmbeddingCache = field(default_factory=EmbeddingCache, repr=False)
    searches: SearchCache = field(default_factory=SearchCache, repr=False)

    def __post_init__(self) -> None:
        whole_number("max_concurrency", self.max_concurrency)
        of_kind("seed", self.seed, Integral)
        for role, lm in self.roles.items():
            of_kind(f"the LM of role {role!r}", lm, LM)
            of_kind(f"the name of the LM of role {role!r}", lm.name, str)
        of_kind("sampling", self.sampling, Sampling)
        of_kind("state", self.state, (ProgramState, NoneType))
        of_kind("store", self.store, (RunStore, NoneType))
        of_kind("embedder", self.embedder, (Embedder, NoneType))
        of_kind("retriever", self.retriever, (Retriever, NoneType))
        object.__setattr__(self, "callbacks", tuple(items("callbacks", self.callbacks, Callable)))  # type: ignore[arg-type]

    @property
    def roles(self) -> Mapping[str, LM]:
        """Role → LM."""
        return self.lm if isinstance(self.lm, Mapping) else {"lm": self.lm}

    def lm_of(self, role: str) -> LM:
        """Raises:
        SessionError: If the session has no LM for that role.
        """
        try:
            return self.roles[role]
        except KeyError:
            raise SessionError(f"no LM for role {role!r}; this session has {', '.join(self.roles)}") from None

    def complete(self, role: str, requests: Sequence[Request]) -> list[Completion | EngineError]:
        """What the LM of a role answers.

        Raises:
            SessionError: If the session has no LM for that role.
            EngineError: If the LM failed as a whole, or broke its contract.
            BudgetSpent: If the time of the call under way is over.
        """
        return in_time(partial(ask, self.lm_of(role), requests))

    def search(self, queries: Sequence[str], k: int) -> list[Passages | EngineError]:
        """What the retriever finds, or found before.

        Raises:
            SessionError: If the session has no retriever.
            EngineError: If the retriever failed as a whole, or broke its contract.
            BudgetSpent: If the time of the call under way is over.
        """
        if self.retriever is None:
            raise SessionError("the program retrieves; write: Session(lm=..., retriever=...)")
        return in_time(partial(self.searches.search, self.retriever, queries, k))

    def decoding(self) -> Any:
        """All that decides prompts, completions and what is found, as JSON: part of the key of recorded work."""
        others = [None if other is None else other.name for other in (self.retriever, self.embedder)]
        return [describe(self.sampling), self.structured, *others]

    def messages(self, signature: Signature, prompt: PromptState, inputs: Mapping[str, Any]) -> tuple[Message, ...]:
        """What an LM reads of a module's prompt and inputs, at inference and in fine-tuning rows.

        Raises:
            SessionError: If the prompt needs an embedder that the session lacks.
        """

        def embed(name: str, texts: Sequence[str]) -> Sequence[Vector]:
            return self.embeddings.of(require_embedder(self.embedder, name), texts)

        return self.template.messages(signature, with_shown_demos(signature, prompt, inputs, embed), inputs)

    def base_weights(self) -> dict[str, WeightState]:
        """Role → its LM without any adapter."""
        return {role: WeightState(base=lm.name) for role, lm in self.roles.items()}

    def child(self, stage: str) -> Session:
        """A session for one stage: a seed derived from this one's and the stage's name, and a ledger of its own."""
        return replace(self, seed=derive_seed(self.seed, stage), ledger=self.ledger.child(), stage=stage)

    def limited(self, budget: Budget) -> Session:
        """The same session with a limit to what may be spent in it: an optimizer then stops at its best so far."""
        return replace(self, ledger=self.ledger.child(budget))

    def notify(self, event: Event) -> None:
        """Tells the callbacks of an event."""
        for callback in self.callbacks:
            callback(event)

    def prepare(self, state: ProgramState) -> None:
        """Makes every adapter of a state answerable, and refuses weights and embedders that the session has not.

        Raises:
            SessionError: If weights belong to another LM, an adapter is needed and there is no store, or a prompt needs
                another embedder.
        """
        for prompt in state.prompts.values():
            if prompt.nearest is not None:
                require_embedder(self.embedder, prompt.nearest.embedder)
        for key, weights in state.weights.items():
            lm = self.lm_of(key.partition("/")[0])
            if weights.base != lm.name:
                raise SessionError(f"the weights of {key!r} belong to {weights.base!r}, but its LM is {lm.name!r}")
            if weights.adapter is not None:
                if self.store is None:
                    raise SessionError(
                        f"{key!r} runs on adapter {weights.adapter}; give the session the store that has it"
                    )
                lm.register_adapter(weights.adapter, self.store.folder(weights.adapter))

    def cached(
        self, key: str | None, work: Callable[[Session], Any], keep: Callable[[Any], bool] = lambda value: True
    ) -> Any:
        """Does a piece of work, or recalls it if it was done before: in this session or, with a store, in any.

        Either way its cost goes into the ledger, so a resumed run accounts for the same as an undisturbed one.

        Args:
            key: Identifies the work by everything that decides its result (`lmpipe.program.identity.work_key`). Work
                without a key is always done, and its result is not recorded.
            work: Does it in the session it is given; returns JSON.
            keep: Whether what it returned is finished; what a budget cut short, for one, is done again another time.

        Returns:
            What the work returned.
        """
        known, value = self.recall(key)
        if known:
            return value
        inner = replace(self, ledger=self.ledger.child())
        value = json.loads(canonical_json(work(inner)))  # as it will be recalled
        if keep(value):
            self.record({key: (value, inner.ledger.total)})
        return value

    def recall(self, key: str | None) -> tuple[bool, Any]:
        """Whether the result of a piece of work is known, and the result; its cost goes into the ledger."""
        if key is None:
            return False, None
        found = self.memory.get(key) if self.store is None else self.store.get(key)
        if found is None:
            return False, None
        self.ledger.add(Cost.from_json(found["cost"]))
        return True, found["value"]

    def record(self, results: Mapping[str | None, tuple[Any, Cost]]) -> None:
        """Keeps the results of finished work with their costs; what has no key cannot be kept."""
        records = {
            key: {"value": value, "cost": cost.to_json()} for key, (value, cost) in results.items() if key is not None
        }
        if self.store is None:
            self.memory.update(records)
        elif records:
            self.store.put(records)

    def track(self, description: str, total: int) -> AbstractContextManager[Callable[[float], None]]:
        """Shows a progress bar while the block runs; the block calls what it is given to advance it."""
        return show_progress(self.progress, description, total)

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
    """The innermost active session.

    Raises:
        SessionError: If there is none; the message says what to write.
    """
    sessions = _sessions.get()
    if not sessions:
        raise SessionError("no session is active; write: with Session(lm=...): program(...)")
    return sessions[-1]
