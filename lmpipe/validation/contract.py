"""The contract of engines, retrievers and embedders: one answer of the right kind for each request.

Users write their own, so each of them is called through `call_and_check`. A violation of the contract ends the run with
an error that names the engine; without the check, one missing answer would assign every later answer to the wrong
request. Knows nothing about the content of requests.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from traceback import extract_tb
from typing import TypeVar

from lmpipe.errors import EngineError, LmpipeError
from lmpipe.text.cleaning import clean_text
from lmpipe.text.display import error_message, shown

A = TypeVar("A")

_LIBRARY = Path(__file__).parents[1]
_CALLERS = {
    _LIBRARY,
    *(_LIBRARY / room for room in ("program", "prompting", "results", "runtime", "storage", "text", "validation")),
}
"""Folders of the modules that call the user's code."""


def call_and_check(
    who: str, call: Callable[[], Iterable[A]], count: int, expected: str, fault: Callable[[A], str]
) -> list[A]:
    """Calls an engine and checks its answers.

    Args:
        who: Name of the engine in error messages.
        call: Function that calls the engine and returns all its answers.
        count: Required number of answers.
        expected: Description of a valid answer for error messages.
        fault: Function that describes what is wrong with an answer; an empty string means that it is valid.

    Returns:
        The answers, in the order of the requests.

    Raises:
        EngineError: If there are too few or too many answers, one of them is invalid, or the engine raised an
            exception that is not one of lmpipe's.
    """
    try:
        returned = call()
        is_list = isinstance(returned, list) or (
            isinstance(returned, Iterable) and not isinstance(returned, (str, bytes))
        )
        answers = list(returned) if is_list else None
    except LmpipeError:
        raise
    except Exception as error:
        raise EngineError(f"{who} failed with {describe_error(error)}") from error
    if answers is None:
        raise EngineError(
            f"{who} returned {shown(returned)} for {count} requests; it must return a list with {expected} for each"
        )
    if len(answers) != count:
        raise EngineError(
            f"{who} returned {len(answers)} answers for {count} requests; it must return {expected} for each"
        )
    for number, answer in enumerate(answers, 1):
        if problem := fault(answer):
            raise EngineError(f"{who} returned {shown(answer, 100)} for request {number} of {count}; {problem}")
    return answers


def describe_error(error: Exception) -> str:
    """Returns type and message of an exception and, unless it is one of lmpipe's, where the user's code raised it."""
    text = clean_text(f"{type(error).__name__}: {error_message(error)}")
    if isinstance(error, LmpipeError):
        return text
    outside = [frame for frame in extract_tb(error.__traceback__) if Path(frame.filename).parent not in _CALLERS]
    in_first_file = [frame for frame in outside if outside[0].filename == frame.filename]
    if not in_first_file:
        return text
    return f"{text} ({Path(in_first_file[-1].filename).name}, line {in_first_file[-1].lineno})"
