"""The expected cost of an experiment, before anything is spent: ``--dry-run``.

The whole schedule runs with stand-ins: an LM that fills in the reply form, a trainer that counts tokens, a retriever of
filler text, and a metric by which every second run succeeds. Calls are therefore counted, not guessed. A real
experiment makes more or fewer of them if more or fewer of its runs succeed, and its tokens depend on how much its LM
writes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, final

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from benchmarks.experiments.run import scheduler
from benchmarks.experiments.spec import ExperimentSpec
from lmpipe import LM, EngineError, Example, Module, Passage, Prediction, Retriever, Session, evaluate, initial_state
from lmpipe.errors import SessionError
from lmpipe.ledger import Cost
from lmpipe.lm import Completion, Message, Request, Usage
from lmpipe.program.predict import predictors
from lmpipe.prompting.choices import choices_of
from lmpipe.prompting.signature import Field, Signature
from lmpipe.prompting.template import Template
from lmpipe.state import WeightState
from lmpipe.storage.hashing import describe_settings, digest
from lmpipe.storage.store import RunStore
from lmpipe.trainer import Objective, SFTLoss, Trainer, TrainingResult, TrainingRow
from optimizers import Strategy

_CHARACTERS_PER_TOKEN = 4  # on average
_TEXT = " ".join(["word"] * 40)  # fills a text field: fifty tokens
_PASSAGE = " ".join(["word"] * 90)  # about as long as the introduction of a Wikipedia article


@final
@dataclass(frozen=True)
class StageCost:
    """The expected cost of a stage on all seeds.

    Attributes:
        name: The strategy up to the stage; ``"test"`` is the scoring of all strategies at the end.
        runs: Number of runs of the program.
        cost: Calls and tokens.
    """

    name: str
    runs: int
    cost: Cost


def dry_run(spec: ExperimentSpec) -> list[StageCost]:
    """Simulates an experiment on its first seed, and returns the cost of each stage on all seeds.

    Raises:
        ConfigError: If there is too little data.
    """
    task, settings = spec.task, spec.settings
    program, metric = task.program(), _EverySecondSucceeds()
    with TemporaryDirectory() as folder:
        store = RunStore(Path(folder, "run"))
        session = Session(
            lm=_FormFillingLM(program),
            sampling=settings.sampling(),
            store=store,
            retriever=_FillerRetriever(),
            quiet=True,
        )
        split = task.split(settings.train, settings.val, settings.test, spec.seeds[0])
        trainer = _TokenCountingTrainer(settings.tuning.epochs)
        start = initial_state(program, session)
        results = scheduler(spec, metric, trainer).optimize_all(
            spec.strategies, program, start, split.train, split.val, session
        )
        costs = {
            str(Strategy(tuple(part.name for part in result.stages[:number]))): stage.cost
            for result in results.values()
            for number, stage in enumerate(result.stages, 1)
        }
        costs |= {str(strategy): result.cost for strategy, result in results.items() if not result.stages}
        test_session = session.metered()
        for result in results.values():
            evaluate(program, split.test, metric, test_session, state=result.state, title="test")
        store.close()
    costs["test"] = test_session.ledger.total
    return [_on_all_seeds(name, cost, len(spec.seeds)) for name, cost in costs.items()]


def show_costs(stages: Sequence[StageCost], console: Console) -> None:
    """Prints the expected cost of each stage and their total."""
    table = Table(box=SIMPLE, title="expected if every second run succeeds, four characters per token")
    for name in ("stage", "runs", "LM calls", "tokens read", "written", "trained on"):
        table.add_column(name, justify="left" if name == "stage" else "right", no_wrap=True)
    total = StageCost("total", sum(stage.runs for stage in stages), sum((stage.cost for stage in stages), Cost()))
    for stage in [*stages, total]:
        cost = stage.cost
        counts = (stage.runs, cost.lm_calls, cost.prompt_tokens, cost.completion_tokens, cost.training_tokens)
        table.add_row(stage.name, *(f"{count:,}" for count in counts))
    console.print(table)


def _on_all_seeds(name: str, cost: Cost, seeds: int) -> StageCost:
    total = sum([cost] * seeds, Cost())
    calls = [module.calls for module in total.modules.values() if module.calls]  # a module that retrieves makes none
    return StageCost(name, min(calls, default=0), total)


@final
class _FormFillingLM(LM):
    """Fills in the reply form of the calling module, which it recognizes by the system message."""

    name = "dry run"

    def __init__(self, program: Module) -> None:
        self._replies = {
            Template().messages(predictor.signature, predictor.initial_prompt, {})[0].content: _reply(
                predictor.signature
            )
            for predictor in predictors(program).values()
        }

    def complete(self, requests: Sequence[Request]) -> list[Completion | EngineError]:
        return [self._complete_one(request) for request in requests]

    def register_adapter(self, adapter: str, folder: Path) -> None:
        """Does nothing: replies are the same with every adapter."""

    def _complete_one(self, request: Request) -> Completion:
        text = self._replies[request.messages[0].content]
        tokens = min(len(text) // _CHARACTERS_PER_TOKEN, request.sampling.max_tokens)
        return Completion(text, usage=Usage(1, _num_tokens(request.messages), tokens))


def _reply(signature: Signature) -> str:
    return Template().completion(signature, {field.name: _filler(field) for field in signature.outputs})


def _filler(field: Field) -> Any:
    """Returns a value of the field's type. For other JSON types it is an empty object; such runs fail, but count."""
    if (choices := choices_of(field.type)) is not None:
        return choices.choices[0].value
    fillers: Mapping[Any, Any] = {str: _TEXT if field.optional else "word", int: 1, float: 1.0, bool: True}
    return fillers.get(field.type, {})


def _num_tokens(messages: Sequence[Message]) -> int:
    return sum(len(message.content) for message in messages) // _CHARACTERS_PER_TOKEN


@final
class _FillerRetriever(Retriever):
    """Finds passages of filler text, different ones for every query."""

    name = "dry run"

    def search(self, queries: Sequence[str], k: int) -> list[list[Passage]]:
        return [[Passage(digest([query, rank]), _PASSAGE, float(k - rank)) for rank in range(k)] for query in queries]


@final
@dataclass(frozen=True)
class _EverySecondSucceeds:
    """A metric by which half of the examples succeed, whatever the prediction."""

    def __call__(self, example: Example, prediction: Prediction) -> float:
        return float(int(digest(example.id), 16) % 2)


@final
@dataclass(frozen=True)
class _TokenCountingTrainer(Trainer):
    """Counts the tokens of its rows, and returns an adapter that contains only a digest of them.

    Args:
        epochs: Number of passes over the rows.
    """

    epochs: int

    def train(
        self, rows: Sequence[TrainingRow], start: WeightState, session: Session, objective: Objective = SFTLoss()
    ) -> TrainingResult:
        tokens = self.epochs * sum(
            _num_tokens(row.messages) + len(row.completion) // _CHARACTERS_PER_TOKEN for row in rows
        )
        session.ledger.add(Cost(training_tokens=tokens))
        if session.store is None:
            raise SessionError("a trainer needs a session with a store")
        folder = session.store.new_folder()
        (folder / "rows").write_text(digest(describe_settings(rows)))
        weights = WeightState(base=start.base, adapter=session.store.put_folder(folder))
        return TrainingResult(weights, steps=0, tokens=tokens, losses=())
