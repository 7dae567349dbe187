"""GSM8K: word problems of grade school mathematics (Cobbe et al. 2021, arXiv 2110.14168).

Beside the answer, the sums in the reasoning are checked: a correct answer after a wrong sum is luck.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, final

from benchmarks.experiments.task import Split, Task
from benchmarks.tasks.arithmetic import equations
from benchmarks.tasks.data import load_hub, read_records
from lmpipe import Example, Metric, Module, Trace
from lmpipe.errors import ConfigError
from lmpipe.metrics import number_match
from lmpipe.program.evaluate import Measure
from lmpipe.storage.hashing import digest
from lmpipe.text.display import shown
from programs import GSM8K

HUB = "openai/gsm8k"


def right_sums(trace: Trace) -> float | None:
    """Share of the sums of a run's reasoning that are right; None if it has none."""
    texts = (str(step.outputs.get("reasoning", "")) for step in trace.lm_steps if step.outputs)
    sums = [right for text in texts for right in equations(text)]
    return sum(sums) / len(sums) if sums else None


def with_sums(trace: Trace) -> float:
    """Whether a run's reasoning holds sums that can be checked."""
    return float(right_sums(trace) is not None)


_MEASURES: Mapping[str, Measure] = MappingProxyType({"right sums": right_sums, "with sums": with_sums})


@final
@dataclass(frozen=True)
class Gsm8kTask(Task):
    """Problems with the last number of their solution as the answer.

    The folder ``DATA/gsm8k`` holds ``train`` and ``test`` as ``.jsonl.gz`` in the hub's fields.

    Args:
        hub: Data set of the hub, or a folder that the package datasets can load.
    """

    name: str = "gsm8k"
    measures: Mapping[str, Measure] = field(default_factory=lambda: _MEASURES, repr=False)
    options: tuple[str, ...] = field(default=("data",), repr=False)
    hub: str = HUB

    def examples(self) -> Split:
        """Raises:
        ConfigError: If there is no such data.
        """
        if self.data is None:
            learned, tested = (_examples(part) for part in load_hub(self.hub, "main", ("train", "test")))
        else:
            folder = Path(self.data, "gsm8k")
            learned, tested = (read_records(folder / f"{part}.jsonl.gz", _example) for part in ("train", "test"))
        return Split.of_two(learned, tested)

    def program(self) -> Module:
        return GSM8K()

    def metric(self) -> Metric:
        return number_match


def _examples(records: Iterable[Mapping[str, Any]]) -> tuple[Example, ...]:
    return tuple(map(_example, records))


def _example(record: Mapping[str, Any]) -> Example:
    """An example named by its problem: whoever asks the same asks the same example."""
    try:
        question, solution = record["question"], record["answer"]
    except KeyError as error:
        raise ConfigError(f"a GSM8K record lacks a field ({error}): {shown(dict(record), 200)}") from error
    if not isinstance(question, str) or not isinstance(solution, str):
        raise ConfigError(f"a GSM8K record has a question or an answer that is no text: {shown(dict(record), 200)}")
    name = digest(" ".join(question.lower().split()))[:12]
    return Example({"question": question}, {"answer": solution.rpartition("####")[2].strip()}, id=name)
