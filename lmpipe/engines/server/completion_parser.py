"""Strict parsing of completion responses: a field that does not match OpenAI's API makes the response invalid.

Unknown fields and fields that were not requested are ignored. Knows nothing about sending requests.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from types import NoneType
from typing import Any, Literal, final

from lmpipe.lm import Usage
from lmpipe.web.http import InvalidResponse, Response

_MAX_TOKENS = 2**53
_ROUNDING = 1e-3  # nats; rounding can put a log-probability this far above 0
_UNFINISHED = ("abort", "error")  # finish reasons of completions that the server did not finish


@final
@dataclass(frozen=True, slots=True)
class ServerCompletion:
    """The completion in a server's response.

    Attributes:
        text: Generated text; empty if the server sent null.
        finish_reason: Reason why generation ended; see `lmpipe.lm.Completion`.
        usage: Usage of one call; without tokens if the server does not count them.
        logprobs: Log-probability of each token in nats, if requested and returned.
    """

    text: str
    finish_reason: Literal["stop", "length"]
    usage: Usage
    logprobs: tuple[float, ...] | None


def parse_completion(response: Response, *, chat: bool, logprobs: bool) -> ServerCompletion:
    """Parses the response to a request for one completion.

    Args:
        response: Response of the server.
        chat: Whether a chat completion was requested.
        logprobs: Whether log-probabilities were requested.

    Raises:
        InvalidResponse: If the response is not a completion; the message names the field and quotes the response.
    """
    try:
        return _parse(response.json(), chat, logprobs)
    except _InvalidField as error:
        problem = str(error)
    raise InvalidResponse(f"{problem}: {response.excerpt}")


@final
class _InvalidField(Exception):
    """A field does not have the expected form."""


def _parse(body: object, chat: bool, logprobs: bool) -> ServerCompletion:
    choices = _object(body, "the response").get("choices")
    if not isinstance(choices, list) or not choices:
        raise _InvalidField("the response contains no choices")
    choice = _object(choices[0], "choices[0]")
    reason = choice.get("finish_reason")
    if not isinstance(reason, (str, NoneType)) or reason in _UNFINISHED:
        raise _InvalidField("finish_reason is not a string, or says that the server did not finish")
    holder, name = (_object(choice.get("message"), "message"), "content") if chat else (choice, "text")
    text = holder.get(name)
    if not isinstance(text, str) and not (chat and text is None and name in holder):
        raise _InvalidField(f"{name} is not a string")
    return ServerCompletion(
        text or "",
        "length" if reason == "length" else "stop",
        _usage(body),
        _logprobs(choice.get("logprobs"), chat) if logprobs else None,
    )


def _usage(body: Any) -> Usage:
    """Returns the usage of one call, without tokens if the server does not count them."""
    value = body.get("usage")
    if value is None:
        return Usage(1)
    usage = _object(value, "usage")
    return Usage(1, _token_count(usage, "prompt_tokens"), _token_count(usage, "completion_tokens"))


def _token_count(usage: Mapping[str, Any], name: str) -> int:
    count = usage.get(name)
    if type(count) is not int or not 0 <= count <= _MAX_TOKENS:
        raise _InvalidField(f"usage.{name} is not a number of tokens")
    return count


def _logprobs(value: object, chat: bool) -> tuple[float, ...] | None:
    entries = None if value is None else _object(value, "logprobs").get("content" if chat else "token_logprobs")
    if entries is None:
        return None
    if not isinstance(entries, list):
        raise _InvalidField("logprobs is not a list")
    return tuple(_logprob(_object(entry, "a logprob").get("logprob") if chat else entry) for entry in entries)


def _logprob(value: object) -> float:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not value <= _ROUNDING:
        raise _InvalidField("a logprob is not the logarithm of a probability")
    return float(max(value, -sys.float_info.max)) if isinstance(value, int) else value


def _object(value: object, name: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise _InvalidField(f"{name} is not a JSON object")
    return value
