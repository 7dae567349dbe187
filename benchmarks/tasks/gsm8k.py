"""GSM8K: word problems of grade school mathematics (Cobbe et al. 2021, arXiv 2110.14168).

Besides the answer, the sums in the reasoning are checked: a correct answer after a wrong sum is luck.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, final

from benchmarks.experiments.settings import Settings
from benchmarks.experiments.task import Split, Task
from benchmarks.tasks.arithmetic import equations
from benchmarks.tasks.bundled import RARELY_CORRECT
from benchmarks.tasks.data import load_hub, read_records
from lmpipe import Example, Metric, Module, Trace
from lmpipe.errors import ConfigError
from lmpipe.metrics import number_match
from lmpipe.program.evaluate import Measure
from lmpipe.storage.hashing import digest
from lmpipe.text.display import shown
from programs import GSM8K

HUB = "openai/gsm8k"

_PAPER = Settings(test=1319)
_BUNDLED = _PAPER.changed({**RARELY_CORRECT, "train": 40, "val": 40, "test": 60, "max_tokens": 96, "num_val": 40})


def correct_sums(trace: Trace) -> float | None:
    """Returns the share of the sums in a rollout's reasoning that are correct; None if it has no sum."""
    texts = (str(step.outputs.get("reasoning", "")) for step in trace.lm_steps if step.outputs)
    sums = [is_correct for text in texts for is_correct in equations(text)]
    return sum(sums) / len(sums) if sums else None


def with_sums(trace: Trace) -> float:
    """Returns 1 if a rollout's reasoning has sums that can be checked, else 0."""
    return float(correct_sums(trace) is not None)


_MEASURES: Mapping[str, Measure] = MappingProxyType({"right sums": correct_sums, "with sums": with_sums})


@final
@dataclass(frozen=True)
class Gsm8kTask(Task):
    """Word problems; the answer is the last number of the solution.

    The folder ``DATA/gsm8k`` holds ``train`` and ``test`` as ``.jsonl.gz`` with the fields of the hub's data set.

    Args:
        hub: Name of a data set on the hub, or a folder that the package datasets can load.
    """

    name: str = "gsm8k"
    measures: Mapping[str, Measure] = field(default_factory=lambda: _MEASURES, repr=False)
    options: tuple[str, ...] = field(default=("data",), repr=False)
    settings: Settings = field(default=_PAPER, repr=False)
    bundled_settings: Settings | None = field(default=_BUNDLED, repr=False)
    hub: str = HUB

    def examples(self) -> Split:
        """Returns the training and test problems; a quarter of the former becomes the validation part.

        Raises:
            ConfigError: If the data cannot be read.
        """
        if self.data is None:
            train, test = (tuple(map(_example, part)) for part in load_hub(self.hub, "main", ("train", "test")))
        else:
            folder = Path(self.data, "gsm8k")
            train, test = (read_records(folder / f"{part}.jsonl.gz", _example) for part in ("train", "test"))
        return Split.of_two(train, test)

    def program(self) -> Module:
        return GSM8K()

    def metric(self) -> Metric:
        return number_match


def _example(record: Mapping[str, Any]) -> Example:
    """Returns an example whose id is a digest of the problem, so that equal problems are one example."""
    try:
        question, solution = record["question"], record["answer"]
    except KeyError as error:
        raise ConfigError(f"a GSM8K record lacks a field ({error}): {shown(dict(record), 200)}") from error
    if not isinstance(question, str) or not isinstance(solution, str):
        raise ConfigError(f"a GSM8K record has a question or an answer that is not text: {shown(dict(record), 200)}")
    name = digest(" ".join(question.lower().split()))[:12]
    return Example({"question": question}, {"answer": solution.rpartition("####")[2].strip()}, id=name)
