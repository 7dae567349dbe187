"""The suite of tasks that the settings for a small LM are measured on, and the figures of its runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.experiments.models import ModelSpec
from benchmarks.experiments.run import run
from benchmarks.experiments.spec import ExperimentSpec, LoadedModels
from benchmarks.performance.defaults import PAPER, STRATEGIES, VARIANTS, figures_of, settings_of, table_of
from benchmarks.performance.suite import SUITE, reviews
from lmpipe import Job, Request, RunStore, ScriptedLM, Session, initial_state, rollout

ANSWERS = {
    "two modules": "bad",
    "wine": "barbera",
    "kinds of things": "tool",
    "breast cancer": "benign",
    "word problems": "9",
    "iris": "virginica",
}


@pytest.mark.parametrize("name", SUITE)
def test_a_task_has_enough_examples_and_its_program_answers_them(name: str) -> None:
    task, settings = SUITE[name], settings_of(SUITE[name], "free")
    split = task.split(settings.train, settings.val, settings.test, 0)
    program = task.program()
    session = Session(lm=ScriptedLM(lambda request: f"opinion: it is so\nanswer: {ANSWERS[name]}"))
    jobs = [Job(initial_state(program, session), example) for example in split.test]
    traces = rollout(program, jobs, session, task.metric())
    assert {trace.error for trace in traces} == {None}
    expected = sum(str(example.labels["answer"]) == ANSWERS[name] for example in split.test)
    assert sum(trace.score for trace in traces) == expected > 0


def test_no_word_of_praise_or_blame_occurs_in_two_reviews() -> None:
    examples = reviews()
    words = [example.id for example in examples]
    assert len(set(words)) == len(words) == 140
    assert all(example.inputs["review"].count(example.id.replace("-", " ")) == 1 for example in examples)


def test_variants_change_the_settings_of_iris_and_keep_the_sizes() -> None:
    settings = {variant: settings_of(SUITE["wine"], variant) for variant in (*VARIANTS, PAPER)}
    assert settings["structured"] == settings["free"].changed({"structured": True})
    assert settings["free"].tuning.learning_rate > settings[PAPER].tuning.learning_rate
    assert {(each.train, each.val, each.test, each.select) for each in settings.values()} == {(40, 40, 60, "best")}


def test_figures_name_the_task_the_variant_and_the_strategy(tmp_path: Path) -> None:
    task = SUITE["kinds of things"]
    settings = settings_of(task, "free").changed({"train": 8, "val": 8, "test": 8, "num_candidate_programs": 1})
    spec = ExperimentSpec(task, ModelSpec("bundled"), settings, STRATEGIES[:2], (0,), tmp_path)

    def answer(request: Request) -> str:
        return "answer: tool" if len(request.messages) > 2 else "a tool"  # readable only after demonstrations

    with RunStore(tmp_path, spec.config) as store:
        result = run(spec, LoadedModels(ScriptedLM(answer)), store)
    figures = figures_of({("kinds of things", "free"): result})
    assert {name: figure["test"] for name, figure in figures.items()} == {
        "kinds of things, free, vanilla": 0.0,
        "kinds of things, free, p": 0.25,
    }
    assert table_of({("kinds of things", "free"): result}).row_count == 2
