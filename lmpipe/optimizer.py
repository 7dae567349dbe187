"""The base class of optimizers: an optimizer is a function from a program state to a better one.

Researchers extend `Optimizer`. `optimize` handles seeds, costs and resumption; `search` does the work. This module
knows nothing about how prompts or weights are improved: see the package `optimizers`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from typing import Any, ClassVar, Literal, final

from lmpipe.data import Example
from lmpipe.errors import ConfigError
from lmpipe.events import ResultRecalled
from lmpipe.optimize_result import OptimizeResult, Origin
from lmpipe.program.identity import identity, work_key
from lmpipe.program.labels import check_labels
from lmpipe.program.module import Module, check_state
from lmpipe.program.predict import predictors, resolve_state
from lmpipe.results.saved import SavedSession
from lmpipe.runtime.garbage import existing_objects_frozen
from lmpipe.runtime.session import Session
from lmpipe.state import ProgramState
from lmpipe.text.reprs import settings_repr, short_repr
from lmpipe.validation.arguments import check_type
from lmpipe.validation.checks import check_examples, check_ids, deduplicate, warn_about_overlap


class Optimizer(ABC):
    """Base class of optimizers. A subclass is a frozen dataclass of its settings and overrides `search`.

    With ``@dataclass(frozen=True, repr=False)`` an optimizer is shown by the settings that are not at their default.
    """

    tunes: ClassVar[Literal["prompts", "weights", "both"]] = "both"
    """The part of the state that the optimizer changes."""
    needs: ClassVar[tuple[Literal["train", "val"], ...]] = ()
    """The sets of examples that must not be empty."""

    @abstractmethod
    def search(
        self,
        program: Module,
        state: ProgramState,
        train: Sequence[Example],
        val: Sequence[Example],
        session: Session,
    ) -> OptimizeResult:
        """Searches for a better state. Call it through `optimize` only.

        An implementation must not change the program or the state, must derive every random choice from
        ``session.seed``, and must not raise because of a single example. When ``session.ledger.reached_limit()`` names
        a limit, it returns the best state so far.
        """

    @final
    def optimize(
        self,
        program: Module,
        state: ProgramState | None,
        train: Sequence[Example],
        val: Sequence[Example],
        session: Session,
    ) -> OptimizeResult:
        """Searches for a better state, or recalls the result of an earlier search from the session's store.

        Args:
            program: The program. It is not changed.
            state: The state to start from. It is not changed. None stands for the session's state or, if it has none,
                the initial state of the program.
            train: Examples to learn from. Repeated examples count once.
            val: Examples to choose by.
            session: LMs, seed and store.

        Returns:
            The result. Its status is ``"skipped"``, with a reason, if there was nothing to learn from.

        Raises:
            ConfigError: If a set of examples that the optimizer needs is empty, if two examples have the same id, if an
                argument is of the wrong type, if the state is of another program, or if a label of a program that is a
                single predictor is not among the choices of the output.
        """
        check_type("program", program, Module)
        check_type("session", session, Session, "optimize(program, state, train, val, session)")
        state = resolve_state(program, session, state)
        check_type("state", state, ProgramState, "optimize(program, {}, train, val, session)")
        train = deduplicate(check_examples(train, "train"), "train")
        val = check_examples(val, "val")
        check_ids(val, "val")
        self.require_examples(train, val)
        _check_prompts(program, state)
        if not session.stage:
            warn_about_overlap(train, val)
            check_labels(program, [*train, *val])
        key = work_key(
            "optimize",
            optimizer=self,
            program=program,
            state=state.digest,
            examples=[[example.digest for example in examples] for examples in (train, val)],
            seed=session.seed,
            decoding=session.inference_settings(),
            limits=session.ledger.limits,
        )

        recalled = True

        def work(inner: Session) -> Any:
            nonlocal recalled
            recalled = False
            origin = self._origin(program, state, train, val, session)
            with existing_objects_frozen():
                result = self.search(program, state, train, val, inner)
            check_type(f"the result of {type(self).__name__}.search()", result, OptimizeResult)
            update = {
                "stopped": result.stopped or inner.ledger.reached_limit(),
                "cost": inner.ledger.total,
                "origin": origin,
            }
            return result.model_copy(update=update).model_dump(mode="json")

        result = OptimizeResult.model_validate(session.cached(key, work)).with_session(session)
        if recalled:
            name = type(self).__name__
            session.notify(ResultRecalled(session.stage, f"{name}, {self.plan}" if self.plan else name))
        return result

    def after(self, earlier: Sequence[OptimizeResult]) -> Optimizer:
        """Returns the optimizer as it runs after other stages of a strategy: by default as it is.

        Args:
            earlier: Results of the stages before it, in order.
        """
        return self

    def __repr__(self) -> str:
        return settings_repr(self) if is_dataclass(self) else short_repr(self)

    @property
    def plan(self) -> str:
        """The strategy of an optimizer that runs others as its stages; empty for others."""
        return ""

    @final
    def _origin(
        self,
        program: Module,
        state: ProgramState,
        train: Sequence[Example],
        val: Sequence[Example],
        session: Session,
    ) -> Origin:
        own: dict[str, object] = (
            {field.name: getattr(self, field.name) for field in fields(self)} if is_dataclass(self) else {}
        )
        parts = {
            "program": program,
            "optimizer": self,
            "data": [[example.digest for example in examples] for examples in (train, val)],
            "start": state.digest,
            "settings": session.inference_settings(),
            **({} if session.stage else {"budget": session.ledger.limits}),
            **({"metric": own["metric"]} if "metric" in own else {}),
        }
        digests = {name: identity(**{name: part}) for name, part in parts.items()}
        return Origin(
            optimizer=type(self).__name__,
            program=type(program).__name__,
            lm={role: lm.name for role, lm in session.roles.items()},
            strategy=self.plan,
            stage=session.stage,
            seed=session.run_seed,
            train=len(train),
            val=len(val),
            session=SavedSession.of(session),
            digests={name: digest for name, digest in digests.items() if digest is not None},
        )

    @final
    def require_examples(self, train: Sequence[Example], val: Sequence[Example]) -> None:
        """Checks that the sets of examples that the optimizer needs are not empty.

        Raises:
            ConfigError: If one of them is empty.
        """
        name = type(self).__name__
        if "train" in self.needs and not train:
            raise ConfigError(f"{name}: there are no training examples to learn from; pass some as train")
        if "val" in self.needs and not val:
            raise ConfigError(f"{name}: there are no validation examples to choose by; pass some as val")


def _check_prompts(program: Module, state: ProgramState) -> None:
    """Checks that a state has a prompt for every predictor; an optimizer would not improve the missing ones."""
    check_state(program, state)
    missing = [path for path in predictors(program) if path not in state.prompts]
    if missing:
        raise ConfigError(
            f"the state has no prompt for {', '.join(map(repr, missing))} of {type(program).__name__}; start from a "
            "state of this program, such as initial_state(program, session)"
        )


class PromptOptimizer(Optimizer):
    """Base class of optimizers of Π: instructions and demonstrations. They leave the weights as they are."""

    tunes: ClassVar[Literal["prompts", "weights", "both"]] = "prompts"


class WeightOptimizer(Optimizer):
    """Base class of optimizers of Θ: the weights of LM roles. They leave the prompts as they are."""

    tunes: ClassVar[Literal["prompts", "weights", "both"]] = "weights"
