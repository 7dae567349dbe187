"""HotPotQA: questions whose answer needs two Wikipedia articles (Yang et al. 2018, arXiv 1809.09600).

The program has to find both articles. Beside the answer, the share of them that it found is measured: without both, the
answer is a guess.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

from benchmarks.experiments.task import Split, Task
from benchmarks.tasks.data import load_hub, read_records
from lmpipe import Example, Metric, Module, Trace, exact_match
from lmpipe.errors import ConfigError
from lmpipe.metrics import answer_f1
from lmpipe.program.evaluate import Measure
from lmpipe.runtime.trace import RetrievalStep
from lmpipe.storage.hashing import digest
from lmpipe.text.display import shown
from programs import MultiHop

HUB = "hotpotqa/hotpot_qa"
_COLUMNS = ("question", "answer", "type", "level", "supporting_facts")


@final
@dataclass(frozen=True)
class HotpotTask(Task):
    """Questions, and the program of two hops.

    The folder ``DATA/hotpotqa`` holds ``train``, ``validation`` and ``test`` as ``.jsonl.gz`` in the hub's fields, and
    ``passages.jsonl.gz``. Without a folder, the hub's hard questions of the full-wiki setting are taken, as in the
    paper: its training questions make two parts, and its validation questions, whose answers are public, are tested
    on; passages then come with the retriever.

    Args:
        hops: SearchCache of the program.
        k: Passages of each.
        hub: Data set of the hub, or a folder that the package datasets can load.
    """

    name: str = "hotpotqa"
    label: str | None = "type"
    retriever: str | None = "bm25"
    options: tuple[str, ...] = field(default=("data", "retriever"), repr=False)
    hops: int = 2
    k: int = 3
    hub: str = HUB

    def __post_init__(self) -> None:
        measures: dict[str, Measure] = {"F1": f1}
        measures |= {f"recall@hop {hop}": GoldRecall(hop) for hop in range(1, self.hops + 1)}
        object.__setattr__(self, "measures", {**measures, "all gold": AllGold(self.hops)})
        if self.data is not None and self.passages is None:
            object.__setattr__(self, "passages", str(Path(self.data, "hotpotqa", "passages.jsonl.gz")))

    def examples(self) -> Split:
        """Raises:
        ConfigError: If there is no such data.
        """
        if self.data is None:
            return self._from_hub()
        folder = Path(self.data, "hotpotqa")
        return Split(*(read_records(folder / f"{part}.jsonl.gz", _example) for part in ("train", "validation", "test")))

    def program(self) -> Module:
        return MultiHop(self.hops, self.k)

    def metric(self) -> Metric:
        return exact_match

    def _from_hub(self) -> Split:
        """The hub's hard questions."""
        parts = load_hub(self.hub, "fullwiki", ("train", "validation"))
        learned, tested = (tuple(_hard(part.select_columns(list(_COLUMNS)))) for part in parts)
        return Split.of_two(learned, tested, self.label)


def _hard(records: Iterable[Mapping[str, Any]]) -> Iterable[Example]:
    return (_example(record) for record in records if record["level"] == "hard")


def _example(record: Mapping[str, Any]) -> Example:
    """An example named by its question: whoever asks the same question asks the same example."""
    try:
        question, answer, kind = record["question"], record["answer"], record["type"]
        titles = list(dict.fromkeys(map(html.unescape, record["supporting_facts"]["title"])))
    except (KeyError, TypeError) as error:
        raise ConfigError(f"a HotPotQA record lacks a field ({error}): {shown(dict(record), 200)}") from error
    if not isinstance(question, str) or not isinstance(answer, str):
        raise ConfigError(f"a HotPotQA record has a question or an answer that is no text: {shown(dict(record), 200)}")
    if not titles:
        raise ConfigError(f"a HotPotQA record names no supporting facts: {shown(dict(record), 200)}")
    name = digest(" ".join(question.lower().split()))[:12]
    return Example({"question": question}, {"answer": answer, "type": kind, "titles": titles}, id=name)


def is_gold(text: str, title: str) -> bool:
    """Whether a passage introduces the article of that title; titles of passages may be escaped for HTML."""
    return html.unescape(text).startswith(f"{title} | ")


def f1(trace: Trace) -> float:
    """F1 of the answer's words; 0 for a failed run."""
    return answer_f1(trace.example, trace.prediction) if trace.prediction else 0.0


@final
@dataclass(frozen=True)
class GoldRecall:
    """Share of the gold passages found up to and with one of the hops; failed runs count with what they have.

    Args:
        hop: From 1.
    """

    hop: int

    def __call__(self, trace: Trace) -> float:
        searches = [step for step in trace.steps if isinstance(step, RetrievalStep) and step.index < self.hop]
        texts = [passage.text for step in searches for passage in step.passages or ()]
        gold = trace.example.labels["titles"]
        return sum(any(is_gold(text, title) for text in texts) for title in gold) / len(gold)


@final
@dataclass(frozen=True)
class AllGold:
    """Whether a run found every gold passage: its mean is the ceiling that retrieval sets to answers.

    Args:
        hops: Of the program.
    """

    hops: int

    def __call__(self, trace: Trace) -> float:
        return float(GoldRecall(self.hops)(trace) == 1)
