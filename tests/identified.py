"""Code of a user, with changes to it, and values of many kinds as attributes of a program.

``python -m tests.identified RUN`` prints their identities in this process: see `main`.
"""

from __future__ import annotations

import json
import logging
import sys
import threading
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from decimal import Decimal
from enum import Enum
from functools import cached_property, lru_cache, partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import torch
from pydantic import BaseModel

from lmpipe import (
    Demo,
    Example,
    Module,
    Predict,
    Prediction,
    RunStore,
    ScriptedLM,
    Session,
    initial_state,
)
from lmpipe.program.identity import identity

EXAMPLES = [Example({"question": f"q{n}"}, {"answer": "yes"}) for n in range(3)]

CODE = '''
"""A project of a user."""
import functools
import re
from dataclasses import dataclass, field
from enum import Enum
from functools import lru_cache, partial, wraps
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, field_validator

from lmpipe import Evaluation, Module, OptimizeResult, Optimizer, Predict, Prediction, evaluate, signature

LIMIT = 3
NAMES = {"A": "yes", "B": ["no", {"perhaps", "never"}]}
ENDING = re.compile(r"!+$")


class Tone(Enum):
    CALM = "calm"
    LOUD = "loud"


@dataclass
class Rule:
    weight: float = 1.0
    words: list = field(default_factory=lambda: ["please"])

    def fits(self, text):
        return self.weight > 0 and Tone.CALM.value not in text


RULE = Rule()


def deep(text):
    return text.strip()


def traced(function):
    @wraps(function)
    def wrapper(*given):
        return function(*given) if LIMIT else None
    return wrapper


@traced
def helper(text, sides=("left", "right")):
    return ENDING.sub("", deep(text))


@lru_cache
def remembered(text):
    return text.casefold()


def scale(by):
    def scaled(value):
        return value * by
    return scaled


half = scale(0.5)


def odd(value):
    return bool(value) and even(value - 1)


def even(value):
    return not value or odd(value - 1)


class Mixin:
    suffix = "."

    def finish(self, text):
        return text + self.suffix if False else text


class Base(Module):
    def prepared(self, text):
        return remembered(text)

    @property
    def known(self):
        return NAMES

    @staticmethod
    def lower(text):
        return text.lower()


def positive(value: int) -> int:
    return abs(value)


class Answer(BaseModel):
    text: str
    count: Annotated[int, AfterValidator(positive)] = 1

    @field_validator("text")
    @classmethod
    def check(cls, value):
        return value.replace("x", "y")


class QA(Base, Mixin):
    """Answers questions."""

    def __init__(self):
        self.ask = Predict("question -> answer")
        self.typed = Predict(signature("question -> answer: Answer", types={"Answer": Answer}))

    def forward(self, question):
        from typing import Any
        answer = self.ask(question=self.prepared(question)).answer
        words = [deep(word) for word in answer.split() if word in {"yes", "no", "perhaps"}]
        return Prediction(answer=self.finish(answer), rule=RULE.fits(answer), words=words)


@dataclass(frozen=True)
class Judge:
    strict: bool = True

    def __call__(self, example, prediction):
        return half(2 * float(helper(prediction.answer) == example.labels["answer"] and even(LIMIT - 1)))


@dataclass(frozen=True)
class Search(Optimizer):
    metric: Judge = Judge()

    def search(self, program, state, train, val, session):
        scored = evaluate(program, val, self.metric, session, state=self.chosen(state))
        return OptimizeResult(state=state, evaluation=scored)

    def chosen(self, state):
        return pick([state])


def pick(states):
    return states[0]
'''

CHANGES = {
    "a constant": ("LIMIT = 3", "LIMIT = 5"),
    "a value in a dict": ('"A": "yes"', '"A": "no"'),
    "a value in a set in a list in a dict": ("never", "seldom"),
    "a pattern": ('r"!+$"', 'r"[!?]+$"'),
    "an enum": ('CALM = "calm"', 'CALM = "quiet"'),
    "an attribute of an object": ("RULE = Rule()", "RULE = Rule(0.5)"),
    "a default factory": ('["please"]', '["kindly"]'),
    "a method of an object": ("self.weight > 0", "self.weight >= 0"),
    "a helper of a helper": ("text.strip()", "text.rstrip()"),
    "a decorator": ("if LIMIT else None", "if LIMIT else 0"),
    "a default argument": ('"right")', '"wrong")'),
    "a cached function": ("text.casefold()", "text.upper()"),
    "a captured value": ("scale(0.5)", "scale(0.25)"),
    "a function that captures": ("value * by", "value / by"),
    "a function in a cycle of calls": ("not value or", "value == 0 or"),
    "an attribute of a mixin": ('suffix = "."', 'suffix = "!"'),
    "a method of a mixin": ("if False else text", "if text else text"),
    "a method of a base class": ("return remembered(text)", "return remembered(text.title())"),
    "a property": ("return NAMES", "return [NAMES]"),
    "a static method": ("text.lower()", "text.swapcase()"),
    "a base class": ("class QA(Base, Mixin)", "class QA(Base)"),
    "a validator": ('replace("x", "y")', 'replace("x", "z")'),
    "a validator in an annotation": ("abs(value)", "max(value, 0)"),
    "a default of a model": ("] = 1", "] = 2"),
    "forward": ("answer=self.finish(answer)", 'answer=self.finish(answer) + "?"'),
    "a set in code": ('{"yes", "no", "perhaps"}', '{"yes", "no", "maybe"}'),
    "an import": ("from typing import Any", "from types import SimpleNamespace"),
    "a signature": ('Predict("question -> answer")', 'Predict("question -> answer", "Be brief.")'),
    "the call of a metric": ('== example.labels["answer"]', '!= example.labels["answer"]'),
    "a setting of a metric": ("strict: bool = True", "strict: bool = False"),
    "the search of an optimizer": ("program, val, self.metric", "program, train, self.metric"),
    "a helper of an optimizer": ("states[0]", "states[-1]"),
}

COSMETICS = {
    "comments and blank lines": ("def deep(text):\n", "\n\n# to be improved\ndef deep(text):\n\n    # spaces go\n"),
    "the docstring of the module": ('"""A project of a user."""', '"""What a user made."""'),
    "another function": ("LIMIT = 3", "LIMIT = 3\n\n\ndef unused():\n    return 1\n"),
    "the docstring of a function": ("def deep(text):\n", 'def deep(text):\n    """Takes spaces off."""\n'),
    "the order of a dict and of a set": (
        '{"A": "yes", "B": ["no", {"perhaps", "never"}]}',
        '{"B": ["no", {"never", "perhaps"}], "A": "yes"}',
    ),
}


def load(source: str) -> ModuleType:
    """Creates a module of the user from its source, as a file or a notebook does."""
    module = ModuleType("project")
    exec(compile(source, "project.py", "exec", dont_inherit=True), vars(module))  # noqa: S102
    return module


def optimized(source: str, store: RunStore) -> int:
    """Optimizes the program that some source defines; returns the number of LM calls, without recalled work."""
    project, lm = load(source), ScriptedLM(lambda request: "answer: yes")
    session = Session(lm=lm, store=store)
    program = project.QA()
    project.Search().optimize(program, initial_state(program, session), EXAMPLES, EXAMPLES, session)
    return len(lm.requests)


class Holder(Module):
    """A program that holds a value."""

    def __init__(self, held: Any) -> None:
        self.ask = Predict("question -> answer")
        self._held = held

    def forward(self, question: str) -> Prediction:
        return self.ask(question=question)


class Slotted:
    __slots__ = ("value",)

    def __init__(self, value: object) -> None:
        self.value = value


class Colour(Enum):
    RED = "red"
    BLUE = "blue"


class Settings(BaseModel):
    words: set[str] = {"a"}
    depth: int = 1
    _seen: int = 0


class Words(dict[Any, Any]):
    """A dict with a method."""


class Stops(set[Any]):
    """A set with a method."""


@dataclass
class Pair:
    one: object = 1
    other: object = 2
    lock: Any = field(default_factory=threading.Lock, repr=False)

    @cached_property
    def both(self) -> object:
        return threading.Lock()


def scaled(value: float, by: float) -> float:
    return value * by


def adder(by: int) -> Callable[[int], int]:
    return lambda value: value + by


VALUES: dict[str, Callable[[], Any]] = {
    "text": lambda: "a",
    "number": lambda: 1,
    "real number": lambda: 1.0,
    "truth": lambda: True,
    "large number": lambda: 10**6000,
    "bytes": lambda: b"a",
    "list": lambda: [1, 2],
    "tuple": lambda: (1, 2),
    "reversed list": lambda: [2, 1],
    "set": lambda: {"b", "a", "c"},
    "frozen set of tuples": lambda: frozenset({("a", 1), ("b", 2)}),
    "set of kinds": lambda: {Colour.RED, "red", 1, None, ("a",)},
    "dict": lambda: {"b": 1, "a": 2},
    "dict with keys of kinds": lambda: {Colour.RED: 1, ("a", 1): 2, 3: 4},
    "ordered dict": lambda: OrderedDict(a=1),
    "default dict": lambda: defaultdict(list, a=[1]),
    "other default dict": lambda: defaultdict(set, a=[1]),
    "counter": lambda: Counter("aab"),
    "deque": lambda: deque([1, 2], maxlen=3),
    "dict of a class": lambda: Words(a=1),
    "set of a class": lambda: Stops({"x", "y", "z"}),
    "enum": lambda: Colour.RED,
    "other enum": lambda: Colour.BLUE,
    "path": lambda: Path("a/b"),
    "decimal": lambda: Decimal("1.50"),
    "date": lambda: datetime(2024, 1, 2),
    "array": lambda: np.arange(6).reshape(2, 3),
    "array of another shape": lambda: np.arange(6),
    "array of objects": lambda: np.array([{"a", "b"}, None], dtype=object),
    "number of numpy": lambda: np.float32(1),
    "frame": lambda: pd.DataFrame({"a": [1, 2], "b": ["x", None]}),
    "tensor": lambda: torch.arange(3),
    "layer": lambda: torch.nn.Embedding.from_pretrained(torch.eye(2)),
    "class": lambda: Slotted,
    "slots": lambda: Slotted([1]),
    "other slots": lambda: Slotted([2]),
    "namespace": lambda: SimpleNamespace(a={"x", "y"}),
    "dataclass": lambda: Pair(1, [2]),
    "other dataclass": lambda: Pair(1, [3]),
    "model": lambda: Settings(words={"x", "y", "z"}),
    "nested model": lambda: [Settings(words={"x", "y", "z"}, depth=2)],
    "model class": lambda: Settings,
    "partial": lambda: partial(scaled, by=2),
    "other partial": lambda: partial(scaled, by=3),
    "lambda": lambda: lambda value: value + 1,
    "other lambda": lambda: lambda value: value + 2,
    "closure": lambda: adder(1),
    "other closure": lambda: adder(2),
    "bound method": lambda: Slotted(1).__repr__,
    "builtin": lambda: len,
    "other builtin": lambda: max,
    "function of numpy": lambda: np.add,
    "module": lambda: json,
    "cached function": lambda: lru_cache(scaled),
    "type": lambda: list[int],
    "other type": lambda: list[str] | None,
    "LM": lambda: ScriptedLM(str, "a"),
    "other LM": lambda: ScriptedLM(str, "b"),
    "program": lambda: Predict("a -> b"),
    "logger": lambda: logging.getLogger("a"),
}


@dataclass(frozen=True)
class Bag:
    """A hashable value."""

    words: frozenset[Any]


class Box(BaseModel):
    """A model with sets at every depth."""

    words: set[str]
    named: dict[str, set[str]]
    listed: list[frozenset[str]]
    bag: Bag
    inner: Box | None = None


def box(inner: Box | None = None) -> Box:
    words = {"p", "q", "r", "s"}
    return Box(words=words, named={"a": words}, listed=[frozenset(words)], bag=Bag(frozenset(words)), inner=inner)


SETS: list[Callable[[], Any]] = [
    lambda: {"a", "b", "c", "d"},
    lambda: frozenset({"a", 1, 2.5, None, ("b", 2), frozenset({"c", "d"})}),
    lambda: {"deep": [({"x", "y", "z"},)]},
    lambda: {Colour.RED, Colour.BLUE},
    lambda: Bag(frozenset({"a", "b", "c"})),
    lambda: {Bag(frozenset({"a", "b"})), Bag(frozenset({"c", "d"}))},
    lambda: box(box()),
    lambda: {("a", 1): {"b", "c"}, 2: "d", "e": None, Colour.RED: 1},
    lambda: np.array([{"a", "b", "c"}, None], dtype=object),
    lambda: deque([{"a", "b", "c"}]),
    lambda: Words(a={"a", "b", "c"}),
    {"a": 1, "b": 2}.keys,
]


def main(run: str) -> None:
    """Prints the calls of an optimization in a run directory, identities of values, and ids of inputs with sets."""
    found = {
        "calls": optimized(CODE, RunStore(run)),
        "known": {name: identity(program=Holder(make())) for name, make in VALUES.items()},
        "ids": [Example({"value": make()}).id for make in SETS],
        "demos": [Demo(inputs={"value": make()}, outputs={}).digest for make in SETS],
    }
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
