"""The interface of language models: they answer batches of requests with completions.

Engines implement it (`lmpipe.engines`); `ScriptedLM` is a real implementation for tests and examples. Knows nothing
about programs, signatures, or states beyond the weights that a request runs on.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral
from pathlib import Path
from typing import Any, Literal, final

from lmpipe.errors import ConfigError, EngineError
from lmpipe.state import WeightState
from lmpipe.text.display import shown
from lmpipe.text.reprs import settings_repr, short_repr
from lmpipe.text.secrets import redact_spec
from lmpipe.validation.arguments import check_finite_number, check_items, check_whole_number
from lmpipe.validation.contract import call_and_check


@final
@dataclass(frozen=True, slots=True)
class Message:
    """One chat message.

    Args:
        role: Role of the speaker.
        content: Text of the message.
    """

    role: Literal["system", "user", "assistant"]
    content: str

    def __repr__(self) -> str:
        return short_repr(self, self.role, self.content)


@final
@dataclass(frozen=True, slots=True)
class Sampling:
    """Sampling parameters of a completion.

    Args:
        temperature: Sampling temperature; 0 decodes greedily.
        top_p: Probability mass of the nucleus to sample from, in (0, 1].
        max_tokens: Maximum number of new tokens.
        stop: Strings that end a completion; they are not part of it.
        top_k: Number of most likely tokens to sample from; None samples from all.
        logprobs: Whether completions include the log-probability of each token.

    Raises:
        ConfigError: If a value is out of range or has the wrong type.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    max_tokens: int = 256
    stop: tuple[str, ...] = ()
    top_k: int | None = None
    logprobs: bool = False

    def __post_init__(self) -> None:
        temperature = check_finite_number("Sampling: temperature", self.temperature)
        top_p = check_finite_number("Sampling: top_p", self.top_p)
        if not 0 < top_p <= 1:
            raise ConfigError(f"Sampling: top_p is {top_p:g}; it must be above 0 and at most 1, and 1 samples from all")
        max_tokens = check_whole_number("Sampling: max_tokens", self.max_tokens)
        top_k = None if self.top_k is None else check_whole_number("Sampling: top_k", self.top_k)
        if isinstance(self.stop, str):
            raise ConfigError(f"Sampling: stop is {shown(self.stop)}; write stop=({shown(self.stop)},)")
        stop = tuple(check_items("Sampling: stop", self.stop, str))
        values = {"temperature": temperature, "top_p": top_p, "max_tokens": max_tokens, "top_k": top_k, "stop": stop}
        for name, value in values.items():
            if value is not getattr(self, name):
                object.__setattr__(self, name, value)

    def __repr__(self) -> str:
        return settings_repr(self)


@final
@dataclass(frozen=True, slots=True)
class Request:
    """A request for one chat completion.

    Args:
        messages: Conversation so far; the completion is the next assistant message.
        sampling: Sampling parameters.
        weights: Weights to run on.
        seed: Seed of all random draws of this request; the batch has no influence on them.
        regex: Regular expression that the whole completion must match, or None. It may use the syntax that all engines
            support: classes, groups, alternatives and repetitions.
    """

    messages: tuple[Message, ...]
    sampling: Sampling
    weights: WeightState
    seed: int = 0
    regex: str | None = None

    def __repr__(self) -> str:
        return short_repr(
            self, self.messages[-1].content if self.messages else "", messages=len(self.messages), weights=self.weights
        )


@final
@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens and calls of LM requests.

    Attributes:
        calls: Number of LM calls.
        prompt_tokens: Tokens of the prompts.
        completion_tokens: Tokens of the completions.
        cached: Number of the calls that a cache answered.
        gpu_seconds: These calls' share of the time that the GPUs of this process spent on their batches.
    """

    calls: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached: int = 0
    gpu_seconds: float = field(default=0.0, compare=False)


@final
@dataclass(frozen=True, slots=True)
class Completion:
    """The completion of a request.

    Attributes:
        text: Text of the completion.
        finish_reason: ``"stop"`` if the LM or a stop string ended it, ``"length"`` if it was cut off at ``max_tokens``.
        usage: Tokens of the call.
        logprobs: If requested, the log-probability of each sampled token, including the one that ends the completion,
            in nats. It belongs to the LM's own distribution: before temperature, top-k, top-p and regex.
    """

    text: str
    finish_reason: Literal["stop", "length"] = "stop"
    usage: Usage = field(default=Usage(1))
    logprobs: tuple[float, ...] | None = None

    def __repr__(self) -> str:
        return short_repr(self, self.text, finish_reason=self.finish_reason, tokens=self.usage.completion_tokens)


@final
@dataclass(frozen=True)
class LMSource:
    """How an LM was loaded: the arguments of `lmpipe.load_lm` that load it again.

    Attributes:
        spec: The spec.
        options: The options of the engine.
    """

    spec: str
    options: Mapping[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        return short_repr(self, redact_spec(self.spec))  # options may hold keys of servers


class LM(ABC):
    """A language model that answers batches of requests.

    `complete` returns one result for each request, in order. It does not raise an exception for a single request: the
    result of a request that cannot be answered is an `EngineError`. If `complete` raises an `EngineError`, all requests
    of the batch have failed. A result depends only on its request, not on the batch, up to float rounding.

    Attributes:
        batched: Whether to collect requests into batches. An LM that schedules requests itself, such as a server, sets
            this to False: each request is then passed on at once, from many threads.
        constrains: Whether completions can be constrained to the regular expression of their request.
        loaded_from: How `lmpipe.load_lm` loaded it; None if it was made otherwise.
    """

    batched: bool = True
    constrains: bool = False
    loaded_from: LMSource | None = None

    def __repr__(self) -> str:
        return short_repr(self, self.name)

    @property
    @abstractmethod
    def name(self) -> str:
        """Name that identifies the base weights; `WeightState.base` of all weights of this LM."""

    @abstractmethod
    def complete(self, requests: Sequence[Request]) -> list[Completion | EngineError]:
        """Answers a batch of requests."""

    @abstractmethod
    def register_adapter(self, adapter: str, folder: Path) -> None:
        """Registers an adapter, so that requests may use it; registering it again costs nothing.

        Args:
            adapter: Digest of the adapter.
            folder: Folder of the adapter in PEFT's format.
        """


def complete_batch(lm: LM, requests: Sequence[Request]) -> list[Completion | EngineError]:
    """Answers a batch of requests and checks the results.

    Raises:
        EngineError: If the LM failed as a whole, or did not return a completion or an error for each request; the
            message names the LM.
    """
    who = f"the LM {lm.name!r} ({type(lm).__name__})"
    return call_and_check(who, lambda: lm.complete(requests), len(requests), "a Completion or an EngineError", _fault)


def _fault(answer: object) -> str:
    if isinstance(answer, EngineError):
        return ""
    if not isinstance(answer, Completion):
        return "it must return a Completion or an EngineError"
    if not isinstance(answer.text, str):
        return f"the text of a completion must be a string, and this is {shown(answer.text, 50)}"
    usage = answer.usage
    counts = [usage.calls, usage.prompt_tokens, usage.completion_tokens] if isinstance(usage, Usage) else [usage]
    invalid = [count for count in counts if not (type(count) is int or isinstance(count, Integral)) or count < 0]
    return f"counts of calls and tokens must be whole numbers from 0, not {shown(invalid[0], 50)}" if invalid else ""


@final
class ScriptedLM(LM):
    """An LM whose completions a Python function computes; for tests, examples and measurements of overhead.

    Recorded work is looked up by the name of the LM. So give another script another name, or use another run directory:
    otherwise what the earlier script answered is recalled.

    Args:
        script: Function that returns the completion text of a request; if it raises an `EngineError`, only that request
            fails.
        name: See `LM.name`; another one for each script that shares a run directory.

    Attributes:
        requests: All requests so far, in order of arrival.
        batch_sizes: Number of requests in each call.
        adapters: Digest → folder of each registered adapter.

    Raises:
        ConfigError: If the script is not a function.
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
        """Calls the script; words count as tokens."""
        try:
            text = self._script(request)
        except EngineError as error:
            return error
        if not isinstance(text, str):
            raise EngineError(f"the script of {self._name!r} returned {shown(text, 100)}; it must return a string")
        prompt_tokens = " ".join([message.content for message in request.messages]).count(" ") + 1
        return Completion(text, usage=Usage(1, prompt_tokens, text.count(" ") + 1))
