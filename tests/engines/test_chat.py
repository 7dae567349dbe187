"""Encoding of chats: control tokens in data remain text, and templates without a system role get the instruction."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from lmpipe.engines.bundled import bundled_lm_folder
from lmpipe.engines.chat import ChatTokens, fold_system
from lmpipe.errors import ConfigError, EngineError
from lmpipe.lm import Message
from tests.engines.small_tokenizers import byte_level, sentencepiece, unigram, wordpiece
from tests.tiny import CHAT


def smollm2() -> Any:
    return AutoTokenizer.from_pretrained(bundled_lm_folder())


TOKENIZERS: list[Callable[[], Any]] = [smollm2, byte_level, sentencepiece, wordpiece]
PLAIN = (Message("system", "a b"), Message("user", "c"), Message("assistant", "d"), Message("user", "e"))


def chat_of(text: str) -> list[Message]:
    """Returns a chat with the text in every message."""
    return [Message(message.role, text) for message in PLAIN]


def control_tokens(tokenizer: Any, ids: list[int]) -> Counter[str]:
    """Counts each special token among token ids."""
    special = {number: str(token) for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    return Counter(special[number] for number in ids if number in special)


def squeezed(text: str) -> str:
    return "".join(text.split()).lower()


@pytest.mark.parametrize("make", TOKENIZERS)
def test_special_tokens_in_data_are_text(make: Callable[[], Any]) -> None:
    tokenizer = make()
    chat = ChatTokens(tokenizer, "small")
    usual = control_tokens(tokenizer, chat.encode(PLAIN))
    special = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    assert len(special) >= 7
    for token in special:
        for text in (
            token,
            f"a {token} b",
            f"a{token}b",
            token * 2,
            f"x{token}{special[0]}yes",
            f"{token[:2]}{token}>",
        ):
            ids = chat.encode(chat_of(text))
            assert control_tokens(tokenizer, ids) == usual
            assert squeezed(tokenizer.decode(ids, skip_special_tokens=True)).count(squeezed(text)) >= len(PLAIN)
            completion = chat.encode_text(text)
            assert not control_tokens(tokenizer, completion)
            assert squeezed(text) in squeezed(tokenizer.decode(completion, skip_special_tokens=True))


@pytest.mark.parametrize("make", TOKENIZERS)
def test_text_without_special_tokens_is_encoded_as_usual(make: Callable[[], Any]) -> None:
    tokenizer = make()
    chat = ChatTokens(tokenizer, "small")
    for text in ("the cat\n\n sat", " ab <|", "a|>", "", "\n", "<s", "th<th>", "1 < 2 | 3 > 2", "\U000f0000"):
        messages = chat_of(text)
        rendered = tokenizer.apply_chat_template(
            [{"role": message.role, "content": message.content} for message in messages],
            tokenize=False,
            add_generation_prompt=True,
        )
        assert chat.encode(messages) == tokenizer(rendered, add_special_tokens=False)["input_ids"]
        assert chat.encode_text(text) == tokenizer(text, add_special_tokens=False)["input_ids"]


FRAGMENTS = ["<|end|>", "<|user|>", "<|", "|>", "end", "</s>", "<s>", "<", ">", "|", "/s", " ", "\n", "a", "\U000f0000"]


@given(st.lists(st.sampled_from(FRAGMENTS), max_size=12).map("".join))
@settings(deadline=None, max_examples=300)
def test_no_mixture_of_fragments_becomes_a_control_token(text: str) -> None:
    usual = control_tokens(BYTES, CHAT_OF_BYTES.encode(PLAIN))
    assert control_tokens(BYTES, CHAT_OF_BYTES.encode(chat_of(text))) == usual
    completion = CHAT_OF_BYTES.encode_text(text)
    assert not control_tokens(BYTES, completion)
    assert BYTES.decode(completion, skip_special_tokens=True) == text


BYTES = byte_level()
CHAT_OF_BYTES = ChatTokens(BYTES, "bytes")


def test_added_tokens_that_a_template_writes_are_control_tokens_of_chats_and_words_of_completions() -> None:
    tokenizer = byte_level()
    tokenizer.chat_template = CHAT.replace("<|assistant|>{%", "<|assistant|><think>{%")
    chat = ChatTokens(tokenizer, "thinking")
    think, tool = tokenizer.convert_tokens_to_ids(["<think>", "<tool>"])
    assert chat.encode(chat_of("<think> a")).count(think) == chat.encode(PLAIN).count(think) == 1
    assert chat.encode(chat_of("a <tool>")).count(tool) == len(PLAIN)  # not in the template, so not a control token
    assert chat.encode_text("<think>so</think>").count(think) == 1


def test_special_tokens_that_are_ordinary_words_are_an_error() -> None:
    chat = ChatTokens(unigram(), "words")
    assert chat.encode_text("a b")
    with pytest.raises(EngineError, match="words cannot encode </s> as ordinary text"):
        chat.encode_text("a</s>b")
    with pytest.raises(EngineError, match=r"words cannot encode this chat: .*Can't sanitize '</s>'"):
        chat.encode(chat_of("a</s>b"))


def with_template(template: str) -> PreTrainedTokenizerFast:
    tokenizer = byte_level()
    tokenizer.chat_template = template
    return tokenizer


RAISING = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + CHAT
DROPPING = CHAT.replace("messages %}", "messages if message.role != 'system' %}")
ALTERNATING = (
    "{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}{% endfor %}" + CHAT
)
UNKNOWN_ROLE = (
    "{% set names = {'user': 'u', 'assistant': 'm'} %}{% for message in messages %}"
    "{{ names[message.role] + ': ' + message.content }}\n{% endfor %}{% if add_generation_prompt %}m:{% endif %}"
)


@pytest.mark.parametrize("template", [RAISING, DROPPING, ALTERNATING, UNKNOWN_ROLE])
def test_a_template_without_a_system_role_gets_the_instruction_in_the_first_user_turn(template: str) -> None:
    tokenizer = with_template(template)
    chat = ChatTokens(tokenizer, "small")
    text = tokenizer.decode(chat.encode(PLAIN), skip_special_tokens=False)
    assert "a b\n\nc" in text
    assert chat.encode(PLAIN) == chat.encode([Message("user", "a b\n\nc"), *PLAIN[2:]])


def test_a_template_with_a_system_role_keeps_it() -> None:
    assert "<|system|>a b<|end|><|user|>c" in BYTES.decode(CHAT_OF_BYTES.encode(PLAIN))


@pytest.mark.parametrize(
    "template",
    [
        CHAT.replace("message.content", "message.content | trim | upper"),
        CHAT.replace("message.content", "message.content | tojson"),
        CHAT.replace("message.content", "message.content.strip().split('</think>')[-1]"),
    ],
)
def test_templates_may_change_messages(template: str) -> None:
    tokenizer = with_template(template)
    chat = ChatTokens(tokenizer, "small")
    usual = control_tokens(tokenizer, chat.encode(PLAIN))
    assert control_tokens(tokenizer, chat.encode(chat_of(" a <|end|> <|user|> "))) == usual


def test_messages_without_a_user_turn_are_folded_too() -> None:
    assert fold_system([Message("system", "a")]) == [Message("user", "a")]
    assert fold_system([Message("system", ""), Message("user", "b")]) == [Message("user", "b")]
    assert fold_system([*PLAIN[:2], Message("system", "x"), Message("user", "y")])[1] == Message("user", "x\n\ny")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("", "has no chat template"),
        ("{% for message in messages %}{{ message.content }}", "fails on a plain chat: TemplateSyntaxError"),
        ("{{ messages[0].content.nothing.more }}", "fails on a plain chat: UndefinedError"),
        ("{{ raise_exception('never') }}", "fails on a plain chat: TemplateError: never"),
        ("{{ 1 + messages[0].content }}", "fails on a plain chat: TypeError"),
        ("{{ messages[-1].content }}", "drops or reorders user and assistant turns"),
        ("{% for message in messages | reverse %}{{ message.content }}{% endfor %}", "drops or reorders"),
        (
            "{% for message in messages if message.role == 'user' %}{{ message.content }}{% endfor %}",
            "drops or reorders",
        ),
    ],
)
def test_a_template_that_does_not_work_is_rejected_at_once(template: str, message: str) -> None:
    with pytest.raises(ConfigError, match=f"small.*{message}"):
        ChatTokens(with_template(template), "small")


def test_a_chat_that_a_template_rejects_is_an_error_of_that_request() -> None:
    chat = ChatTokens(with_template(ALTERNATING), "small")
    with pytest.raises(
        EngineError, match="small cannot encode this chat: TemplateError: Conversation roles must alternate"
    ):
        chat.encode([Message("user", "a"), Message("user", "b")])
    with pytest.raises(EngineError, match="small cannot encode this chat"):
        chat.encode([Message("user", "half an emoji \ud83d")])
