"""A generated program of 50 modules, in nested lists and dicts, works in every optimizer.

Each question holds the number of its module, so a prompt shows which module sent it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

import pytest

from benchmarks.performance.modules import OPTIMIZERS, Grove, LetterCounts, RowKeeper, examples, reply
from lmpipe import (
    Module,
    Optimizer,
    OptimizeResult,
    ProgramState,
    RunStore,
    ScriptedLM,
    Session,
    Trainer,
    evaluate,
    exact_match,
    initial_state,
    predictors,
)
from lmpipe.trainer import TrainingRow
from optimizers import BootstrapFewShot

MODULES = 50


def optimize(
    program: Grove, make: Callable[[Trainer], Optimizer], session: Session
) -> tuple[OptimizeResult, list[list[TrainingRow]]]:
    """Returns the result and the rows of each training."""
    trainer = RowKeeper()
    start = initial_state(program, session)
    return make(trainer).optimize(program, start, examples(6), examples(8, start=50), session), trainer.rows


def modules_in(text: str) -> set[int]:
    """Numbers of the modules whose questions are in a text."""
    return {int(number) for number in re.findall(r"Step (\d+)", text)}


def modules_shown(state: ProgramState, path: str) -> set[int]:
    """Numbers of the modules whose calls are shown by a module's demos; labelled demos show no calls."""
    return set().union(*(modules_in(demo.inputs["question"]) for demo in state.prompts[path].demos))


def test_the_program_has_modules_of_each_kind_at_every_depth() -> None:
    paths = list(predictors(Grove(MODULES)))
    assert len(paths) == MODULES
    assert {path.count("half") for path in paths} == {0, 1, 2, 3}
    assert {path.rpartition("half.")[2] for path in paths} == {
        "parts.asked.0",
        "parts.asked.1.predict",
        "parts.told.plain",
        "parts.told.reasoned.predict",
    }


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_each_of_many_modules_learns_from_its_own_calls(name: str, store: RunStore) -> None:
    program, session = Grove(MODULES), Session(lm=ScriptedLM(reply), store=store, embedder=LetterCounts())
    result, trainings = optimize(program, OPTIMIZERS[name], session)
    val = examples(8, start=50)
    before, after = (
        evaluate(program, val, exact_match, session, state=state)
        for state in (initial_state(program, session), result.state)
    )
    assert (before.mean, after.mean) == (0.5, 1.0)
    for number, path in enumerate(predictors(program)):
        assert modules_shown(result.state, path) <= {number}
    if trainings:
        pairs = result.details.get("pairs", {})  # only some modules are right and wrong on the same inputs
        taught = {n for n, path in enumerate(predictors(program)) if not pairs or pairs[path]["pairs"]}
        assert len(taught) > MODULES / 2
        assert modules_in(" ".join(row.messages[-1].content for rows in trainings for row in rows)) == taught


def test_every_module_is_shown_its_own_calls(store: RunStore) -> None:
    program, session = Grove(MODULES), Session(lm=ScriptedLM(reply), store=store, embedder=LetterCounts())
    result, _ = optimize(program, lambda _: BootstrapFewShot(exact_match, max_labeled_demos=0), session)
    assert [modules_shown(result.state, path) for path in predictors(program)] == [
        {number} for number in range(MODULES)
    ]


def test_the_adapter_of_a_module_is_trained_on_its_own_calls(store: RunStore) -> None:
    program, session = Grove(MODULES), Session(lm=ScriptedLM(reply), store=store, embedder=LetterCounts())
    result, trainings = optimize(program, OPTIMIZERS["BootstrapFinetune, an adapter a module"], session)
    assert [modules_in(" ".join(row.messages[-1].content for row in rows)) for rows in trainings] == [
        {number} for number in range(MODULES)
    ]
    assert set(result.state.weights) == {"lm"} | {f"lm/{path}" for path in predictors(program)}


class CountedGrove(Grove):
    """Counts how often its whole structure is searched for modules."""

    def __init__(self, modules: int) -> None:
        super().__init__(modules)
        self.walks: list[str] = []

    def named_modules(self, path: str = "self") -> Iterator[tuple[str, Module]]:
        self.walks.append(path)
        return super().named_modules(path)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_structure_is_not_searched_once_for_each_module(name: str, store: RunStore) -> None:
    walks = []
    for modules in (2, 20):
        program = CountedGrove(modules)
        optimize(program, OPTIMIZERS[name], Session(lm=ScriptedLM(reply), store=store, embedder=LetterCounts()))
        walks.append(len(program.walks))
    assert walks[1] < walks[0] + 10
