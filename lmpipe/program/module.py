"""Modules: the frozen structure of a program.

A module holds predictors and other modules in attributes, lists, tuples and dicts, and says in `forward` how they
are called. It holds no prompts, demonstrations or weights: those are a `ProgramState`, so one module object runs
under many states at once.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, ClassVar, final

from lmpipe.data import Example, Prediction
from lmpipe.errors import ConfigError, ModuleError, SignatureError
from lmpipe.runtime.call_context import CallContext, current_context, refuse_stray_call
from lmpipe.runtime.deadline import time_limit
from lmpipe.runtime.session import current_session, in_session
from lmpipe.runtime.trace import total_cost
from lmpipe.state import ProgramState
from lmpipe.text.display import shown


@final
class _Used:
    """Marks a module that has run, and says where the modules of its tree are. A copy of the module has not run."""

    __slots__ = ("module", "paths")

    def __init__(self, module: Module | None = None) -> None:
        self.module = module
        self.paths: Mapping[int, str] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return _Used, ()  # what is copied or unpickled belongs to no module


class Module(ABC):
    """Base of every program and of every part of one.

    A subclass makes its parts in ``__init__`` and overrides `forward`; calling the module runs it. From its first run
    on, a module cannot be changed; a copy of it can.
    """

    takes_prompt: ClassVar[bool] = False
    """Whether the module makes an LM call, with a prompt of its own."""

    @abstractmethod
    def forward(self, *args: Any, **inputs: Any) -> Prediction:
        """Runs the module; called through ``module(...)`` only. Overrides name their inputs."""

    def __call__(self, *values: Any, **inputs: Any) -> Prediction:
        """Runs the module within the program that called it, or in the active session if none did.

        Inputs are given by name.

        Raises:
            SignatureError: If an input is given without its name.
            SessionError: If no session is active.
            ConfigError: If the session's state does not fit the program.
            ModuleError: If `forward` does not return a prediction.
            ParseError: If a completion could not be read.
            EngineError: If a request or a query could not be answered.
        """
        if values:
            raise SignatureError(f"{shown(values[0], 50)} was given to {type(self).__name__} without the input's name")
        if current_context() is not None:
            return self._forward(inputs)
        if not in_session():
            refuse_stray_call(self)
        session = current_session()
        state = session.state or ProgramState(prompts={}, weights=session.base_weights())
        check_state(self, state)
        session.prepare(state)
        run = CallContext(
            session,
            state,
            self.paths(),
            session.seed,
            lambda role, request: session.complete(role, [request])[0],
            lambda query, k: session.search([query], k)[0],
        )
        with run.active(), time_limit(session.ledger.seconds_left):
            try:
                return prediction_of(self, self._forward(inputs))
            finally:
                session.ledger.add(total_cost(run.steps))

    def _forward(self, inputs: Mapping[str, Any]) -> Prediction:
        result = self.forward(**inputs)
        if not isinstance(result, Prediction) and inspect.isawaitable(result):
            if inspect.iscoroutine(result):
                result.close()
            raise ModuleError(
                f"{type(self).__name__}.forward() is async; write `def forward` and call the modules in it without "
                "await: examples run at once, each in a thread of its own"
            )
        return result

    def named_modules(self, path: str = "self") -> Iterator[tuple[str, Module]]:
        """Every module of the tree with its path, parents first, each object once; the root is ``"self"``."""
        seen: set[int] = set()
        pending: list[tuple[str, object, tuple[int, ...]]] = [(path, self, ())]
        while pending:
            where, value, holders = pending.pop()
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
            if id(value) in holders:
                raise ModuleError(
                    f"{type(self).__name__}.{where} is a {type(value).__name__} that contains itself; keep the modules "
                    "of a program in a list or dict that holds nothing but them"
                )
            prefix = "" if where == path else f"{where}."
            inside = (*holders, id(value))
            pending += reversed([(f"{prefix}{name}", part, inside) for name, part in parts.items()])

    def paths(self) -> Mapping[int, str]:
        """``id(module)`` → path for the whole tree, which is frozen from here on."""
        used = self._used
        if used is None or used.paths is None:
            known = {id(module): path for path, module in self.named_modules()}
            for _, module in self.named_modules():
                if module._used is None:
                    module.__dict__["_used"] = _Used(module)
            used = self.__dict__["_used"]
            used.paths = known
        return used.paths

    @property
    def _used(self) -> _Used | None:
        """The mark of this very module: a copy carries that of the original along, which says nothing of it."""
        used: _Used | None = self.__dict__.get("_used")
        return used if used is not None and used.module is self else None

    def __setattr__(self, name: str, value: object) -> None:
        if self._used is not None:
            raise ModuleError(
                f"{type(self).__name__}.{name} cannot be set: the module has run already. Structure is set in "
                "__init__; prompts and weights belong to a ProgramState"
            )
        super().__setattr__(name, value)


def prediction_of(program: Module, result: object) -> Prediction:
    """What a program returned.

    Raises:
        ModuleError: If it is no prediction.
    """
    if isinstance(result, Prediction):
        return result
    raise ModuleError(
        f"{type(program).__name__}.forward() returned {type(result).__name__}, not a Prediction; return what a module "
        "gave, or make one: Prediction(answer=...)"
    )


def check_inputs(program: Module, examples: Iterable[Example]) -> None:
    """Looks whether ``forward`` takes the inputs of examples.

    Raises:
        ConfigError: If it takes others; the message names both.
    """
    signature = inspect.signature(program.forward, follow_wrapped=False)
    names: tuple[str, ...] = ()
    try:
        for names in {tuple(example.inputs): None for example in examples}:
            signature.bind(**dict.fromkeys(names))
    except TypeError as error:
        raise ConfigError(
            f"examples have the inputs {', '.join(map(str, names)) or 'none'}, and {type(program).__name__}.forward() "
            f"takes {', '.join(signature.parameters) or 'nothing'}: {error}"
        ) from None


def check_state(program: Module, state: ProgramState) -> None:
    """Looks whether a state's prompts and weights are for modules that a program has.

    Modules that the state does not name keep their vanilla prompts.

    Raises:
        ConfigError: If the state names others; the message says which paths differ.
    """
    named = {*state.prompts, *(key.partition("/")[2] for key in state.weights if "/" in key)}
    if not named:
        return
    own = [path for path, module in program.named_modules() if module.takes_prompt]
    unknown = sorted(named - set(own))
    if unknown:
        free = [path for path in own if path not in state.prompts]
        raise ConfigError(
            f"the state does not fit the program: it is for {', '.join(map(repr, unknown))}, and "
            f"{type(program).__name__} has {', '.join(map(repr, own)) or 'no module with a prompt'}; if a module was "
            f"renamed, write state.with_renamed_modules({{{unknown[0]!r}: {free[0] if free else 'its new path'!r}}})"
        )
