"""The context of one call of a program on one example: its modules read from it and append their steps to it.

A context variable carries it. This code knows nothing about modules, or about who answers requests and when.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, final

from lmpipe.data import snapshot
from lmpipe.errors import EngineError, ModuleError, ParseError
from lmpipe.lm import Completion, Request, Usage
from lmpipe.retriever import Passages
from lmpipe.runtime.session import Session
from lmpipe.runtime.trace import Step, TraceStep
from lmpipe.state import ProgramState
from lmpipe.storage.hashing import derive_seed
from lmpipe.text.cleaning import clean_text, clean_value

CompleteFn = Callable[[str, Request], Completion | EngineError]
"""Answers a request with the LM of a role."""
SearchFn = Callable[[str, int], Passages | EngineError]
"""Searches for up to k passages for a query."""


@final
class CallContext:
    """The context of one call of a program on one example: the data that its modules read, and the steps they append.

    Args:
        session: The session that the program runs in.
        state: Prompts and weights; a predictor that the state does not name keeps its initial prompt.
        paths: ``id(module)`` → path, for every module of the program.
        seed: Seed of this call of the program; each LM call derives its own from it.
        complete: Answers a request with the LM of a role.
        search: Searches for passages.
        temperature: Overrides the temperature of every LM call.

    Attributes:
        steps: LM calls and retrievals so far, in order.
    """

    def __init__(
        self,
        session: Session,
        state: ProgramState,
        paths: Mapping[int, str],
        seed: int,
        complete: CompleteFn,
        search: SearchFn,
        temperature: float | None = None,
    ) -> None:
        self.session = session
        self.state = state
        self.search = search
        self.temperature = temperature
        self.steps: list[TraceStep] = []
        self._complete = complete
        self._paths = paths
        self._seed = seed
        self._call_counts: dict[str, int] = {}
        self._thread = 0
        self._called_in_wrong_thread: list[object] = []

    def next_call(self, module: object) -> tuple[str, int, int]:
        """Counts a call of a module, and returns the module's path, the number of the call and its seed.

        Raises:
            ModuleError: If the module is not part of the running program, or is called from another thread.
        """
        if threading.get_ident() != self._thread:
            raise _wrong_thread_error(module)
        path = self._paths.get(id(module))
        if path is None:
            raise ModuleError(
                f"{type(module).__name__} is not part of the running program; make it in __init__ and keep it in an "
                "attribute, a list or a dict of its module"
            )
        index = self._call_counts.get(path, 0)
        self._call_counts[path] = index + 1
        return path, index, derive_seed(self._seed, path, index)

    def call_lm(
        self,
        role: str,
        path: str,
        index: int,
        inputs: Mapping[str, Any],
        request: Request,
        parse: Callable[[str], dict[str, Any]],
        replaced: int = 0,
    ) -> dict[str, Any]:
        """Makes an LM call, and appends its step whether the call succeeds or not.

        Characters of the completion that are not valid text are replaced and counted.

        Args:
            role: Role of the LM that answers.
            path: Path of the calling module.
            index: Number of this call of the module.
            inputs: Inputs of the module.
            request: The request to send.
            parse: Parses a completion into outputs.
            replaced: Number of characters of the inputs that were not valid text.

        Returns:
            The outputs.

        Raises:
            EngineError: If the request could not be answered.
            ParseError: If the completion could not be parsed.
        """
        completion = self._complete(role, request)
        if isinstance(completion, EngineError):
            error = clean_text(str(completion))
            self.steps.append(Step(path, index, "lm", inputs, None, request, None, Usage(1), error, replaced))
            raise completion
        counts = [replaced]
        text: str = clean_value(completion.text, counts.append)
        try:
            outputs = parse(text)
            if "\\" in text:  # JSON escapes may spell characters that are not valid text
                outputs = clean_value(outputs, counts.append)
        except ParseError as e:
            step = Step(path, index, "lm", inputs, None, request, text, completion.usage, str(e), sum(counts))
            self.steps.append(step)
            raise
        step = Step(path, index, "lm", inputs, snapshot(outputs), request, text, completion.usage, None, sum(counts))
        self.steps.append(step)
        return outputs

    @contextmanager
    def activate(self) -> Iterator[None]:
        """Makes this the current context of the calling thread, the only one that may call modules.

        Raises:
            ModuleError: If a thread without this context called a module of the program in the meantime.
        """
        self._thread = threading.get_ident()
        _has_run_programs.set(True)
        token = _context.set(self)
        _active.add(self)
        try:
            yield
        except Exception:
            self._raise_if_called_in_wrong_thread()  # that failed call is the cause of this exception
            raise
        else:
            self._raise_if_called_in_wrong_thread()
        finally:
            _active.discard(self)
            _context.reset(token)

    def _raise_if_called_in_wrong_thread(self) -> None:
        if self._called_in_wrong_thread:
            raise _wrong_thread_error(self._called_in_wrong_thread[0])

    @staticmethod
    def refuse_wrong_thread(module: object) -> None:
        """Checks that a module called outside of every context is not part of a program running in another thread.

        The program that it is part of then ends with the same error. Threads in which a program has run, such as those
        in which metrics run, may call modules outside of a context.

        Raises:
            ModuleError: If the module is part of a program that is running in another thread.
        """
        if _has_run_programs.get() or threading.current_thread() is threading.main_thread():
            return
        contexts = [context for context in tuple(_active) if id(module) in context._paths]
        for context in contexts:
            context._called_in_wrong_thread.append(module)
        if contexts:
            raise _wrong_thread_error(module)


def _wrong_thread_error(module: object) -> ModuleError:
    return ModuleError(
        f"{type(module).__name__} was called from a thread that forward() started; call modules one after another in "
        "forward() itself: examples already run at once, and so do their calls"
    )


_active: set[CallContext] = set()
"""The active contexts of all threads of this process."""

_has_run_programs: ContextVar[bool] = ContextVar("lmpipe_has_run_programs", default=False)
"""Whether a program has run in this context; a thread that `forward` starts has an empty one."""

_context: ContextVar[CallContext | None] = ContextVar("lmpipe_call_context", default=None)


def in_call() -> bool:
    """Whether the calling code runs within a call of a program."""
    return _context.get() is not None


def current_context() -> CallContext:
    """Returns the context of the program that the calling ``forward`` runs in.

    Raises:
        ModuleError: If no program is running.
    """
    context = _context.get()
    if context is None:
        raise ModuleError("forward() was called by hand; call the module itself: module(...)")
    return context
