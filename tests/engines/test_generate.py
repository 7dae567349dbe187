"""The batch of the local engine: what a row gets depends on nothing but the row, however rows are batched."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from lmpipe import Completion, EngineError, Request, Sampling, WeightState
from lmpipe.engines.local import LocalLM
from lmpipe.engines.local.sampling import SequenceState
from lmpipe.lm import Message


def alone(lm: LocalLM, row: SequenceState) -> list[int]:
    fresh = SequenceState(row.prompt, row.sampling, row.seed)
    lm.generate([fresh])
    return fresh.tokens


def load(folder: Path, **limits: int) -> LocalLM:
    return LocalLM(
        AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder), "tiny", **limits
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


@given(
    st.lists(st.builds(SequenceState, PROMPTS, SAMPLINGS, st.integers(0, 3)), min_size=1, max_size=10),
    st.integers(1, 6),
    st.integers(400, 4000),
)
@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_batches_prefixes_and_limits_change_nothing(
    tiny_lm: LocalLM, tiny_folder: Path, rows: list[SequenceState], max_sequences: int, tokens: int
) -> None:
    expected = [alone(tiny_lm, row) for row in rows]
    lm = load(tiny_folder, max_sequences=max_sequences, memory=tokens * tiny_lm.limits.bytes_per_token)
    for _ in range(2):  # the second time from kept prefixes
        again = [SequenceState(row.prompt, row.sampling, row.seed) for row in rows]
        lm.generate(again)
        assert [row.tokens for row in again] == expected
        assert lm.prefix_bytes <= lm.limits.memory


def test_a_shared_beginning_is_computed_once_and_kept(tiny_folder: Path) -> None:
    lm = load(tiny_folder)
    seen: list[int] = []
    lm.model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    shared = PIECES[4]
    rows = [SequenceState((*shared, *PIECES[1], number), Sampling(max_tokens=1)) for number in range(8)]
    lm.generate(rows)
    assert seen == [90 + 3 + 8]  # what all rows share, and a token of each
    lm.generate([SequenceState((*shared, *PIECES[1], number), Sampling(max_tokens=1)) for number in range(20, 25)])
    assert seen[1:] == [5]


def test_equal_prompts_are_computed_once_and_drawn_apart(tiny_lm: LocalLM) -> None:
    rows = [SequenceState(PIECES[2], Sampling(temperature=1.0, max_tokens=8), seed) for seed in (1, 2, 1)]
    tiny_lm.generate(rows)
    assert rows[0].tokens == rows[2].tokens != rows[1].tokens


def test_rows_outgrow_the_room_that_was_made_for_them(tiny_folder: Path) -> None:
    lm = load(tiny_folder, max_sequences=3)
    rows = [SequenceState(PIECES[0], Sampling(temperature=1.0, max_tokens=150), seed) for seed in range(3)]
    rows += [
        SequenceState(PIECES[4], Sampling(max_tokens=5)),
        SequenceState(PIECES[3], Sampling(temperature=1.0, max_tokens=70)),
    ]
    expected = [alone(lm, row) for row in rows]
    lm.generate(rows)
    assert [row.tokens for row in rows] == expected
    assert len(rows[1].tokens) == 150


def test_out_of_memory_shrinks_the_batch_and_loses_nothing(tiny_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The model stands for a GPU that has room for four rows."""
    lm = load(tiny_folder, max_sequences=16)

    def refuse(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if kwargs["input_ids"].numel() in range(5, 17):
            raise torch.OutOfMemoryError("CUDA out of memory")

    expected = [
        alone(lm, SequenceState(PIECES[3], Sampling(temperature=1.0, max_tokens=6), seed)) for seed in range(12)
    ]
    handle = lm.model.register_forward_pre_hook(refuse, with_kwargs=True)
    rows = [SequenceState(PIECES[3], Sampling(temperature=1.0, max_tokens=6), seed) for seed in range(12)]
    with caplog.at_level(logging.WARNING):
        lm.generate(rows)
    assert [row.tokens for row in rows] == expected
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
    row = SequenceState(PIECES[2], Sampling(temperature=0.7, top_k=3, max_tokens=6, logprobs=True), 4)
    tiny_lm.generate([row])
    logits = AutoModelForCausalLM.from_pretrained(tiny_folder)(torch.tensor([[*row.prompt, *row.tokens]])).logits[0]
    expected = logits.log_softmax(-1)[len(row.prompt) - 1 : -1].gather(-1, torch.tensor(row.tokens)[:, None])[:, 0]
    assert row.logprobs == pytest.approx(expected.tolist(), abs=1e-4)


def test_top_k_draws_among_the_likeliest(tiny_lm: LocalLM, tiny_folder: Path) -> None:
    rows = [SequenceState(PIECES[2], Sampling(temperature=5.0, top_k=3, max_tokens=1), seed) for seed in range(60)]
    tiny_lm.generate(rows)
    likeliest = AutoModelForCausalLM.from_pretrained(tiny_folder)(torch.tensor([PIECES[2]])).logits[0, -1].topk(3)
    assert {row.tokens[0] for row in rows} == set(likeliest.indices.tolist())
