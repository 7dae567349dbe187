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
from lmpipe.evaluate import Evaluation, program_digest
from lmpipe.hashing import describe, digest
from lmpipe.ledger import Cost
from lmpipe.module import Module
from lmpipe.session import Session
from lmpipe.state import ProgramState


@final
class Candidate(BaseModel):
    """A state that an optimizer looked at, and how it scored."""

    model_config = ConfigDict(frozen=True)

    name: str
    state: str
    mean: float
    n: int


@final
class OptimizeResult(BaseModel):
    """What an optimizer found.

    Attributes:
        state: The better state; the one it was given if it was skipped.
        status: ``"done"``, or ``"skipped"`` when there was nothing to work with.
        reason: Why it was skipped, in words.
        evaluation: Of `state`, where the optimizer made one.
        candidates: What it chose from.
        details: Figures worth reporting, as JSON.
        stages: The results of the parts of a composed optimizer.
    """

    model_config = ConfigDict(frozen=True)

    state: ProgramState
    status: Literal["done", "skipped"] = "done"
    reason: str = ""
    evaluation: Evaluation | None = None
    candidates: tuple[Candidate, ...] = ()
    details: dict[str, Any] = {}
    stages: tuple[StageResult, ...] = ()


@final
class StageResult(BaseModel):
    """One stage of a composed optimizer.

    Attributes:
        name: The stage as the strategy names it.
        result: What its optimizer found.
        evaluation: Of the state after the stage, on the whole validation set.
        cost: What it cost, the evaluation included.
    """

    model_config = ConfigDict(frozen=True)

    name: str
    result: OptimizeResult
    evaluation: Evaluation
    cost: Cost


class Optimizer(ABC):
    """Base of every optimizer. A subclass is a frozen dataclass of its settings and overrides `search` and `tunes`."""

    tunes: ClassVar[Literal["prompts", "weights", "both"]]
    """What of the state it changes."""

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
        raise for an individual example.
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
            train: Examples to learn from.
            val: Examples to choose by.
            session: LMs, seed and store.

        Returns:
            The result; with status ``"skipped"`` and a reason if there was nothing to learn from.
        """
        data = [[example.digest for example in examples] for examples in (train, val)]
        parts = [describe(self), program_digest(program), state.digest, data, session.seed, session.decoding()]

        def work(inner: Session) -> Any:
            return self.search(program, state, train, val, inner).model_dump(mode="json")

        return OptimizeResult.model_validate(session.once("optimize " + digest(parts), work))


OptimizeResult.model_rebuild()
