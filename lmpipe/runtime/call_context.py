"""One run of a program on one example: what its modules look up, and where they leave their steps.

A context variable carries it. Knows nothing of modules, or of who answers and when.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any, final

from lmpipe.data import snapshot
from lmpipe.errors import EngineError, ModuleError, ParseError
from lmpipe.lm import Completion, Request, Usage
from lmpipe.retriever import Passages
from lmpipe.runtime.session import Session
from lmpipe.runtime.trace import AnyStep, Step
from lmpipe.state import ProgramState
from lmpipe.storage.hashing import derive_seed
from lmpipe.text.cleaning import clean, cleaned

Answer = Callable[[str, Request], Completion | EngineError]
"""Answers a request of a role."""
Search = Callable[[str, int], Passages | EngineError]
"""Finds up to k passages for a query."""


@final
class CallContext:
    """One run of a program on one example: what its predictors look up, and where they leave their steps.

    Args:
        session: The session it runs in.
        state: Prompts and weights; a predictor that the state does not name keeps its vanilla prompt.
        paths: ``id(module)`` → path, for every module of the program.
        seed: Of this run; each call derives its own.
        answer: Answers a request of a role.
        search: Finds passages.
        temperature: Overrides the sampling of every call.
    """

    def __init__(
        self,
        session: Session,
        state: ProgramState,
        paths: Mapping[int, str],
        seed: int,
        answer: Answer,
        search: Search,
        temperature: float | None = None,
    ) -> None:
        self.session = session
        self.state = state
        self.answer = answer
        self.search = search
        self.temperature = temperature
        self.steps: list[AnyStep] = []
        self._paths = paths
        self._seed = seed
        self._calls: dict[str, int] = {}
        self._thread = 0
        self._strays: list[object] = []

    def locate(self, module: object) -> tuple[str, int, int]:
        """Path of a module, the number of this call of it, and the seed of the call.

        Raises:
            ModuleError: If the module is not part of the running program, or is called from another thread.
        """
        if threading.get_ident() != self._thread:
            raise _from_other_thread(module)
        path = self._paths.get(id(module))
        if path is None:
            raise ModuleError(
                f"{type(module).__name__} is not part of the running program; make it in __init__ and keep it in an "
                "attribute, a list or a dict of its module"
            )
        index = self._calls.get(path, 0)
        self._calls[path] = index + 1
        return path, index, derive_seed(self._seed, path, index)

    def call(
        self,
        role: str,
        path: str,
        index: int,
        inputs: Mapping[str, Any],
        request: Request,
        read: Callable[[str], dict[str, Any]],
        replaced: int = 0,
    ) -> dict[str, Any]:
        """Makes an LM call, and leaves its step whether it succeeds or not.

        Characters of the completion that are no text are replaced, and counted.

        Args:
            role: Which of the session's LMs answers.
            path: Of the calling module.
            index: Number of this call of it.
            inputs: What the module was given.
            request: What is sent.
            read: Makes outputs of a completion.
            replaced: How many characters of the inputs were no text.

        Returns:
            The outputs.

        Raises:
            EngineError: If the request could not be answered.
            ParseError: If the completion could not be read.
        """
        answer = self.answer(role, request)
        step = partial(Step, path, index, "lm", inputs, request=request)
        if isinstance(answer, EngineError):
            error = clean(str(answer))
            self.steps.append(step(outputs=None, text=None, usage=Usage(1), error=error, replaced=replaced))
            raise answer
        more = [replaced]
        text: str = cleaned(answer.text, more.append)
        step = partial(step, text=text, usage=answer.usage)
        try:
            outputs = read(text)
            if "\\" in text:  # JSON may spell characters that are no text
                outputs = cleaned(outputs, more.append)
        except ParseError as unread:
            self.steps.append(step(outputs=None, error=str(unread), replaced=sum(more)))
            raise
        self.steps.append(step(outputs=snapshot(outputs), replaced=sum(more)))
        return outputs

    @contextmanager
    def active(self) -> Iterator[CallContext]:
        """Makes this the current run of the calling thread, which alone may call modules.

        Raises:
            ModuleError: If a thread without this context called a module of the program meanwhile.
        """
        self._thread = threading.get_ident()
        _has_run_programs.set(True)
        token = _context.set(self)
        _active.add(self)
        try:
            yield self
        except Exception:
            self._refuse_strays()  # since a call that failed elsewhere is why this went wrong
            raise
        else:
            self._refuse_strays()
        finally:
            _active.discard(self)
            _context.reset(token)

    def has(self, module: object) -> bool:
        """Whether the running program has a module."""
        return id(module) in self._paths

    def note_stray(self, module: object) -> None:
        """Notes a call from a thread that ``forward`` started without this context; the run ends with it."""
        self._strays.append(module)

    def _refuse_strays(self) -> None:
        if self._strays:
            raise _from_other_thread(self._strays[0])


def _from_other_thread(module: object) -> ModuleError:
    return ModuleError(
        f"{type(module).__name__} was called from a thread that forward() started; call modules one after another in "
        "forward() itself: examples run at once, so their calls do"
    )


_active: set[CallContext] = set()
"""The runs under way in this process, by which a call from a thread without any run is told from one outside."""

_has_run_programs: ContextVar[bool] = ContextVar("lmpipe_has_run_programs", default=False)
"""Whether this context is one in which a program has run; a thread that `forward` starts has an empty one."""

_context: ContextVar[CallContext | None] = ContextVar("lmpipe_call_context", default=None)


def refuse_stray_call(module: object) -> None:
    """Looks whether a module that is called outside of every run belongs to one that is under way in another thread.

    Threads in which a program has run, as those in which metrics are asked, may call modules outside of a run.

    Raises:
        ModuleError: If so.
    """
    if _has_run_programs.get() or threading.current_thread() is threading.main_thread():
        return
    runs = [run for run in tuple(_active) if run.has(module)]
    for run in runs:
        run.note_stray(module)
    if runs:
        raise _from_other_thread(module)


def current_context() -> CallContext | None:
    """The run that the calling code is part of, if any."""
    return _context.get()


def required_context() -> CallContext:
    """The run that the calling ``forward`` is part of.

    Raises:
        ModuleError: If there is none.
    """
    run = _context.get()
    if run is None:
        raise ModuleError("forward() was called by hand; call the module itself: module(...)")
    return run
