"""Inspecting a finished run: ``lmpipe show``, ``trace``, ``prompt``, ``export`` and ``diff``."""

from __future__ import annotations

import gzip
import io
import json
import math
import re
import runpy
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import final

import pytest
import torch
from peft import PeftModel
from rich.console import Console
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import lmpipe
from benchmarks.experiments.experiment import run_experiment
from benchmarks.experiments.models import ModelSpec
from benchmarks.experiments.spec import ExperimentSpec
from benchmarks.experiments.strategies import table_rows
from benchmarks.experiments.task import Task
from lmpipe import Example, Metric, Module, Prediction, ProgramState, Trace
from lmpipe.cli import app
from lmpipe.cli.terminal import show_error
from lmpipe.errors import ConfigError, CorruptBlob
from lmpipe.ledger import MEASURED
from lmpipe.program.evaluate import Measure
from lmpipe.results.result import Result
from lmpipe.run_directory import open_run
from lmpipe.storage.checksummed_json import read_checksummed, write_checksummed
from lmpipe.storage.hashing import digest_bytes
from programs import Iris
from tests.test_docs import snippets

SPECIES = ("setosa", "versicolor", "virginica")
SIZES = {"petal_length": 1.4, "petal_width": 0.2, "sepal_length": 5.1, "sepal_width": 3.5}


def easy(example: Example, prediction: Prediction) -> float:
    """Scores half of the flowers as correct whatever the answer, so that there are traces to train on."""
    return float(example.inputs["petal_length"] % 2 < 1)


def words(trace: Trace) -> float:
    return float(sum(len((step.text or "").split()) for step in trace.lm_steps))


@final
@dataclass(frozen=True)
class Flowers(Task):
    name: str = "flowers"
    measures: Mapping[str, Measure] = field(default_factory=lambda: {"words written": words, "the same": words})

    def examples(self) -> Sequence[Example]:
        return [
            Example({**SIZES, "petal_length": n + 0.5}, {"answer": SPECIES[n % 3]}, id=f"f{n:02}") for n in range(24)
        ]

    def program(self) -> Module:
        return Iris()

    def metric(self) -> Metric:
        return easy


def make_run(out: Path, folder: Path, **changes: object) -> Path:
    sizes = {"train": 6, "val": 4, "test": 4, "num_train": 6, "num_val": 4, "max_tokens": 40, "structured": True}
    task = Flowers()
    settings = task.settings.changed({**sizes, **changes})
    strategies = table_rows(["vanilla", "p -> w"])
    run_experiment(ExperimentSpec(task, ModelSpec(f"hf:{folder}"), settings, strategies, (3, 4), out))
    return out


@pytest.fixture(scope="module")
def run(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "first", tiny_folder)


@pytest.fixture(scope="module")
def free(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with other settings, in which completions have any form."""
    return make_run(tmp_path_factory.mktemp("runs") / "free", tiny_folder, structured=False, max_tokens=41)


def run_cli(*arguments: str | Path) -> str:
    done = CliRunner().invoke(app, list(map(str, arguments)), catch_exceptions=False)
    assert done.exit_code == 0
    return done.stdout


def test_the_table_is_the_one_of_the_benchmark(run: Path) -> None:
    table = run_cli("show", run)
    for row in open_run(run).result.strategies:
        assert row.strategy in table
        assert row.test.percent in table
        assert row.quality["words written"].all.percent in table
    assert "test %" in table
    assert "…" not in table, "80 columns are enough"


def test_a_trace_shows_what_was_sent_answered_and_read(run: Path) -> None:
    opened = open_run(run)
    outcome = opened.outcome("p -> w", seed=4)
    record = next(opened.records(outcome))
    step = record.steps[0]
    assert step.text
    shown = run_cli("trace", run, "--strategy", "p -> w", "--seed", "4", "--example", record.example)
    scored = f"score {record.score:g}, words written {len(step.text.split())}"
    for part in (*(content for _, content in step.messages), step.text, scored, step.path):
        assert part in shown
    assert shown.count("example f") == 1
    inner, outer = (run_cli("trace", run, "--module", path) for path in (step.path, step.path.partition(".")[0]))
    assert inner == outer
    assert "completion" in inner
    for command in ("trace", "prompt"):
        with pytest.raises(ConfigError, match=f"no module 'no.such'; the modules are {step.path}"):
            run_cli(command, run, "--module", "no.such")


def test_only_failed_traces_are_shown_with_errors(free: Path) -> None:
    shown = run_cli("trace", free, "--strategy", "vanilla", "--errors", "--limit", "2")
    assert shown.count("failed (parse)") == 2
    assert shown.count("error: field 'answer'") == 2


def test_traces_without_calls_are_shown_too(run: Path, tmp_path: Path) -> None:
    """For example, because the program fails before its first call."""
    copy = shutil.copytree(run, tmp_path / "run")
    result = Result.read(copy / "result.json").model_dump(mode="json")
    records = list(open_run(run).records(open_run(run).outcome("vanilla")))
    unreached = [record.model_copy(update={"steps": (), "failure": "program"}) for record in records]
    log = gzip.compress("\n".join(record.model_dump_json() for record in unreached).encode())
    result["strategies"][0]["outcomes"][0]["traces"] = digest_bytes(log)
    (copy / "blobs" / digest_bytes(log)).write_bytes(log)
    write_checksummed(copy / "result.json", result)
    assert run_cli("trace", copy, "--strategy", "vanilla", "--errors").count("failed (program)") == len(records)
    assert run_cli("prompt", copy, "--strategy", "vanilla") == "vanilla, seed 3\n"


def test_prompts_are_shown_as_they_are_sent(run: Path) -> None:
    outcome = open_run(run).outcome("p -> w", seed=3)
    (prompt,) = outcome.state.prompts.values()
    shown = run_cli("prompt", run, "--strategy", "p -> w", "--seed", "3")
    assert prompt.instructions in shown
    assert shown.count("assistant\n") == len(prompt.demos)


def test_an_export_is_loaded_by_peft_and_has_the_same_state(run: Path, tiny_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run_cli("export", run, out, "--strategy", "p -> w", "--seed", "4")
    state = ProgramState.model_validate_json((out / "state.json").read_text())
    assert state == open_run(run).outcome("p -> w", seed=4).state
    tuned = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_folder), out / "adapter")
    tokens = torch.arange(5)[None]
    with torch.no_grad(), tuned.disable_adapter():
        before = tuned(tokens).logits
    with torch.no_grad():
        assert not torch.equal(tuned(tokens).logits, before)
    card = (out / "README.md").read_text()
    assert next(iter(state.prompts.values())).instructions in card
    assert open_run(run).strategy("p -> w").test.percent in card
    assert re.search(r"vllm serve .* --max-lora-rank \d+ ", card)
    with pytest.raises(ConfigError, match="already exists and holds something else"):
        run_cli("export", run, out)


def test_an_outcome_is_loaded_from_its_run_and_from_its_export(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_cli("export", run, out := tmp_path / "out", "--strategy", "p -> w", "--seed", "4")
    sessions = [lmpipe.load(run, strategy="p -> w", seed=4), lmpipe.load(out)]
    outcome = open_run(run).outcome("p -> w", seed=4)
    record = next(open_run(run).records(outcome))
    for session in sessions:
        assert session.state == outcome.state
        assert (session.seed, session.structured) == (4, True)
        assert session.sampling == Flowers().settings.changed({"max_tokens": 40}).sampling()
        evaluation = lmpipe.evaluate(
            Iris(), [flower for flower in Flowers().examples() if flower.id == record.example], easy, session
        )
        assert evaluation.scores == {record.example: record.score}
        assert session.history()[0].text == record.steps[0].text, "the same call has the same answer"
    card = snippets(out / "README.md")
    (tmp_path / "card.py").write_text(card)
    monkeypatch.chdir(out)
    runpy.run_path(str(tmp_path / "card.py"))
    with pytest.raises(ConfigError, match="has no seed 9; it has 3, 4"):
        lmpipe.load(run, seed=9)


def test_the_best_row_has_a_score_and_without_any_it_is_the_first(run: Path) -> None:
    finished = open_run(run)
    row = finished.result.strategies[0]

    def best_of(*means: float | None) -> str:
        rows = [
            row.model_copy(update={"strategy": str(number), "val": row.val.model_copy(update={"mean": mean})})
            for number, mean in enumerate(means)
        ]
        return replace(finished, result=finished.result.model_copy(update={"strategies": rows})).strategy().strategy

    assert best_of(math.nan, 0.0, 0.5, 0.5, None) == "2"
    assert best_of(None, math.nan) == "0"
    with pytest.raises(ConfigError, match="has no result yet"):
        best_of()


def test_without_its_result_a_benchmark_is_read_from_its_journal(run: Path, tmp_path: Path) -> None:
    """As while it is going on; its test scores are then unknown."""
    copy = shutil.copytree(run, tmp_path / "run")
    (copy / "result.json").unlink()
    recorded, finished = open_run(copy), open_run(run)
    assert (recorded.result.task, recorded.result.lm) == (finished.result.task, finished.result.lm)
    assert recorded.result.seeds == finished.result.seeds
    assert recorded.provenance == finished.provenance
    assert recorded.notes == ()
    assert _without_times(recorded.result.cost) == _without_times(finished.result.cost)
    for row, other in zip(recorded.result.strategies, finished.result.strategies, strict=True):
        assert row.strategy == other.strategy
        assert row.val.per_seed == other.val.per_seed
        assert [stage.per_seed for stage in row.stages] == [stage.per_seed for stage in other.stages]
        assert [outcome.state for outcome in row.outcomes] == [outcome.state for outcome in other.outcomes]
        assert row.test.percent == "—"
    shown = run_cli("diff", run, copy)
    assert "settings: no difference" in shown
    assert "+p -> w: —" in shown
    assert f"on {recorded.examples} examples" in run_cli("trace", copy)
    assert recorded.traces("p -> w", seed=4)


def _without_times(cost: dict[str, object]) -> dict[str, object]:
    return {name: value for name, value in cost.items() if name not in MEASURED}


def test_a_failed_export_leaves_no_folder(run: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(run, tmp_path / "run")
    outcome = open_run(copy).outcome("p -> w", seed=4)
    (weights,) = outcome.state.weights.values()
    (copy / "blobs" / str(weights.adapter) / "adapter_config.json").unlink()
    with pytest.raises(CorruptBlob):
        run_cli("export", copy, tmp_path / "out", "--strategy", "p -> w", "--seed", "4")
    assert not (tmp_path / "out").exists()


def test_a_damaged_result_is_reported(run: Path, tmp_path: Path) -> None:
    (tmp_path / "result.json").write_bytes((run / "result.json").read_bytes()[:-100])
    with pytest.raises(CorruptBlob, match=r"result\.json is damaged"):
        run_cli("show", tmp_path)


def test_errors_are_shown_with_their_brackets() -> None:
    text = io.StringIO()
    show_error(ConfigError("run: pip install 'lmpipe[retrieval]' [/b]"), Console(file=text))
    assert text.getvalue() == "ConfigError: run: pip install 'lmpipe[retrieval]' [/b]\n"


def test_a_difference_shows_settings_scores_and_prompts(run: Path, free: Path, tmp_path: Path) -> None:
    shown = run_cli("diff", run, free, "--strategy", "vanilla")
    assert '-    "max_tokens": 40' in shown
    assert '+    "max_tokens": 41' in shown
    assert "versions: no difference" in shown
    copy = shutil.copytree(run, tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"lm": "another"}))
    assert '+  "lm": "another"' in run_cli("diff", run, copy)
    assert "prompts of vanilla, seed 3: no difference" in shown


def test_damage_and_missing_names_are_reported(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"neither result\.json nor journal\.jsonl"):
        run_cli("show", tmp_path)
    with pytest.raises(ConfigError, match=r"no strategy 'w'; it has vanilla, p -> w"):
        run_cli("trace", run, "--strategy", "w")
    with pytest.raises(ConfigError, match="no seed 9; it has 3, 4"):
        run_cli("prompt", run, "--seed", "9")
    copy = shutil.copytree(run, tmp_path / "copy")
    outcome = open_run(copy).outcome("vanilla")
    log = copy / "blobs" / str(outcome.traces)
    log.write_bytes(log.read_bytes()[:-5])
    with pytest.raises(CorruptBlob, match=str(outcome.traces)):
        run_cli("trace", copy, "--strategy", "vanilla")
    result = read_checksummed(copy / "result.json")
    (copy / "result.json").write_text(json.dumps({**result, "schema_version": 4}))
    with pytest.raises(ConfigError, match=r"result\.json has no checksum: another version wrote it"):
        run_cli("show", copy)
    for changes, message in (
        ({"schema_version": 4}, "its schema_version is 4"),
        ({"strategies": [{}]}, "strategies.0"),
    ):
        write_checksummed(copy / "result.json", {**result, **changes})
        with pytest.raises(ConfigError, match=f"of another version: (?s:.)*{message}"):
            run_cli("show", copy)
