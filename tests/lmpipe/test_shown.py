"""How values are shown: a short line each, a result as a table of a screen, and HTML in notebooks."""

from __future__ import annotations

import copy
import inspect
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import lmpipe
import lmpipe.extend
import optimizers
from lmpipe import (
    Budget,
    ChainOfThought,
    Completion,
    Demo,
    Evaluation,
    Example,
    Job,
    LocalTrainer,
    OptimizeResult,
    Passage,
    Predict,
    Prediction,
    ProgramState,
    PromptState,
    Request,
    Retrieve,
    RunStore,
    Sampling,
    ScriptedLM,
    Session,
    Trace,
    TuningConfig,
    WeightState,
    exact_match,
    initial_state,
    rollout,
    signature,
)
from lmpipe.engines.local import LocalLM
from lmpipe.errors import SessionError
from lmpipe.extend import Candidate, Cost, Finding, Message, Reporter, TrainingRow, Usage
from lmpipe.text.reprs import MAX_REPR, short_repr
from optimizers import GRPO, BetterTogether, BootstrapFewShot, BootstrapFinetune, MIPROv2
from tests.scripted import Colour, KeepingTrainer, NumberLine, examples, scheduler, scripted

LONG = "a long text with\nseveral lines \x1b[31m and " + 1000 * "x"


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> OptimizeResult:
    """The result of ``p -> w -> p`` whose initial state fails on all examples."""
    with RunStore(tmp_path_factory.mktemp("run")) as store:
        session = Session(lm=scripted(), store=store, quiet=True)
        return scheduler(KeepingTrainer()).optimize(Colour(), None, examples(24), examples(24, 50), session)


@pytest.fixture(scope="module")
def trace() -> Trace:
    session = Session(lm=ScriptedLM(lambda request: f"answer: {LONG}"))
    program = Predict("question, context: list[str] -> answer")
    example = Example({"question": LONG, "context": 50 * [LONG]}, {"answer": LONG})
    return rollout(program, [Job(initial_state(program, session), example)], session, exact_match)[0]


def values(result: OptimizeResult, trace: Trace, folder: Path, lm: LocalLM) -> list[object]:
    """A value of every public type, as large as it can be."""
    program = Colour()
    big = {f"field{number}": LONG for number in range(30)}
    prompt = PromptState(instructions=LONG, demos=(Demo(inputs=big, outputs=big),))
    weights = WeightState(base=LONG, adapter=64 * "a")
    state = ProgramState(prompts=dict.fromkeys(big, prompt), weights=dict.fromkeys(big, weights))
    store = RunStore(folder / (100 * "deep/") / "run")
    return [
        result,
        *result.stages,
        *result.findings,
        result.evaluation,
        result.origin,
        result.session,
        replace(result.session, state=state, store=store, retriever=None, lm=dict.fromkeys(big, scripted())),
        trace,
        *trace.steps,
        trace.prediction,
        trace.lm_steps[0].request,
        program,
        Predict(signature(", ".join(big) + " -> answer")),
        ChainOfThought("question -> answer"),
        Retrieve(k=5),
        signature(", ".join(f"{name}: list[dict[str, int]]" for name in big) + " -> answer"),
        state,
        prompt,
        prompt.demos[0],
        weights,
        store,
        lm,
        scripted(),
        NumberLine(),
        KeepingTrainer(),
        LocalTrainer(lm, TuningConfig(epochs=3, batch_size=4, learning_rate=1e-3, weight_decay=0.1, eval_fraction=0.1)),
        TuningConfig(epochs=3, target_modules=tuple(big)),
        Reporter(),
        Example(big, big, id=LONG),
        Prediction(**big),
        Job(state, Example(big), sample=3, temperature=0.5),
        Request((Message("user", LONG),), Sampling(stop=(LONG, LONG)), weights, 3, LONG),
        Completion(LONG, usage=Usage(1, 2, 3)),
        Message("user", LONG),
        Passage(LONG, LONG, 0.5),
        Sampling(stop=(LONG, LONG)),
        Budget(max_lm_calls=100, max_tokens=1_000_000, max_seconds=1e6),
        TrainingRow((Message("user", LONG),), LONG, LONG, rejected=LONG),
        Candidate(name=LONG, state=64 * "a", mean=0.5, n=3),
        Finding(kind="worse", stage=LONG, message=LONG, advice=LONG),
        Cost(lm_calls=3),
        BootstrapFewShot(exact_match, teacher=optimizers.Teacher(program, state, scripted())),
        MIPROv2(exact_match, max_rounds=3, num_trials=7),
        BootstrapFinetune(exact_match, KeepingTrainer(), vary_demos=True),
        GRPO(exact_match, KeepingTrainer()),
        scheduler(KeepingTrainer(), "p -> w -> p -> w -> p"),
    ]


def test_every_public_type_is_shown_in_a_short_line(
    result: OptimizeResult, trace: Trace, tmp_path: Path, tiny_lm: LocalLM
) -> None:
    shown = values(result, trace, tmp_path, tiny_lm)
    for value in shown:
        text = repr(value)
        assert len(text) <= MAX_REPR, text
        assert text.isprintable(), text
        assert text.startswith(type(value).__name__), text
    covered = {kind for value in shown for kind in type(value).__mro__}
    public = {name: getattr(lmpipe, name) for name in lmpipe.__all__}
    exceptions = {name for name, kind in public.items() if inspect.isclass(kind) and issubclass(kind, BaseException)}
    abstract = {"Retriever", "Optimizer", "Metric"}
    missing = {name for name, kind in public.items() if inspect.isclass(kind) and kind not in covered}
    assert missing - exceptions - abstract == set()


def test_settings_at_their_default_are_not_shown() -> None:
    assert repr(BootstrapFewShot(exact_match)) == "BootstrapFewShot(metric=exact_match)"
    assert repr(BootstrapFewShot(exact_match, max_rounds=2)) == "BootstrapFewShot(metric=exact_match, max_rounds=2)"
    assert repr(TuningConfig()) == "TuningConfig()"
    assert repr(BetterTogether(exact_match, {}, "vanilla")).startswith("BetterTogether(metric=exact_match, ")


def test_what_is_shown_says_what_matters(result: OptimizeResult) -> None:
    assert repr(result.evaluation) == "Evaluation(100 % (86–100), n=24)"
    assert repr(result.stages[0].evaluation) == "Evaluation(50 % (31–69), n=24, failures={'parse': 12})"
    assert repr(Colour()) == "Colour(hint, answer)"
    assert repr(Predict("a, b: list[int] -> c")) == "Predict(a, b: list[int] -> c)"
    assert repr(scripted()) == "ScriptedLM('scripted')"
    assert repr(Completion("red", usage=Usage(1, 2, 3))) == "Completion('red', finish_reason='stop', tokens=3)"


@given(st.lists(st.text(), max_size=5), st.dictionaries(st.sampled_from("abcdefgh"), st.text()))
def test_any_values_fit_into_a_line(positional: list[str], fields: dict[str, str]) -> None:
    text = short_repr(object(), *positional, **fields)
    assert len(text) <= MAX_REPR
    assert "\n" not in text


def test_a_printed_result_is_a_table_of_a_screen(result: OptimizeResult) -> None:
    lines = str(result).splitlines()
    assert len(lines) <= 24
    assert max(map(len, lines)) <= 120
    text = str(result)
    for part in ("BetterTogether, p -> w -> p", "24 training and 24 validation examples", "scripted"):
        assert part in " ".join(text.split())
    rows = [line.split() for line in lines]
    assert ["initial", "state", "0", "%", "(0–14)", "24"] in rows
    (p,) = [row for row in rows if row[:2] == ["p", "done"]]
    assert p[2:7] == ["50", "%", "(31–69)", "24", "252"]
    assert "chosen: the state after p -> w -> p, 100 % (86–100)" in text
    assert f"cost: {result.cost.lm_calls:,} LM calls" in text
    for finding in result.findings:
        assert " ".join(str(finding).split()) in " ".join(text.split())


def test_a_result_without_stages_shows_its_candidates(result: OptimizeResult) -> None:
    stage = result.stages[0].result
    rows = [line.split() for line in str(stage).splitlines()]
    assert ["labelled", "75", "%", "(41–93)", "8"] in rows
    assert "chosen: labelled, 75 % (41–93)" in str(stage)


def test_a_skipped_stage_is_shown_with_its_reason(store: RunStore) -> None:
    session = Session(lm=ScriptedLM(lambda request: "?"), store=store, quiet=True)
    result = scheduler(KeepingTrainer(), "w").optimize(Colour(), None, examples(8), examples(8, 50), session)
    assert result.status == "skipped"
    words = " ".join(str(result).split())
    assert f"skipped (w): {' '.join(result.reason.split())}" in words
    assert words.count("nothing to train on") == 1
    alone = result.stages[0].result
    assert f"skipped: {' '.join(alone.reason.split())}" in " ".join(str(alone).split())
    assert "skipped 0 % (0–32)" in words


def test_the_initial_state_is_shown_as_the_chosen_one() -> None:
    session = Session(lm=scripted(), quiet=True)
    vanilla = scheduler(KeepingTrainer(), "vanilla").optimize(Colour(), None, examples(8), examples(8, 50), session)
    assert "chosen: the initial state, 0 % (0–32)" in str(vanilla)
    assert "initial state" in str(vanilla).partition("chosen")[0]


def test_a_stage_that_was_skipped_is_not_the_chosen_one(store: RunStore) -> None:
    session = Session(lm=ScriptedLM(lambda request: "?"), store=store, quiet=True)
    better = replace(scheduler(KeepingTrainer(), "w -> p"), select="best")
    result = better.optimize(Colour(), None, examples(8), examples(8, 50), session)
    assert result.stages[0].result.status == "skipped"
    assert "chosen: the state after w -> p, 0 % (0–32)" in str(result)


def test_results_can_be_copied_and_pickled(result: OptimizeResult) -> None:
    for copied in (copy.copy(result), copy.deepcopy(result), pickle.loads(pickle.dumps(result))):
        assert copied == result
    with pytest.raises(SessionError, match=r"session.using\(result.state\)"):
        _ = pickle.loads(pickle.dumps(result)).session
    changed = result.model_copy(update={"state": result.stages[0].result.state})
    assert changed.session.state == changed.state


def test_notebooks_show_tables_with_escaped_text(result: OptimizeResult) -> None:
    assert "<td>50 % (31–69)</td>" in result._repr_html_()
    assert "p -&gt; w" in result._repr_html_()
    assert "<td>hint</td><td>48</td>" in result.stages[0].evaluation._repr_html_()
    hostile = "<script>alert(1)</script>"
    state = result.state.with_prompt("hint", PromptState(instructions=hostile))
    session = Session(lm=ScriptedLM(lambda request: f"hint: {hostile}"))
    program = Predict("number: int -> hint")
    (ran,) = rollout(program, [Job(initial_state(program, session), examples(1)[0])], session)
    shown = [state._repr_html_(), session.history()._repr_html_(), ran._repr_html_()]
    for html in shown:
        assert "&lt;script&gt;" in html
        assert "<script>" not in html


def test_an_evaluation_of_nothing_is_shown() -> None:
    assert repr(Evaluation(scores={})) == "Evaluation(—, n=0)"
