"""Modules: the frozen structure of a program.

A module holds predictors and other modules in attributes, lists, tuples and dicts, and its `forward` calls them. It
holds no prompts, demonstrations or weights: those are a `ProgramState`, so one module object can run under many states
at once.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, ClassVar, final

from lmpipe.data import Example, Prediction
from lmpipe.errors import ConfigError, ModuleError, SignatureError
from lmpipe.runtime.call_context import CallContext, in_call
from lmpipe.runtime.deadline import set_deadline
from lmpipe.runtime.session import current_session, in_session
from lmpipe.runtime.trace import Step, total_cost
from lmpipe.runtime.waiting import WaitRecord
from lmpipe.state import ProgramState
from lmpipe.text.display import did_you_mean, shown
from lmpipe.text.reprs import Name, short_repr


@final
class _FrozenMark:
    """Marks a module that has run, and holds what follows from its structure. A copy of the module has not run.

    Attributes:
        module: The module.
        paths: ``id(module)`` → path of the modules in its tree.
        waits: The metric that the module was last run with, and what is known of the code of both.
    """

    __slots__ = ("module", "paths", "waits")

    def __init__(self, module: Module | None = None) -> None:
        self.module = module
        self.paths: Mapping[int, str] | None = None
        self.waits: tuple[object, WaitRecord] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return _FrozenMark, ()  # a copied or unpickled mark belongs to no module


class Module(ABC):
    """Base class of programs and of their parts.

    A subclass creates its parts in ``__init__`` and overrides `forward`; calling the module runs it. Once a module has
    run, it cannot be changed any more; a copy of it can.
    """

    has_prompt: ClassVar[bool] = False
    """Whether the module makes LM calls with a prompt of its own."""
    shares_threads: ClassVar[bool] = True
    """Whether jobs may share a thread once the module's code has not waited in many of them. False keeps a thread for
    each job; write this if `forward` holds a lock or a thread-local setting across the call of a module."""
    input_names: tuple[str, ...] = ()
    """Names of the inputs, for modules whose `forward` does not name them because a signature does."""

    @abstractmethod
    def forward(self, *args: Any, **inputs: Any) -> Prediction:
        """Runs the module. Call it through ``module(...)`` only. Overrides name their inputs as parameters."""

    def __call__(self, *values: Any, **inputs: Any) -> Prediction:
        """Runs the module as part of the program that called it, or by itself in the active session.

        Inputs are passed by name.

        Raises:
            SignatureError: If an input is passed without its name, is missing, or does not exist.
            SessionError: If no session is active.
            ConfigError: If the session's state does not fit the program.
            ModuleError: If `forward` does not return a prediction.
            ParseError: If a completion could not be parsed.
            EngineError: If a request or a query could not be answered.
        """
        if values:
            given = zip([*_parameters(self), *["…"] * len(values)], values, strict=False)
            code = ", ".join(f"{name}={shown(value, 50)}" for name, value in given)
            raise SignatureError(
                f"{shown(values[0], 50)} was passed to {type(self).__name__} without the input's name; write "
                f"{'self.…' if in_call() else 'program'}({code})"
            )
        if in_call():
            return self._run_forward(inputs)
        if problem := _input_problem(self, inputs):
            raise SignatureError(f"{type(self).__name__} takes the inputs {_listed_inputs(self)}; {problem}")
        if not in_session():
            CallContext.refuse_wrong_thread(self)
        session = current_session()
        state = session.state or ProgramState(prompts={}, weights=session.untuned_weights())
        check_state(self, state)
        session.register_adapters(state)
        context = CallContext(
            session,
            state,
            self.paths(),
            session.seed,
            lambda role, request: session.complete(role, [request])[0],
            lambda query, k: session.search([query], k)[0],
        )
        with context.activate(), set_deadline(session.ledger.seconds_left):
            try:
                return check_prediction(self, self._run_forward(inputs))
            finally:
                session.ledger.add(total_cost(context.steps))
                session.remember_calls(step for step in context.steps if isinstance(step, Step))

    def _run_forward(self, inputs: Mapping[str, Any]) -> Prediction:
        result = self.forward(**inputs)
        if not isinstance(result, Prediction) and inspect.isawaitable(result):
            if inspect.iscoroutine(result):
                result.close()
            raise ModuleError(
                f"{type(self).__name__}.forward() is async; write `def forward` and call the modules in it without "
                "await: examples run at once, each in a thread of its own"
            )
        return result

    def __repr__(self) -> str:
        parts = [path for path, module in self.named_modules() if module is not self]
        return short_repr(self, *map(Name, parts))

    def named_modules(self, path: str = "self") -> Iterator[tuple[str, Module]]:
        """Yields every module of the tree with its path: parents first, each object once. The root is ``"self"``."""
        seen: set[int] = set()
        pending: list[tuple[str, object, tuple[int, ...]]] = [(path, self, ())]
        while pending:
            where, value, containers = pending.pop()
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
            if id(value) in containers:
                raise ModuleError(
                    f"{type(self).__name__}.{where} is a {type(value).__name__} that contains itself; keep the modules "
                    "of a program in a list or dict that holds nothing but them"
                )
            prefix = "" if where == path else f"{where}."
            containers = (*containers, id(value))
            pending += reversed([(f"{prefix}{name}", part, containers) for name, part in parts.items()])

    def paths(self) -> Mapping[int, str]:
        """Freezes the whole tree and returns ``id(module)`` → path for every module in it."""
        mark = self._frozen_mark
        if mark is None or mark.paths is None:
            paths = {id(module): path for path, module in self.named_modules()}
            for _, module in self.named_modules():
                if module._frozen_mark is None:
                    module.__dict__["_frozen_mark"] = _FrozenMark(module)
            mark = self.__dict__["_frozen_mark"]
            mark.paths = paths
        return mark.paths

    def wait_record(self, metric: object) -> WaitRecord:
        """Freezes the whole tree, and returns what is known of the time that its code and a metric's spend waiting."""
        self.paths()
        mark: _FrozenMark = self.__dict__["_frozen_mark"]
        if mark.waits is None or mark.waits[0] is not metric:
            waits = not all(module.shares_threads for _, module in self.named_modules())
            mark.waits = (metric, WaitRecord(waits=waits))
        return mark.waits[1]

    @property
    def _frozen_mark(self) -> _FrozenMark | None:
        """The mark of this object itself. A shallow copy carries the mark of its original, which does not count."""
        mark: _FrozenMark | None = self.__dict__.get("_frozen_mark")
        return mark if mark is not None and mark.module is self else None

    def __setattr__(self, name: str, value: object) -> None:
        if self._frozen_mark is not None:
            raise ModuleError(
                f"{type(self).__name__}.{name} cannot be set: the module has run already. Structure is set in "
                "__init__, prompts and weights belong to a ProgramState, and values of one example to variables of "
                "forward() and to its Prediction"
            )
        super().__setattr__(name, value)


def check_prediction(program: Module, result: object) -> Prediction:
    """Returns the result of a program, after checking that it is a prediction.

    Raises:
        ModuleError: If the result is not a prediction.
    """
    if isinstance(result, Prediction):
        return result
    where = f"{type(program).__name__}.forward() returned {type(result).__name__}, not a Prediction"
    if result is None:
        raise ModuleError(f"{where}; does it lack a `return`, as in: return self.predict(…)?")
    if isinstance(result, Mapping):
        code = ", ".join(f"{name}={shown(value, 50)}" for name, value in result.items())
        raise ModuleError(f"{where}; write: return Prediction({code})")
    raise ModuleError(
        f"{where}; return what a module returned, or make one: return Prediction(answer={shown(result, 50)})"
    )


def check_inputs(program: Module, examples: Iterable[Example]) -> None:
    """Checks that ``forward`` accepts the inputs of examples.

    Raises:
        ConfigError: If it does not accept them; the message names the inputs and the parameters.
    """
    for names in {tuple(example.inputs): None for example in examples}:
        if problem := _input_problem(program, names):
            raise ConfigError(
                f"examples have the inputs {', '.join(names) or 'none'}, and {type(program).__name__}.forward() takes "
                f"{_listed_inputs(program)}: {problem}; rename them, or move what the program does not take to the "
                "labels: Example(inputs={…}, labels={…})"
            )


def _parameters(module: Module) -> dict[str, bool]:
    """Name of an input that a module takes → whether the input must be passed."""
    if module.input_names:
        return dict.fromkeys(module.input_names, True)
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    parameters = inspect.signature(module.forward, follow_wrapped=False).parameters.items()
    return {name: part.default is inspect.Parameter.empty for name, part in parameters if part.kind in named}


def _input_problem(module: Module, names: Iterable[str]) -> str:
    """Says which inputs are missing or do not exist; empty if all is well."""
    parameters, names = _parameters(module), list(names)
    takes_any = not module.input_names and any(
        part.kind is inspect.Parameter.VAR_KEYWORD
        for part in inspect.signature(module.forward, follow_wrapped=False).parameters.values()
    )
    unknown = [] if takes_any else [name for name in names if name not in parameters]
    missing = [name for name, required in parameters.items() if required and name not in names]
    if unknown:
        return f"{unknown[0]!r} is not one of them{did_you_mean(unknown[0], missing or parameters)}"
    return f"{missing[0]!r} is missing" if missing else ""


def _listed_inputs(module: Module) -> str:
    return ", ".join(_parameters(module)) or "no input"


def check_state(program: Module, state: ProgramState) -> None:
    """Checks that a state's prompts and weights are for modules of a program.

    Modules that the state does not name keep their initial prompts.

    Raises:
        ConfigError: If the state names modules that the program does not have; the message says which paths differ.
    """
    named = {*state.prompts, *(key.partition("/")[2] for key in state.weights if "/" in key)}
    if not named:
        return
    paths = [path for path, module in program.named_modules() if module.has_prompt]
    unknown = sorted(named - set(paths))
    if unknown:
        unnamed = [path for path in paths if path not in state.prompts]
        raise ConfigError(
            f"the state does not fit the program: it is for {', '.join(map(repr, unknown))}, and "
            f"{type(program).__name__} has {', '.join(map(repr, paths)) or 'no module with a prompt'}; if a module was "
            "renamed, write "
            f"state.with_renamed_modules({{{unknown[0]!r}: {unnamed[0] if unnamed else 'its new path'!r}}})"
        )
