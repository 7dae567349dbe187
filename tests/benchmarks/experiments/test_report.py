"""The report of a run with content in every section: gains, changed examples, searches, training and failures."""

from __future__ import annotations

import re
from pathlib import Path

import pandas
import pytest
from markupsafe import escape

from benchmarks.experiments.models import ModelSpec
from benchmarks.experiments.report import write_report
from benchmarks.experiments.report.confusion import confusions
from benchmarks.experiments.report.rows import cost_of_seed, difference, efficiencies, module_rows, stage_tree
from benchmarks.experiments.report.trace_examples import TraceReader, changes, endings, prompts
from benchmarks.experiments.run import run
from benchmarks.experiments.settings import Settings
from benchmarks.experiments.spec import ExperimentSpec, LoadedModels
from benchmarks.experiments.strategies import table_rows
from lmpipe import ScriptedLM
from lmpipe.engines.local import LocalLM
from lmpipe.engines.training import TuningConfig
from lmpipe.errors import CorruptBlob
from lmpipe.results.result import Result, Score
from lmpipe.results.trace_log import read_trace_log
from lmpipe.storage.store import RunStore
from tests.benchmarks.experiments.chromium import CHROMIUM, look
from tests.benchmarks.experiments.rivers_task import RiversTask, reader
from tests.rivers import SEAS, WordOverlap

STRATEGIES = ("vanilla", "p", "w", "p -> w -> p")
COMMAND = "python -m benchmarks.rivers --strategy 'p -> w -> p' --out runs/rivers"


@pytest.fixture(scope="module")
def ran(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Result, Path]:
    """A run of two seeds; the scripted LM answers, and a tiny LM of the same name is trained."""
    out = tmp_path_factory.mktemp("rivers")
    settings = Settings(
        train=8,
        val=8,
        test=8,
        num_train=8,
        num_val=8,
        num_candidate_programs=2,
        tuning=TuningConfig(rank=2, alpha=4, epochs=1, batch_size=4),
    )
    trained = LocalLM.from_pretrained(str(tiny_folder), name="reader")
    store = RunStore(out)
    spec = ExperimentSpec(RiversTask(), ModelSpec("scripted"), settings, table_rows(STRATEGIES), (0, 1), out)
    result = run(spec, LoadedModels(ScriptedLM(reader, name="reader"), trained, WordOverlap()), store)
    store.close()
    write_report(result, out, "answer", COMMAND)
    return result, out


@pytest.fixture(scope="module")
def page(ran: tuple[Result, Path]) -> str:
    return (ran[1] / "report.html").read_text()


SECTIONS = ("results", "stages", "differences", "findings", "costs", "measures", "runs", "confusion", "learning")
TOLD = ("changes", "prompts", "settings", "command", "tree", "tiles")
PLOTS = ("scores", "by-stage", "gains", "measures", "candidates", "losses")


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium to look at the page with (Debian: chromium)")
@pytest.mark.parametrize("width", [360, 1100])
def test_a_browser_shows_all_of_it(ran: tuple[Result, Path], tmp_path: Path, width: int) -> None:
    """At the width of a phone and of a desktop, nothing is wider than the page, and the console is empty."""
    measured, console = look(ran[1] / "report.html", width, tmp_path)
    assert console == []
    assert {*SECTIONS, *TOLD} <= set(measured["ids"])
    assert len(set(measured["ids"])) == len(measured["ids"])
    assert set(measured["plots"]) == {f"plot-{name}" for name in PLOTS}
    for wide, high in measured["plots"].values():
        assert 200 < wide < width
        assert high > 100
    assert len(measured["tables"]) >= 10
    assert min(measured["tables"]) >= 2
    assert measured["folded"] == measured["open"] == width


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium to look at the page with (Debian: chromium)")
def test_the_browser_notices_wide_pages_and_console_messages(tmp_path: Path) -> None:
    bad = "<!doctype html><details><div style='width: 500px'>wide</div></details><script>console.error('no')</script>"
    (tmp_path / "bad.html").write_text(bad)
    measured, console = look(tmp_path / "bad.html", 360, tmp_path)
    assert measured["folded"] == 360
    assert measured["open"] >= 500
    assert len(console) == 1


def test_it_needs_no_other_file_and_runs_nothing(page: str) -> None:
    assert not re.search(r"""(src|href)=["']?(https?:|//|file:)""", page)
    assert "<script" not in page
    assert "&lt;script&gt;alert(" in page, "what a trace holds is text"
    assert COMMAND.replace("'", "&#39;").replace(">", "&gt;") in page


def test_lists_are_shown_as_they_are_written(page: str) -> None:
    """Letters and apostrophes of titles are not escaped."""
    assert "\\u00" not in page


def test_costs_of_a_seed_are_those_of_the_seeds_that_have_a_score(ran: tuple[Result, Path]) -> None:
    row = ran[0].strategies[2]
    half = row.test.model_copy(update={"per_seed": [None, row.test.per_seed[1]]})
    assert cost_of_seed(row, "lm_calls") == row.cost["lm_calls"] / 2
    assert cost_of_seed(row.model_copy(update={"test": half}), "lm_calls") == row.outcomes[1].cost["lm_calls"]


def test_it_is_the_same_every_time(ran: tuple[Result, Path]) -> None:
    result, out = ran
    names = ("report.html", "report.md", "results.csv", "scores.csv", "scores.svg")
    before = [(out / name).read_bytes() for name in names]
    write_report(result, out, "answer", COMMAND)
    assert [(out / name).read_bytes() for name in names] == before
    assert "rivers --strategy" not in result.model_dump_json(), "a result is the same in every directory"


def test_scores_and_differences_are_shown_with_their_intervals(ran: tuple[Result, Path], page: str) -> None:
    result, out = ran
    text = (out / "report.md").read_text()
    for row in result.strategies:
        assert row.test.percent in page
        assert f"| `{row.strategy}` | {row.val.percent} | {row.test.percent} |" in text
    for one in result.comparisons:
        points = f"{100 * one.difference:+.1f} ({100 * one.low:+.1f} to {100 * one.high:+.1f})"
        counts = f"{one.wins} | {one.losses} | {one.ties} |"
        assert f"| `{one.strategy}` | `{one.baseline}` | {points} | {one.p:.4f} |" in text
        assert counts in text
        assert points in page


def test_a_difference_can_be_read_from_either_side(ran: tuple[Result, Path]) -> None:
    result, _ = ran
    there, back = difference(result, "p", "vanilla"), difference(result, "vanilla", "p")
    assert there is not None
    assert back is not None
    assert (back.difference, back.low, back.high) == (-there.difference, -there.high, -there.low)
    assert (back.wins, back.losses, back.ties) == (there.losses, there.wins, there.ties)
    assert difference(result, "p", "p") is None


def test_gains_are_set_against_their_cost(ran: tuple[Result, Path]) -> None:
    """The cost is that of one seed; the run has two."""
    result, _ = ran
    vanilla, prompts, *_ = efficiencies(result)
    gain = difference(result, "p", "vanilla")
    assert gain is not None
    calls = result.strategies[1].cost["lm_calls"] / 2
    assert (vanilla.gain, vanilla.per_1000_calls, vanilla.per_minute) == ("—", "—", "—")
    assert prompts.per_1000_calls.split()[0] == f"{100 * gain.difference / (calls / 1000):+.2f}"
    assert prompts.per_minute != "—"


def test_stages_that_strategies_share_are_one_branch(ran: tuple[Result, Path]) -> None:
    tree = stage_tree(ran[0])
    assert tree.path == ()
    assert tree.val == ran[0].strategies[0].val
    assert [child.path for child in tree.children] == [("p",), ("w",)]
    (tuned,) = tree.children[0].children
    assert [child.path for child in tuned.children] == [("p", "w", "p")]
    assert tuned.calls == ran[0].strategies[3].stages[1].cost["lm_calls"]


def read(out: Path) -> TraceReader:
    return lambda outcome: list(read_trace_log(out / "blobs" / (outcome.traces or "")))


def test_classes_are_counted_over_all_seeds(ran: tuple[Result, Path]) -> None:
    """Without learning, the LM knows Cairo's sea, and all other answers are unreadable."""
    result, out = ran
    vanilla, prompts, *_ = confusions(result, read(out), "answer")
    assert vanilla.columns == (*sorted(SEAS.values()), "unreadable")
    assert vanilla.rows["Mediterranean"] == (0, 4, 0, 0, 0)
    assert all(row == (0, 0, 0, 0, 4) for name, row in vanilla.rows.items() if name != "Mediterranean")
    assert prompts.columns == tuple(sorted(SEAS.values()))
    assert prompts.rows["Mediterranean"] == (0, 0, 4, 0)
    assert confusions(result, read(out), "river") == [], "no program answers with a river"
    assert confusions(result, read(out), None) == []


def test_examples_that_changed_are_side_by_side(ran: tuple[Result, Path], page: str) -> None:
    result, out = ran
    pairs = {(pair.before, pair.after): pair for pair in changes(result, read(out))}
    assert ("vanilla", "p -> w -> p") in pairs
    for (old, new), pair in pairs.items():
        compared = difference(result, new, old)
        assert compared is not None
        assert (pair.num_gained, pair.num_lost) == (compared.wins, compared.losses)
    learned = pairs["vanilla", "p -> w -> p"]
    assert {one.seed for one in learned.gained} == {0, 1}
    for one in learned.gained:
        assert one.before.example == one.after.example
        assert (one.before.score, one.after.score) == (0, 1)
        assert f"example {one.before.example}<" in page
        assert [step.kind for step, _ in one.steps if step] == ["lm", "retrieval", "lm", "retrieval", "lm"]
    assert any(pair.num_lost for pair in pairs.values())


def test_prompts_are_those_that_were_sent(ran: tuple[Result, Path], page: str) -> None:
    result, out = ran
    for sent, row in zip(prompts(result, read(out)), result.strategies, strict=True):
        first = next(read_trace_log(out / "blobs" / (row.outcomes[0].traces or "")))
        assert set(sent.modules) == {"query.0.predict", "query.1.predict", "answer.predict"}
        for path, messages in sent.modules.items():
            step = next(step for step in first.steps if step.path == path)
            assert messages == list(step.messages[:-1])
            assert all(str(escape(content)) in page for _, content in messages)
    assert "with adapter" in page


def test_endings_and_modules_say_how_runs_failed(ran: tuple[Result, Path]) -> None:
    result, out = ran
    vanilla = endings(result, read(out))[0]
    assert (vanilla.right, vanilla.wrong, vanilla.failed) == (4, 0, {"parse": 12})
    assert vanilla.reasons == [("ParseError: field 'answer': is absent", 12)]
    answer = next(row for row in module_rows(result) if (row.strategy, row.path) == ("vanilla", "answer.predict"))
    assert (answer.cost.calls, answer.unreadable) == (16, "75.0 %")


def test_results_csv_has_a_line_for_every_strategy_and_seed(ran: tuple[Result, Path]) -> None:
    result, out = ran
    table = pandas.read_csv(out / "results.csv").set_index(["strategy", "seed"])
    assert list(table.index) == [(strategy, seed) for strategy in STRATEGIES for seed in (0, 1)]
    for row in result.strategies:
        lines = table.loc[row.strategy]
        assert list(lines["test"]) == row.test.per_seed
        assert list(lines["recall@hop 2"]) == row.quality["recall@hop 2"].all.per_seed
        assert lines["lm_calls"].sum() == row.cost["lm_calls"]


def test_scores_csv_has_a_line_for_every_test_run_and_none_of_the_data(ran: tuple[Result, Path]) -> None:
    result, out = ran
    table = pandas.read_csv(out / "scores.csv")
    for (strategy, seed), lines in table.groupby(["strategy", "seed"]):
        row = next(row for row in result.strategies if row.strategy == strategy)
        traces = {trace.example: trace for trace in read(out)(row.outcomes[seed])}
        assert list(lines["example"]) == list(traces)
        assert lines["score"].mean() == row.test.per_seed[seed]
        for name in result.measures:
            assert lines[name].mean() == pytest.approx(row.quality[name].all.per_seed[seed])
        assert list(lines["failure"].fillna("")) == [trace.failure or "" for trace in traces.values()]
    assert set(table["strategy"]) == set(STRATEGIES)
    answers = {trace.labels["answer"] for trace in traces.values()}
    assert not answers & set(table.astype(str).to_numpy().flat)


def test_missing_traces_are_reported(ran: tuple[Result, Path], tmp_path: Path) -> None:
    with pytest.raises(CorruptBlob, match=r"missing or damaged.*the evaluation is then done again"):
        write_report(ran[0], tmp_path)


def test_a_result_of_one_strategy_that_learned_nothing_has_a_report(ran: tuple[Result, Path], tmp_path: Path) -> None:
    """There are no scores, no traces, and nothing to compare with."""
    row = ran[0].strategies[2]
    nothing = Score(mean=None, stderr=None, low=None, high=None, n=0, per_seed=[None, None])
    unkept = [outcome.model_copy(update={"traces": None}) for outcome in row.outcomes]
    skipped = row.stages[0].model_copy(update={"status": "skipped", "reason": "none succeeded", "val": nothing})
    changed = {"val": nothing, "test": nothing, "quality": {}, "stages": [skipped], "outcomes": unkept}
    bare = {"strategies": [row.model_copy(update=changed)], "comparisons": [], "findings": []}
    write_report(ran[0].model_copy(update=bare), tmp_path, "answer")
    text = (tmp_path / "report.html").read_text()
    assert "No strategy had anything to learn from." in text
    assert "none succeeded" in text
    for absent in ("differences", "changes", "prompts", "confusion", "measures"):
        assert f'id="{absent}"' not in text
    assert len((tmp_path / "results.csv").read_text().splitlines()) == 3
