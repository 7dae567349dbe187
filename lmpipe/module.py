"""Modules: the frozen structure of a program.

A module holds predictors and other modules in attributes, lists, tuples and dicts, and says in `forward` how they
are called. It holds no prompts, demonstrations or weights: those are a `ProgramState`, so one module object runs
under many states at once.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any

from lmpipe.data import Prediction
from lmpipe.errors import ModuleError
from lmpipe.run import Run, current_run
from lmpipe.session import current_session
from lmpipe.state import ProgramState
from lmpipe.trace import total_cost


class Module(ABC):
    """Base of every program and of every part of one.

    A subclass makes its parts in ``__init__`` and overrides `forward`; calling the module runs it. From its first run
    on, a module cannot be changed.
    """

    @abstractmethod
    def forward(self, *args: Any, **inputs: Any) -> Prediction:
        """Runs the module; called through ``module(...)`` only. Overrides name their inputs."""

    def __call__(self, **inputs: Any) -> Prediction:
        """Runs the module within the program that called it, or in the active session if none did.

        Raises:
            SessionError: If no session is active.
            ParseError: If a completion could not be read.
            EngineError: If a request or a query could not be answered.
        """
        if current_run() is not None:
            return self.forward(**inputs)
        session = current_session()
        state = session.state or ProgramState(prompts={}, weights=session.base_weights())
        session.prepare(state)
        run = Run(
            session,
            state,
            self.paths(),
            session.seed,
            lambda role, request: session.complete(role, [request])[0],
            lambda query, k: session.search([query], k)[0],
        )
        with run.active():
            try:
                return self.forward(**inputs)
            finally:
                session.ledger.add(total_cost(run.steps))

    def named_modules(self, path: str = "self") -> Iterator[tuple[str, Module]]:
        """Every module of the tree with its path, parents first, each object once; the root is ``"self"``."""
        seen: set[int] = set()
        pending: list[tuple[str, object]] = [(path, self)]
        while pending:
            where, value = pending.pop()
            if isinstance(value, Module):
                if id(value) in seen:
                    continue
                seen.add(id(value))
                yield where, value
                parts: Mapping[Any, object] = vars(value)
            elif isinstance(value, Mapping):
                parts = value
            elif isinstance(value, (list, tuple)):
                parts = dict(enumerate(value))
            else:
                continue
            prefix = "" if where == path else f"{where}."
            pending += reversed([(f"{prefix}{name}", part) for name, part in parts.items()])

    def paths(self) -> Mapping[int, str]:
        """``id(module)`` → path for the whole tree, which is frozen from here on."""
        known: Mapping[int, str] | None = self.__dict__.get("_paths")
        if known is None:
            known = {id(module): path for path, module in self.named_modules()}
            for _, module in self.named_modules():
                module.__dict__["_frozen"] = True
            self.__dict__["_paths"] = known
        return known

    def __setattr__(self, name: str, value: object) -> None:
        if self.__dict__.get("_frozen"):
            raise ModuleError(
                f"{type(self).__name__}.{name} cannot be set: the module has run already. Structure is set in "
                "__init__; prompts and weights belong to a ProgramState"
            )
        super().__setattr__(name, value)
