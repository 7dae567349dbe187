"""What `benchmarks.performance.engine` measures of lmpipe, in a process of its own: ``python -m benchmarks.performance.workers.engine JOB …``.

Prints one JSON object as its last line. CPU seconds leave out loading the model.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from time import process_time
from typing import Any

import torch

from benchmarks.performance.workload import Workload, generation_flops, make_workload, training_flops
from lmpipe import RunStore, Sampling, Session, WeightState
from lmpipe.engines.bundled import load_bundled
from lmpipe.engines.local import LocalLM
from lmpipe.engines.local.sampling import Row
from lmpipe.engines.precision import multiplies_bfloat16
from lmpipe.engines.training import LocalTrainer, TuningConfig
from lmpipe.engines.training.callbacks import Watch
from lmpipe.engines.training.fit import fit, seeded
from lmpipe.engines.training.packed_batch import EncodedRow
from lmpipe.lm import Message
from lmpipe.trainer import SFTLoss, TrainingRow

TUNING = TuningConfig(rank=16, alpha=32, target_modules="all-linear", learning_rate=1e-4, epochs=1)


def product_rate(dtype: torch.dtype, size: int = 2048, repetitions: int = 9) -> float:
    """Operations per CPU second of a product of two square matrices, by the faster of PyTorch's two libraries.

    Those are ``torch.mm`` (MKL in float32) and oneDNN with one matrix in its own layout; of each the median of several.
    Where bfloat16 is emulated, its rate is that of float32, which is faster.
    """
    if not multiplies_bfloat16(torch.device("cpu")):
        dtype = torch.float32
    one, other = torch.randn(size, size).to(dtype), torch.randn(size, size).to(dtype)
    packed = torch.ops.mkldnn._reorder_linear_weight(other, size)

    def fastest(product: Callable[[], Any]) -> float:
        product()
        return statistics.median(cpu_seconds(product) for _ in range(repetitions))

    mkl = fastest(lambda: torch.mm(one, other))
    onednn = fastest(lambda: torch.ops.mkldnn._linear_pointwise(one, packed, None, "none", [], ""))
    return 2 * size**3 / min(mkl, onednn)


def cpu_seconds(work: Callable[[], Any]) -> float:
    """CPU seconds of this process for a piece of work."""
    started = process_time()
    work()
    return process_time() - started


def rows_of(work: Workload) -> list[Row]:
    """One row for each prompt."""
    return [Row(tuple(prompt), Sampling(max_tokens=work.new_tokens)) for prompt in work.prompts]


def endless(dtype: str) -> LocalLM:
    """The bundled LM, which never ends a completion by itself, so that all engines do the same work."""
    lm = load_bundled(dtype=getattr(torch, dtype))
    lm.tokenizer.eos_token_id = lm.model.generation_config.eos_token_id = None
    return LocalLM(lm.model, lm.tokenizer, lm.name)


def generate(workload: str, dtype: str) -> dict[str, Any]:
    """The workload once, between two measurements of what the processor can do."""
    work, lm = Workload(**json.loads(Path(workload).read_text())), endless(dtype)
    rate = product_rate(lm.model.dtype)
    rows = rows_of(work)
    seconds = cpu_seconds(lambda: lm.generate(rows))
    return {
        "cpu_seconds": seconds,
        "tokens": [row.tokens for row in rows],
        "rates": [rate, product_rate(lm.model.dtype)],
        "flops": generation_flops(lm.model, work),
    }


def train(workload: str) -> dict[str, Any]:
    """One pass of LoRA training over the workload's rows."""
    work, lm = Workload(**json.loads(Path(workload).read_text())), load_bundled()
    rows = [EncodedRow(tuple(row), count) for row, count in zip(work.rows, work.trained, strict=True)]
    rate = product_rate(torch.bfloat16)
    with (
        tempfile.TemporaryDirectory() as folder,
        seeded(0),
        lm.adapters.trainable(TUNING.peft_config(), None) as model,
    ):
        started = process_time()
        curve = fit(model, rows, TUNING, 0, Path(folder), SFTLoss(), Watch())
        seconds = process_time() - started
    return {
        "cpu_seconds": seconds,
        "tokens": sum(map(len, work.rows)),
        "losses": curve.train,
        "rates": [rate, product_rate(torch.bfloat16)],
        "flops": training_flops(lm.model, work),
    }


def swap() -> dict[str, Any]:
    """CPU seconds from knowing an adapter's folder to its first token, less those of a further token on it."""
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
            return cpu_seconds(lambda: lm.generate([Row((1, 2, 3), Sampling(max_tokens=1))], adapter))

        loaded = [first_token(adapter) - first_token(adapter) for adapter in adapters]
        there = [first_token(adapters[number % 3]) for number in range(9)]
        store.close()
    return {"load": max(loaded), "switch": statistics.median(there)}


def growth() -> dict[str, Any]:
    """CPU seconds against the number of rows, the length of the prefix, new tokens, and candidates of a search."""
    lm = endless("float32")

    def seconds(requests: int = 32, prefix: int = 300, new_tokens: int = 16) -> float:
        work = make_workload(lm.tokenizer, requests=requests, prefix=prefix, own=30, new_tokens=new_tokens, rows=0)
        return cpu_seconds(lambda: lm.generate(rows_of(work)))

    def again(prefix: int) -> float:
        """The same prompts a second time: their prefix is kept."""
        seconds(prefix=prefix)
        return seconds(prefix=prefix)

    def candidates(count: int) -> float:
        """So many prompts of 300 tokens, each with the same eight questions."""
        rng = torch.Generator().manual_seed(count)
        prefixes = [tuple(torch.randint(1000, 20000, (300,), generator=rng).tolist()) for _ in range(count)]
        questions = [tuple(range(number * 40, number * 40 + 30)) for number in range(8)]
        rows = [Row(prefix + question, Sampling(max_tokens=16)) for prefix in prefixes for question in questions]
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
