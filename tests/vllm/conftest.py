"""SmolLM2 in the local engine, on a vLLM server and in vLLM in this process, and an adapter for it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

import pytest

from lmpipe import LM, RunStore, Session, WeightState
from lmpipe.engines.bundled import NAME, load_bundled
from lmpipe.engines.local import LocalLM
from lmpipe.engines.server import ServerLM
from lmpipe.engines.training import LocalTrainer, TuningConfig
from lmpipe.engines.vllm import VllmLM
from lmpipe.lm import Message
from lmpipe.trainer import TrainingRow

CONTEXT = 2048
START_TIMEOUT = 300  # seconds


@pytest.fixture(scope="session")
def local() -> LocalLM:
    """The local engine, with which the others are compared."""
    return load_bundled()


@pytest.fixture(scope="session")
def folder(local: LocalLM) -> str:
    """Folder of the model."""
    return str(local.model.name_or_path)


@pytest.fixture(scope="session")
def url(folder: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Base URL of a running vLLM server."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("server") / "log"
    options = ["--model", folder, "--served-model-name", NAME, "--port", str(port), "--dtype", "float32"]
    options += ["--max-model-len", str(CONTEXT), "--enable-lora", "--max-lora-rank", "16", "--enforce-eager"]
    options += ["--max-loras", "2"]  # one more than adapters: on CPU, base rows of a mixed batch use the last slot
    options += ["--no-enable-chunked-prefill"]  # on CPU, a seeded request with a chunked prompt crashes the server
    options += ["--max-num-seqs", "8"]  # on CPU, adapters are slow; few sequences let later requests use cached prompts
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *options]
    environment = {**os.environ, "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True"}
    with log.open("w") as out:
        server = subprocess.Popen(command, stdout=out, stderr=out, env=environment)
    try:
        _wait_until_healthy(server, f"http://127.0.0.1:{port}/health", log)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.terminate()
        server.wait()


def _wait_until_healthy(server: subprocess.Popen[bytes], health: str, log: Path) -> None:
    end = time.monotonic() + START_TIMEOUT
    while not _answers(health):
        if time.monotonic() > end or server.poll() is not None:
            raise RuntimeError(f"the server did not start:\n{log.read_text()[-3000:]}")
        time.sleep(1)


def _answers(url: str) -> bool:
    try:
        urllib.request.urlopen(url, timeout=5).close()  # noqa: S310
    except OSError:
        return False
    return True


@pytest.fixture(scope="session")
def server(url: str) -> Iterator[ServerLM]:
    lm = ServerLM(NAME, [url])
    yield lm
    lm.close()


@pytest.fixture(scope="session")
def in_process(folder: str) -> VllmLM:
    return VllmLM.from_pretrained(
        folder,
        name=NAME,
        max_lora_rank=16,
        dtype="float32",
        max_model_len=CONTEXT,
        enforce_eager=True,
    )


@pytest.fixture(scope="session", params=["server", "in_process"])
def vllm(request: pytest.FixtureRequest) -> LM:
    """vLLM behind HTTP, and vLLM in this process."""
    lm: LM = request.getfixturevalue(request.param)
    return lm


@pytest.fixture(scope="session")
def tuned(local: LocalLM, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[WeightState, Path]]:
    """Weights tuned to answer with exclamation marks, and the folder of their adapter."""
    rows = [
        TrainingRow((Message("user", f"What is {number} plus one?"),), f"It is {number + 1}!!!") for number in range(16)
    ]
    store = RunStore(tmp_path_factory.mktemp("run"))
    tuning = TuningConfig(rank=16, alpha=32, target_modules="all-linear", learning_rate=1e-3, epochs=8)
    trainer = LocalTrainer(local, tuning)
    weights = trainer.train(rows, WeightState(base=NAME), Session(lm=local, store=store)).weights
    yield weights, store.folder(str(weights.adapter))
    store.close()
