"""Measures generation and training by the local engine: ``python -m benchmarks.performance.workers.engine JOB …``.

The last line is one JSON object. CPU seconds do not include loading the model.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from time import perf_counter, process_time
from typing import Any, TypeVar

import torch

from benchmarks.performance.workload import Workload, generation_flops, make_workload, training_flops
from lmpipe import RunStore, Sampling, Session, WeightState
from lmpipe.engines.bundled import load_bundled
from lmpipe.engines.local import LocalLM
from lmpipe.engines.local.models import num_layers
from lmpipe.engines.local.sampling import SequenceState
from lmpipe.engines.precision import multiplies_bfloat16
from lmpipe.engines.training import LocalTrainer, TuningConfig
from lmpipe.engines.training.callbacks import TrainingObserver
from lmpipe.engines.training.fit import fit, seeded
from lmpipe.engines.training.packed_batch import TokenizedRow
from lmpipe.lm import Message
from lmpipe.trainer import SFTLoss, TrainingRow

T = TypeVar("T")
TUNING = TuningConfig(rank=16, alpha=32, target_modules="all-linear", learning_rate=1e-4, epochs=1)


def product_rate(dtype: torch.dtype, size: int = 2048, repetitions: int = 9) -> float:
    """Returns the operations per CPU second of a product of two square matrices, by the faster of two libraries.

    The libraries are ``torch.mm`` (MKL in float32), and oneDNN with one matrix in its own layout. Where bfloat16 is
    emulated, the rate is that of float32, which is faster.

    Args:
        dtype: Data type of the matrices.
        size: Number of rows and columns.
        repetitions: Number of measurements of each library; the median counts.
    """
    if not multiplies_bfloat16(torch.device("cpu")):
        dtype = torch.float32
    left, right = torch.randn(size, size).to(dtype), torch.randn(size, size).to(dtype)
    packed = torch.ops.mkldnn._reorder_linear_weight(right, size)

    def median_seconds(product: Callable[[], Any]) -> float:
        product()
        return statistics.median(cpu_seconds(product) for _ in range(repetitions))

    mkl = median_seconds(lambda: torch.mm(left, right))
    onednn = median_seconds(lambda: torch.ops.mkldnn._linear_pointwise(left, packed, None, "none", [], ""))
    return 2 * size**3 / min(mkl, onednn)


def cpu_seconds(work: Callable[[], Any]) -> float:
    """Returns the CPU seconds that this process spends on a piece of work."""
    started = process_time()
    work()
    return process_time() - started


def timed(work: Callable[[], T]) -> tuple[T, dict[str, float]]:
    """Returns what a piece of work returns, and its ``cpu_seconds`` in this process and ``seconds`` of wall time."""
    started, clock = process_time(), perf_counter()
    result = work()
    return result, {"cpu_seconds": process_time() - started, "seconds": perf_counter() - clock}


def rows_of(workload: Workload) -> list[SequenceState]:
    """Returns the engine's form of each prompt."""
    return [SequenceState(tuple(prompt), Sampling(max_tokens=workload.new_tokens)) for prompt in workload.prompts]


def endless(dtype: str, quantization: str | None = None) -> LocalLM:
    """Loads the bundled LM without a token that ends a completion, so that all engines do the same work."""
    lm = load_bundled(dtype=getattr(torch, dtype), quantization=quantization)
    lm.tokenizer.eos_token_id = lm.model.generation_config.eos_token_id = None
    return LocalLM(lm.model, lm.tokenizer, lm.name)


def read_workload(path: str) -> Workload:
    """Reads a workload that `Workload.write` has written."""
    return Workload(**json.loads(Path(path).read_text()))


def generate(path: str, dtype: str, quantization: str | None = None) -> dict[str, Any]:
    """Generates for the workload once, and measures the rate of matrix products before and after."""
    workload, lm = read_workload(path), endless(dtype, quantization)
    rate = product_rate(lm.model.dtype)
    rows = rows_of(workload)
    _, seconds = timed(lambda: lm.generate(rows))
    return {
        **seconds,
        "tokens": [row.tokens for row in rows],
        "rates": [rate, product_rate(lm.model.dtype)],
        "flops": generation_flops(lm.model, workload),
    }


def train(path: str) -> dict[str, Any]:
    """Trains LoRA for one pass over the workload's rows."""
    workload, lm = read_workload(path), load_bundled()
    rows = [TokenizedRow(tuple(row), count) for row, count in zip(workload.rows, workload.trained, strict=True)]
    rate = product_rate(torch.bfloat16)
    with (
        tempfile.TemporaryDirectory() as folder,
        seeded(0),
        lm.adapters.trainable(TUNING.peft_config(num_layers(lm.model)), None) as model,
    ):
        result, seconds = timed(lambda: fit(model, rows, TUNING, 0, Path(folder), SFTLoss(), TrainingObserver()))
    return {
        **seconds,
        "tokens": sum(map(len, workload.rows)),
        "losses": list(result.losses),
        "rates": [rate, product_rate(torch.bfloat16)],
        "flops": training_flops(lm.model, workload),
    }


def swap() -> dict[str, Any]:
    """Measures the CPU seconds of loading an adapter, and of a first token on an adapter that is loaded.

    Loading is the difference between a first token on an adapter that is not loaded and one on the same adapter again.
    """
    lm = load_bundled()
    row = TrainingRow((Message("user", "Say a."),), "a")
    with tempfile.TemporaryDirectory() as folder:
        store = RunStore(folder)
        adapters = []
        for seed in range(3):
            tuned = LocalTrainer(lm, TUNING).train(
                [row], WeightState(base=lm.name), Session(lm=lm, store=store, seed=seed)
            )
            adapters.append(str(tuned.weights.adapter))
            lm.register_adapter(adapters[-1], store.folder(adapters[-1]))

        def first_token(adapter: str) -> float:
            return cpu_seconds(lambda: lm.generate([SequenceState((1, 2, 3), Sampling(max_tokens=1))], adapter))

        loading = [first_token(adapter) - first_token(adapter) for adapter in adapters]
        switching = [first_token(adapters[number % 3]) for number in range(9)]
        store.close()
    return {"load": max(loading), "switch": statistics.median(switching)}


def growth() -> dict[str, Any]:
    """Measures CPU seconds by the number of requests, the prefix length, new tokens, and candidates of a search."""
    lm = endless("float32")

    def seconds(requests: int = 32, prefix: int = 300, new_tokens: int = 16) -> float:
        workload = make_workload(
            lm.tokenizer, requests=requests, prefix=prefix, suffix=30, new_tokens=new_tokens, rows=0
        )
        return cpu_seconds(lambda: lm.generate(rows_of(workload)))

    def again(prefix: int) -> float:
        """Generates for the same prompts a second time, when the engine has kept their prefix."""
        seconds(prefix=prefix)
        return seconds(prefix=prefix)

    def candidates(count: int) -> float:
        """Generates for a number of prefixes of 300 tokens, each with the same eight questions."""
        rng = torch.Generator().manual_seed(count)
        prefixes = [tuple(torch.randint(1000, 20000, (300,), generator=rng).tolist()) for _ in range(count)]
        questions = [tuple(range(number * 40, number * 40 + 30)) for number in range(8)]
        rows = [
            SequenceState(prefix + question, Sampling(max_tokens=16)) for prefix in prefixes for question in questions
        ]
        return cpu_seconds(lambda: lm.generate(rows))

    seconds(requests=2)
    return {
        "requests": {count: seconds(requests=count) for count in (1, 4, 16, 64, 128, 256)},
        "new tokens": {count: seconds(new_tokens=count) for count in (8, 16, 32, 64, 128)},
        "prefix, first time": {length: seconds(prefix=length) for length in (16, 300, 600, 1000, 1500)},
        "prefix, again": {length: again(length) for length in (16, 300, 600, 1000, 1500)},
        "candidates": {count: candidates(count) for count in (1, 4, 8, 16, 32)},
    }


JOBS: dict[str, Callable[..., dict[str, Any]]] = {"generate": generate, "train": train, "swap": swap, "growth": growth}

if __name__ == "__main__":
    print(json.dumps(JOBS[sys.argv[1]](*sys.argv[2:])))
