"""vLLM answers as the local engine does: base and adapter, greedy and sampled, free and held to a pattern."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from lmpipe import LM, Completion, EngineError, Request, Sampling, WeightState
from lmpipe.engines.bundled import NAME
from lmpipe.engines.local import LocalLM
from lmpipe.engines.server import ServerLM
from lmpipe.lm import Message
from tests.vllm.conftest import CONTEXT

THINGS = [
    "France",
    "Japan",
    "Peru",
    "Kenya",
    "gold",
    "iron",
    "water",
    "salt",
    "Mozart",
    "Newton",
    "Darwin",
    "Plato",
    "cats",
    "bees",
    "whales",
    "oaks",
    "chess",
    "tennis",
    "tea",
    "bread",
    "the_moon",
    "the_sun",
    "rain",
    "winter",
]


def request(text: str, weights: WeightState | None = None, seed: int = 0, **sampling: float | bool) -> Request:
    chat = (Message("system", "Answer the question briefly."), Message("user", text))
    settings = Sampling(**{"max_tokens": 24, **sampling})  # type: ignore[arg-type]
    return Request(chat, settings, weights or WeightState(base=NAME), seed)


QUESTIONS = [request(f"What is special about {thing.replace('_', ' ')}?") for thing in THINGS]


def answers(lm: LM, requests: Sequence[Request]) -> list[Completion]:
    made = lm.complete(requests)
    assert not [answer for answer in made if isinstance(answer, EngineError)]
    return [answer for answer in made if isinstance(answer, Completion)]


def texts(lm: LM, requests: Sequence[Request]) -> list[str]:
    return [answer.text for answer in answers(lm, requests)]


def same(ours: Sequence[str], theirs: Sequence[str]) -> int:
    return sum(one == other for one, other in zip(ours, theirs, strict=True))


def test_greedy_texts_are_those_of_the_local_engine(
    vllm: LM, local: LocalLM, record_property: Callable[[str, object], None]
) -> None:
    equal = same(texts(vllm, QUESTIONS), texts(local, QUESTIONS))
    record_property("equal greedy texts", f"{equal} of {len(QUESTIONS)}")
    assert equal >= 0.8 * len(QUESTIONS)


def test_prompts_have_as_many_tokens_as_in_the_local_engine(vllm: LM, local: LocalLM) -> None:
    expected = [len(local.encode(question.messages)) for question in QUESTIONS]
    assert [answer.usage.prompt_tokens for answer in answers(vllm, QUESTIONS)] == expected


def test_logprobs_are_those_of_the_model(
    vllm: LM, local: LocalLM, folder: str, record_property: Callable[[str, object], None]
) -> None:
    model, off = AutoModelForCausalLM.from_pretrained(folder), []
    for question in QUESTIONS[:8]:
        asked = replace(question, sampling=replace(question.sampling, logprobs=True, temperature=0.5, top_p=0.9))
        answer = answers(vllm, [asked])[0]
        assert answer.logprobs is not None
        assert len(answer.logprobs) == answer.usage.completion_tokens
        prompt, new = local.encode(asked.messages), local.encode_text(answer.text)
        with torch.inference_mode():
            logits = model(torch.tensor([prompt + new])).logits[0, len(prompt) - 1 : -1]
        expected = logits.log_softmax(-1).gather(-1, torch.tensor(new)[:, None])[:, 0].tolist()
        off += [abs(one - other) for one, other in zip(answer.logprobs, expected, strict=False)]
    record_property("largest difference of log-probabilities", f"{max(off):.1e}")
    assert max(off) < 1e-3


def test_a_seed_decides_an_answer_whatever_is_asked_beside_it(
    vllm: LM, record_property: Callable[[str, object], None]
) -> None:
    drawn = [replace(asked, seed=2**62 + n) for n, asked in enumerate(8 * [request("Name a word.", temperature=1.0)])]
    together = texts(vllm, drawn)
    alone = [texts(vllm, [asked])[0] for asked in drawn]
    record_property("equal sampled texts, alone and together", f"{same(together, alone)} of {len(drawn)}")
    assert same(together, alone) >= len(drawn) - 1
    assert len(set(together)) > 4


def test_a_pattern_is_kept(vllm: LM) -> None:
    pattern = r"reason: [^\n]+\nanswer: (setosa|versicolor|virginica)"
    asked = [replace(question, regex=pattern, sampling=Sampling(max_tokens=200)) for question in QUESTIONS[:4]]
    for answer in answers(vllm, asked):
        assert answer.finish_reason == "length" or re.fullmatch(pattern, answer.text)


def test_what_does_not_fit_fails_alone(vllm: LM) -> None:
    long, short = vllm.complete([request("word " * CONTEXT), request("Hi")])
    assert isinstance(long, EngineError)
    assert str(CONTEXT) in str(long)
    assert isinstance(short, Completion)


def test_an_adapter_loaded_at_run_time_answers_as_in_the_local_engine(
    vllm: LM, local: LocalLM, tuned: tuple[WeightState, Path], record_property: Callable[[str, object], None]
) -> None:
    weights, folder = tuned
    for lm in (vllm, local):
        lm.register_adapter(str(weights.adapter), folder)
    asked = [replace(question, weights=weights) for question in QUESTIONS]
    adapted, base = texts(vllm, asked), texts(vllm, QUESTIONS)
    equal = same(adapted, texts(local, asked))
    record_property("equal greedy texts with an adapter", f"{equal} of {len(asked)}")
    assert equal >= 0.8 * len(asked)
    assert same(adapted, base) < 0.2 * len(asked)
    mixed = texts(vllm, [one for pair in zip(asked, QUESTIONS, strict=True) for one in pair])
    assert same(mixed[0::2], adapted) + same(mixed[1::2], base) >= 1.8 * len(asked)


def test_prompts_rendered_here_are_answered_as_the_server_renders_them(url: str, folder: str, server: ServerLM) -> None:
    rendering = ServerLM(NAME, [url], tokenizer=folder)
    assert rendering.dialect.name == "vllm"
    assert same(texts(rendering, QUESTIONS), texts(server, QUESTIONS)) >= len(QUESTIONS) - 1
    rendering.close()


def test_an_adapter_that_the_server_cannot_take_says_so(
    server: ServerLM, tuned: tuple[WeightState, Path], tmp_path: Path
) -> None:
    (tmp_path / "adapter_config.json").write_text((tuned[1] / "adapter_config.json").read_text())
    server.register_adapter("broken", tmp_path)
    with pytest.raises(EngineError, match=r"does not load the adapter at .*must see that folder"):
        server.complete([request("Hi", WeightState(base=NAME, adapter="broken"))])
