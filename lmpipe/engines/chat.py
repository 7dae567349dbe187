"""What engines that see tokens share: a chat as token ids, a text cut at its stops, and what an LM cannot answer.

Knows the tokenizers of transformers by what they can do, and imports none of them. Knows nothing of models.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lmpipe.errors import ConfigError, EngineError
from lmpipe.lm import Message, Request


def plain_chat(messages: Sequence[Message]) -> list[dict[str, str]]:
    """A chat as templates and servers take it."""
    return [{"role": message.role, "content": message.content} for message in messages]


def check_chat_template(tokenizer: Any, name: str) -> None:
    """Raises:
    ConfigError: If the tokenizer has no chat template.
    """
    if not tokenizer.chat_template:
        raise ConfigError(f"the tokenizer of {name!r} has no chat template; choose an instruction-tuned model")


def encode_chat(tokenizer: Any, messages: Sequence[Message]) -> list[int]:
    """Token ids of a chat up to the beginning of the next assistant message, by the tokenizer's own template."""
    text = tokenizer.apply_chat_template(plain_chat(messages), tokenize=False, add_generation_prompt=True)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def cut_at_stop(text: str, stop: Sequence[str]) -> str:
    """The text before the first of its stop texts."""
    return text[: min((text.index(end) for end in stop if end in text), default=len(text))]


def wrong_base(request: Request, name: str) -> EngineError | None:
    """An error if a request runs on weights of another LM."""
    if request.weights.base == name:
        return None
    return EngineError(f"the request runs on {request.weights.base!r}, but this LM is {name!r}")


def unregistered(adapter: str) -> EngineError:
    """The error for an adapter that the LM was not told of."""
    return EngineError(f"adapter {adapter} is not registered with this LM; register_adapter() it first")


def too_long(request: Request, prompt_tokens: int, context_length: int, name: str) -> EngineError | None:
    """An error, with both lengths, if a prompt and its completion do not fit."""
    if prompt_tokens + request.sampling.max_tokens <= context_length:
        return None
    return EngineError(
        f"{prompt_tokens} prompt tokens and max_tokens={request.sampling.max_tokens} do not fit the context of "
        f"{context_length} tokens of {name}; use fewer demonstrations or a smaller max_tokens"
    )
