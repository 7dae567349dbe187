"""What engines, retrievers and embedders owe: one answer of the right kind for each question.

They are extended by users, so each is asked through `answers`. Whatever breaks the contract ends the run with an error
that names the engine: an answer that is missing or of another kind must never be given to somebody else's question.
Knows nothing of what is asked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from traceback import extract_tb
from typing import TypeVar

from lmpipe.errors import EngineError, LmpipeError
from lmpipe.text.cleaning import clean
from lmpipe.text.display import message_of, shown

A = TypeVar("A")

_LIBRARY = Path(__file__).parents[1]
_CALLERS = {_LIBRARY, *(_LIBRARY / room for room in ("program", "runtime", "validation"))}
"""The folders of the modules that call code of the user."""


def answers(who: str, ask: Callable[[], Iterable[A]], count: int, wanted: str, fault: Callable[[A], str]) -> list[A]:
    """Asks, and checks what comes back.

    Args:
        who: Names the engine in messages.
        ask: Asks it for all answers.
        count: How many answers there must be.
        wanted: What an answer must be, in words.
        fault: What is wrong with an answer, in words; empty if nothing is.

    Returns:
        The answers, in the order of the questions.

    Raises:
        EngineError: If there are too few or too many answers, one of them does not fit, or the engine raised an
            exception that is not an error of lmpipe.
    """
    try:
        given = ask()
        is_list = isinstance(given, list) or (isinstance(given, Iterable) and not isinstance(given, (str, bytes)))
        found = list(given) if is_list else None
    except LmpipeError:
        raise
    except Exception as error:
        raise EngineError(f"{who} failed with {described(error)}") from error
    if found is None:
        raise EngineError(f"{who} gave {shown(given)} to {count} requests; it must give a list with {wanted} for each")
    if len(found) != count:
        raise EngineError(f"{who} gave {len(found)} answers to {count} requests; it must give {wanted} for each")
    for number, answer in enumerate(found, 1):
        if problem := fault(answer):
            raise EngineError(f"{who} gave {shown(answer, 100)} to request {number} of {count}; {problem}")
    return found


def described(error: Exception) -> str:
    """Kind and message of an exception and, unless it is one of lmpipe's, where code of the user raised it."""
    text = clean(f"{type(error).__name__}: {message_of(error)}")
    if isinstance(error, LmpipeError):
        return text
    places = [frame for frame in extract_tb(error.__traceback__) if Path(frame.filename).parent not in _CALLERS]
    own = [frame for frame in places if places[0].filename == frame.filename]
    return f"{text} ({Path(own[-1].filename).name}, line {own[-1].lineno})" if own else text
