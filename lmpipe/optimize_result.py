"""The values that optimizers return: the new state, the scores on the way, the findings and the cost.

A result also answers for itself: `OptimizeResult.session` runs programs with the state that was found. This module
knows nothing about how a state is found.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, final

from pydantic import BaseModel, ConfigDict, PrivateAttr

from lmpipe.errors import SessionError
from lmpipe.ledger import Cost
from lmpipe.metrics import wilson_interval
from lmpipe.program.evaluate import Evaluation
from lmpipe.results.model_card import CardFacts
from lmpipe.results.run_reader import prompts_of, prompts_sent
from lmpipe.results.saved import SavedSession, write_saved
from lmpipe.results.trace_log import read_trace_log
from lmpipe.runtime.session import Session
from lmpipe.state import ProgramState
from lmpipe.text.figures import cost, count, percent
from lmpipe.text.markdown import as_code, as_line
from lmpipe.text.reprs import Name, short_repr
from lmpipe.text.tables import Table
from lmpipe.validation.arguments import check_type


@final
class Candidate(BaseModel):
    """A state that an optimizer scored.

    Attributes:
        name: Name of the candidate, as the optimizer calls it.
        state: Digest of the state.
        mean: Mean score.
        n: Number of examples that it was scored on.
    """

    model_config = ConfigDict(frozen=True)

    name: str
    state: str
    mean: float
    n: int

    def __repr__(self) -> str:
        return short_repr(self, self.name, mean=self.mean, n=self.n)

    def __str__(self) -> str:
        return repr(self)


@final
class Finding(BaseModel):
    """A remark about an optimization that a researcher should read.

    Attributes:
        kind: Kind of finding.
        stage: The strategy up to and including the stage that the finding is about.
        message: The finding in words, with figures.
        advice: Advice on what to change.
    """

    model_config = ConfigDict(frozen=True)

    kind: Literal[
        "failing",
        "skipped",
        "few traces",
        "class collapse",
        "no learning",
        "over-fit",
        "worse",
        "no gain",
        "no choice",
        "budget",
    ]
    stage: str
    message: str
    advice: str

    def __repr__(self) -> str:
        return short_repr(self, self.kind, stage=self.stage, message=self.message)

    def __str__(self) -> str:
        return f"{self.kind} ({self.stage}): {self.message}. Try: {self.advice}."


@final
class Origin(BaseModel):
    """What a result was made with, for people who read a run directory.

    Attributes:
        optimizer: Class of the optimizer.
        program: Class of the program.
        lm: Names of the LMs, by role.
        strategy: The strategy of a composed optimizer; empty for others.
        stage: The strategy up to and including the stage that made the result; empty outside of a stage.
        seed: Seed of the run.
        train: Number of training examples.
        val: Number of validation examples.
        session: LMs and settings of the session; None in results of earlier versions.
        digests: Digests of what the seed does not decide: ``"program"``, ``"optimizer"``, ``"metric"``, ``"data"``,
            ``"start"`` (the initial state), ``"settings"`` of the session and, outside of a stage, its ``"budget"``.
            Empty in results of earlier versions.
    """

    model_config = ConfigDict(frozen=True)

    optimizer: str
    program: str
    lm: dict[str, str]
    strategy: str = ""
    stage: str = ""
    seed: int
    train: int
    val: int
    session: SavedSession | None = None
    digests: dict[str, str] = {}

    def __repr__(self) -> str:
        return short_repr(self, self.optimizer, self.program, lm=self.lm, strategy=self.strategy, stage=self.stage)

    def __str__(self) -> str:
        return repr(self)


@final
class OptimizeResult(BaseModel):
    """The result of an optimizer.

    Attributes:
        state: The better state; the initial state if the optimizer was skipped.
        status: ``"done"``, or ``"skipped"`` if there was nothing to work with.
        reason: Why the optimizer was skipped; empty if it was not.
        stopped: A clause that names the budget that ended the optimizer early; the state is then the best one so far.
        evaluation: Evaluation of `state`, if the optimizer made one.
        initial: Evaluation of the initial state, if a composed optimizer made one.
        candidates: The states that the optimizer chose from.
        runners_up: The best of these besides `state`, the best first, for stages that can use further prompts.
        details: Figures to report, as JSON.
        stages: The results of the stages of a composed optimizer.
        findings: The findings of a composed optimizer about its stages.
        cost: Cost of the optimization; set by `Optimizer.optimize`.
        origin: What the result was made with; set by `Optimizer.optimize`.
    """

    model_config = ConfigDict(frozen=True)

    _session: Session | None = PrivateAttr(default=None)

    state: ProgramState
    status: Literal["done", "skipped"] = "done"
    reason: str = ""
    stopped: str = ""
    evaluation: Evaluation | None = None
    initial: Evaluation | None = None
    candidates: tuple[Candidate, ...] = ()
    runners_up: tuple[ProgramState, ...] = ()
    details: dict[str, Any] = {}
    stages: tuple[StageResult, ...] = ()
    findings: tuple[Finding, ...] = ()
    cost: Cost = Cost()
    origin: Origin | None = None

    def __repr__(self) -> str:
        optimizer, strategy = (self.origin.optimizer, self.origin.strategy) if self.origin else (self.status, "")
        parts = {"stages": self.stages, "candidates": self.candidates, "findings": self.findings}
        figures = {name: len(items) for name, items in parts.items() if items}
        return short_repr(
            self, Name(optimizer or self.status), strategy=strategy, score=_score(self.evaluation), **figures
        )

    def __str__(self) -> str:
        """A table of the stages or candidates with their scores, which state was chosen, and the findings."""
        return str(_table(self))

    def _repr_html_(self) -> str:
        """The same table, for notebooks."""
        return _table(self).html()

    @property
    def session(self) -> Session:
        """A session that runs programs with the state that was found: ``with result.session: program(…)``.

        Raises:
            SessionError: If the result was not returned by `Optimizer.optimize`.
        """
        if self._session is None:
            raise SessionError("this result belongs to no session; write: with session.using(result.state): program(…)")
        return self._session.using(self.state)

    def __eq__(self, other: object) -> bool:
        """Compares the fields; results of two sessions may be equal."""
        return isinstance(other, OptimizeResult) and self.__dict__ == other.__dict__

    def __hash__(self) -> int:
        return hash(self.state)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickles have no session: its LMs and its store belong to this process."""
        return OptimizeResult.model_validate, (self.model_dump(mode="json"),)

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> OptimizeResult:
        return self  # nothing in it changes

    def with_session(self, session: Session) -> OptimizeResult:
        """Returns this result, and those of its stages, with a session to run their states in."""
        stages = tuple(stage.model_copy(update={"result": stage.result.with_session(session)}) for stage in self.stages)
        result = self.model_copy(update={"stages": stages})
        result._session = session
        return result

    def save(self, folder: str | Path) -> Path:
        """Saves the state that was found, its adapters, and the LMs and settings that it runs on.

        `lmpipe.load` reads the folder, which does not depend on the run directory. Keys of servers are not saved.

        Args:
            folder: Path of a new folder. A folder that holds this very state and session already stays as it is.

        Returns:
            The path of the folder.

        Raises:
            ConfigError: If the folder exists and holds anything else.
            CorruptBlob: If an adapter is missing or damaged.
            SessionError: If the result was not returned by `Optimizer.optimize`.
            StoreError: If the folder cannot be written.
        """
        check_type("folder", folder, (str, Path), "result.save('folder')")
        session = self.session
        write_saved(Path(folder), self.state, SavedSession.of(session), session.adapter_folder, _card_facts(self))
        return Path(folder)


def _card_facts(result: OptimizeResult) -> CardFacts:
    """What the model card says about a result."""
    session, origin, evaluation = result.session, result.origin, result.evaluation
    scores = [f"The optimizer was skipped: {as_line(result.reason)}."] if result.status == "skipped" else []
    if evaluation is not None and evaluation.n:
        share, examples = percent(evaluation.mean, *evaluation.interval), count(evaluation.n, "example")
        scores.append(f"Validation score: {share} of {examples}, with a 95 % Wilson interval.")
    traces = None if evaluation is None else evaluation.traces
    sent = read_trace_log(session.store.path / "blobs" / traces) if session.store and traces else None
    return CardFacts(
        program=origin.program if origin else "program",
        found_by=_found_by(origin),
        seed=session.run_seed,
        scores=scores,
        prompts=prompts_of(result.state) if sent is None else prompts_sent(sent),
    )


def _found_by(origin: Origin | None) -> str:
    if origin is None:
        return "an optimizer"
    strategy = f"the strategy {as_code(origin.strategy)} of " if origin.strategy else ""
    return strategy + as_code(origin.optimizer)


@final
class StageResult(BaseModel):
    """One stage of a composed optimizer.

    Attributes:
        name: Name of the stage in the strategy.
        result: Result of the stage's optimizer.
        evaluation: Evaluation of the state after the stage, on the whole validation set.
        train_evaluation: Evaluation of that state on training examples, if any are scored.
        cost: Cost of the stage, including the evaluations.
    """

    model_config = ConfigDict(frozen=True)

    name: str
    result: OptimizeResult
    evaluation: Evaluation
    train_evaluation: Evaluation | None = None
    cost: Cost

    def __repr__(self) -> str:
        return short_repr(self, self.name, self.result, self.evaluation)

    def __str__(self) -> str:
        return repr(self)


def _table(result: OptimizeResult) -> Table:
    """Returns the table that shows a result."""
    told = {finding.message for finding in result.findings}
    skipped = [("", result)] if result.status == "skipped" and not result.stages else []
    skipped += [(f"{name} was ", stage.result) for name, stage in _named(result.stages) if _skipped(stage)]
    notes = [f"chosen: {_chosen(result)}"] if result.status == "done" else []
    notes += [f"ended early: {result.stopped}"] if result.stopped else []
    notes += [f"{name}skipped: {each.reason}" for name, each in skipped if each.reason not in told]
    spent = cost(result.cost.lm_calls, result.cost.tokens, result.cost.seconds)
    notes += [f"cost: {spent}", *map(str, result.findings)]
    first = result.initial
    if first is None and not result.stages:
        columns: Sequence[str] = ("candidate", "score", "examples")
        return Table(columns, [_candidate_row(each) for each in result.candidates], _title(result), notes)
    columns = ("stage", "status", "score", "examples", "LM calls", "seconds")
    rows = [] if first is None else [("initial state", "", _score(first) or "", f"{first.n:,}", "", "")]
    rows += [_stage_row(name, stage) for name, stage in _named(result.stages)]
    return Table(columns, rows, _title(result), notes)


def _candidate_row(candidate: Candidate) -> tuple[str, str, str]:
    interval = wilson_interval(candidate.mean, candidate.n)
    return candidate.name, percent(candidate.mean, *interval), f"{candidate.n:,}"


def _stage_row(name: str, stage: StageResult) -> tuple[str, str, str, str, str, str]:
    spent = (f"{stage.cost.lm_calls:,}", f"{stage.cost.seconds:,.0f}")
    return name, stage.result.status, _score(stage.evaluation) or "", f"{stage.evaluation.n:,}", *spent


def _title(result: OptimizeResult) -> str:
    origin = result.origin
    if origin is None:
        return "result of an optimizer"
    strategy = f", {origin.strategy}," if origin.strategy else ""
    examples = f"{origin.train:,} training and {origin.val:,} validation examples"
    lms = ", ".join(dict.fromkeys(origin.lm.values()))
    return f"{origin.optimizer}{strategy} for {origin.program} on {lms}: {examples}"


def _named(stages: Sequence[StageResult]) -> list[tuple[str, StageResult]]:
    """Returns each stage with the strategy up to and including it."""
    names = [stage.name for stage in stages]
    return [(" -> ".join(names[: number + 1]), stage) for number, stage in enumerate(stages)]


def _skipped(stage: StageResult) -> bool:
    return stage.result.status == "skipped"


def _chosen(result: OptimizeResult) -> str:
    """Says which state the result is, and its score."""
    done = [(name, stage) for name, stage in _named(result.stages) if not _skipped(stage)]
    after = [name for name, stage in done if stage.result.state == result.state]
    chosen = [each.name for each in result.candidates if each.state == result.state.digest]
    found = f"the state after {after[0]}" if after else chosen[0] if chosen else f"state {result.state.digest[:8]}"
    if (result.stages or result.initial is not None) and not after:
        found = "the initial state"
    score = _score(result.evaluation)
    return f"{found}, {score}" if score else found


def _score(evaluation: Evaluation | None) -> str | None:
    return None if evaluation is None else percent(evaluation.mean, *evaluation.interval)


OptimizeResult.model_rebuild()
