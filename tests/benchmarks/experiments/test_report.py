"""The report of an experiment in which scores and examples change, with searches, trainings and failures."""

from __future__ import annotations

import io
import re
import shutil
from pathlib import Path

import pandas
import pytest
from markupsafe import escape
from rich.console import Console

from benchmarks.experiments.models import ModelSpec
from benchmarks.experiments.report import write_report
from benchmarks.experiments.report.confusion import confusions
from benchmarks.experiments.report.rows import (
    cost_of_seed,
    difference,
    efficiencies,
    headline,
    module_rows,
    stage_tree,
    winner_of,
)
from benchmarks.experiments.report.trace_examples import TraceReader, changes, endings, prompts
from benchmarks.experiments.run import run
from benchmarks.experiments.settings import Settings
from benchmarks.experiments.spec import ExperimentSpec, LoadedModels
from benchmarks.experiments.strategies import table_rows
from lmpipe import ScriptedLM
from lmpipe.cli.tables import show_result
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
    """An experiment on two seeds: a scripted LM answers, and a tiny LM of the same name is trained."""
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
    found = run(spec, LoadedModels(ScriptedLM(reader, name="reader"), trained, WordOverlap()), store)
    store.close()
    write_report(found, out, "answer", COMMAND)
    return found, out


@pytest.fixture(scope="module")
def page(ran: tuple[Result, Path]) -> str:
    return (ran[1] / "report.html").read_text()


SECTIONS = ("results", "stages", "differences", "findings", "costs", "measures", "runs", "confusion", "learning")
TOLD = ("changes", "prompts", "settings", "command", "tree", "tiles")
PLOTS = ("scores", "by-stage", "gains", "measures", "candidates", "losses")


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium to look at the page with (Debian: chromium)")
@pytest.mark.parametrize("width", [390, 1100])
def test_a_browser_shows_all_of_it(ran: tuple[Result, Path], tmp_path: Path, width: int) -> None:
    """At the width of a phone and of a desktop, nothing is wider than the page, what is cut off has a shadow at that
    edge, and the console is empty."""
    found, console = look(ran[1] / "report.html", width, tmp_path)
    assert console == []
    assert {*SECTIONS, *TOLD} <= set(found["ids"])
    assert len(set(found["ids"])) == len(found["ids"])
    assert set(found["plots"]) == {f"plot-{name}" for name in PLOTS}
    for wide, high in found["plots"].values():
        assert 200 < wide < width
        assert high > 100
    assert len(found["tables"]) >= 10
    assert min(found["tables"]) >= 2
    assert found["folded"] == found["open"] == width
    assert all(found["cut"])
    assert len(found["cut"]) >= 5 or width > 390


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium to look at the page with (Debian: chromium)")
def test_what_is_looked_for_would_be_seen(tmp_path: Path) -> None:
    table = "<div style='overflow-x: auto'><table><tr><td style='min-width: 500px'>cut</table></div>"
    folded = "<details><div style='width: 500px'>wide</div></details>"
    bad = f"<!doctype html>{table}{folded}<script>console.error('no')</script>"
    (tmp_path / "bad.html").write_text(bad)
    found, console = look(tmp_path / "bad.html", 360, tmp_path)
    assert found["folded"] == 360
    assert found["open"] >= 500
    assert found["cut"] == [False]
    assert len(console) == 1


def test_it_needs_no_other_file_and_runs_nothing(page: str) -> None:
    assert not re.search(r"""(src|href)=["']?(https?:|//|file:)""", page)
    assert "<script" not in page
    assert "&lt;script&gt;alert(" in page, "what a trace holds is text"
    assert COMMAND.replace("'", "&#39;").replace(">", "&gt;") in page


def test_lists_are_shown_as_they_are_written(page: str) -> None:
    """Letters and apostrophes in lists are not escaped."""
    assert "\\u00" not in page


def test_costs_of_a_seed_are_those_of_the_seeds_that_have_a_score(ran: tuple[Result, Path]) -> None:
    row = ran[0].strategies[2]
    half = row.test.model_copy(update={"per_seed": [None, row.test.per_seed[1]]})
    assert cost_of_seed(row, "lm_calls") == row.cost["lm_calls"] / 2
    assert cost_of_seed(row.model_copy(update={"test": half}), "lm_calls") == row.outcomes[1].cost["lm_calls"]


def test_it_is_the_same_every_time(ran: tuple[Result, Path]) -> None:
    found, out = ran
    names = ("report.html", "report.md", "results.csv", "scores.csv", "scores.svg")
    before = [(out / name).read_bytes() for name in names]
    write_report(found, out, "answer", COMMAND)
    assert [(out / name).read_bytes() for name in names] == before
    assert "rivers --strategy" not in found.model_dump_json(), "a result is the same in every directory"


def test_scores_and_differences_stand_with_their_intervals(ran: tuple[Result, Path], page: str) -> None:
    found, out = ran
    text = (out / "report.md").read_text()
    for row in found.strategies:
        assert row.test.percent in page
        assert f"| `{row.strategy}` | {row.test.percent} | {row.val.percent} |" in text
    for one in found.comparisons:
        points = one.format_points()
        p = "< 0.001" if one.p < 0.001 else f"{one.p:.3f}"
        counts = f"{one.wins} | {one.losses} | {one.ties} |"
        assert f"| `{one.strategy}` | `{one.baseline}` | {points} | {p} |" in text
        assert counts in text
        assert points in page


@pytest.mark.parametrize(
    ("mean", "low", "high", "shown"),
    [
        (0.842, 0.76, 0.918, "84 (76–92)"),
        (0.842, 0.826, 0.857, "84 (83–86)"),
        (0.842, 0.832, 0.852, "84 (83–85)"),
        (0.842, 0.834, 0.851, "84.2 (83.4–85.1)"),
        (0.842, 0.841, 0.843, "84.2 (84.1–84.3)"),
        (0.8422, 0.8418, 0.8426, "84.22 (84.18–84.26)"),
        (1, 1, 1, "100 (100–100)"),
        (None, None, None, "—"),
    ],
)
def test_a_score_has_the_digits_that_its_interval_carries(
    mean: float | None, low: float | None, high: float | None, shown: str
) -> None:
    """Down to the first significant digit of the half-width, and no tens."""
    assert Score(mean=mean, stderr=None, low=low, high=high, n=50, per_seed=[mean]).percent == shown


def test_a_difference_has_the_digits_that_its_interval_carries(ran: tuple[Result, Path]) -> None:
    one = ran[0].comparisons[0].model_copy(update={"difference": 0.0461, "low": -0.0004, "high": 0.0922})
    assert one.format_points() == "+5 (+0 to +9)", "an end that is rounded to zero has the sign of zero"
    assert one.format_points(10) == "+0.5 (+0.0 to +0.9)"
    assert one.format_points(0.001) == "+4,610 (-40 to +9,220)"


def test_test_scores_stand_before_validation_scores(ran: tuple[Result, Path], page: str) -> None:
    found, out = ran
    terminal = Console(width=80, record=True, file=io.StringIO())
    show_result(found, terminal)
    assert "<th>strategy</th><th>test</th><th>validation</th>" in page
    assert "| strategy | test | validation |" in (out / "report.md").read_text()
    assert re.search(r"strategy +test % +val % +LM calls", terminal.export_text())
    assert re.findall(r">(test|validation)</text>", (out / "scores.svg").read_text()) == ["test", "validation"]
    assert list(pandas.read_csv(out / "results.csv"))[4:6] == ["test", "val"]


def test_links_have_the_names_of_their_headings(page: str) -> None:
    links = re.findall(r'<a href="#(\w+)">([^<]+)</a>', page)
    assert links == re.findall(r'<section id="(\w+)"><h2>([^<]+)</h2>', page)
    assert len(links) == 12


def test_seeds_are_named_in_the_number_they_have(ran: tuple[Result, Path], page: str) -> None:
    assert "Seeds 0, 1." in page
    skipped = ran[0].strategies[2].stages[0]
    entries = [{**entry, "status": "skipped"} for entry in skipped.per_seed]
    both, one = (skipped.model_copy(update={"per_seed": seeds, "reason": "why"}) for seeds in (entries, entries[:1]))
    assert both.skips == "w skipped on seeds 0, 1: why"
    assert one.skips == "w skipped on seed 0: why"


def with_tests(result: Result, *intervals: tuple[float, float, float]) -> Result:
    """The result with other test scores (mean and interval) of its first strategies, and without comparisons."""
    rows = [
        row.model_copy(update={"test": row.test.model_copy(update={"mean": mean, "low": low, "high": high})})
        for row, (mean, low, high) in zip(result.strategies, intervals, strict=False)
    ]
    return result.model_copy(update={"strategies": rows, "comparisons": []})


def test_the_best_strategy_is_marked_only_if_no_other_may_be_as_good(ran: tuple[Result, Path]) -> None:
    """Equal scores tie, and so do those whose paired difference, or else whose intervals, leave it open."""
    apart = with_tests(ran[0], (0.2, 0.1, 0.3), (0.6, 0.4, 0.8))
    near = with_tests(ran[0], (0.2, 0.1, 0.5), (0.6, 0.4, 0.8))
    equal = with_tests(ran[0], (0.6, 0.6, 0.6), (0.6, 0.6, 0.6))
    winner = winner_of(apart)
    assert winner is not None
    assert winner.strategy == "p"
    assert headline(apart) == "“p” scores best on the test examples: 60 (40–80) percent."
    assert winner_of(near) is winner_of(equal) is None
    assert headline(near) == (
        "No strategy is clearly the best on the test examples: "
        "“p” scores 60 (40–80) percent, and “vanilla” may be as good."
    )
    compared = difference(ran[0], "p", "vanilla")
    assert compared is not None
    for low, best in [(0.01, "p"), (-0.01, None), (0.0, None)]:
        paired = compared.model_copy(update={"difference": 0.4, "low": low, "high": 0.8, "p_holm": 0.0004})
        found = winner_of(near.model_copy(update={"comparisons": [paired]}))
        assert (found and found.strategy) == best
    assert headline(near.model_copy(update={"comparisons": [paired]})).endswith(
        " “p” differs from the program without learning by +40 (+0 to +80) points, p < 0.001 corrected for all tests."
    )


def test_a_tie_is_not_marked_on_the_page(ran: tuple[Result, Path], tmp_path: Path) -> None:
    shutil.copytree(ran[1], tmp_path / "run")
    write_report(with_tests(ran[0], (0.6, 0.4, 0.8), (0.6, 0.4, 0.8)), tmp_path / "run")
    assert 'class="best"' not in (tmp_path / "run" / "report.html").read_text()
    write_report(with_tests(ran[0], (0.2, 0.1, 0.3), (0.6, 0.4, 0.8)), tmp_path / "run")
    assert (tmp_path / "run" / "report.html").read_text().count('<tr class="best"><td>p</td>') == 1
    write_report(with_tests(ran[0], (0.2, 0.1, 0.3)), tmp_path / "run")
    only = (tmp_path / "run" / "report.html").read_text()
    assert "“vanilla” scores 20 (10–30) percent on the test examples." in only
    assert 'class="best"' not in only


def test_a_difference_can_be_read_from_either_side(ran: tuple[Result, Path]) -> None:
    found, _ = ran
    there, back = difference(found, "p", "vanilla"), difference(found, "vanilla", "p")
    assert there is not None
    assert back is not None
    assert (back.difference, back.low, back.high) == (-there.difference, -there.high, -there.low)
    assert (back.wins, back.losses, back.ties) == (there.losses, there.wins, there.ties)
    assert difference(found, "p", "p") is None


def test_gains_are_set_against_their_cost(ran: tuple[Result, Path]) -> None:
    """The cost is that of one seed; the experiment has two."""
    found, _ = ran
    vanilla, prompts, *_ = efficiencies(found)
    gain = difference(found, "p", "vanilla")
    assert gain is not None
    calls = found.strategies[1].cost["lm_calls"] / 2
    assert (vanilla.gain, vanilla.per_1000_calls, vanilla.per_minute) == ("—", "—", "—")
    assert prompts.per_1000_calls == gain.format_points(calls / 1000)
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
    """Without learning, only the answer for Cairo is correct, and the others cannot be parsed."""
    found, out = ran
    vanilla, prompts, *_ = confusions(found, read(out), "answer")
    assert vanilla.columns == (*sorted(SEAS.values()), "unreadable")
    assert vanilla.rows["Mediterranean"] == (0, 4, 0, 0, 0)
    assert all(row == (0, 0, 0, 0, 4) for name, row in vanilla.rows.items() if name != "Mediterranean")
    assert prompts.columns == tuple(sorted(SEAS.values()))
    assert prompts.rows["Mediterranean"] == (0, 0, 4, 0)
    assert confusions(found, read(out), "river") == [], "no program answers with a river"
    assert confusions(found, read(out), None) == []


def test_examples_that_changed_are_side_by_side(ran: tuple[Result, Path], page: str) -> None:
    found, out = ran
    pairs = {(pair.before, pair.after): pair for pair in changes(found, read(out))}
    assert ("vanilla", "p -> w -> p") in pairs
    for (old, new), pair in pairs.items():
        compared = difference(found, new, old)
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
    found, out = ran
    for sent, row in zip(prompts(found, read(out)), found.strategies, strict=True):
        first = next(read_trace_log(out / "blobs" / (row.outcomes[0].traces or "")))
        assert set(sent.modules) == {"query.0.predict", "query.1.predict", "answer.predict"}
        for path, messages in sent.modules.items():
            step = next(step for step in first.steps if step.path == path)
            assert messages == list(step.messages[:-1])
            assert all(str(escape(content)) in page for _, content in messages)
    assert "with adapter" in page


def test_endings_and_modules_say_how_runs_failed(ran: tuple[Result, Path]) -> None:
    found, out = ran
    vanilla = endings(found, read(out))[0]
    assert (vanilla.right, vanilla.wrong, vanilla.failed) == (4, 0, {"parse": 12})
    assert vanilla.reasons == [("ParseError: field 'answer': is absent", 12)]
    answer = next(row for row in module_rows(found) if (row.strategy, row.path) == ("vanilla", "answer.predict"))
    assert (answer.cost.calls, answer.unreadable) == (16, "12 (75 %)")


def test_results_csv_has_a_line_for_every_strategy_and_seed(ran: tuple[Result, Path]) -> None:
    found, out = ran
    table = pandas.read_csv(out / "results.csv").set_index(["strategy", "seed"])
    assert list(table.index) == [(strategy, seed) for strategy in STRATEGIES for seed in (0, 1)]
    for row in found.strategies:
        own = table.loc[row.strategy]
        assert list(own["test"]) == row.test.per_seed
        assert list(own["recall@hop 2"]) == row.quality["recall@hop 2"].all.per_seed
        assert own["lm_calls"].sum() == row.cost["lm_calls"]


def test_scores_csv_has_a_line_for_every_test_run_and_none_of_the_data(ran: tuple[Result, Path]) -> None:
    found, out = ran
    table = pandas.read_csv(out / "scores.csv")
    for (strategy, seed), own in table.groupby(["strategy", "seed"]):
        row = next(row for row in found.strategies if row.strategy == strategy)
        traces = {trace.example: trace for trace in read(out)(row.outcomes[seed])}
        assert list(own["example"]) == list(traces)
        assert own["score"].mean() == row.test.per_seed[seed]
        for name in found.measures:
            assert own[name].mean() == pytest.approx(row.quality[name].all.per_seed[seed])
        assert list(own["failure"].fillna("")) == [trace.failure or "" for trace in traces.values()]
    assert set(table["strategy"]) == set(STRATEGIES)
    answers = {trace.labels["answer"] for trace in traces.values()}
    assert not answers & set(table.astype(str).to_numpy().flat)


def test_without_the_traces_it_says_so(ran: tuple[Result, Path], tmp_path: Path) -> None:
    with pytest.raises(CorruptBlob, match=r"missing or damaged.*the evaluation is then done again"):
        write_report(ran[0], tmp_path)


def test_a_result_of_one_strategy_that_learned_nothing_has_a_report(ran: tuple[Result, Path], tmp_path: Path) -> None:
    """Such a result has no scores, no traces and no comparisons."""
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
