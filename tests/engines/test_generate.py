"""Continuous batching in the local engine: the tokens of a sequence do not depend on how sequences are batched."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from lmpipe import Completion, EngineError, Request, Sampling, WeightState
from lmpipe.engines.kernels.library import kernels
from lmpipe.engines.local import LocalLM
from lmpipe.engines.local.sampling import SequenceState
from lmpipe.lm import Message
from tests.tiny import tiny_llama


def alone(lm: LocalLM, sequence: SequenceState) -> list[int]:
    fresh = SequenceState(sequence.prompt, sequence.sampling, sequence.seed)
    lm.generate([fresh])
    return fresh.tokens


def load(folder: Path, **limits: int) -> LocalLM:
    return LocalLM(
        AutoModelForCausalLM.from_pretrained(folder),
        AutoTokenizer.from_pretrained(folder),
        "tiny",
        max_cached_answers=0,
        **limits,
    )


PIECES = [
    tuple(torch.randint(0, 250, (size,), generator=torch.Generator().manual_seed(size)).tolist())
    for size in (1, 3, 17, 40, 90)
]
PROMPTS = st.lists(st.sampled_from(PIECES), min_size=1, max_size=4).map(lambda parts: sum(parts, ()))
SAMPLINGS = st.builds(
    Sampling,
    temperature=st.sampled_from([0.0, 0.8]),
    top_p=st.sampled_from([1.0, 0.9]),
    top_k=st.sampled_from([None, 5]),
    max_tokens=st.integers(1, 12),
)


@pytest.fixture(params=["small heads", "fused decoder", "no kernels"])
def folder(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A model whose heads are too small for the kernels, one that they compute, and this one without them."""
    monkeypatch.setenv("LMPIPE_KERNELS", "0" if request.param == "no kernels" else "1")
    kernels.cache_clear()
    yield tiny_llama(tmp_path, hidden_size=32 if request.param == "small heads" else 128)
    kernels.cache_clear()


@given(
    st.lists(st.builds(SequenceState, PROMPTS, SAMPLINGS, st.integers(0, 3)), min_size=1, max_size=10),
    st.integers(1, 6),
    st.integers(400, 4000),
)
@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_batches_prefixes_and_limits_change_nothing(
    folder: Path, sequences: list[SequenceState], max_sequences: int, tokens: int
) -> None:
    reference = load(folder)
    expected = [alone(reference, sequence) for sequence in sequences]
    lm = load(folder, max_sequences=max_sequences, memory=tokens * reference.limits.bytes_per_token)
    for _ in range(2):  # the second time with cached prefixes
        again = [SequenceState(sequence.prompt, sequence.sampling, sequence.seed) for sequence in sequences]
        lm.generate(again)
        assert [sequence.tokens for sequence in again] == expected
        assert lm.prefix_bytes <= lm.limits.memory


def test_a_shared_prefix_is_computed_once_and_cached(tiny_folder: Path) -> None:
    lm = load(tiny_folder)
    seen: list[int] = []
    lm.model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    shared = PIECES[4]
    sequences = [SequenceState((*shared, *PIECES[1], number), Sampling(max_tokens=1)) for number in range(8)]
    lm.generate(sequences)
    assert seen == [90 + 3 + 8]  # the shared prefix, and one token of each sequence
    lm.generate([SequenceState((*shared, *PIECES[1], number), Sampling(max_tokens=1)) for number in range(20, 25)])
    assert seen[1:] == [5]


def test_equal_prompts_are_computed_once_and_sampled_separately(tiny_lm: LocalLM) -> None:
    sequences = [SequenceState(PIECES[2], Sampling(temperature=1.0, max_tokens=8), seed) for seed in (1, 2, 1)]
    tiny_lm.generate(sequences)
    assert sequences[0].tokens == sequences[2].tokens != sequences[1].tokens


def test_sequences_outgrow_the_reserved_cache(tiny_folder: Path) -> None:
    lm = load(tiny_folder, max_sequences=3)
    sequences = [SequenceState(PIECES[0], Sampling(temperature=1.0, max_tokens=150), seed) for seed in range(3)]
    sequences += [
        SequenceState(PIECES[4], Sampling(max_tokens=5)),
        SequenceState(PIECES[3], Sampling(temperature=1.0, max_tokens=70)),
    ]
    expected = [alone(lm, sequence) for sequence in sequences]
    lm.generate(sequences)
    assert [sequence.tokens for sequence in sequences] == expected
    assert len(sequences[1].tokens) == 150


def test_out_of_memory_shrinks_the_batch_and_loses_nothing(tiny_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The model behaves like a GPU with memory for four sequences."""
    lm = load(tiny_folder, max_sequences=16)

    def refuse(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if kwargs["input_ids"].numel() in range(5, 17):
            raise torch.OutOfMemoryError("CUDA out of memory")

    expected = [
        alone(lm, SequenceState(PIECES[3], Sampling(temperature=1.0, max_tokens=6), seed)) for seed in range(12)
    ]
    handle = lm.model.register_forward_pre_hook(refuse, with_kwargs=True)
    sequences = [SequenceState(PIECES[3], Sampling(temperature=1.0, max_tokens=6), seed) for seed in range(12)]
    with caplog.at_level(logging.WARNING):
        lm.generate(sequences)
    assert [sequence.tokens for sequence in sequences] == expected
    assert lm.limits.sequences == 4
    assert "continuing with at most 8 sequences" in caplog.text
    handle.remove()


def test_a_request_that_cannot_fit_the_memory_fails_alone(tiny_folder: Path) -> None:
    lm = load(tiny_folder, memory=100 * 512)
    chat = (Message("user", "hello"),)
    short = Request(chat, Sampling(max_tokens=5), WeightState(base="tiny"))
    answers = lm.complete([short, replace(short, sampling=Sampling(max_tokens=500))])
    assert isinstance(answers[0], Completion)
    assert isinstance(answers[1], EngineError)
    assert "max_tokens=500 need" in str(answers[1])
    assert "pass a larger memory= to LocalLM" in str(answers[1])


def test_logprobs_are_those_of_the_model(tiny_lm: LocalLM, tiny_folder: Path) -> None:
    sequence = SequenceState(PIECES[2], Sampling(temperature=0.7, top_k=3, max_tokens=6, logprobs=True), 4)
    tiny_lm.generate([sequence])
    model = AutoModelForCausalLM.from_pretrained(tiny_folder)
    logprobs = model(torch.tensor([[*sequence.prompt, *sequence.tokens]])).logits[0].log_softmax(-1)
    completion = logprobs[len(sequence.prompt) - 1 : -1]
    expected = completion.gather(-1, torch.tensor(sequence.tokens)[:, None])[:, 0]
    assert sequence.logprobs == pytest.approx(expected.tolist(), abs=1e-4)


def test_top_k_samples_among_the_likeliest_tokens(tiny_lm: LocalLM, tiny_folder: Path) -> None:
    sequences = [SequenceState(PIECES[2], Sampling(temperature=5.0, top_k=3, max_tokens=1), seed) for seed in range(60)]
    tiny_lm.generate(sequences)
    likeliest = AutoModelForCausalLM.from_pretrained(tiny_folder)(torch.tensor([PIECES[2]])).logits[0, -1].topk(3)
    assert {sequence.tokens[0] for sequence in sequences} == set(likeliest.indices.tolist())
