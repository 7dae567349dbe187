"""The LM protocol: batches of requests in, completions out.

Knows nothing of programs, signatures or states beyond the weights a request must run on. Engines implement it
(`lmpipe.engines`); `ScriptedLM` is a real implementation for tests and examples.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from numbers import Integral
from pathlib import Path
from typing import Literal, final

from lmpipe.errors import ConfigError, EngineError
from lmpipe.state import WeightState
from lmpipe.text.display import shown
from lmpipe.validation.contract import call_and_check


@final
@dataclass(frozen=True, slots=True)
class Message:
    """One chat message."""

    role: Literal["system", "user", "assistant"]
    content: str


@final
@dataclass(frozen=True, slots=True)
class Sampling:
    """How a completion is drawn.

    Args:
        temperature: 0 is greedy.
        top_p: Smallest probability mass to draw from, in (0, 1].
        max_tokens: Most new tokens.
        stop: Texts that end a completion; they are not part of it.
        top_k: How many of the likeliest tokens to draw from; none draws from all.
        logprobs: Whether completions carry the log-probability of each token.

    Raises:
        ConfigError: If a value is out of its range.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    max_tokens: int = 256
    stop: tuple[str, ...] = ()
    top_k: int | None = None
    logprobs: bool = False

    def __post_init__(self) -> None:
        if self.temperature < 0 or not 0 < self.top_p <= 1 or min(self.max_tokens, self.top_k or 1) < 1:
            raise ConfigError(f"{self}: temperature must be ≥ 0, top_p in (0, 1], max_tokens and top_k ≥ 1")


@final
@dataclass(frozen=True, slots=True)
class Request:
    """One chat completion to make.

    Args:
        messages: The conversation so far; the completion is the next assistant message.
        sampling: How to draw it.
        weights: The exact weights to run on.
        seed: Decides every random draw of this request, whatever batch it runs in.
        regex: Regular expression that the completion must match as a whole, or none. It may use what engines have
            in common: classes, groups, alternatives and repetitions.
    """

    messages: tuple[Message, ...]
    sampling: Sampling
    weights: WeightState
    seed: int = 0
    regex: str | None = None


@final
@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens read and written, and the calls that did it.

    Attributes:
        cached: How many of the calls a cache answered.
        gpu_seconds: The calls' share of the time that GPUs of this process took for their batch.
    """

    calls: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached: int = 0
    gpu_seconds: float = field(default=0.0, compare=False)


@final
@dataclass(frozen=True, slots=True)
class Completion:
    """What an LM answered.

    Attributes:
        text: The new text.
        finish_reason: Whether it ended by itself or at a stop text, or was cut off at ``max_tokens``.
        usage: Tokens of the call.
        logprobs: If asked for: the log-probability of each token drawn, the one that ends the completion included, in
            nats, in the LM's own distribution: before temperature, top-k, top-p and regex.
    """

    text: str
    finish_reason: Literal["stop", "length"] = "stop"
    usage: Usage = field(default=Usage(1))
    logprobs: tuple[float, ...] | None = None


class LM(ABC):
    """A language model that answers batches.

    `complete` returns one result for each request, in order, and never raises for a single one: a request that
    cannot be answered gives an `EngineError` in its place. If it does raise an `EngineError`, every request of that
    batch has failed. Results depend on a request alone, not on the batch, up to float rounding.

    Attributes:
        batched: Whether requests are worth collecting into batches. An LM that schedules them by itself, as a server
            does, wants each at once, and is called from many threads.
    """

    batched: bool = True

    @property
    @abstractmethod
    def name(self) -> str:
        """What identifies the base weights: the `base` of every `WeightState` made for this LM."""

    @abstractmethod
    def complete(self, requests: Sequence[Request]) -> list[Completion | EngineError]:
        """Answers a batch."""

    @abstractmethod
    def register_adapter(self, adapter: str, folder: Path) -> None:
        """Makes requests with that adapter digest answerable; `folder` is in PEFT's format. Repeating it is free."""


def complete_batch(lm: LM, requests: Sequence[Request]) -> list[Completion | EngineError]:
    """What an LM answers, held to its contract.

    Raises:
        EngineError: If the LM failed as a whole, or gave anything else than a completion or an error for each request;
            the message names the LM.
    """
    who = f"the LM {lm.name!r} ({type(lm).__name__})"
    return call_and_check(who, lambda: lm.complete(requests), len(requests), "a Completion or an EngineError", _fault)


def _fault(answer: object) -> str:
    if isinstance(answer, EngineError):
        return ""
    if not isinstance(answer, Completion):
        return "it must give a Completion or an EngineError"
    if not isinstance(answer.text, str):
        return f"the text of a completion must be text, and this is {shown(answer.text, 50)}"
    usage = answer.usage
    counts = [usage.calls, usage.prompt_tokens, usage.completion_tokens] if isinstance(usage, Usage) else [usage]
    wrong = [count for count in counts if not isinstance(count, Integral) or count < 0]
    return f"calls and tokens are counted from 0 on, and one is {shown(wrong[0], 50)}" if wrong else ""


@final
class ScriptedLM(LM):
    """An LM that answers by a function of the request; for tests, examples and overhead measurements.

    Args:
        script: Gives the completion text; an `EngineError` that it raises fails that request alone.
        name: See `LM.name`.

    Raises:
        ConfigError: If the script is no function.

    Attributes:
        requests: Every request so far, in the order of arrival.
        batch_sizes: How many requests came in each call.
        adapters: Digest → folder of every adapter registered.
    """

    def __init__(self, script: Callable[[Request], str], name: str = "scripted") -> None:
        if not callable(script):
            raise ConfigError(f"the script of a ScriptedLM is {shown(script, 100)}; pass a function of the request")
        self._script = script
        self._name = name
        self.requests: list[Request] = []
        self.batch_sizes: list[int] = []
        self.adapters: dict[str, Path] = {}

    @property
    def name(self) -> str:
        return self._name

    def complete(self, requests: Sequence[Request]) -> list[Completion | EngineError]:
        self.requests.extend(requests)
        self.batch_sizes.append(len(requests))
        return [self._answer(request) for request in requests]

    def register_adapter(self, adapter: str, folder: Path) -> None:
        self.adapters[adapter] = folder

    def _answer(self, request: Request) -> Completion | EngineError:
        """Counts words as tokens."""
        try:
            text = self._script(request)
        except EngineError as error:
            return error
        if not isinstance(text, str):
            raise EngineError(f"the script of {self._name!r} gave {shown(text, 100)}; it must give a text")
        read = " ".join([message.content for message in request.messages]).count(" ") + 1
        return Completion(text, usage=Usage(1, read, text.count(" ") + 1))
