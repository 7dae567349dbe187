"""HotPotQA as a task: its data, its splits, its measures, and its command."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from benchmarks.tasks.hotpotqa import HotpotTask
from lmpipe import Job, Request, ScriptedLM, Session, evaluate, exact_match, initial_state, rollout
from lmpipe.cli import app
from lmpipe.errors import ConfigError
from lmpipe.retrieval import load_retriever
from tests.processes import run
from tests.rivers import CITIES, SEAS

PARTS = ("train", "validation", "test")
PASSAGES = [
    *({"title": f"&quot;{city}&quot;", "text": f"It lies on the {river}."} for city, river in CITIES.items()),
    *({"title": river, "text": f"It flows into the {sea}."} for river, sea in SEAS.items()),
]


def record(city: str, ask: str = "Where does the river of {} end?", level: str = "hard") -> dict[str, Any]:
    river = CITIES[city]
    return {
        "id": f"{city} {ask}",
        "question": ask.format(city),
        "answer": SEAS[river],
        "type": "comparison" if city == "Cairo" else "bridge",
        "level": level,
        "supporting_facts": {"title": [f'"{city}"', river, river], "sent_id": [0, 0, 1]},
    }


RECORDS = {
    "train": [*map(record, CITIES), record("Rome", "Which sea waits for the water of {}?")],
    "validation": [record(city, "To which sea leads {}?") for city in CITIES],
    "test": [record(city, "{} and the sea?") for city in ("Paris", "Rome", "Cairo")] + [record("London")],
}


def write(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress("".join(json.dumps(one) + "\n" for one in records).encode()))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for part in PARTS:
        write(folder / "hotpotqa" / f"{part}.jsonl.gz", RECORDS[part])
    write(folder / "hotpotqa" / "passages.jsonl.gz", [{"pid": n, **passage} for n, passage in enumerate(PASSAGES)])
    return folder


def test_the_parts_of_the_data_stay_apart(data: Path) -> None:
    """London's question is in the train and the test part of the data; it is used for testing only."""
    task = HotpotTask(data=str(data))
    split = task.split(4, 4, 4, seed=0)
    for found, part in zip((split.train, split.val, split.test), PARTS, strict=True):
        known = {one["question"] for one in RECORDS[part]}
        assert {example.inputs["question"] for example in found} <= known
    ids = [example.id for part in (split.train, split.val, split.test) for example in part]
    assert len(set(ids)) == len(ids) == 12
    assert split.test != task.split(4, 4, 4, seed=1).test
    assert task.split(4, 4, 4, seed=0) == split
    with pytest.raises(ConfigError, match="train part, has 4 different examples, but 5 are needed"):
        task.split(5, 4, 4, seed=0)


def test_an_example_knows_its_gold_titles_as_text(data: Path) -> None:
    example = next(one for one in HotpotTask(data=str(data)).examples().val if "Paris" in one.inputs["question"])
    assert example.inputs == {"question": "To which sea leads Paris?"}
    assert example.labels == {"answer": "Channel", "type": "bridge", "titles": ['"Paris"', "Seine"]}


def reader(request: Request) -> str:
    """Finds both passages for Paris and Cairo, only the first for Rome, and stops after the first for London."""
    asked, system = request.messages[-1].content, request.messages[0].content
    city = next(city for city in CITIES if city in asked.rpartition("question: ")[2])
    if "\nsearch_query:" not in system:
        return f"answer: the {SEAS[CITIES[city]]}" if city == "Paris" else "answer: Black Sea"
    if "lies on" not in asked:
        return f"search_query: {city}"
    return {"Rome": "search_query: Rome", "London": "Well"}.get(city, f"search_query: {CITIES[city]}")


def test_what_is_found_after_each_hop_is_measured(data: Path) -> None:
    task = HotpotTask(data=str(data), k=1)
    session = Session(lm=ScriptedLM(reader), retriever=load_retriever("bm25", task.passages))
    program, examples = task.program(), task.examples().val
    jobs = [Job(initial_state(program, session), example) for example in examples]
    traces = {trace.example.inputs["question"].split()[-1]: trace for trace in rollout(program, jobs, session)}
    values = {
        city.rstrip("?"): [measure(trace) for measure in task.measures.values()] for city, trace in traces.items()
    }
    assert list(task.measures) == ["F1", "recall@hop 1", "recall@hop 2", "all gold"]
    assert values == {
        "Paris": [1, 0.5, 1, 1],
        "London": [0, 0.5, 0.5, 0],
        "Rome": [0.5, 0.5, 0.5, 0],
        "Cairo": [0, 0.5, 1, 1],
    }
    assert traces["London?"].failure == "parse"
    found = evaluate(program, examples, exact_match, session, state=jobs[0].state, measures=task.measures)
    assert found.mean == 0.25
    assert {name: sum(of.values()) / 4 for name, of in found.measures.items()} == {
        "F1": 0.375,
        "recall@hop 1": 0.5,
        "recall@hop 2": 0.75,
        "all gold": 0.5,
    }
    assert found.measures["F1"].keys() == found.scores.keys()


def test_other_measures_are_not_answered_from_memory(data: Path) -> None:
    task = HotpotTask(data=str(data), k=1)
    session = Session(lm=ScriptedLM(reader), retriever=load_retriever("bm25", task.passages))
    program, examples = task.program(), task.examples().val
    state = initial_state(program, session)
    assert evaluate(program, examples, exact_match, session, state=state).measures == {}
    made = session.ledger.total.lm_calls
    first = evaluate(program, examples, exact_match, session, state=state, measures=task.measures)
    assert first.measures
    assert session.ledger.total.lm_calls == 2 * made
    assert evaluate(program, examples, exact_match, session, state=state, measures=task.measures) == first


HUB_CARD = """---
configs:
- config_name: fullwiki
  data_files:
  - {split: train, path: train.jsonl}
  - {split: validation, path: validation.jsonl}
---
"""


def test_the_hub_gives_hard_questions_and_training_ones_are_divided(tmp_path: Path) -> None:
    """The data are in a local folder, which the package datasets loads like the hub's, with its own cache."""
    hub = tmp_path / "hub"
    hub.mkdir()
    (hub / "README.md").write_text(HUB_CARD)
    asks = [f"Question {n} on {{}}?" for n in range(4)]
    records = [record(city, ask) for ask in asks for city in CITIES]
    others = [{**record("Rome", "Easy on {}?", "easy"), "context": {"title": ["Rome"]}}]
    for part, own in (("train", [*records[:12], *others]), ("validation", [*records[12:], *others])):
        lines = [json.dumps({"context": {"title": ["Paris"]}, **one}) for one in own]
        (hub / f"{part}.jsonl").write_text("\n".join(lines))
    script = (
        "import sys, json\nfrom benchmarks.tasks.hotpotqa import HotpotTask\n"
        "split = HotpotTask(hub=sys.argv[1]).examples()\n"
        "print(json.dumps([[one.inputs['question'] for one in part] for part in (split.train, split.val, split.test)]))"
    )
    loaded = subprocess.run(
        [sys.executable, "-c", script, str(hub)],
        env={**os.environ, "HF_HOME": str(tmp_path / "cache"), "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert loaded.returncode == 0, loaded.stderr[-2000:]
    train, val, test = json.loads(loaded.stdout.splitlines()[-1])
    asked = [one["question"] for one in records]
    assert (len(train), len(val)) == (9, 3)
    assert sorted(train + val) == sorted(asked[:12])
    assert sorted(test) == sorted(asked[12:])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "train.jsonl.gz, line 2: not JSON"),
        ("[1]", "train.jsonl.gz, line 2: not a JSON object"),
        ("[" * 100_000, "train.jsonl.gz, line 2: .* nested too deeply"),
        ('{"question": "Why?"}', "train.jsonl.gz, line 2: .* lacks a field .'answer'"),
        (json.dumps({**RECORDS["train"][0], "question": 5}), "train.jsonl.gz, line 2: .* that is not text"),
    ],
)
def test_damaged_data_are_named(data: Path, tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "hotpotqa").mkdir()
    for part in PARTS:
        text = json.dumps(RECORDS[part][0]) + "\n" + (line if part == "train" else "")
        (tmp_path / "hotpotqa" / f"{part}.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    with pytest.raises(ConfigError, match=message):
        HotpotTask(data=str(tmp_path)).examples()
    with pytest.raises(ConfigError, match=r"train\.jsonl\.gz cannot be read"):
        HotpotTask(data=str(tmp_path / "nowhere")).examples()


def test_passages_come_with_the_folder_or_with_the_retriever(data: Path) -> None:
    assert HotpotTask(data=str(data)).passages == f"{data}/hotpotqa/passages.jsonl.gz"
    assert replace(HotpotTask(), data=str(data)).passages == f"{data}/hotpotqa/passages.jsonl.gz"
    task = HotpotTask()
    with pytest.raises(ConfigError, match="write 'bm25:PASSAGES'"):
        load_retriever(task.retriever or "", task.passages)


def hotpotqa(*options: str, benchmark: str = "hotpotqa") -> subprocess.CompletedProcess[str]:
    return run("-m", f"benchmarks.{benchmark}", *options)


def test_the_command_writes_what_was_found(data: Path, tiny_folder: Path, tmp_path: Path) -> None:
    sizes = ["--train", "2", "--val", "2", "--test", "3", "--max-tokens", "40", "--structured"]
    options = ["--lm", f"hf:{tiny_folder}", "--data", str(data), "--out", str(tmp_path / "run"), *sizes]
    done = hotpotqa(*options, "--strategy", "vanilla", "--strategy", "p", "--strategy", "w")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    vanilla, searched, skipped = result["strategies"]
    for row in (vanilla, searched):
        assert list(row["quality"]) == ["F1", "recall@hop 1", "recall@hop 2", "all gold"]
        first, second = (row["quality"][f"recall@hop {hop}"]["all"]["mean"] for hop in (1, 2))
        assert 0 <= first <= second <= 1
        assert row["quality"]["all gold"]["all"]["n"] == 3
        assert row["quality"]["all gold"]["successful"]["n"] == 0
    assert skipped["quality"]["all gold"]["all"]["mean"] is None
    assert (skipped["outcomes"][0]["traces"], skipped["outcomes"][0]["modules"]) == (None, {})
    with pytest.raises(ConfigError, match="no traces of 'w', seed 0: w skipped on seed 0: none of"):
        CliRunner().invoke(app, ["trace", str(tmp_path / "run"), "--strategy", "w"], catch_exceptions=False)
    looked = CliRunner().invoke(app, ["prompt", str(tmp_path / "run"), "--strategy", "w"], catch_exceptions=False)
    assert looked.exit_code == 0, "the prompts of a state can be looked at without traces"
    assert searched["stages"][0]["cost"]["retrievals"] > 0
    assert "recall@hop 2" in done.stdout
    assert "recall@hop 2" in (tmp_path / "run" / "report.html").read_text()
    again = hotpotqa(*options, "--strategy", "vanilla", "--retriever", "bm25:/nowhere")
    assert "ConfigChanged" in again.stdout


def test_iris_has_no_such_options(tmp_path: Path) -> None:
    shown = hotpotqa("--help", benchmark="iris").stdout
    assert "--data" not in shown
    assert "--retriever" not in shown
    refused = hotpotqa("--out", str(tmp_path), "--data", "x", benchmark="iris")
    assert refused.returncode == 1
    assert "iris has no option --data" in refused.stdout
    assert "--retriever" in hotpotqa("--help").stdout


def test_its_settings_are_the_papers_and_smaller_for_the_bundled_lm() -> None:
    paper = HotpotTask().settings_for("hf:some/model")
    assert (paper.train, paper.val, paper.test, paper.num_train, paper.num_val) == (1000, 500, 1500, 100, 250)
    assert HotpotTask().settings_for("bundled").test < paper.test
