"""Checks for a machine with a CUDA GPU: ``python -m benchmarks.performance.gpu [--model ID_OR_PATH] [--json]``.

The checks are those that docs/gpu.md lists: greedy agreement with transformers, generation in bfloat16 against vLLM,
QLoRA on a base in 4 bits, and the memory budget.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from time import perf_counter
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from benchmarks.performance.metrics_table import Measurement, show_measurements
from benchmarks.performance.processes import BASELINE_SCRIPTS
from benchmarks.performance.workers.engine import rows_of
from benchmarks.performance.workload import Workload, make_workload
from lmpipe import RunStore, Session, WeightState
from lmpipe.engines.local import LocalLM
from lmpipe.engines.training import LocalTrainer, TuningConfig
from lmpipe.lm import Message
from lmpipe.trainer import TrainingRow

console = Console()


def agreement(model: str) -> dict[str, Measurement]:
    """Measures the share of prompts whose greedy tokens in float32 are those of transformers' generate."""
    torch.backends.cuda.matmul.allow_tf32 = False
    lm = LocalLM.from_pretrained(model, dtype=torch.float32)
    workload = make_workload(lm.tokenizer, requests=32, new_tokens=32, rows=0)
    rows = rows_of(workload)
    lm.generate(rows)
    lm.model.set_attn_implementation("sdpa")
    same = 0
    for row in rows:
        out = lm.model.generate(torch.tensor([row.prompt], device="cuda"), max_new_tokens=32, do_sample=False)
        same += out[0, len(row.prompt) :].tolist()[: len(row.tokens)] == row.tokens
    return {"float32: greedy answers equal to generate's": Measurement(same / len(rows), 1.0, "higher", "")}


def speed(model: str) -> dict[str, Measurement]:
    """Measures new tokens per second in bfloat16 and, where vLLM is installed, compares them with vLLM's."""
    lm = LocalLM.from_pretrained(model, dtype=torch.bfloat16)
    workload = make_workload(lm.tokenizer, requests=256, new_tokens=128, rows=0)
    lm.generate(rows_of(workload)[:8])
    rows = rows_of(workload)
    torch.cuda.synchronize()
    started = perf_counter()
    lm.generate(rows)
    torch.cuda.synchronize()
    rate = sum(len(row.tokens) for row in rows) / (perf_counter() - started)
    console.print(f"bfloat16: {rate:,.0f} new tokens per second")
    del lm
    torch.cuda.empty_cache()
    if importlib.util.find_spec("vllm") is None:
        console.print("vLLM is not installed here, so it is not measured")
        return {}
    return {"bfloat16: speed over vLLM's": Measurement(rate / _vllm_speed(model, workload), 0.5, "higher", "×")}


def _vllm_speed(model: str, workload: Workload) -> float:
    with tempfile.TemporaryDirectory() as folder:
        path = workload.write(Path(folder) / "workload.json")
        command = [sys.executable, str(BASELINE_SCRIPTS / "vllm_generate.py"), model, str(path), "bfloat16"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return float(sum(map(len, answer["tokens"])) / answer["seconds"])


def qlora(model: str) -> dict[str, Measurement]:
    """Checks that a base in 4 bits learns a few rows, and that the GPU's time is counted; prints the memory."""
    lm = LocalLM.from_pretrained(model, quantization="nf4")
    rows = [TrainingRow((Message("user", f"Say the word for {n}."),), f"The word is {n * 7}.") for n in range(32)]
    torch.cuda.reset_peak_memory_stats()
    with tempfile.TemporaryDirectory() as folder:
        store = RunStore(folder)
        session = Session(lm=lm, store=store)
        tuning = TuningConfig(
            method="qlora", rank=16, alpha=32, target_modules="all-linear", learning_rate=1e-3, epochs=5
        )
        result = LocalTrainer(lm, tuning).train(rows, WeightState(base=lm.name), session)
        store.close()
    spent = session.ledger.total
    console.print(f"QLoRA: {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB at most; losses {result.losses}")
    return {
        "QLoRA: last loss over first": Measurement(result.losses[-1] / result.losses[0], 0.5, "lower", "×"),
        "QLoRA: GPU seconds of its seconds": Measurement(spent.gpu_seconds / spent.seconds, 0.8, "higher", "×"),
    }


def budget(model: str) -> dict[str, Measurement]:
    """Measures the memory of generation besides the weights, relative to the budget for keys and values."""
    memory = 2 * 2**30
    lm = LocalLM.from_pretrained(model, dtype=torch.bfloat16, memory=memory)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    lm.generate(rows_of(make_workload(lm.tokenizer, requests=512, prefix=1000, suffix=200, rows=0)))
    used = torch.cuda.max_memory_allocated() - before
    return {"memory of 512 requests over a budget of 2 GiB": Measurement(used / memory, 1.5, "lower", "×")}


def main(
    model: Annotated[
        str, typer.Option(help="Id of a model on the hub, or a local folder.")
    ] = "HuggingFaceTB/SmolLM2-135M-Instruct",
    as_json: Annotated[bool, typer.Option("--json", help="End with one JSON object.")] = False,
) -> None:
    """Runs the checks that need a GPU."""
    if not torch.cuda.is_available():
        console.print("[bold red]there is no CUDA GPU here[/]; every check of this script needs one")
        raise typer.Exit(1)
    measurements: dict[str, Measurement] = {}
    for check in (agreement, speed, qlora, budget):
        console.print(f"{check.__name__}: {(check.__doc__ or '').splitlines()[0]}")
        measurements |= check(model)
        torch.cuda.empty_cache()
    show_measurements(f"{torch.cuda.get_device_name()}, {model}", measurements, as_json=as_json)


if __name__ == "__main__":
    typer.run(main)
