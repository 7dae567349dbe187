"""The local engine gives the same answers as transformers' own generate(), for one request at a time or many."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from lmpipe import Completion, EngineError, Request, Sampling, WeightState
from lmpipe.engines import load_lm
from lmpipe.engines.local import LocalLM
from lmpipe.engines.local.sampling import SequenceState
from lmpipe.errors import ConfigError
from lmpipe.lm import Message


def request(text: str, seed: int = 0, **sampling: float | int | tuple[str, ...]) -> Request:
    chat = (Message("system", "Continue the text, whatever it is."), Message("user", text))
    return Request(chat, Sampling(**{"max_tokens": 12, **sampling}), WeightState(base="tiny"), seed)  # type: ignore[arg-type]


REQUESTS = [request(text) for text in ("a", "ab", "abc and then some more", "zebra", "a", "")]


def texts(lm: LocalLM, requests: list[Request]) -> list[str]:
    answers = lm.complete(requests)
    assert all(isinstance(answer, Completion) for answer in answers)
    return [answer.text for answer in answers if isinstance(answer, Completion)]


def test_greedy_tokens_are_those_of_transformers_generate(tiny_lm: LocalLM, tiny_folder: Path) -> None:
    reference = AutoModelForCausalLM.from_pretrained(tiny_folder)
    for question, text in zip(REQUESTS, texts(tiny_lm, REQUESTS), strict=True):
        prompt = tiny_lm.encode(question.messages)
        out = reference.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False)
        assert text == tiny_lm.tokenizer.decode(out[0][len(prompt) :], skip_special_tokens=True)


def test_a_sampled_answer_does_not_depend_on_its_batch(tiny_lm: LocalLM) -> None:
    sampled = [
        request(text, seed, temperature=1.0, top_p=top_p)
        for seed, (text, top_p) in enumerate([("a", 1.0), ("a", 0.9), ("longer text", 1.0), ("a", 1.0)])
    ]
    together = texts(tiny_lm, sampled)
    assert together == [texts(tiny_lm, [alone])[0] for alone in sampled]
    assert together == texts(tiny_lm, sampled[::-1])[::-1]
    assert together[0] != together[3]


def test_top_p_near_zero_is_greedy(tiny_lm: LocalLM) -> None:
    nearly = [replace(each, sampling=replace(each.sampling, temperature=1.0, top_p=1e-6)) for each in REQUESTS]
    assert texts(tiny_lm, nearly) == texts(tiny_lm, REQUESTS)


def test_stop_strings_end_a_completion_and_are_cut_off(tiny_lm: LocalLM) -> None:
    whole = texts(tiny_lm, REQUESTS[2:3])[0]
    stop = whole[4:6]
    answer = tiny_lm.complete([request("abc and then some more", stop=(stop,))])[0]
    assert isinstance(answer, Completion)
    assert answer.text == whole[: whole.index(stop)]
    assert answer.finish_reason == "stop"


def test_usage_and_finish_reason_are_reported(tiny_lm: LocalLM) -> None:
    answer = tiny_lm.complete([request("a", max_tokens=3)])[0]
    assert isinstance(answer, Completion)
    assert answer.usage.prompt_tokens == len(tiny_lm.encode(request("a").messages))
    assert (answer.usage.completion_tokens, answer.finish_reason) == (3, "length")


def test_a_request_that_does_not_fit_fails_alone_and_names_both_lengths(tiny_lm: LocalLM) -> None:
    answers = tiny_lm.complete([request("a"), request("b" * 2000), request("a")])
    assert isinstance(answers[0], Completion)
    assert answers[0] == answers[2]
    assert isinstance(answers[1], EngineError)
    tokens = len(tiny_lm.encode(request("b" * 2000).messages))
    assert f"{tokens} prompt tokens and max_tokens=12 do not fit the context of 1024" in str(answers[1])


def test_weights_of_another_model_are_refused(tiny_lm: LocalLM) -> None:
    answer = tiny_lm.complete([replace(request("a"), weights=WeightState(base="large"))])[0]
    assert "uses the weights of 'large', but this LM is 'tiny'" in str(answer)


def test_emulated_bfloat16_is_warned_about(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for native in (True, False):
        monkeypatch.setattr("lmpipe.engines.local.models.multiplies_bfloat16", lambda device, native=native: native)
        load_lm(f"hf:{tiny_folder}", dtype="bfloat16")
        load_lm(f"hf:{tiny_folder}")
        assert ["float32 would be the faster" in message for message in caplog.messages] == ([] if native else [True])


def test_onednn_is_not_required(tiny_folder: Path, tiny_lm: LocalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = texts(tiny_lm, REQUESTS)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    monkeypatch.setattr(torch.ops, "mkldnn", None)
    assert texts(LocalLM.from_pretrained(str(tiny_folder), name="tiny"), REQUESTS) == expected


def test_an_unknown_adapter_is_an_error(tiny_lm: LocalLM) -> None:
    with pytest.raises(EngineError, match="adapter 0abc is not registered"):
        tiny_lm.complete([replace(request("a"), weights=WeightState(base="tiny", adapter="0abc"))])


def test_models_are_loaded_by_their_spec(tiny_folder: Path) -> None:
    assert load_lm(f"hf:{tiny_folder}").name == str(tiny_folder)
    assert load_lm(f"hf:{tiny_folder}", dtype="bfloat16").name == f"{tiny_folder}@bfloat16"
    with pytest.raises(ConfigError, match="no dtype 'half16'; write float32"):
        load_lm(f"hf:{tiny_folder}", dtype="half16")
    with pytest.raises(ConfigError, match="no quantization 'int3'; write nf4, int8 or int8-dynamic"):
        load_lm(f"hf:{tiny_folder}", quantization="int3")
    with pytest.raises(ConfigError, match="write 'bundled' or 'hf:ID_OR_PATH'"):
        load_lm("gpt")
    with pytest.raises(ConfigError, match="cannot load a causal LM from '/nowhere'"):
        load_lm("hf:/nowhere")


def test_greedy_answers_are_kept_for_equal_requests(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = LocalLM.from_pretrained(str(tiny_folder), name="tiny", max_cached_answers=3)
    generate, computed = lm.generate, list[int]()

    def counted(sequences: Sequence[SequenceState], adapter: str | None) -> None:
        computed.append(len(sequences))
        generate(sequences, adapter)

    monkeypatch.setattr(lm, "generate", counted)
    first = lm.complete(REQUESTS[:3])
    again = lm.complete([replace(request, seed=7) for request in REQUESTS[:3]])
    assert computed == [3]
    for old, new in zip(first, again, strict=True):
        assert isinstance(old, Completion)
        assert new == replace(old, usage=replace(old.usage, cached=1))
    sampled = [request("a", temperature=1.0)] * 2
    assert lm.complete(sampled) == lm.complete(sampled)
    assert computed == [3, 2, 2]
    lm.complete(REQUESTS[2:4])  # the fourth answer takes the place of the first
    assert computed == [3, 2, 2, 1]
    lm.complete(REQUESTS[:1])
    assert computed == [3, 2, 2, 1, 1]
    with pytest.raises(ConfigError, match="max_cached_answers=-1 must be at least 0"):
        LocalLM.from_pretrained(str(tiny_folder), max_cached_answers=-1)
