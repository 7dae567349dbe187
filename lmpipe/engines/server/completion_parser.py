"""What a server's answer says, read strictly: a field that is not what OpenAI's API describes makes it a bad answer.

Unknown fields are left alone, and so are those that were not asked for. Knows nothing of sending.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from types import NoneType
from typing import Any, Literal, final

from lmpipe.lm import Usage
from lmpipe.web.http import Answer, BadAnswer

_MOST_TOKENS = 2**53
_ROUNDING = 1e-3  # nats; a log-probability may be above 0 by so much
_BROKEN_OFF = ("abort", "error")  # reasons of a completion that the server did not finish


@final
@dataclass(frozen=True, slots=True)
class Reply:
    """A completion as a server gave it.

    Attributes:
        text: The new text; empty where the server gives none.
        finish_reason: As `lmpipe.lm.Completion` has it.
        usage: Of one call; no tokens where the server counts none.
        logprobs: Of the tokens, in nats, where the server gives them.
    """

    text: str
    finish_reason: Literal["stop", "length"]
    usage: Usage
    logprobs: tuple[float, ...] | None


def read_reply(answer: Answer, *, chat: bool, logprobs: bool) -> Reply:
    """Reads the answer to a request for one completion.

    Args:
        answer: Of the server.
        chat: Whether a chat completion was asked for.
        logprobs: Whether log-probabilities were.

    Raises:
        BadAnswer: If it is not a completion; the message names the field and quotes the answer.
    """
    try:
        return _read(answer.json(), chat, logprobs)
    except _Unreadable as error:
        problem = str(error)
    raise BadAnswer(f"{problem}: {answer.quoted}")


@final
class _Unreadable(Exception):
    """A field is not what it should be."""


def _read(found: object, chat: bool, logprobs: bool) -> Reply:
    choices = _object(found, "the answer").get("choices")
    if not isinstance(choices, list) or not choices:
        raise _Unreadable("the answer holds no choices")
    choice = _object(choices[0], "choices[0]")
    reason = choice.get("finish_reason")
    if not isinstance(reason, (str, NoneType)) or reason in _BROKEN_OFF:
        raise _Unreadable("finish_reason is no text, or says that the server did not finish")
    holder, name = (_object(choice.get("message"), "message"), "content") if chat else (choice, "text")
    text = holder.get(name)
    if not isinstance(text, str) and not (chat and text is None and name in holder):
        raise _Unreadable(f"{name} is no text")
    return Reply(
        text or "",
        "length" if reason == "length" else "stop",
        _usage(found),
        _logprobs(choice.get("logprobs"), chat) if logprobs else None,
    )


def _usage(found: Any) -> Usage:
    """Nothing but the call where the server counts no tokens."""
    said = found.get("usage")
    if said is None:
        return Usage(1)
    usage = _object(said, "usage")
    return Usage(1, _tokens(usage, "prompt_tokens"), _tokens(usage, "completion_tokens"))


def _tokens(usage: Mapping[str, Any], name: str) -> int:
    count = usage.get(name)
    if type(count) is not int or not 0 <= count <= _MOST_TOKENS:
        raise _Unreadable(f"usage.{name} is not a number of tokens")
    return count


def _logprobs(said: object, chat: bool) -> tuple[float, ...] | None:
    values = None if said is None else _object(said, "logprobs").get("content" if chat else "token_logprobs")
    if values is None:
        return None
    if not isinstance(values, list):
        raise _Unreadable("logprobs are no list")
    return tuple(_logprob(_object(value, "a logprob").get("logprob") if chat else value) for value in values)


def _logprob(value: object) -> float:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not value <= _ROUNDING:
        raise _Unreadable("a logprob is no logarithm of a probability")
    return float(max(value, -sys.float_info.max)) if isinstance(value, int) else value


def _object(value: object, what: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise _Unreadable(f"{what} is no JSON object")
    return value
