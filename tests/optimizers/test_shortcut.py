"""The shortest way: `optimize` makes a session, a store, a trainer and the stages, and does what the classes do."""

from __future__ import annotations

from pathlib import Path

import pytest

import lmpipe
from benchmarks.tasks.iris import IrisTask
from lmpipe import (
    Budget,
    Example,
    LocalTrainer,
    Module,
    Predict,
    Prediction,
    Request,
    RunStore,
    Sampling,
    ScriptedLM,
    Session,
    evaluate,
    exact_match,
    load_lm,
)
from lmpipe.errors import ConfigError, StrategyError
from optimizers import SMALL_LM_TUNING, BetterTogether, LabeledFewShot, optimize, small_lm_stages
from tests.tiny import tiny_llama


class Rivers(Module):
    def __init__(self) -> None:
        self.name = Predict("river -> answer: Literal['sea', 'lake']")

    def forward(self, river: str) -> Prediction:
        return self.name(river=river)


def rivers(count: int) -> list[Example]:
    return [Example({"river": f"river {n}"}, {"answer": "lake" if n % 4 == 0 else "sea"}) for n in range(count)]


def by_demos(request: Request) -> str:
    """Right as soon as the prompt shows demonstrations of both classes."""
    shown = {message.content for message in request.messages[1:] if message.role == "assistant"}
    number = int(request.messages[-1].content.rpartition(" ")[2])
    return "answer: lake" if number % 4 == 0 and len(shown) == 2 else "answer: sea"


def test_one_call_finds_a_better_state_and_a_session_to_run_it_in(tmp_path: Path) -> None:
    lm = ScriptedLM(by_demos)
    result = optimize(Rivers(), rivers(24), exact_match, lm=lm, strategy="p", out=tmp_path)
    assert result.evaluation is not None
    assert result.evaluation.mean == 1
    assert evaluate(Rivers(), rivers(40)[24:], exact_match, result.session).mean == 1
    with result.session:
        assert Rivers()(river="river 100").answer == "lake"
    last = result.session.history()[0]
    assert last.inputs == {"river": "river 100"}
    assert "river 100" in str(result.session.history())


def test_it_reports_unless_it_is_quiet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    optimize(Rivers(), rivers(24), exact_match, lm=ScriptedLM(by_demos), strategy="p", out=tmp_path / "a", quiet=True)
    assert capsys.readouterr() == ("", "")
    optimize(Rivers(), rivers(24), exact_match, lm=ScriptedLM(by_demos), strategy="p", out=tmp_path / "b")
    assert "stage 1 of 1, p: " in capsys.readouterr().err


def test_it_does_what_the_classes_do(tmp_path: Path) -> None:
    examples = rivers(24)
    short = optimize(
        Rivers(),
        examples[:12],
        exact_match,
        val=examples[12:],
        lm=ScriptedLM(by_demos),
        strategy="p",
        out=tmp_path / "a",
    )
    better = BetterTogether(exact_match, small_lm_stages(exact_match, label="answer"), strategy="p", select="best")
    session = Session(
        lm=ScriptedLM(by_demos), sampling=Sampling(temperature=0.0, max_tokens=24), store=RunStore(tmp_path / "b")
    )
    long = better.optimize(Rivers(), None, examples[:12], examples[12:], session)
    assert (short.state, short.evaluation, short.cost) == (long.state, long.evaluation, long.cost)


def test_weights_are_tuned_where_the_lm_runs_here(tmp_path: Path) -> None:
    result = optimize(
        Rivers(),
        rivers(8),
        exact_match,
        lm=f"hf:{tiny_llama(tmp_path / 'lm')}",
        strategy="w",
        out=tmp_path / "run",
        budget=Budget(max_lm_calls=400),
    )
    assert result.stages[0].result.details["tried"] > 0
    assert result.session.structured, "a typed output, and an engine that can constrain completions to it"


def test_validation_examples_are_set_aside_in_proportion_and_without_copies(tmp_path: Path) -> None:

    class Watching(Module):
        def __init__(self) -> None:
            self.name = Predict("river -> answer")

        def forward(self, river: str) -> Prediction:
            return self.name(river=river)

    stages = {"p": LabeledFewShot(k=100)}
    examples = [*rivers(16), *(Example(example.inputs, example.labels, id="copy") for example in rivers(1))]
    result = optimize(
        Watching(), examples, exact_match, lm=ScriptedLM(by_demos), strategy="p", stages=stages, out=tmp_path
    )
    assert result.origin is not None
    assert (result.origin.train, result.origin.val) == (8, 8)
    demos = result.stages[0].result.state.prompts["name"].demos
    assert sorted(str(demo.outputs["answer"]) for demo in demos) == ["lake"] * 2 + ["sea"] * 6


@pytest.mark.parametrize("seed", range(4))
def test_the_classes_are_those_of_the_label_that_the_program_predicts(tmp_path: Path, seed: int) -> None:
    examples = [Example(each.inputs, {**each.labels, "kind": f"{n % 3}"}) for n, each in enumerate(rivers(16))]
    stages = {"p": LabeledFewShot(k=100)}
    lm = ScriptedLM(by_demos)
    result = optimize(Rivers(), examples, exact_match, lm=lm, strategy="p", stages=stages, out=tmp_path, seed=seed)
    demos = result.stages[0].result.state.prompts["name"].demos
    assert sorted(str(demo.outputs["answer"]) for demo in demos) == ["lake"] * 2 + ["sea"] * 6


def test_validation_examples_may_lack_the_label_of_the_classes(tmp_path: Path) -> None:
    val = [Example({"river": f"river {n}"}) for n in range(30, 40)]

    def is_lake(example: Example, prediction: Prediction) -> bool:
        return bool(prediction.answer == "lake")

    result = optimize(
        Rivers(), rivers(24), is_lake, val=val, lm=ScriptedLM(by_demos), strategy="p", out=tmp_path, quiet=True
    )
    assert result.evaluation is not None
    assert result.evaluation.n == 10


def test_an_lm_with_a_cache_is_trained_without_it_and_other_roles_are_left_alone(tmp_path: Path) -> None:
    cached = load_lm(f"hf:{tiny_llama(tmp_path / 'lm')}", cache=tmp_path / "completions.sqlite")
    result = optimize(
        Rivers(),
        rivers(8),
        exact_match,
        lm={"lm": cached, "judge": ScriptedLM(by_demos)},
        strategy="w",
        out=tmp_path / "run",
        budget=Budget(max_lm_calls=40),
        quiet=True,
    )
    assert result.stages[0].result.details["tried"] > 0


def test_a_second_run_recalls_the_first(tmp_path: Path) -> None:
    first, second = ScriptedLM(by_demos), ScriptedLM(by_demos)
    results = [optimize(Rivers(), rivers(16), exact_match, lm=lm, strategy="p", out=tmp_path) for lm in (first, second)]
    assert results[0] == results[1]
    assert first.requests
    assert not second.requests


def test_any_function_is_a_metric(tmp_path: Path) -> None:
    wanted = ["sea", "lake"]
    lm = ScriptedLM(by_demos)
    result = optimize(
        Rivers(),
        rivers(16),
        lambda example, prediction: prediction.answer in wanted and prediction.answer == example.labels["answer"],
        lm=lm,
        strategy="p",
        out=tmp_path,
    )
    assert result.evaluation is not None
    assert result.evaluation.mean == 1


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"strategy": "p -> w"}, ConfigError, "cannot be trained here; pass trainer=…"),
        ({"strategy": "p -> q"}, StrategyError, "no stage is called 'q'"),
        ({"train": rivers(3)}, ConfigError, "there are 3 different examples, too few to set some aside"),
        ({"program": Rivers}, ConfigError, "program"),
        ({"select": "worst"}, ConfigError, "select is 'worst'"),
        ({"trainer": 3}, ConfigError, "trainer is 3"),
        (
            {"lm": {"judge": ScriptedLM(by_demos)}},
            ConfigError,
            "needs an LM for the role 'lm' of its predictor 'name', and lm has 'judge'",
        ),
        ({"stages": {"k": LabeledFewShot()}}, ConfigError, "stages has 'k'"),
    ],
)
def test_what_cannot_work_is_refused_before_any_call(
    changes: dict[str, object], error: type[Exception], message: str, tmp_path: Path
) -> None:
    lm = ScriptedLM(by_demos)
    out = tmp_path / "run"
    arguments = {"program": Rivers(), "train": rivers(8), "metric": exact_match, "lm": lm, "out": out, **changes}
    with pytest.raises(error, match=message):
        optimize(**arguments)  # type: ignore[arg-type]
    assert not lm.requests
    assert not out.exists(), "no empty run directory is left"


def test_copies_and_contradictions_among_the_examples_are_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = Example({"river": "river 1"}, {"answer": "lake"}, id="contradicts")
    copy = Example({"river": "river 2"}, {"answer": "sea"}, id="copy")
    lm = ScriptedLM(by_demos)
    optimize(Rivers(), [*rivers(16), other, copy], exact_match, lm=lm, strategy="vanilla", out=tmp_path, quiet=True)
    assert "train: 1 of 18 examples are copies of others; each is used once" in caplog.text
    assert "such as {'river': 'river 1'}: {'answer': 'sea'} and {'answer': 'lake'}" in caplog.text


def test_the_settings_are_those_of_iris_for_the_bundled_lm(tmp_path: Path) -> None:
    settings = IrisTask().settings_for("bundled")
    trainer = LocalTrainer(load_lm(f"hf:{tiny_llama(tmp_path)}"), SMALL_LM_TUNING)
    assert settings.tuning == SMALL_LM_TUNING
    patient = settings.changed({"max_idle_rounds": 8, "rollouts_per_example": 4})
    assert small_lm_stages(exact_match, trainer, "answer") == patient.optimizers(exact_match, trainer, "answer")


def test_scores_of_validation_examples_keep_their_traces_and_those_of_training_examples_do_not(tmp_path: Path) -> None:
    examples = rivers(16)
    better = BetterTogether(exact_match, small_lm_stages(exact_match, label="answer"), strategy="p", num_train_scored=4)
    session = Session(lm=ScriptedLM(by_demos), store=RunStore(tmp_path), quiet=True)
    [stage] = better.optimize(Rivers(), None, examples[:8], examples[8:], session).stages
    assert stage.evaluation.traces is not None
    assert stage.train_evaluation is not None
    assert stage.train_evaluation.traces is None


@pytest.mark.parametrize("folder", [None, 3])
def test_a_folder_to_save_in_or_load_from_is_a_path(folder: object, tmp_path: Path) -> None:
    result = optimize(Rivers(), rivers(8), exact_match, lm=ScriptedLM(by_demos), strategy="p", out=tmp_path)
    with pytest.raises(ConfigError, match="folder is"):
        result.save(folder)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="folder is"):
        lmpipe.load(folder)  # type: ignore[arg-type]
