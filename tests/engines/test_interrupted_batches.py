"""After a batch is interrupted by Ctrl-C, an error or a time limit, the engine still gives correct answers."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from lmpipe import Completion, EngineError, Request, RunStore, Sampling, Session, WeightState
from lmpipe.engines.local import LocalLM
from lmpipe.errors import BudgetSpent
from lmpipe.lm import Message
from lmpipe.runtime.deadline import set_deadline
from tests.engines.letters import BASE, ROWS, trainer

SHARED = "Tell me what comes next in the alphabet, however long it takes to find that out. " * 2


def requests(weights: WeightState = BASE, letters: str = "abcdef") -> list[Request]:
    """Returns requests whose prompts share a prefix, which is computed once and cached."""
    return [
        Request((Message("system", SHARED), Message("user", letter * 3)), Sampling(max_tokens=8), weights)
        for letter in letters
    ]


@contextmanager
def failing(lm: LocalLM, call: int, error: BaseException) -> Iterator[None]:
    """Makes the last layer of the model raise at one of its calls, when earlier layers have cached their results."""
    calls = iter(range(1, 10**6))

    def fail(module: Any, args: Any) -> None:
        if next(calls) == call:
            raise error

    handle = lm.model.model.layers[-1].register_forward_pre_hook(fail)
    try:
        yield
    finally:
        handle.remove()


@pytest.mark.parametrize("method", ["base", "lora", "prefix", "full"])
def test_after_a_failure_in_any_pass_answers_are_correct(tiny_folder: Path, tmp_path: Path, method: str) -> None:
    lm, fresh = (
        LocalLM.from_pretrained(str(tiny_folder), name="tiny", max_sequences=4, max_cached_answers=0) for _ in range(2)
    )
    weights = BASE
    with closing(RunStore(tmp_path / "run")) as store:
        if method != "base":
            weights = trainer(lm, method=method, epochs=2).train(ROWS, BASE, Session(lm=lm, store=store)).weights
            for engine in (lm, fresh):
                engine.register_adapter(str(weights.adapter), store.folder(str(weights.adapter)))
        tuned, usual = fresh.complete(requests(weights)), fresh.complete(requests())
        for call in (1, 2, 4, 9):
            for error in (KeyboardInterrupt(), RuntimeError("mat1 and mat2 shapes cannot be multiplied")):
                expected = KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else EngineError
                with (
                    failing(lm, call, error),
                    pytest.raises(expected, match=None if expected is KeyboardInterrupt else "mat1"),
                ):
                    lm.complete(requests(weights))
                assert lm.prefix_bytes == 0
                assert lm.complete(requests(weights)) == tuned
                assert lm.complete(requests()) == usual


def test_a_time_limit_ends_a_batch_between_forward_passes(tiny_lm: LocalLM) -> None:
    usual = tiny_lm.complete(requests())
    endless = [Request(request.messages, Sampling(max_tokens=600), BASE) for request in requests(letters="ghijkl")]

    def slow(module: Any, args: Any) -> None:
        time.sleep(0.05)

    handle = tiny_lm.model.model.layers[0].register_forward_pre_hook(slow)
    started = time.perf_counter()
    with set_deadline(0.3), pytest.raises(BudgetSpent, match="max_seconds is spent"):
        tiny_lm.complete(endless)
    assert time.perf_counter() - started < 5
    handle.remove()
    assert tiny_lm.complete(requests()) == usual


def test_no_forward_pass_is_made_after_the_time_limit(tiny_lm: LocalLM) -> None:
    passes: list[object] = []
    handle = tiny_lm.model.register_forward_pre_hook(lambda module, args: passes.append(module))
    with set_deadline(0), pytest.raises(BudgetSpent):
        tiny_lm.complete(requests())
    assert not passes
    handle.remove()
    assert all(isinstance(answer, Completion) for answer in tiny_lm.complete(requests()))


def test_out_of_memory_on_a_cpu_or_in_cublas_shrinks_the_batch(tiny_folder: Path) -> None:
    lm = LocalLM.from_pretrained(str(tiny_folder), name="tiny", max_sequences=4, max_cached_answers=0)
    usual = lm.complete(requests())
    for message in (
        "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    ):
        with failing(lm, 3, RuntimeError(message)):
            assert lm.complete(requests()) == usual
    assert lm.limits.sequences == 1
    with (
        failing(lm, 1, MemoryError()),
        pytest.raises(EngineError, match="not even one sequence fits in memory alongside tiny"),
    ):
        lm.complete(requests())
