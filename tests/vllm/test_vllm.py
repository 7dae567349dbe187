"""vLLM generates the same as the local engine: base and adapter, greedy and sampled, free and constrained."""

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

SUBJECTS = [
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


QUESTIONS = [request(f"What is special about {subject.replace('_', ' ')}?") for subject in SUBJECTS]


def answers(lm: LM, requests: Sequence[Request]) -> list[Completion]:
    results = lm.complete(requests)
    assert not [result for result in results if isinstance(result, EngineError)]
    return [result for result in results if isinstance(result, Completion)]


def texts(lm: LM, requests: Sequence[Request]) -> list[str]:
    return [answer.text for answer in answers(lm, requests)]


def same(generated: Sequence[str], expected: Sequence[str]) -> int:
    """Counts equal texts."""
    return sum(text == other for text, other in zip(generated, expected, strict=True))


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
    model, differences = AutoModelForCausalLM.from_pretrained(folder), []
    for question in QUESTIONS[:8]:
        request_with_logprobs = replace(
            question, sampling=replace(question.sampling, logprobs=True, temperature=0.5, top_p=0.9)
        )
        answer = answers(vllm, [request_with_logprobs])[0]
        assert answer.logprobs is not None
        assert len(answer.logprobs) == answer.usage.completion_tokens
        prompt, new = local.encode(request_with_logprobs.messages), local.encode_text(answer.text)
        with torch.inference_mode():
            logits = model(torch.tensor([prompt + new])).logits[0, len(prompt) - 1 : -1]
        expected = logits.log_softmax(-1).gather(-1, torch.tensor(new)[:, None])[:, 0].tolist()
        differences += [abs(logprob - reference) for logprob, reference in zip(answer.logprobs, expected, strict=False)]
    record_property("largest difference of log-probabilities", f"{max(differences):.1e}")
    assert max(differences) < 1e-3


def test_a_seed_determines_a_completion_whatever_else_is_in_the_batch(
    vllm: LM, record_property: Callable[[str, object], None]
) -> None:
    sampled = [
        replace(question, seed=2**62 + n) for n, question in enumerate(8 * [request("Name a word.", temperature=1.0)])
    ]
    together = texts(vllm, sampled)
    alone = [texts(vllm, [question])[0] for question in sampled]
    record_property("equal sampled texts, alone and together", f"{same(together, alone)} of {len(sampled)}")
    assert same(together, alone) >= len(sampled) - 1
    assert len(set(together)) > 4


def test_completions_match_the_regex(vllm: LM) -> None:
    regex = r"reason: [^\n]+\nanswer: (setosa|versicolor|virginica)"
    constrained = [replace(question, regex=regex, sampling=Sampling(max_tokens=200)) for question in QUESTIONS[:4]]
    for answer in answers(vllm, constrained):
        assert answer.finish_reason == "length" or re.fullmatch(regex, answer.text)


def test_a_request_that_is_too_long_fails_alone(vllm: LM) -> None:
    long, short = vllm.complete([request("word " * CONTEXT), request("Hi")])
    assert isinstance(long, EngineError)
    assert str(CONTEXT) in str(long)
    assert isinstance(short, Completion)


def test_an_adapter_loaded_at_run_time_generates_as_in_the_local_engine(
    vllm: LM, local: LocalLM, tuned: tuple[WeightState, Path], record_property: Callable[[str, object], None]
) -> None:
    weights, folder = tuned
    for lm in (vllm, local):
        lm.register_adapter(str(weights.adapter), folder)
    on_adapter = [replace(question, weights=weights) for question in QUESTIONS]
    adapted, base = texts(vllm, on_adapter), texts(vllm, QUESTIONS)
    equal = same(adapted, texts(local, on_adapter))
    record_property("equal greedy texts with an adapter", f"{equal} of {len(on_adapter)}")
    assert equal >= 0.8 * len(on_adapter)
    assert same(adapted, base) < 0.2 * len(on_adapter)
    mixed = texts(vllm, [question for pair in zip(on_adapter, QUESTIONS, strict=True) for question in pair])
    assert same(mixed[0::2], adapted) + same(mixed[1::2], base) >= 1.8 * len(on_adapter)


def test_prompts_rendered_here_equal_those_rendered_by_the_server(url: str, folder: str, server: ServerLM) -> None:
    rendering = ServerLM(NAME, [url], tokenizer=folder)
    assert rendering.dialect.name == "vllm"
    assert same(texts(rendering, QUESTIONS), texts(server, QUESTIONS)) >= len(QUESTIONS) - 1
    rendering.close()


def test_an_adapter_that_the_server_cannot_load_is_an_error(
    server: ServerLM, tuned: tuple[WeightState, Path], tmp_path: Path
) -> None:
    (tmp_path / "adapter_config.json").write_text((tuned[1] / "adapter_config.json").read_text())
    server.register_adapter("broken", tmp_path)
    with pytest.raises(EngineError, match=r"does not load the adapter at .*must see that folder"):
        server.complete([request("Hi", WeightState(base=NAME, adapter="broken"))])
