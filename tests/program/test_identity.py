"""Recorded work is recalled if and only if nothing that decides its result has changed."""

from __future__ import annotations

import functools
import json
import os
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from code import InteractiveInterpreter
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import cloudpickle
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmpipe import (
    Example,
    Module,
    Optimizer,
    OptimizeResult,
    Predict,
    Prediction,
    ProgramState,
    RunStore,
    ScriptedLM,
    Session,
    evaluate,
    exact_match,
    initial_state,
)
from lmpipe.errors import ConfigError
from lmpipe.program.identity import identity
from lmpipe.program.identity.packages import package_of
from lmpipe.storage.hashing import canonical_json, digest
from tests.identified import CHANGES, CODE, COSMETICS, EXAMPLES, SETS, VALUES, Holder, Pair, load, optimized


def scripted() -> ScriptedLM:
    return ScriptedLM(lambda request: "answer: yes")


@pytest.mark.parametrize("change", CHANGES)
def test_work_is_done_again_when_something_that_it_reaches_has_changed(store: RunStore, change: str) -> None:
    before, after = CHANGES[change]
    assert CODE.count(before) == 1
    assert [optimized(CODE, store), optimized(CODE, store)] == [3, 0]
    project, changed = load(CODE), load(CODE.replace(before, after))
    known = identity(optimizer=project.Search(), program=project.QA())
    assert known is not None
    assert identity(optimizer=changed.Search(), program=changed.QA()) not in (known, None)


@pytest.mark.parametrize(
    "change", ["a helper of a helper", "forward", "the search of an optimizer", "a captured value"]
)
def test_work_that_is_done_again_is_recorded_next_to_earlier_records(store: RunStore, change: str) -> None:
    changed = CODE.replace(*CHANGES[change])
    assert optimized(CODE, store) == 3
    again = optimized(changed, store)
    assert again == 3 or "optimizer" in change  # its evaluation is recalled
    assert [optimized(CODE, store), optimized(changed, store)] == [0, 0]


@pytest.mark.parametrize("change", COSMETICS)
def test_work_is_recalled_when_only_the_layout_of_code_has_changed(store: RunStore, change: str) -> None:
    before, after = COSMETICS[change]
    assert CODE.count(before) == 1
    assert [optimized(CODE, store), optimized(CODE.replace(before, after), store)] == [3, 0]


def test_a_class_that_is_defined_anew_at_a_prompt_is_another_one(store: RunStore) -> None:
    lm = ScriptedLM(lambda request: "answer: yes")
    prompt = InteractiveInterpreter({"__name__": "__main__", "session": Session(lm=lm, store=store), "ex": EXAMPLES})
    begin = "from lmpipe import *\ndef shout(text): return text\ndef metric(e, p): return float(p.answer == 'yes')\n"
    cell = "class QA(Module):\n  def __init__(self): self.p = Predict('question -> answer')\n"
    cell += "  def forward(self, question): return Prediction(answer=shout(self.p(question=question).answer))\n"
    run = "means.append(evaluate(QA(), ex, metric, session).mean)\n"
    prompt.locals["means"] = means = []  # type: ignore[index]
    for text in (
        begin + cell + run,
        cell + run,
        cell.replace(".answer)", ".answer + '!')") + run,
        cell + "def shout(text): return text.upper()\n" + run,
        "def shout(text): return text\n" + run,
        "def metric(e, p): return float(p.answer != 'yes')\n" + run,
    ):
        prompt.runsource(text, symbol="exec")
    assert means == [1, 1, 0, 0, 1, 0]
    assert len(lm.requests) == 12  # the second and the fifth were recalled


def test_attributes_of_any_kind_count_by_their_content() -> None:
    known = {name: identity(program=Holder(make())) for name, make in VALUES.items()}
    assert None not in known.values()
    assert len(set(known.values())) == len(VALUES)
    assert {name: identity(program=Holder(make())) for name, make in VALUES.items()} == known


def test_every_attribute_of_a_module_counts_whatever_its_name() -> None:
    class Route(Module):
        def __init__(self, paths: list[str]) -> None:
            self._paths, self._frozen = paths, True

        def forward(self) -> Prediction:
            return Prediction(paths=self._paths)

    assert identity(program=Route(["a"])) == identity(program=Route(["a"])) != identity(program=Route(["b"]))


def test_a_program_has_the_same_identity_after_it_has_run(store: RunStore) -> None:
    lm = ScriptedLM(lambda request: "answer: yes")
    session, program = Session(lm=lm, store=store), Holder(Pair())
    before = identity(program=program)
    assert program._held.both is program._held.both  # computed once, from the rest
    for _ in range(2):
        assert evaluate(program, EXAMPLES, exact_match, session).mean == 1
    assert len(lm.requests) == 3
    assert identity(program=program) == before == identity(program=Holder(Pair()))


def other_process(seed: int, run: Path) -> Any:
    """The identities in another process, with another order of sets."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.identified", str(run)],
        env={**os.environ, "PYTHONHASHSEED": str(seed)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert not done.returncode, done.stderr
    return json.loads(done.stdout)


def test_work_is_recalled_in_other_processes_whatever_the_order_of_their_sets(tmp_path: Path) -> None:
    one, two = (other_process(seed, tmp_path / "run") for seed in (1, 2))
    assert (one.pop("calls"), two.pop("calls")) == (3, 0)
    assert one == two
    assert None not in one["known"].values()
    assert one["ids"] == [Example({"value": make()}).id for make in SETS]
    assert one["known"] == {name: identity(program=Holder(make())) for name, make in VALUES.items()}


def test_objects_that_are_pickled_by_value_keep_their_identity() -> None:
    project = load(CODE)
    sent = [cloudpickle.loads(cloudpickle.dumps(each)) for each in (project.Search(), project.Answer)]
    assert [identity(it=each) for each in sent] == [identity(it=project.Search()), identity(it=project.Answer)]


LOCK = threading.Lock()


def guarded() -> bool:
    return LOCK.locked()


def judge(example: Example, prediction: Prediction) -> float:
    return float(not guarded())


def numbers() -> Iterator[int]:
    yield 1


@dataclass(frozen=True)
class Guard:
    """A metric that excludes its lock."""

    lock: Any = field(default_factory=threading.Lock, repr=False)

    def __call__(self, example: Example, prediction: Prediction) -> float:
        return float(not self.lock.locked())


class Client:
    """An object that excludes its connection."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.connection = sqlite3.connect(":memory:")

    def __getstate__(self) -> dict[str, str]:
        return {"url": self.url}


class Broken:
    """An object that cannot be pickled."""

    def __reduce_ex__(self, protocol: object) -> str:
        raise OSError("gone")


def nested(depth: int) -> list[Any]:
    top: list[Any] = []
    inner = top
    for _ in range(depth):
        inner += [[], "beside"]
        inner = inner[0]
    return top


def test_work_that_cannot_be_identified_is_done_again_with_one_warning(
    store: RunStore, caplog: pytest.LogCaptureFixture
) -> None:
    lm, program = scripted(), Predict("question -> answer")
    session = Session(lm=lm, store=store)
    state = initial_state(program, session)
    means = [evaluate(program, EXAMPLES, judge, session, state=state).mean for _ in range(2)]
    assert means == [1, 1]
    assert len(lm.requests) == 6
    assert not (store.path / "journal.jsonl").read_bytes()
    (warning,) = caplog.messages
    assert "nothing identifies metric → judge → guarded → LOCK (_thread.lock)" in warning
    assert "__getstate__" in warning
    assert evaluate(program, EXAMPLES, Guard(), session, state=state) == evaluate(
        program, EXAMPLES, Guard(), session, state=state
    )
    assert len(lm.requests) == 9


@pytest.mark.parametrize(
    "make",
    [
        threading.Lock,
        threading.Thread,
        threading.local,
        numbers,
        Broken,
        lambda: sqlite3.connect(":memory:"),
        socket.socket,
        Path(__file__).open,
        lambda: memoryview(b"a"),
        sys._getframe,
        lambda: nested(5000),
    ],
)
def test_objects_that_cannot_be_identified_have_no_identity(make: Callable[[], Any]) -> None:
    held = make()
    assert identity(program=Holder({"it": [held]})) is None
    assert identity(metric=lambda example, prediction: held) is None
    if isinstance(held, (sqlite3.Connection, socket.socket)) or hasattr(held, "read"):
        held.close()


def test_a_class_decides_which_of_its_attributes_do_not_count() -> None:
    with closing(Client("a").connection), closing(Client("b").connection):
        assert identity(it=Client("a")) == identity(it=Client("a")) != identity(it=Client("b"))


@dataclass(frozen=True)
class Counting(Optimizer):
    """An optimizer that cannot be identified."""

    lock: Any = field(default_factory=threading.Lock)

    def search(self, program: Module, state: ProgramState, train: Any, val: Any, session: Session) -> OptimizeResult:
        return OptimizeResult(state=state, evaluation=evaluate(program, val, exact_match, session, state=state))


def test_an_optimizer_that_cannot_be_identified_works_without_being_recalled(store: RunStore) -> None:
    lm, program = scripted(), Predict("question -> answer")
    session = Session(lm=lm, store=store)
    results = [
        Counting().optimize(program, initial_state(program, session), EXAMPLES, EXAMPLES, session) for _ in range(2)
    ]
    assert results[0].evaluation == results[1].evaluation
    assert len(lm.requests) == 3  # its evaluation is recalled
    assert "optimize" not in (store.path / "journal.jsonl").read_text()


class Node:
    """A node that refers to other nodes, which refer to it."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.others: list[Node] = []
        self.seen: set[Node] = set()


def graph(size: int, last: str) -> Node:
    nodes = [Node(str(number)) for number in range(size - 1)] + [Node(last)]
    for node in nodes:
        node.others, node.seen = nodes, set(nodes)
    return nodes[0]


def test_objects_that_refer_to_one_another_have_an_identity() -> None:
    began = time.process_time()
    assert identity(it=graph(50, "a")) == identity(it=graph(50, "a")) != identity(it=graph(50, "b"))
    held: list[Any] = ["x"]
    held.append(held)
    shared: list[Any] = ["x"]
    for _ in range(100):
        shared = [shared, shared]
    assert len({identity(it=held), identity(it=shared), identity(it=["x", ["x"]]), None}) == 4
    assert time.process_time() - began < 20


PACKAGE = "import threading\n\nLOCK = threading.Lock()\n\n\ndef tool(text):\n    return LOCK and text\n"
HELPERS = "LIMIT = 1\n\n\ndef used(text):\n    return text * LIMIT\n\n\ndef unused(text):\n    return text\n"
USER = """
import {helpers}
import {package}


def by_attribute(example, prediction):
    return {helpers}.used({package}.tool(prediction.answer))


def by_name(example, prediction):
    return getattr({helpers}, "used")(prediction.answer)


def by_import(example, prediction):
    from {helpers} import used
    import {package}, json, nothing_of_this_name
    return used(prediction.answer)
"""


def test_modules_of_the_user_are_read_and_packages_count_by_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = tmp_path / "site-packages"
    (installed / "toolbox_of_a_package").mkdir(parents=True)
    (installed / "toolbox_of_a_package" / "__init__.py").write_text(PACKAGE)
    (installed / "toolbox_of_a_package-1.5.dist-info").mkdir()
    (installed / "toolbox_of_a_package-1.5.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: toolbox-of-a-package\nVersion: 1.5\n"
    )
    (tmp_path / "helpers_of_a_user.py").write_text(HELPERS)
    monkeypatch.syspath_prepend(str(installed))
    monkeypatch.syspath_prepend(str(tmp_path))
    user = load(USER.format(helpers="helpers_of_a_user", package="toolbox_of_a_package"))
    names = ("by_attribute", "by_name", "by_import")

    def identities() -> list[str | None]:
        return [identity(metric=vars(user)[name]) for name in names]

    assert package_of("toolbox_of_a_package.inner") == "toolbox_of_a_package 1.5"
    assert package_of("helpers_of_a_user") is package_of("__main__") is package_of("tests.scripted") is None
    before = identities()
    assert None not in before
    held = vars(vars(user)["helpers_of_a_user"])
    held["unused"] = len
    seldom = identities()
    assert [one == other for one, other in zip(before, seldom, strict=True)] == [True, False, True]
    held["LIMIT"] = 2
    assert not set(identities()) & {*before, *seldom}


def test_equal_values_have_one_identity_whether_they_are_one_object_or_two() -> None:
    one = Pair([1])
    assert identity(it=[one, one]) == identity(it=[Pair([1]), Pair([1])])


def test_a_metric_that_is_a_lambda_or_captures_variables_is_recalled_by_what_it_captures(store: RunStore) -> None:
    lm, program = scripted(), Predict("question -> answer")
    session = Session(lm=lm, store=store)
    state = initial_state(program, session)

    def scoring(right: str) -> Callable[[Example, Prediction], float]:
        return lambda example, prediction: float(prediction.answer == right)

    means = [evaluate(program, EXAMPLES, scoring(right), session, state=state).mean for right in ("yes", "no", "yes")]
    assert means == [1, 0, 1]
    assert len(lm.requests) == 6


def test_measures_count_too(store: RunStore) -> None:
    lm, program = scripted(), Predict("question -> answer")
    session, factors = Session(lm=lm, store=store), count(1)
    state = initial_state(program, session)

    def measured(by: int) -> float:
        measures = {"m": lambda trace: by}
        return evaluate(program, EXAMPLES, exact_match, session, state=state, measures=measures).measures["m"][
            EXAMPLES[0].id
        ]

    assert [measured(next(factors)), measured(next(factors)), measured(1)] == [1, 2, 1]
    assert len(lm.requests) == 6


PLAIN = st.none() | st.booleans() | st.integers() | st.text() | st.floats(allow_nan=False) | st.binary(max_size=3)
KEYS = st.text(max_size=3) | st.integers(10, 99) | st.tuples(st.text(max_size=2), st.booleans())


def shuffled(value: Any, reverse: bool) -> Any:
    """Copies a value with its dicts and sets in one of two orders of insertion."""
    if isinstance(value, dict):
        pairs = [(key, shuffled(item, reverse)) for key, item in value.items()]
        return dict(reversed(pairs)) if reverse else dict(pairs)
    if isinstance(value, (set, frozenset)):
        items = sorted(value, key=repr, reverse=reverse)
        return frozenset(items) if isinstance(value, frozenset) else set(items)
    return [shuffled(item, reverse) for item in value] if isinstance(value, list) else value


@given(
    st.recursive(
        PLAIN,
        lambda inner: (
            st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=4) | st.frozensets(PLAIN, max_size=4)
        ),
        max_leaves=12,
    )
)
def test_the_order_of_dicts_and_sets_does_not_count(value: Any) -> None:
    one, other = shuffled(value, reverse=False), shuffled(value, reverse=True)
    assert identity(it=one) == identity(it=other) is not None
    try:
        expected = digest(one)
    except ConfigError:  # two keys that have the same text
        with pytest.raises(ConfigError, match="have the same text"):
            digest(other)
    else:
        assert digest(other) == expected


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (object(), "'question.parts.1': a value of type object cannot be written as JSON"),
        (iter([1]), r"'question.parts.1': an iterator \(list_iterator\) can be read only once; pass a list"),
        (len, "builtin_function_or_method"),
        (Node("a"), "a value of type Node"),
        ({1: "a", "1": "b"}, "several keys of a mapping have the same text, among 1"),
        ([10**5000], "4300 digits"),
        (nested(100_000), "nested too deeply"),
    ],
)
def test_inputs_that_have_no_json_are_named(value: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Example({"plain": 1, "question": {"parts": ["a", value]}})


def test_text_that_is_not_unicode_and_numbers_that_are_none_have_ids() -> None:
    values = ["\ud800", float("nan"), float("inf"), b"\xff", b"\xfe", "a"]
    assert len({Example({"question": value}).id for value in values}) == len(values)
    assert canonical_json({"b": {2, 1}, "a": (None,)}) == '{"a":[null],"b":[1,2]}'


def unnamed(function: Callable[..., float]) -> Callable[..., float]:
    """A decorator that gives its function a name of its own."""

    def inner(example: Example, prediction: Prediction) -> float:
        return function(example, prediction)

    return inner


def named(function: Callable[..., float]) -> Callable[..., float]:
    @functools.wraps(function)
    def inner(example: Example, prediction: Prediction) -> float:
        return function(example, prediction)

    return inner


@unnamed
def decorated(example: Example, prediction: Prediction) -> float:
    return 1.0


@functools.singledispatch
def by_type(value: object) -> float:
    return 0.0


@by_type.register
def _(value: int) -> float:
    return 1.0


@by_type.register
def _(value: str) -> float:
    return 0.5


def dispatching(example: Example, prediction: Prediction) -> float:
    return by_type(prediction.answer)


@pytest.mark.parametrize("metric", [decorated, dispatching])
def test_decorators_define_nothing_again(metric: Callable[..., float], caplog: pytest.LogCaptureFixture) -> None:
    assert identity(metric=metric) is not None
    assert "earlier definition" not in caplog.text


def test_a_decorated_function_that_is_defined_again_as_it_was_is_the_same(caplog: pytest.LogCaptureFixture) -> None:
    interpreter = InteractiveInterpreter(globals())
    cell = "@named\ndef rerun(example, prediction): return {}\n"
    interpreter.runsource(cell.format(1.0), symbol="exec")
    first = globals()["rerun"]
    interpreter.runsource(cell.format(1.0), symbol="exec")
    assert identity(metric=first) is not None
    assert "earlier definition" not in caplog.text
    interpreter.runsource(cell.format(0.5), symbol="exec")
    assert identity(metric=first) is not None
    assert "is an earlier definition of rerun" in caplog.text
