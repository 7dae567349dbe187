"""What a run would cost, before it costs anything: ``--dry-run``.

The whole schedule runs on stand-ins: an LM that fills in the reply form, a trainer that counts tokens, a retriever of
filler text, and a metric by which every second run succeeds. So calls are counted and not guessed; how many a real run
makes depends on how many of its runs succeed, and tokens on how much it writes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, final

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from benchmarks.experiments.run import scheduler
from benchmarks.experiments.settings import Settings, table_rows
from benchmarks.experiments.task import Task
from lmpipe import LM, EngineError, Example, Module, Passage, Prediction, Retriever, Session, evaluate, initial_state
from lmpipe.errors import SessionError
from lmpipe.ledger import Cost, Ledger
from lmpipe.lm import Completion, Message, Request, Usage
from lmpipe.program.predict import predictors
from lmpipe.prompting.choices import choices_of
from lmpipe.prompting.signature import Field, Signature
from lmpipe.prompting.template import Template
from lmpipe.state import WeightState
from lmpipe.storage.hashing import describe, digest
from lmpipe.storage.store import RunStore
from lmpipe.trainer import Objective, SFTLoss, Trainer, TrainingResult, TrainingRow
from optimizers import format_strategy

_CHARACTERS = 4  # of a token, about
_TEXT = " ".join(["word"] * 40)  # what a field of text is filled with: fifty tokens
_PASSAGE = " ".join(["word"] * 90)  # about what an introduction of Wikipedia holds


@final
@dataclass(frozen=True)
class StageCost:
    """What a stage is expected to cost on all seeds.

    Attributes:
        name: The strategy up to it; ``"test"`` is the scoring of all strategies at the end.
        runs: Of the program.
        cost: Calls and tokens.
    """

    name: str
    runs: int
    cost: Cost


def rehearse(task: Task, settings: Settings, strategies: Sequence[str], seeds: Sequence[int]) -> list[StageCost]:
    """Goes through the run of one seed, and counts it for all.

    Raises:
        ConfigError: If there is too little data.
    """
    program = task.program()
    with TemporaryDirectory() as folder:
        store = RunStore(Path(folder, "run"))
        session = Session(
            lm=_Filler(program),
            sampling=settings.sampling(),
            store=store,
            retriever=_Library(),
        )
        split = task.split(settings.train, settings.val, settings.test, seeds[0])
        metric = _EverySecond()
        planned = scheduler(settings, metric, _Counter(settings.tuning.epochs), task.label)
        start = initial_state(program, session)
        results = planned.optimize_all(table_rows(strategies), program, start, split.train, split.val, session)
        costs = {
            format_strategy([part.name for part in result.stages[:number]]): stage.cost
            for result in results.values()
            for number, stage in enumerate(result.stages, 1)
        }
        costs |= {name: result.cost for name, result in results.items() if not result.stages}
        tested = replace(session, ledger=Ledger())
        for result in results.values():
            evaluate(program, result.state, split.test, metric, tested, title="test")
        store.close()
    costs["test"] = tested.ledger.total
    return [_scaled(name, cost, len(seeds)) for name, cost in costs.items()]


def show_plan(stages: Sequence[StageCost], console: Console) -> None:
    """Prints what is expected."""
    table = Table(box=SIMPLE, title="expected, if every second run succeeds; about four characters a token")
    for name in ("stage", "runs", "LM calls", "tokens read", "written", "trained on"):
        table.add_column(name, justify="left" if name == "stage" else "right", no_wrap=True)
    for stage in [*stages, StageCost("together", sum(one.runs for one in stages), sum_of(stages))]:
        cost = stage.cost
        counts = (stage.runs, cost.lm_calls, cost.prompt_tokens, cost.completion_tokens, cost.training_tokens)
        table.add_row(stage.name, *(f"{count:,}" for count in counts))
    console.print(table)


def sum_of(stages: Sequence[StageCost]) -> Cost:
    """What all of them cost."""
    return sum((stage.cost for stage in stages), Cost())


def _scaled(name: str, cost: Cost, seeds: int) -> StageCost:
    total = sum([cost] * seeds, Cost())
    called = [module.calls for module in total.modules.values() if module.calls]  # a retriever's module makes none
    return StageCost(name, min(called, default=0), total)


@final
class _Filler(LM):
    """Fills in the reply form of whatever module asks, which it tells by the system message."""

    name = "dry run"

    def __init__(self, program: Module) -> None:
        self._replies = {
            Template().messages(predictor.signature, predictor.vanilla, {})[0].content: _reply(predictor.signature)
            for predictor in predictors(program).values()
        }

    def complete(self, requests: Sequence[Request]) -> list[Completion | EngineError]:
        return [self._answer(request) for request in requests]

    def register_adapter(self, adapter: str, folder: Path) -> None:
        """Answers alike with every adapter."""

    def _answer(self, request: Request) -> Completion:
        text = self._replies[request.messages[0].content]
        tokens = min(len(text) // _CHARACTERS, request.sampling.max_tokens)
        return Completion(text, usage=Usage(1, _tokens(request.messages), tokens))


def _reply(signature: Signature) -> str:
    return Template().completion(signature, {field.name: _fill(field) for field in signature.outputs})


def _fill(field: Field) -> Any:
    """A value of the field's type; JSON of any other type is not filled in, so its runs fail and count."""
    if (named := choices_of(field.type)) is not None:
        return named.choices[0].value
    known: Mapping[Any, Any] = {str: _TEXT if field.optional else "word", int: 1, float: 1.0, bool: True}
    return known.get(field.type, {})


def _tokens(messages: Sequence[Message]) -> int:
    return sum(len(message.content) for message in messages) // _CHARACTERS


@final
class _Library(Retriever):
    """Always has passages, other ones for every query."""

    name = "dry run"

    def search(self, queries: Sequence[str], k: int) -> list[list[Passage]]:
        return [[Passage(digest([query, rank]), _PASSAGE, float(k - rank)) for rank in range(k)] for query in queries]


@final
@dataclass(frozen=True)
class _EverySecond:
    """Half of the examples succeed."""

    def __call__(self, example: Example, prediction: Prediction) -> float:
        return float(int(digest(example.id), 16) % 2)


@final
@dataclass(frozen=True)
class _Counter(Trainer):
    """Counts, and gives an adapter that holds its rows and nothing else.

    Args:
        epochs: How often rows are passed.
    """

    epochs: int

    def train(
        self, rows: Sequence[TrainingRow], start: WeightState, session: Session, objective: Objective = SFTLoss()
    ) -> TrainingResult:
        tokens = self.epochs * sum(_tokens(row.messages) + len(row.completion) // _CHARACTERS for row in rows)
        session.ledger.add(Cost(training_tokens=tokens))
        if session.store is None:
            raise SessionError("a trainer needs a session with a store")
        folder = session.store.new_folder()
        (folder / "rows").write_text(digest(describe(rows)))
        weights = WeightState(base=start.base, adapter=session.store.put_folder(folder))
        return TrainingResult(weights, steps=0, tokens=tokens, losses=())
