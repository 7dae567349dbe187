"""What an optimizer is: a function from a program state to a better one.

Researchers extend `Optimizer`. `optimize` takes care of seeds, cost and resumption, `search` does the work.
Knows nothing of how prompts or weights are improved: see the package `optimizers`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Literal, final

from pydantic import BaseModel, ConfigDict

from lmpipe.data import Example
from lmpipe.errors import ConfigError
from lmpipe.ledger import Cost
from lmpipe.program.evaluate import Evaluation
from lmpipe.program.identity import work_key
from lmpipe.program.module import Module, check_state
from lmpipe.program.predict import predictors
from lmpipe.runtime.session import Session
from lmpipe.state import ProgramState
from lmpipe.validation.arguments import check_type
from lmpipe.validation.checks import check_examples, check_ids, deduplicate, warn_about_overlap


@final
class Candidate(BaseModel):
    """A state that an optimizer looked at, and how it scored."""

    model_config = ConfigDict(frozen=True)

    name: str
    state: str
    mean: float
    n: int


@final
class Finding(BaseModel):
    """Something about a run that a researcher should know, in words.

    Attributes:
        kind: What sort of thing it is.
        stage: The strategy up to and with the stage that it is about.
        message: What was found, with figures.
        advice: What to try next.
    """

    model_config = ConfigDict(frozen=True)

    kind: Literal["few traces", "class collapse", "over-fit", "worse", "no gain", "budget", "failing", "no choice"]
    stage: str
    message: str
    advice: str


@final
class OptimizeResult(BaseModel):
    """What an optimizer found.

    Attributes:
        state: The better state; the one it was given if it was skipped.
        status: ``"done"``, or ``"skipped"`` when there was nothing to work with.
        reason: Why it was skipped, in words.
        stopped: Which budget ended it before it was through, in words; the state is then the best so far.
        evaluation: Of `state`, where the optimizer made one.
        candidates: What it chose from.
        details: Figures worth reporting, as JSON.
        stages: The results of the parts of a composed optimizer.
        findings: What a composed optimizer has to say of them.
        cost: What it cost; set by `Optimizer.optimize`.
    """

    model_config = ConfigDict(frozen=True)

    state: ProgramState
    status: Literal["done", "skipped"] = "done"
    reason: str = ""
    stopped: str = ""
    evaluation: Evaluation | None = None
    candidates: tuple[Candidate, ...] = ()
    details: dict[str, Any] = {}
    stages: tuple[StageResult, ...] = ()
    findings: tuple[Finding, ...] = ()
    cost: Cost = Cost()


@final
class StageResult(BaseModel):
    """One stage of a composed optimizer.

    Attributes:
        name: The stage as the strategy names it.
        result: What its optimizer found.
        evaluation: Of the state after the stage, on the whole validation set.
        train_evaluation: The same on training examples, if any were to be scored.
        cost: What it cost, the evaluations included.
    """

    model_config = ConfigDict(frozen=True)

    name: str
    result: OptimizeResult
    evaluation: Evaluation
    train_evaluation: Evaluation | None = None
    cost: Cost


class Optimizer(ABC):
    """Base of every optimizer. A subclass is a frozen dataclass of its settings and overrides `search`."""

    tunes: ClassVar[Literal["prompts", "weights", "both"]] = "both"
    """What of the state it changes."""
    needs: ClassVar[tuple[Literal["train", "val"], ...]] = ()
    """Which of the two sets of examples it cannot work without."""

    @abstractmethod
    def search(
        self,
        program: Module,
        state: ProgramState,
        train: Sequence[Example],
        val: Sequence[Example],
        session: Session,
    ) -> OptimizeResult:
        """Looks for a better state; called through `optimize` only.

        Must change neither the program nor the state, take every random choice from ``session.seed``, and never
        raise for an individual example. When ``session.ledger.reached_limit()`` names a limit, it returns the best
        state so far.
        """

    @final
    def optimize(
        self,
        program: Module,
        state: ProgramState,
        train: Sequence[Example],
        val: Sequence[Example],
        session: Session,
    ) -> OptimizeResult:
        """Finds a better state, or recalls the one found before if the session's store has it.

        Args:
            program: The program; it is left as it is.
            state: Where to start; it is left as it is.
            train: Examples to learn from; one that is there several times counts once.
            val: Examples to choose by.
            session: LMs, seed and store.

        Returns:
            The result; with status ``"skipped"`` and a reason if there was nothing to learn from.

        Raises:
            ConfigError: If it needs examples and there are none, something is no example, or two have one id; or if the
                state is of another program.
        """
        check_type("program", program, Module)
        check_type("state", state, ProgramState)
        check_type("session", session, Session)
        train = deduplicate(check_examples(train, "train"), "train")
        val = check_examples(val, "val")
        check_ids(val, "val")
        self.require(train, val)
        _check_paths(program, state)
        if not session.stage:
            warn_about_overlap(train, val)
        key = work_key(
            "optimize",
            optimizer=self,
            program=program,
            state=state.digest,
            examples=[[example.digest for example in examples] for examples in (train, val)],
            seed=session.seed,
            decoding=session.decoding(),
            limits=session.ledger.limits,
        )

        def work(inner: Session) -> Any:
            result = self.search(program, state, train, val, inner)
            check_type(f"what {type(self).__name__}.search() returned", result, OptimizeResult)
            found = {"stopped": result.stopped or inner.ledger.reached_limit(), "cost": inner.ledger.total}
            return result.model_copy(update=found).model_dump(mode="json")

        return OptimizeResult.model_validate(session.cached(key, work))

    @final
    def require(self, train: Sequence[Example], val: Sequence[Example]) -> None:
        """Raises:
        ConfigError: If there are none of the examples that it needs.
        """
        name = type(self).__name__
        if "train" in self.needs and not train:
            raise ConfigError(f"{name}: there are no training examples to learn from; pass some as train")
        if "val" in self.needs and not val:
            raise ConfigError(f"{name}: there are no validation examples to choose by; pass some as val")


def _check_paths(program: Module, state: ProgramState) -> None:
    """An optimizer changes the prompts that a state has: one that lacks some would leave them as they are."""
    check_state(program, state)
    missing = [path for path in predictors(program) if path not in state.prompts]
    if missing:
        raise ConfigError(
            f"the state has no prompt for {', '.join(map(repr, missing))} of {type(program).__name__}; start from a "
            "state of this program, such as initial_state(program, session)"
        )


class PromptOptimizer(Optimizer):
    """Base of the optimizers of Π: instructions and demonstrations. Weights come back as they were given."""

    tunes: ClassVar[Literal["prompts", "weights", "both"]] = "prompts"


class WeightOptimizer(Optimizer):
    """Base of the optimizers of Θ: the weights of LM roles. Prompts come back as they were given."""

    tunes: ClassVar[Literal["prompts", "weights", "both"]] = "weights"


OptimizeResult.model_rebuild()
