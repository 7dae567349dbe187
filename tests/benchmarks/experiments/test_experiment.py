"""The benchmark command end to end, with a real tiny LM: run, report, resume."""

from __future__ import annotations

import json
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from benchmarks.experiments.experiment import run_experiment
from benchmarks.experiments.models import ModelSpec
from benchmarks.experiments.spec import ExperimentSpec
from benchmarks.experiments.statistics import holm, paired_difference, score_of
from benchmarks.experiments.strategies import table_rows
from benchmarks.tasks.iris import IrisTask
from lmpipe.engines.local import LocalLM
from lmpipe.errors import ConfigError, StoreError
from lmpipe.ledger import MEASURED
from lmpipe.results.result import Result
from lmpipe.storage.hashing import digest
from tests.disk import full_disk
from tests.engines.openai_server import serving
from tests.processes import run, start


def command(tiny_folder: Path, out: Path, *more: str) -> list[str]:
    strategies = ["--strategy", "vanilla", "--strategy", "p", "--strategy", "p -> w"]
    return small(out, "--lm", f"hf:{tiny_folder}", *strategies, "--seeds", "0,1", *more)


def small(out: Path, *options: str) -> list[str]:
    sizes = ["--train", "6", "--val", "4", "--test", "3", "--max-tokens", "8"]
    return ["-m", "benchmarks.iris", "--out", str(out), *sizes, *options]


def without_seconds(result: dict[str, Any]) -> dict[str, Any]:
    assert len(result.pop("sum")) == 32
    for row in [result, *result["strategies"]]:
        for part in (row, *row.get("stages", ()), *row.get("outcomes", ())):
            assert all(part["cost"].pop(name) >= 0 for name in MEASURED)
    return result


@pytest.fixture(scope="module")
def finished(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run")
    process = run(*command(tiny_folder, out, "--track", f"tensorboard:{out}/board"))
    process.check_returncode()
    (out / "reported.txt").write_text(process.stderr)
    return out


def test_a_run_writes_its_table_and_its_report(finished: Path) -> None:
    result = json.loads((finished / "result.json").read_text())
    assert set(result) == {
        "schema_version",
        "task",
        "lm",
        "seeds",
        "config",
        "versions",
        "strategies",
        "comparisons",
        "findings",
        "cost",
        "sum",
    }
    assert [row["strategy"] for row in result["strategies"]] == ["vanilla", "p", "p -> w"]
    for row in result["strategies"]:
        assert set(row["test"]) == {"mean", "stderr", "low", "high", "n", "per_seed"}
        assert row["cost"]["lm_calls"] > 0
    stage = result["strategies"][2]["stages"][1]
    assert (stage["name"], stage["status"]) == ("w", "skipped")
    assert "nothing to train on" in stage["reason"]
    assert set(stage["cost"]["modules"]) == {"classify.predict"}
    assert ("skipped", "p -> w") in {(finding["kind"], finding["stage"]) for finding in result["findings"]}
    first, second = result["strategies"][2]["stages"]
    assert first["cost"]["lm_calls"] == result["strategies"][1]["stages"][0]["cost"]["lm_calls"]
    start = result["strategies"][0]["cost"]["lm_calls"]
    assert start == 2 * 4
    assert result["cost"]["lm_calls"] == start + first["cost"]["lm_calls"] + second["cost"]["lm_calls"]
    splits = json.loads((finished / "splits.json").read_text())
    assert {part: len(ids) for part, ids in splits["1"].items()} == {"train": 6, "val": 4, "test": 3}
    page = (finished / "report.html").read_text()
    assert page.count("<h2>Findings") == page.count("<h2>Costs") == 1
    assert set(re.findall(r'id="plot-([a-z-]+)"', page)) == {"scores", "by-stage", "gains", "candidates"}
    for written in (page, (finished / "report.md").read_text()):
        assert re.search(r"\* p (→|->) w: w skipped on seeds 0, 1: .*nothing to train on", written)
    assert f"python -m benchmarks.iris --out {finished} " in page
    assert not re.search(r"""(src|href)=["']https?:""", page), "the page must be self-contained"


def test_a_run_scores_the_initial_state_once(finished: Path) -> None:
    reported = (finished / "reported.txt").read_text()
    assert "initial state: " in reported
    assert "vanilla was not run again" not in reported


def test_a_run_is_tracked_where_it_is_asked_to_be(finished: Path) -> None:
    """Each of the two seeds has one stage of "p" and two of "p -> w"."""
    board = EventAccumulator(str(finished / "board"))
    board.Reload()
    assert len(board.Tensors("stage/score")) == 6
    assert len(board.Tensors("stages/p-w")) == 2


def test_a_killed_run_started_again_ends_in_the_same_result(finished: Path, tiny_folder: Path, tmp_path: Path) -> None:
    process = start(*command(tiny_folder, tmp_path))
    journal = tmp_path / "journal.jsonl"
    while process.poll() is None and not (journal.exists() and journal.read_bytes().count(b"\n") >= 2):
        time.sleep(0.01)
    assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "result.json").exists()
    run(*command(tiny_folder, tmp_path)).check_returncode()
    mine, theirs = (json.loads((path / "result.json").read_text()) for path in (tmp_path, finished))
    assert without_seconds(mine) == without_seconds(theirs)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_run_that_is_interrupted_says_that_it_goes_on_and_does(
    finished: Path, tiny_folder: Path, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    process = start(*command(tiny_folder, tmp_path))
    journal = tmp_path / "journal.jsonl"
    while process.poll() is None and not (journal.exists() and journal.read_bytes().count(b"\n") >= 2):
        time.sleep(0.01)
    started = time.monotonic()
    process.send_signal(number)
    assert process.wait(timeout=60) == code
    assert time.monotonic() - started < 3
    said = process.stderr
    assert said.strip().splitlines()[-1].startswith("interrupted; run the same command again to continue")
    assert "Traceback" not in said
    again = run(*command(tiny_folder, tmp_path))
    again.check_returncode()
    assert "Warning" not in again.stderr
    mine, theirs = (json.loads((path / "result.json").read_text()) for path in (tmp_path, finished))
    assert without_seconds(mine) == without_seconds(theirs)


def test_a_full_disk_leaves_the_result_of_before(finished: Path, tiny_folder: Path) -> None:
    before = {path: path.read_bytes() for path in (finished / "result.json", finished / "report.html")}
    assert min(map(len, before.values())) > 1000
    task, models = IrisTask(), ModelSpec(f"hf:{tiny_folder}")
    settings = task.settings.changed({"train": 6, "val": 4, "test": 3, "max_tokens": 8})
    spec = ExperimentSpec(task, models, settings, table_rows(["vanilla", "p", "p -> w"]), (0, 1), finished)
    with full_disk(1000), pytest.raises(StoreError, match=r"result\.json cannot be written: .*free space"):
        run_experiment(spec)
    assert {path: path.read_bytes() for path in before} == before


def test_other_settings_on_the_same_directory_are_refused(finished: Path, tiny_folder: Path) -> None:
    again = run(*command(tiny_folder, finished, "--val", "5"))
    assert again.returncode == 1
    assert "ConfigChanged" in again.stdout
    assert "(settings.val: 4 → 5)" in " ".join(again.stdout.split())


def test_a_mistake_before_anything_was_done_may_be_put_right_in_the_same_directory(
    tiny_folder: Path, tmp_path: Path
) -> None:
    wrong, right = (small(tmp_path, "--lm", f"hf:{path}", "--strategy", "vanilla") for path in ("/no/lm", tiny_folder))
    assert run(*wrong).returncode == 1
    assert (tmp_path / "config.json").is_file()
    run(*right).check_returncode()


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--strategy", "p -> q", "no stage is called 'q'"),
        ("--seeds", "one", "must be whole numbers"),
        ("--seeds", "1,0,1", "names a seed twice"),
        ("--test", "0", "test: Input should be greater than 0"),
        ("--lm", "gpt", "unknown LM 'gpt'"),
        ("--ray", "auto", "no Ray at 'auto'"),  # on a machine where a Ray runs it is joined, and this fails in time
        ("--ray", "nowhere", "no Ray at 'nowhere'"),
        ("--track", "comet:here", "unknown tracker 'comet:here'"),
        ("--train", "500", "150 different examples, but 507 are needed"),
        ("--lm", "openai:m@http://127.0.0.1:9/v1", "cannot be fine-tuned here; add --train-lm with the same model"),
    ],
)
def test_bad_options_are_named(tiny_folder: Path, tmp_path: Path, option: str, value: str, message: str) -> None:
    refused = run(*command(tiny_folder, tmp_path, option, value))
    assert refused.returncode == 1
    assert message in " ".join(refused.stdout.split())


def test_a_run_on_a_server_trains_a_model_of_the_same_name(tiny_folder: Path, tmp_path: Path) -> None:
    """The password in the URL of the second run is in none of its files."""
    with serving(model=str(tiny_folder)) as fake:
        options = ["--train-lm", f"hf:{tiny_folder}", "--cache", str(tmp_path / "cache.db"), "--strategy", "w"]
        for out, url in (("first", fake.url), ("second", fake.url.replace("//", "//user:w0rd-of-mine@"))):
            printed = run(*small(tmp_path / out, "--lm", f"openai:{tiny_folder}@{url}", *options))
            printed.check_returncode()
            assert "w0rd" not in printed.stdout + printed.stderr
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and b"w0rd" in path.read_bytes()]
    assert "@127.0.0.1" in (tmp_path / "second" / "report.html").read_text()
    first, second = (json.loads((tmp_path / out / "result.json").read_text()) for out in ("first", "second"))
    assert without_seconds(first) == without_seconds(second)
    assert len(fake.bodies) == len({json.dumps(body, sort_keys=True) for body in fake.bodies})
    with pytest.raises(ConfigError, match="serve the model by that name"):
        ModelSpec("openai:m@http://127.0.0.1:9/v1", f"hf:{tiny_folder}").load(to_train=True)


def test_processes_of_one_machine_share_its_memory(tiny_folder: Path) -> None:
    alone, beside = (ModelSpec(f"hf:{tiny_folder}").load(to_train=False, num_processes=count)[0] for count in (1, 4))
    assert isinstance(alone, LocalLM)
    assert isinstance(beside, LocalLM)
    assert 0.15 < beside.limits.memory / alone.limits.memory < 0.4  # what is free changes in between


def test_iris_is_split_into_disjoint_stratified_parts() -> None:
    split = IrisTask().split(50, 50, 50, seed=0)
    ids = [example.id for part in (split.train, split.val, split.test) for example in part]
    assert len(set(ids)) == 150
    for part in (split.train, split.val, split.test):
        labels = [example.labels["answer"] for example in part]
        assert {labels.count(label) for label in set(labels)} <= {16, 17}
    assert split != IrisTask().split(50, 50, 50, seed=1)
    with pytest.raises(ConfigError, match="150 different examples"):
        IrisTask().split(100, 50, 50, seed=0)


@pytest.mark.parametrize("seed", range(6))
def test_the_flower_that_stands_in_the_data_twice_is_in_one_part(seed: int) -> None:
    split = IrisTask().split(50, 50, 50, seed)
    parts = [{digest([dict(flower.inputs), dict(flower.labels)]) for flower in part} for part in split.parts.values()]
    assert len(set().union(*parts)) == sum(map(len, parts)) == 149


def test_scores_over_seeds() -> None:
    one = score_of([[1.0, 0.0, 1.0, 0.0]])
    assert (one.mean, one.n, one.per_seed) == (0.5, 4, [0.5])
    assert (one.low, one.high) == (0, 1)
    assert one.stderr == pytest.approx(0.288675)
    several = score_of([[1.0, 0.0], None, [1.0, 1.0]])
    assert (several.mean, several.stderr, several.n, several.per_seed) == (0.75, 0.25, 4, [0.5, None, 1.0])
    assert several.low == 0.25
    assert several.high == 1
    assert score_of([None]).percent == "—"
    assert score_of([[1.0] * 9, [1.0] * 9]).percent == "100 (100–100)"


def test_a_paired_difference_has_an_interval() -> None:
    better = {(seed, str(n)): float(n % 4 > 0) for seed in range(5) for n in range(20)}
    worse = {(seed, str(n)): float(n % 2) for seed in range(5) for n in range(20)}
    found = paired_difference("p", better, "vanilla", worse)
    assert found.difference == pytest.approx(0.25)
    assert 0 < found.low < 0.25 < found.high < 0.5
    assert (found.wins, found.losses, found.ties) == (25, 0, 75)
    assert found.p == pytest.approx(2 / 10_000)
    assert paired_difference("p", worse, "vanilla", worse).p == 1


def test_what_is_no_number_does_not_count_in_a_score_or_a_difference() -> None:
    nan = float("nan")
    assert score_of([[1.0, nan, 0.0], [nan]]) == score_of([[1.0, 0.0], None])
    assert score_of([[nan]]).percent == "—"
    one, other = {(0, str(n)): float(n % 2) for n in range(6)}, {(0, str(n)): 0.0 for n in range(8)}
    assert paired_difference("p", {**one, (0, "6"): nan}, "vanilla", other) == paired_difference(
        "p", one, "vanilla", other
    )
    with pytest.raises(ConfigError, match="no scored example in common"):
        paired_difference("p", {(0, "a"): nan}, "vanilla", {(0, "a"): 1.0})


@pytest.mark.parametrize(("pairs", "p"), [(1, 1), (2, 2 / 4), (3, 2 / 8)])
def test_the_permutation_test_is_exact_for_few_pairs(pairs: int, p: float) -> None:
    """Of the 8 ways to swap three pairs, two are as extreme as the observed one; of the 2 for one pair, both."""
    better = {(0, str(n)): float(n < pairs) for n in range(5)}
    found = paired_difference("p", better, "vanilla", dict.fromkeys(better, 0.0))
    assert found.p == pytest.approx(p)


@given(st.lists(st.floats(0, 1), max_size=8))
def test_holm_corrects_upwards_and_keeps_the_order(values: list[float]) -> None:
    corrected = holm(values)
    for one, also in zip(values, corrected, strict=True):
        assert round(one, 6) <= also <= 1
    assert sorted(corrected) == [corrected[place] for place in sorted(range(len(values)), key=values.__getitem__)]
    assert holm([0.01, 0.04, 0.03]) == [0.03, 0.06, 0.06]


def test_the_bundled_lm_has_settings_of_its_own() -> None:
    assert IrisTask().settings_for("hf:some/model").tuning.learning_rate == 1e-5
    assert IrisTask().settings_for("bundled").tuning.learning_rate > 1e-5


def test_result_json_is_read_back(finished: Path, tmp_path: Path) -> None:
    text = (finished / "result.json").read_text()
    Result.read(finished / "result.json").write(tmp_path / "result.json")
    assert (tmp_path / "result.json").read_text() == text
