"""Cells of a notebook run again, are interrupted, and define things anew; one kernel serves all tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.notebooks.kernel import CellError, Notebook, notebook

FIRST = """
import time
from enum import Enum
from lmpipe import Example, Module, OptimizeResult, Predict, Prediction, PromptOptimizer, RunStore, ScriptedLM, Session
from lmpipe import evaluate, exact_match, initial_state, signature

store = RunStore("run", {"task": "sizes"})
calls, hang = [], False

def script(request):
    if hang and "Wait" in request.messages[0].content:
        print("hanging", flush=True)
        time.sleep(60)
    calls.append(request)
    return "answer: small"

session = Session(lm=ScriptedLM(script), store=store, quiet=True)
examples = [Example({"number": number}, {"answer": "small"}) for number in range(4)]

def calls_of(program, metric):
    before = len(calls)
    score = evaluate(program, examples, metric, session).mean
    return len(calls) - before, score
"""

SIZE = """
class Size(Module):
    def __init__(self):
        self.answer = Predict("number: int -> answer")

    def forward(self, number):
        return self.answer(number=number)
"""

IS_SMALL = """
def is_small(example, prediction):
    return float(prediction.answer == "small")
"""

KEEP = """
class Keep(PromptOptimizer):
    needs = ("train",)

    def __init__(self, metric):
        self.metric = metric

    def search(self, program, state, train, val, session):
        return OptimizeResult(state=state, evaluation=evaluate(program, train, self.metric, session, state=state))

def calls_of_optimizer(optimizer):
    before = len(calls)
    optimizer.optimize(program, initial_state(program, session), examples, [], session)
    return len(calls) - before
"""

KIND = """
class Kind(Enum):
    SMALL = "small"
    BIG = "big"
"""


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Notebook]:
    with notebook(tmp_path_factory.mktemp("notebook")) as running:
        yield running


@pytest.fixture
def cells(kernel: Notebook, tmp_path: Path) -> Notebook:
    """The kernel, after the first cells of a notebook in an empty folder."""
    kernel.run(f"%cd -q {tmp_path}", FIRST, SIZE, IS_SMALL, "program = Size()")
    return kernel


def test_the_first_cell_can_run_twice(cells: Notebook) -> None:
    assert cells.run("calls_of(program, is_small)") == "(4, 1.0)"
    cells.run("earlier = store", FIRST)
    assert cells.run("earlier is store") == "False"
    assert cells.run("calls_of(program, is_small)") == "(0, 1.0)"
    with pytest.raises(CellError, match=r"ConfigChanged: .*run has other settings \(task: 'sizes' → 'other'\)"):
        cells.run('store = RunStore("run", {"task": "other"})')
    assert cells.run("calls_of(program, is_small)") == "(0, 1.0)"


def test_a_folder_that_was_deleted_between_two_cells_is_noticed(cells: Notebook) -> None:
    cells.run("calls_of(program, is_small)", "import shutil; shutil.rmtree('run')")
    with pytest.raises(CellError, match=r"StoreError: .*blobs was deleted by something else"):
        cells.run("store.put({'a': 1})")
    cells.run(FIRST)
    assert cells.run("calls_of(program, is_small)") == "(4, 1.0)"


def test_an_interrupted_cell_can_run_again_and_is_resumed(cells: Notebook) -> None:
    """The LM hangs in the second of two evaluations; IPython keeps the error, and with it all objects in its frames."""
    work = """
slow = Predict("number: int -> answer", "Wait.")
calls_of(program, exact_match), calls_of(slow, exact_match)
"""
    with pytest.raises(CellError, match="KeyboardInterrupt"):
        cells.run(FIRST.replace("hang = [], False", "hang = [], True") + work)
    assert cells.run("len(calls)") == "4"
    assert cells.run(FIRST + work) == "((0, 1.0), (4, 1.0))"


def test_what_is_defined_again_without_a_change_is_recalled(cells: Notebook) -> None:
    cells.run(KEEP, "search = Keep(is_small)", "calls_of_optimizer(search)")
    assert cells.run(SIZE, IS_SMALL, KEEP, "calls_of(program, is_small), calls_of_optimizer(search)") == "((0, 1.0), 0)"
    cells.run("program, search = Size(), Keep(is_small)")
    assert cells.run("calls_of(program, is_small), calls_of_optimizer(search)") == "((0, 1.0), 0)"


@pytest.mark.parametrize(
    ("cell", "before", "after"),
    [
        (SIZE, "number=number)\n", "number=number + 1)\n"),
        (IS_SMALL, '== "small"', '!= "small"'),
        (KEEP, "train, self", "train[1:], self"),
    ],
)
def test_a_class_a_metric_and_an_optimizer_that_changed_are_not_recalled(
    cells: Notebook, cell: str, before: str, after: str
) -> None:
    """An object of the earlier definition still runs the earlier code, which a warning says once."""
    make, work = "program = Size(); search = Keep(is_small)", "calls_of_optimizer(search)"
    cells.run(KEEP, make, work)
    cells.run(cell.replace(before, after))
    name = cell.split()[1].partition("(")[0]
    warned = cells.run(work)
    assert f"is an earlier definition of {name}, which was defined again since" in warned
    assert warned.endswith("\n0")
    assert cells.run(work) == "0"
    assert cells.run(make, work) in {"3", "4"}
    cells.run(cell)
    assert cells.run(make, work) == "0"


def test_values_of_an_enum_that_was_defined_again_are_noticed(cells: Notebook) -> None:
    """They are not equal to those of the latest enum, even if nothing changed."""
    make = "program = Predict(signature('number: int -> answer: Kind', types={'Kind': Kind}))"
    metric = IS_SMALL.replace('"small"', "Kind.SMALL")
    assert cells.run(KIND, make, metric, "calls_of(program, is_small)") == "(4, 1.0)"
    warned = cells.run(KIND, metric, "calls_of(program, is_small)")
    assert "is an earlier definition of Kind, which was defined again since" in warned
    assert warned.endswith("(4, 0.0)")
    assert cells.run(make, "calls_of(program, is_small)") == "(0, 1.0)"


def test_a_class_whose_base_was_defined_again_says_so(cells: Notebook) -> None:
    base = SIZE.replace("self.answer =", "super(Size, self).__init__()\n        self.answer =")
    cells.run(base, "class Special(Size): pass", "program = Special()", "calls_of(program, is_small)")
    with pytest.raises(CellError, match="TypeError: super"):
        cells.run(base.replace("=number)\n", "=-number)\n"), "Special()")
    assert "Special → Size is an earlier definition of Size" in cells.run("calls_of(program, is_small)")
