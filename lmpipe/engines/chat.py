"""Functions that all token-based engines share: encoding chats, cutting at stop strings, and errors of requests.

Uses tokenizers of transformers without importing transformers. Knows nothing about models.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, final

from jinja2 import TemplateError

from lmpipe.engines.library_errors import INVALID_INPUT_ERRORS, ErrorTranslator, library_message
from lmpipe.errors import ConfigError, EngineError
from lmpipe.lm import Message, Request

_PROBES = ("7305191", "2846203", "9513867", "4672915")  # message texts; templates do not change digits

_ENCODING_ERRORS: tuple[type[Exception], ...] = (*INVALID_INPUT_ERRORS, TemplateError)


@final
class ChatTokens:
    """Encodes chats and completions as token ids, with a tokenizer that has a chat template.

    Text is data: if it contains the name of a control token, such as ``<|im_end|>``, it is encoded as ordinary
    characters, so that no input can end a turn or begin another. Control tokens are the special tokens, and those added
    tokens that the chat template itself writes, such as ``<think>``. transformers implements this
    (``sanitize_control_tokens``). Text without added tokens is rendered and encoded in the usual way.

    If the template has no system role, the system message goes to the beginning of the first user message, followed by
    a blank line. Whether a template has the role is tested with a small chat.

    Args:
        tokenizer: A tokenizer of transformers.
        name: Name of the LM or the tokenizer, for error messages.

    Raises:
        ConfigError: If there is no chat template, or it fails, or it drops or reorders turns.
    """

    def __init__(self, tokenizer: Any, name: str) -> None:
        if not getattr(tokenizer, "chat_template", None):
            raise ConfigError(f"the tokenizer of {name!r} has no chat template; choose an instruction-tuned model")
        self._tokenizer, self._name = tokenizer, name
        added = tokenizer.added_tokens_decoder
        words = sorted({str(token) for token in added.values() if not str(token).isspace()}, key=len, reverse=True)
        self._added = re.compile("|".join(map(re.escape, words)) or "(?!)")
        self._special = {number for number, token in added.items() if token.special}
        self._has_system = self._probe()

    def encode(self, messages: Sequence[Message]) -> list[int]:
        """Encodes a chat up to the beginning of the next assistant message, with the tokenizer's chat template.

        Raises:
            EngineError: If the template or the tokenizer fails on this chat.
        """
        chat = plain_chat(messages if self._has_system else fold_system(messages))
        with self._encoding_errors("this chat"):
            if not any(self._added.search(message["content"]) for message in chat):
                return list(self._tokenizer(self._render(chat), add_special_tokens=False)["input_ids"])
            return list(
                self._tokenizer.apply_chat_template(
                    chat, add_generation_prompt=True, return_dict=False, sanitize_control_tokens=True
                )
            )

    def encode_text(self, text: str) -> list[int]:
        """Encodes a completion without special tokens.

        Added tokens that are not special, such as ``<think>``, remain tokens, since the LM itself writes them.

        Raises:
            EngineError: If the tokenizer fails, or if it encodes ordinary text as a special token.
        """
        with self._encoding_errors("a completion"):
            ids = list(self._tokenizer(text, add_special_tokens=False)["input_ids"])
            if self._special.isdisjoint(ids):
                return ids
            ids = list(self._tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"])
        special = self._special.intersection(ids) - {self._tokenizer.unk_token_id}
        if special:
            words = ", ".join(self._tokenizer.convert_ids_to_tokens(sorted(special)))
            raise EngineError(
                f"the tokenizer of {self._name} cannot encode {words} as ordinary text; remove it from the completion"
            )
        return ids

    def _render(self, chat: Sequence[dict[str, str]]) -> str:
        return str(self._tokenizer.apply_chat_template(list(chat), tokenize=False, add_generation_prompt=True))

    def _encoding_errors(self, what: str) -> ErrorTranslator:
        return ErrorTranslator(
            _ENCODING_ERRORS,
            lambda error: EngineError(f"{self._name} cannot encode {what}: {library_message(error)}"),
        )

    def _probe(self) -> bool:
        """Checks the template on small chats, and returns whether it has a system role."""
        system, question, answer, followup = _PROBES
        turns = [Message("user", question), Message("assistant", answer), Message("user", followup)]
        try:
            positions = [self._render(plain_chat(turns)).find(text) for text in (question, answer, followup)]
        except _ENCODING_ERRORS as error:
            raise ConfigError(
                f"the chat template of {self._name!r} fails on a plain chat: {library_message(error)}; fix the "
                "chat_template of its tokenizer, or choose another model"
            ) from error
        if -1 in positions or positions != sorted(positions):
            raise ConfigError(
                f"the chat template of {self._name!r} drops or reorders user and assistant turns; fix the "
                "chat_template of its tokenizer, or choose another model"
            )
        try:
            return system in self._render(plain_chat([Message("system", system), *turns]))
        except _ENCODING_ERRORS:
            return False


def plain_chat(messages: Sequence[Message]) -> list[dict[str, str]]:
    """Returns a chat in the format of chat templates and OpenAI-compatible servers."""
    return [{"role": message.role, "content": message.content} for message in messages]


def fold_system(messages: Sequence[Message]) -> list[Message]:
    """Moves each system message to the beginning of the next user message, followed by a blank line."""
    turns: list[Message] = []
    pending: list[str] = []  # system messages
    for message in messages:
        if message.role == "system":
            pending.append(message.content)
        elif message.role == "user":
            turns.append(Message("user", _joined([*pending, message.content])))
            pending = []
        else:
            turns.append(message)
    return [*turns, Message("user", _joined(pending))] if pending else turns


def _joined(parts: Sequence[str]) -> str:
    return "\n\n".join(part for part in parts if part)


def cut_at_stop(text: str, stop: Sequence[str]) -> str:
    """Returns the text before the first stop string in it."""
    return text[: min((text.index(end) for end in stop if end in text), default=len(text))]


def wrong_base_error(request: Request, name: str) -> EngineError | None:
    """Returns an error if a request uses the weights of another LM."""
    if request.weights.base == name:
        return None
    return EngineError(f"the request uses the weights of {request.weights.base!r}, but this LM is {name!r}")


def unregistered_adapter_error(adapter: str) -> EngineError:
    """Returns the error for an adapter that is not registered with the LM."""
    return EngineError(f"adapter {adapter} is not registered with this LM; call register_adapter() first")


def context_length_error(request: Request, prompt_tokens: int, context_length: int, name: str) -> EngineError | None:
    """Returns an error with both lengths if a prompt and its completion do not fit the context."""
    if prompt_tokens + request.sampling.max_tokens <= context_length:
        return None
    return EngineError(
        f"{prompt_tokens} prompt tokens and max_tokens={request.sampling.max_tokens} do not fit the context of "
        f"{context_length} tokens of {name}; use fewer demonstrations or a smaller max_tokens"
    )
