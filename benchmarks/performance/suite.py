"""Six small tasks as newcomers bring them: tables of numbers, texts, a program of two modules, and word problems.

Their data are in scikit-learn or in this file, so nothing is downloaded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import cycle, product
from types import MappingProxyType
from typing import Any, final

from sklearn.datasets import load_breast_cancer, load_wine

from benchmarks.experiments.task import Task
from benchmarks.tasks.iris import IrisTask
from lmpipe import ChainOfThought, Example, Metric, Module, Predict, Prediction, exact_match

Digits = Mapping[str, int]
"""Column of a data set → number of digits after the decimal point that its values are rounded to."""

WINE: Digits = MappingProxyType({"alcohol": 1, "flavanoids": 1, "color_intensity": 1, "hue": 2, "proline": 0})
BREAST_CANCER: Digits = MappingProxyType(
    {"mean radius": 1, "mean texture": 1, "mean perimeter": 0, "mean area": 0, "mean smoothness": 3}
)
CULTIVARS = ("barolo", "grignolino", "barbera")  # the classes of scikit-learn's wines, in its order

KINDS = {
    "animal": """horse rabbit tiger eagle salmon spider frog goat camel whale dolphin parrot snake turtle zebra monkey
        donkey pigeon wolf bear owl shark squirrel hamster lizard crab penguin kangaroo elephant giraffe hedgehog otter
        bee ant swan""",
    "food": """bread cheese soup rice pasta pizza salad pancake sausage omelette yoghurt butter biscuit sandwich honey
        stew porridge noodles pudding cake jam curry dumpling lasagne muffin waffle burger risotto croissant ham
        chocolate popcorn toast pie gravy""",
    "tool": """hammer screwdriver saw drill wrench pliers chisel axe spade rake shovel crowbar spanner scissors trowel
        sander mallet clamp hoe file pickaxe ladder wheelbarrow anvil vice hacksaw tweezers scalpel lathe plane jack
        level ruler needle stapler""",
    "clothing": """shirt trousers jacket skirt dress coat sweater scarf gloves socks hat belt shoes boots sandals vest
        blouse cardigan jeans shorts pyjamas raincoat tie hoodie mittens slippers leggings tights cap apron tuxedo kilt
        swimsuit underwear bathrobe""",
}

OPINIONS = {
    "good": """wonderful superb excellent delightful charming brilliant lovely fantastic marvellous splendid amazing
        perfect gorgeous beautiful terrific magnificent outstanding fabulous great enjoyable impressive pleasant
        admirable exquisite heavenly flawless glorious memorable refreshing satisfying stunning sublime thrilling
        uplifting commendable first-rate top-notch world-class awesome captivating divine dazzling enchanting
        exceptional exciting extraordinary fascinating fine fun good heart-warming incredible inspiring masterly
        phenomenal pleasing rewarding remarkable sensational spectacular stellar tasteful touching tremendous
        unbeatable unforgettable welcoming winning worthwhile well-made""",
    "bad": """awful terrible dreadful horrible boring disappointing dull disgusting poor miserable appalling tedious
        lousy ghastly dismal unbearable mediocre ugly unpleasant worthless annoying atrocious abysmal bland broken
        careless clumsy confusing depressing dirty embarrassing filthy flawed frustrating gloomy horrendous inferior
        irritating joyless lacklustre lifeless messy nasty offensive overpriced painful pathetic pointless repulsive
        revolting rotten rude shabby shoddy sickening sloppy stale stupid tasteless tiresome unacceptable useless
        vile weak wretched bad ill-conceived forgettable hopeless third-rate""",
}
SETTINGS = (
    "We went on a Tuesday with two friends, and the film was {}.",
    "My brother ordered the set menu. I found the meal {}.",
    "The room was on the third floor, and our stay was {}.",
    "I read the book on the train to Leeds; it is {}.",
    "It arrived after two days in a brown box. The camera is {}.",
    "The concert began at eight, and the band was {}.",
    "I have used this app since March, and it is {}.",
)


@final
class TwoModules(Module):
    """Judges a review in two calls: the first extracts the opinion, the second judges it."""

    def __init__(self) -> None:
        self.extract = Predict("review -> opinion")
        self.judge = ChainOfThought("opinion -> answer: Literal['good', 'bad']")

    def forward(self, review: str) -> Prediction:
        return self.judge(opinion=self.extract(review=review).opinion)


@final
@dataclass(frozen=True)
class SuiteTask(Task):
    """A task whose data and program are made by functions.

    Args:
        load: Returns the examples.
        make: Returns the program.
        max_tokens: Maximum number of new tokens of an LM call of the program.
    """

    label: str | None = "answer"
    load: Callable[[], Sequence[Example]] = field(default=tuple, repr=False)
    make: Callable[[], Module] = field(default=TwoModules, repr=False)
    max_tokens: int = 32

    def examples(self) -> Sequence[Example]:
        return self.load()

    def program(self) -> Module:
        return self.make()

    def metric(self) -> Metric:
        return exact_match


def rounded(data: Any, digits: Digits, classes: Sequence[str]) -> list[Example]:
    """Returns the rows of a data set of scikit-learn, with the columns and digits that a person would write.

    Args:
        data: The data set, as a function such as ``load_wine`` returns it.
        digits: The columns to keep, and their digits.
        classes: Names of the classes.
    """
    columns = [(list(data.feature_names).index(name), name.replace(" ", "_"), count) for name, count in digits.items()]
    return [
        Example(
            {name: round(float(row[number]), count or None) for number, name, count in columns},
            {"answer": classes[target]},
            id=f"row-{number}",
        )
        for number, (row, target) in enumerate(zip(data.data, data.target, strict=True))
    ]


def wine() -> list[Example]:
    """Returns the 178 Italian wines of scikit-learn, of three cultivars, with five of their 13 columns."""
    return rounded(load_wine(), WINE, CULTIVARS)


def breast_cancer() -> list[Example]:
    """Returns the 569 tumours of scikit-learn, 63 % of them benign, with five of their 30 columns."""
    return rounded(load_breast_cancer(), BREAST_CANCER, ("malignant", "benign"))


def kinds() -> list[Example]:
    """Returns 140 things of four kinds."""
    return [
        Example({"thing": thing}, {"answer": kind}, id=thing) for kind, row in KINDS.items() for thing in row.split()
    ]


def reviews() -> list[Example]:
    """Returns 140 reviews of two sentences or clauses; no word of praise or blame occurs twice."""
    return [
        Example({"review": text.format(word.replace("-", " "))}, {"answer": answer}, id=word)
        for answer, row in OPINIONS.items()
        for word, text in zip(row.split(), cycle(SETTINGS), strict=False)
    ]


def word_problems() -> list[Example]:
    """Returns 150 additions and subtractions of small numbers in words; the answers are 1 to 20."""
    names, things = ("Anna", "Ben", "Carla", "David", "Ella"), ("apples", "books", "coins", "pens")
    problems = product(range(6, 16), range(1, 6), (("buys", 1), ("loses", -1), ("finds", 1)))
    examples = []
    for number, (have, change, (verb, sign)) in enumerate(problems):
        name, thing = names[number % len(names)], things[number % len(things)]
        question = f"{name} has {have} {thing} and {verb} {change}. How many {thing} does {name} have now?"
        examples.append(Example({"question": question}, {"answer": have + sign * change}, id=f"{have} {verb} {change}"))
    return examples


def inputs_of(digits: Digits) -> str:
    """Returns the inputs of a signature for columns of a data set."""
    return ", ".join(f"{name.replace(' ', '_')}: {'float' if count else 'int'}" for name, count in digits.items())


def classifier(inputs: str, answer: str) -> Callable[[], Module]:
    """Returns a function that makes a chain of thought from some inputs to a typed answer."""
    return lambda: ChainOfThought(f"{inputs} -> answer: {answer}")


SUITE: Mapping[str, Task] = MappingProxyType(
    {
        task.name: task
        for task in (
            SuiteTask("two modules", load=reviews, make=TwoModules),
            SuiteTask("wine", load=wine, make=classifier(inputs_of(WINE), f"Literal{list(CULTIVARS)}")),
            SuiteTask("kinds of things", load=kinds, make=classifier("thing", f"Literal{list(KINDS)}"), max_tokens=24),
            SuiteTask(
                "breast cancer",
                load=breast_cancer,
                make=classifier(inputs_of(BREAST_CANCER), "Literal['malignant', 'benign']"),
                max_tokens=24,
            ),
            SuiteTask("word problems", load=word_problems, make=classifier("question", "int"), max_tokens=48),
            IrisTask(),
        )
    }
)
"""The tasks by name; those that tell the most about the settings come first."""
