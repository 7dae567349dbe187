"""Trackers log the same values in every system: the real packages write files, which are read back."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
import traceback
from pathlib import Path

import pytest

from lmpipe import Session, initial_state
from lmpipe.errors import ConfigError
from lmpipe.events import CandidateScored, EpochEnded, Event, FindingMade, StageEnded, StageStarted, TracesCollected
from lmpipe.ledger import Cost
from lmpipe.storage.store import RunStore
from lmpipe.trackers import Tracker, WandbTracker, load_tracker
from tests.scripted import Colour, KeepingTrainer, examples, scheduler, scripted

Series = dict[str, list[tuple[int, float]]]
EVENTS: list[Event] = [
    CandidateScored("p", "zero-shot", 0.25, 8),
    CandidateScored("p", "shuffled 1", 0.5, 8),
    StageStarted("p", "BootstrapFewShot", 1, 2, 0),
    StageEnded("p", "done", 0.5, float("nan"), Cost(lm_calls=20, prompt_tokens=90, completion_tokens=10, seconds=1.5)),
    TracesCollected("p -> w", 3, 16, 2, 4, 6),
    EpochEnded("p -> w", 1, 2.0, 2.5),
    EpochEnded("p -> w", 2, 1.5),
    StageEnded("p -> w", "skipped", 0.75, 0.125, Cost(lm_calls=30, training_tokens=7, seconds=2.5), (0.5, 1.0), 8),
    FindingMade("p -> w", "worse", "the score fell", "another strategy"),
]
LOGGED: Series = {
    "candidate/score": [(1, 0.25), (2, 0.5)],
    "candidate/examples": [(1, 8), (2, 8)],
    "candidates/p/zero-shot": [(1, 0.25)],
    "candidates/p/shuffled 1": [(2, 0.5)],
    "stage/score": [(1, 0.5), (2, 0.75)],
    "stage/stderr": [(2, 0.125)],
    "stage/low": [(2, 0.5)],
    "stage/high": [(2, 1.0)],
    "stage/skipped": [(1, 0), (2, 1)],
    "stage/lm_calls": [(1, 20), (2, 30)],
    "stage/tokens": [(1, 100), (2, 7)],
    "stage/seconds": [(1, 1.5), (2, 2.5)],
    "stages/p": [(1, 0.5)],
    "stages/p-w": [(2, 0.75)],
    "trace/kept": [(1, 3)],
    "trace/tried": [(1, 16)],
    "trace/solved": [(1, 2)],
    "trace/examples": [(1, 4)],
    "trace/rows": [(1, 6)],
    "epoch/loss": [(1, 2.0), (2, 1.5)],
    "epoch/eval_loss": [(1, 2.5)],
}


def log(tracker: Tracker) -> None:
    with tracker:
        for event in EVENTS:
            tracker(event)


def from_tensorboard(folder: Path) -> Series:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.util.tensor_util import make_ndarray

    board = EventAccumulator(str(folder), size_guidance={"tensors": 0})  # 0 loads all of them
    board.Reload()
    return {
        name: [(event.step, make_ndarray(event.tensor_proto).item()) for event in board.Tensors(name)]
        for name in board.Tags()["tensors"]
    }


def from_mlflow(uri: str) -> Series:
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("lmpipe")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    return {
        name: [(metric.step, metric.value) for metric in client.get_metric_history(run.info.run_id, name)]
        for name in run.data.metrics
    }


def from_wandb(file: Path) -> Series:
    """The records of an offline run's log: checksum, length, kind, protocol buffer."""
    import wandb
    from wandb.proto.wandb_internal_pb2 import Record

    wandb.teardown()  # waits until its service has written everything
    data, at, series = file.read_bytes(), 7, Series()
    while at < len(data):
        (length,) = struct.unpack_from("<H", data, at + 4)
        record = Record.FromString(data[at + 7 : at + 7 + length])
        at += 7 + length
        row = {item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
        for name, value in row.items():
            kind, inner, _ = name.partition("/")
            if inner and not name.endswith("/number"):
                series.setdefault(name, []).append((row[f"{kind.removesuffix('s')}/number"], value))
    return series


def test_tensorboard_reads_what_was_logged(tmp_path: Path) -> None:
    log(load_tracker(f"tensorboard:{tmp_path}"))
    assert from_tensorboard(tmp_path) == LOGGED


def test_mlflow_reads_what_was_logged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    uri = (tmp_path / "mlruns").as_uri()
    log(load_tracker(f"mlflow:{uri}"))
    assert from_mlflow(uri) == LOGGED


def test_wandb_logs_offline(tmp_path: Path) -> None:
    log(WandbTracker("lmpipe", mode="offline", dir=str(tmp_path), settings={"silent": True}))
    (file,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    assert from_wandb(file) == LOGGED


def test_a_session_reports_stages_and_candidates_to_its_trackers(tmp_path: Path, store: RunStore) -> None:
    program = Colour()
    with load_tracker(f"tensorboard:{tmp_path}") as tracker:
        session = Session(lm=scripted(), store=store, callbacks=(tracker,))
        result = scheduler(KeepingTrainer()).optimize(
            program, initial_state(program, session), examples(12), examples(8, start=50), session
        )
    series = from_tensorboard(tmp_path)
    assert [step for step, _ in series["stage/score"]] == [1, 2, 3]
    assert series["stage/score"][-1][1] == pytest.approx(result.stages[-1].evaluation.mean)
    assert [value for _, value in series["stage/lm_calls"]] == [stage.cost.lm_calls for stage in result.stages]
    means = [candidate.mean for stage in result.stages for candidate in stage.result.candidates]
    assert [value for _, value in series["candidate/score"]][1:] == pytest.approx(means)  # after the initial state
    assert "candidates/p-w-p/zero-shot" in series


@pytest.mark.parametrize("package", ["tensorboard", "mlflow", "wandb"])
def test_a_missing_package_is_named(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError, match=rf"needs {package}: pip install 'lmpipe\[{package}\]'"):
        load_tracker(f"{package}:somewhere")


@pytest.mark.parametrize("spec", ["comet:here", "tensorboard", "wandb:"])
def test_an_unknown_tracker_is_named(spec: str) -> None:
    with pytest.raises(ConfigError, match=f"unknown tracker '{spec}'; write 'tensorboard:FOLDER'"):
        load_tracker(spec)


def test_mlflow_names_a_destination_that_it_cannot_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_ALLOW_FILE_STORE", raising=False)
    with pytest.raises(ConfigError, match=r"MLflow cannot log to './mlruns'.*MLFLOW_ALLOW_FILE_STORE"):
        load_tracker("mlflow:./mlruns")


def test_credentials_of_a_tracking_server_are_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    for uri in (
        "http://user:w0rd-of-mine@127.0.0.1:9",
        "http://127.0.0.1:9?token=w0rd-of-mine",
        "user:w0rd-of-mine@host",
    ):
        with pytest.raises(ConfigError, match="MLflow cannot log to") as raised:
            load_tracker(f"mlflow:{uri}")
        assert "w0rd" not in "".join(traceback.format_exception(raised.value))
    with pytest.raises(ConfigError, match="unknown tracker") as raised:
        load_tracker("comet:http://user:w0rd-of-mine@host")
    assert "w0rd" not in str(raised.value)


def test_an_error_while_logging_is_a_config_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="TensorBoard cannot write to"):
        log(load_tracker(f"tensorboard:{tmp_path / 'file' / 'board'}"))


def test_a_session_imports_no_tracker() -> None:
    code = "import sys, lmpipe, lmpipe.trackers; lmpipe.Session(lm=lmpipe.ScriptedLM(str)); print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "lmpipe.trackers" in loaded
    assert not {"mlflow", "tensorboard", "wandb"} & set(loaded)
