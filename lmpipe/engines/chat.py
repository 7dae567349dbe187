"""What engines that see tokens share: a chat as token ids, a text cut at its stops, and what an LM cannot answer.

Knows the tokenizers of transformers by what they can do, and imports none of them. Knows nothing of models.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, final

from jinja2 import TemplateError

from lmpipe.engines.library_errors import MISFITS, Renamed, told
from lmpipe.errors import ConfigError, EngineError
from lmpipe.lm import Message, Request

_MARKS = ("7305191", "2846203", "9513867", "4672915")  # digits, which templates leave as they are

_FAILS: tuple[type[Exception], ...] = (*MISFITS, TemplateError)  # what templates and tokenizers raise


@final
class ChatTokens:
    """A tokenizer with a chat template: chats and completions as token ids.

    Text is data. Where it spells a control token of the tokenizer, such as ``<|im_end|>``, it is encoded as the
    characters that it has, so that no input can end a turn or begin another. Control tokens are the special tokens and
    those added tokens that the chat template writes itself, such as ``<think>``. transformers does this
    (``sanitize_control_tokens``); text without any added token is encoded in one piece, as ever.

    Templates without a system role get the system message at the beginning of the first user message, before a blank
    line. Whether a template has one is found out by rendering a small chat.

    Args:
        tokenizer: Of transformers.
        name: Of the LM or the tokenizer, for people.

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
        """Token ids of a chat up to the beginning of the next assistant message, by the tokenizer's own template.

        Raises:
            EngineError: If the template or the tokenizer fails on this chat.
        """
        chat = plain_chat(messages if self._has_system else fold_system(messages))
        with self._renamed("this chat"):
            if not any(self._added.search(message["content"]) for message in chat):
                return list(self._tokenizer(self._render(chat), add_special_tokens=False)["input_ids"])
            return list(
                self._tokenizer.apply_chat_template(
                    chat, add_generation_prompt=True, return_dict=False, sanitize_control_tokens=True
                )
            )

    def encode_text(self, text: str) -> list[int]:
        """Token ids of a text that an LM wrote or is to write, without special tokens.

        Added tokens that are not special, such as ``<think>``, stay tokens: they are what the LM itself writes.

        Raises:
            EngineError: If the tokenizer fails, or has a special token as an ordinary word.
        """
        with self._renamed("a completion"):
            ids = list(self._tokenizer(text, add_special_tokens=False)["input_ids"])
            if self._special.isdisjoint(ids):
                return ids
            ids = list(self._tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"])
        left = self._special.intersection(ids) - {self._tokenizer.unk_token_id}
        if left:
            words = ", ".join(self._tokenizer.convert_ids_to_tokens(sorted(left)))
            raise EngineError(f"the tokenizer of {self._name} cannot write {words} as text; leave out such texts")
        return ids

    def _render(self, chat: Sequence[dict[str, str]]) -> str:
        return str(self._tokenizer.apply_chat_template(list(chat), tokenize=False, add_generation_prompt=True))

    def _renamed(self, what: str) -> Renamed:
        return Renamed(_FAILS, lambda error: EngineError(f"{self._name} cannot encode {what}: {told(error)}"))

    def _probe(self) -> bool:
        """Renders small chats; returns whether the template has a system role."""
        system, question, answer, further = _MARKS
        turns = [Message("user", question), Message("assistant", answer), Message("user", further)]
        try:
            places = [self._render(plain_chat(turns)).find(mark) for mark in (question, answer, further)]
        except _FAILS as error:
            raise ConfigError(
                f"the chat template of {self._name!r} fails on a plain chat: {told(error)}; mend the chat_template of "
                "its tokenizer, or choose another model"
            ) from error
        if -1 in places or places != sorted(places):
            raise ConfigError(
                f"the chat template of {self._name!r} drops or reorders user and assistant turns; mend the "
                "chat_template of its tokenizer, or choose another model"
            )
        try:
            return system in self._render(plain_chat([Message("system", system), *turns]))
        except _FAILS:
            return False


def plain_chat(messages: Sequence[Message]) -> list[dict[str, str]]:
    """A chat as templates and servers take it."""
    return [{"role": message.role, "content": message.content} for message in messages]


def fold_system(messages: Sequence[Message]) -> list[Message]:
    """A chat without system messages: each stands at the beginning of the next user message, before a blank line."""
    turns: list[Message] = []
    waiting: list[str] = []
    for message in messages:
        if message.role == "system":
            waiting.append(message.content)
        elif message.role == "user":
            turns.append(Message("user", _joined([*waiting, message.content])))
            waiting = []
        else:
            turns.append(message)
    return [*turns, Message("user", _joined(waiting))] if waiting else turns


def _joined(parts: Sequence[str]) -> str:
    return "\n\n".join(part for part in parts if part)


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
