"""HotPotQA: questions whose answer needs two Wikipedia articles (Yang et al. 2018, arXiv 1809.09600).

The program has to find both articles. Besides the answer, the share of the articles that it found is measured: without
both, the answer is a guess.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

from benchmarks.experiments.settings import Settings
from benchmarks.experiments.task import Split, Task
from benchmarks.tasks.bundled import RARELY_CORRECT
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

_PAPER = Settings(partial_labels=True)

# A demonstration holds up to six passages, so there are few. A search sees half of the validation set, as in the paper,
# and a quarter of the training set: eight strategies on three seeds take six hours of one core.
_BUNDLED = _PAPER.changed(
    {
        **RARELY_CORRECT,
        "train": 100,
        "val": 50,
        "test": 100,
        "max_tokens": 48,
        "stop": ("\n\n",),
        "max_bootstrapped_demos": 2,
        "num_train": 25,
        "num_val": 25,
    }
)
_COLUMNS = ("question", "answer", "type", "level", "supporting_facts")


@final
@dataclass(frozen=True)
class HotpotTask(Task):
    """Questions for a program of two hops.

    The folder ``DATA/hotpotqa`` holds ``train``, ``validation`` and ``test`` as ``.jsonl.gz`` with the fields of the
    hub's data set, and ``passages.jsonl.gz``. Without a folder, the hub's hard questions of the full-wiki setting are
    used, as in the paper: its training questions are divided into a training and a validation part, and its validation
    questions, whose answers are public, are the test part; the retriever must then name its passages.

    Args:
        hops: Number of searches of the program.
        k: Number of passages that each search returns.
        hub: Name of a data set on the hub, or a folder that the package datasets can load.
    """

    name: str = "hotpotqa"
    label: str | None = "type"
    retriever: str | None = "bm25"
    options: tuple[str, ...] = field(default=("data", "retriever"), repr=False)
    settings: Settings = field(default=_PAPER, repr=False)
    bundled_settings: Settings | None = field(default=_BUNDLED, repr=False)
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
        """Returns the three parts of the data.

        Raises:
            ConfigError: If the data cannot be read.
        """
        if self.data is None:
            parts = load_hub(self.hub, "fullwiki", ("train", "validation"))
            train, test = (tuple(_hard(part.select_columns(list(_COLUMNS)))) for part in parts)
            return Split.of_two(train, test, self.label)
        folder = Path(self.data, "hotpotqa")
        return Split(*(read_records(folder / f"{part}.jsonl.gz", _example) for part in ("train", "validation", "test")))

    def program(self) -> Module:
        return MultiHop(self.hops, self.k)

    def metric(self) -> Metric:
        return exact_match


def _hard(records: Iterable[Mapping[str, Any]]) -> Iterable[Example]:
    return (_example(record) for record in records if record["level"] == "hard")


def _example(record: Mapping[str, Any]) -> Example:
    """Returns an example whose id is a digest of the question, so that equal questions are one example."""
    try:
        question, answer, kind = record["question"], record["answer"], record["type"]
        titles = list(dict.fromkeys(map(html.unescape, record["supporting_facts"]["title"])))
    except (KeyError, TypeError) as error:
        raise ConfigError(f"a HotPotQA record lacks a field ({error}): {shown(dict(record), 200)}") from error
    if not isinstance(question, str) or not isinstance(answer, str):
        raise ConfigError(f"a HotPotQA record has a question or an answer that is not text: {shown(dict(record), 200)}")
    if not titles:
        raise ConfigError(f"a HotPotQA record names no supporting facts: {shown(dict(record), 200)}")
    name = digest(" ".join(question.lower().split()))[:12]
    return Example({"question": question}, {"answer": answer, "type": kind, "titles": titles}, id=name)


def is_gold(text: str, title: str) -> bool:
    """Whether a passage is from the article with a title; titles in passages may be escaped for HTML."""
    return html.unescape(text).startswith(f"{title} | ")


def f1(trace: Trace) -> float:
    """Returns the F1 score of the answer's words; 0 for a failed rollout."""
    return answer_f1(trace.example, trace.prediction) if trace.prediction else 0.0


@final
@dataclass(frozen=True)
class GoldRecall:
    """Share of the gold passages that a rollout found in its first hops. Failed rollouts count too.

    Args:
        hop: Number of hops, from 1.
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
    """Whether a rollout found every gold passage. The mean limits the score: without both, the answer is a guess.

    Args:
        hops: Number of hops of the program.
    """

    hops: int

    def __call__(self, trace: Trace) -> float:
        return float(GoldRecall(self.hops)(trace) == 1)
