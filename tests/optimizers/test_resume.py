"""A run that was killed at any moment, or met a full disk, ends with the same result after a restart."""

from __future__ import annotations

import random
import re
import time
from pathlib import Path

import psutil
import pytest

from tests.killable import STORING, content, run

CHECKPOINT = "training/*/checkpoint-*/complete.json"


def pieces(path: Path) -> int:
    """Number of pieces of work that a run has recorded."""
    return (path / "journal.jsonl").read_bytes().count(b"\n") if (path / "journal.jsonl").exists() else 0


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    path = tmp_path_factory.mktemp("undisturbed")
    assert run(path).status == 0
    return content(path)


def test_the_code_that_stores_results_is_where_runs_are_killed() -> None:
    assert all(Path(name).is_file() for name in STORING)


def test_two_runs_with_one_seed_write_identical_bytes(undisturbed: dict[str, bytes], tmp_path: Path) -> None:
    assert run(tmp_path).status == 0
    assert content(tmp_path) == undisturbed
    assert "state.json" in undisturbed


@pytest.mark.parametrize("where", ["moments", "lines"])
def test_a_run_killed_at_random_moments_ends_with_the_same_bytes(
    undisturbed: dict[str, bytes], tmp_path: Path, where: str
) -> None:
    """The run is killed thirty times: at any moment, or before any line of the code that stores results."""
    began = time.perf_counter()
    assert run(tmp_path / "timed").status == 0
    whole = time.perf_counter() - began
    rng = random.Random(where)
    kills, reached, number = 0, set(), 0
    while kills < 30:
        path = tmp_path / str(number)
        end = run(path, **{"seconds": rng.uniform(0, whole)} if where == "moments" else {"lines": rng.randint(1, 2000)})
        if end.killed:
            kills += 1
            reached.add(pieces(path))
        else:  # the run ended before that, so another one begins
            assert end.status == 0
            assert content(path) == undisturbed
            number += 1
    assert len(reached) >= 6, "the kills must fall into all of the work"
    assert run(tmp_path / str(number)).status == 0
    assert content(tmp_path / str(number)) == undisturbed


@pytest.mark.parametrize("seed", range(8))
def test_a_run_on_a_full_disk_fails_clearly_and_continues_when_there_is_room(
    undisturbed: dict[str, bytes], tmp_path: Path, seed: int
) -> None:
    room = random.Random(seed).randint(0, 15_000)
    end = run(tmp_path, room=room)
    assert end.status == 1
    assert end.error.startswith(f"StoreError: {tmp_path}")
    assert "cannot be written: File too large; free space" in end.error
    assert not (tmp_path / "state.json").exists()
    assert run(tmp_path).status == 0
    assert content(tmp_path) == undisturbed


@pytest.fixture(scope="module")
def trained(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a run that trains a real LM, which are the same when it is repeated."""
    paths = [tmp_path_factory.mktemp("trained") for _ in range(2)]
    assert [run(path, model=str(tiny_folder)).status for path in paths] == [0, 0]
    one, two = map(content, paths)
    assert any(name.endswith("adapter_model.safetensors") for name in one)
    assert one == two
    return one


def test_a_killed_run_that_trains_a_real_lm_ends_with_the_same_bytes(
    trained: dict[str, bytes], tiny_folder: Path, tmp_path: Path
) -> None:
    """The run is killed repeatedly, each time a little later, until it ends; and once when it has a checkpoint."""
    model, seconds, killed = str(tiny_folder), 0.5, 0
    while run(tmp_path / "often", model=model, seconds=seconds).killed:
        killed += 1
        seconds *= 1.2
    assert killed >= 2
    assert run(tmp_path / "once", model=model, until=CHECKPOINT).killed
    assert run(tmp_path / "once", model=model).status == 0
    assert content(tmp_path / "often") == content(tmp_path / "once") == trained


def test_a_checkpoint_that_does_not_fit_on_the_disk_is_named_and_training_continues(
    trained: dict[str, bytes], tiny_folder: Path, tmp_path: Path
) -> None:
    model = str(tiny_folder)
    assert run(tmp_path, model=model, until=CHECKPOINT).killed
    end = run(tmp_path, model=model, room=20_000)
    assert end.status == 1
    named = rf"StoreError: {tmp_path}/training/\w+/checkpoint-\d+ cannot be written: .*free space.*"
    assert re.fullmatch(named, end.error, re.DOTALL)
    assert list(tmp_path.glob(CHECKPOINT))
    assert run(tmp_path, model=model).status == 0
    assert content(tmp_path) == trained


def test_a_launched_training_ends_with_the_run_that_launched_it(tiny_folder: Path, tmp_path: Path) -> None:
    """Otherwise it would write into the folder that the next run trains in."""

    def training() -> bool:
        lines = [process.info["cmdline"] or [] for process in psutil.process_iter(["cmdline"])]
        return any(argument.startswith(str(tmp_path)) for line in lines for argument in line)

    assert run(tmp_path, model=str(tiny_folder), launched=True, until="training/*/progress.json").killed
    for _ in range(600):
        if not training():
            break
        time.sleep(0.1)
    assert not training()
    assert not list(tmp_path.glob("training/*/losses.json")), "it went on to its end"
