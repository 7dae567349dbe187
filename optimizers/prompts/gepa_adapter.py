"""The adapter between the package gepa and a program: scores candidates, records rollouts and rewrites instructions.

Knows gepa's interfaces, and answers them with rollouts and evaluations in a session. Imported only when GEPA runs, so
that only GEPA needs the package.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from types import TracebackType
from typing import Any, cast, final

from gepa.api import optimize
from gepa.core.adapter import EvaluationBatch, GEPAAdapter
from gepa.core.result import GEPAResult
from gepa.core.state import GEPAState
from gepa.strategies.instruction_proposal import InstructionProposalSignature

from lmpipe import Evaluation, Example, Job, Metric, Module, ProgramState, Session, predictors
from lmpipe.extend import CandidateScored, evaluate_many
from optimizers.prompts.cached_rollout import cached_rollout
from optimizers.prompts.proposer import Proposer
from optimizers.prompts.reflection import Reflect, completion, reflection_record

logger = logging.getLogger(__name__)

_SCORE_OFFSET = 2.0**-20  # gepa draws ancestors to merge in proportion to their scores, which must not all be 0

Instructions = dict[int, str]
"""Index of a module → instruction: gepa's candidate. gepa iterates over sets of the keys; the order of integers is the
same in all processes."""
ReflectiveDataset = Mapping[int, Sequence[Mapping[str, Any]]]
"""Index of a module → its calls, as the reflecting LM sees them."""


@final
@dataclass(frozen=True)
class DataInst:
    """An example for gepa: one to validate candidates on, or one to reflect on."""

    example: Example
    for_validation: bool


@final
class _DeferredError:
    """A context manager that keeps the error of its block, since gepa continues after an error in its adapter."""

    def __init__(self) -> None:
        self._error: BaseException | None = None

    def __enter__(self) -> None:
        self.check()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self._error = error

    def check(self) -> None:
        """Raises the error that was kept, if any."""
        if self._error is not None:
            raise self._error


@final
class _Logger:
    """Forwards gepa's messages to the log."""

    def log(self, message: str) -> None:
        """Logs a message at level DEBUG."""
        logger.debug("%s", message)


@final
class ProgramAdapter:
    """gepa's adapter for a program.

    Args:
        program: The program whose instructions evolve.
        state: The initial state; all candidates have its demos and weights.
        val: The validation examples.
        metric: Scores a prediction, and may explain what is wrong with it.
        session: Session with the LMs, the seed, the store and the limits.
        proposer: The LM that rewrites instructions.
        template: Prompt template for the proposer; by default gepa's own.
        perfect_mean: Mean validation score at which the search stops.

    Attributes:
        scored: State of each candidate that was scored on all validation examples → its name and evaluation.
        rewritten: Number of requested instructions, and numbers of unusable ones.
    """

    def __init__(
        self,
        program: Module,
        state: ProgramState,
        val: Sequence[Example],
        metric: Metric,
        session: Session,
        proposer: Proposer,
        template: str | None,
        perfect_mean: float,
    ) -> None:
        self._program, self._state, self._val, self._metric = program, state, val, metric
        self._session, self._template, self._perfect_mean = session, template, perfect_mean
        self._paths = tuple(predictors(program))
        self._reflect = Reflect(proposer)
        self._reflect_state, self._reflect_session = proposer.bind(state, session)
        self._evaluations: dict[Any, Evaluation] = {}
        self._runs: dict[Any, list[dict[str, Any]]] = {}
        self._error = _DeferredError()
        self.scored: dict[ProgramState, tuple[str, Evaluation]] = {}
        self.rewritten = {"asked": 0, "unreadable": 0, "unchanged": 0}

    def start(self) -> Instructions:
        """Returns the instructions of the initial state."""
        return {number: self._state.prompts[path].instructions for number, path in enumerate(self._paths)}

    def state_of(self, candidate: Instructions) -> ProgramState:
        """Returns the initial state with a candidate's instructions."""
        prompts = self._state.prompts
        texts = {self._paths[number]: text for number, text in candidate.items()}
        return self._state.with_prompts(
            {path: prompts[path].model_copy(update={"instructions": text}) for path, text in texts.items()}
        )

    def evaluate(
        self, batch: list[DataInst], candidate: Instructions, capture_traces: bool = False
    ) -> EvaluationBatch[Any, None]:
        """Scores a candidate on examples; for examples to reflect on, the result also has the calls."""
        state, examples = self.state_of(candidate), [item.example for item in batch]
        if not all(item.for_validation for item in batch):
            runs = self._run(state, examples)
            return EvaluationBatch([None] * len(runs), [_gepa_score(run["score"]) for run in runs], runs)
        scores = self._score(state, {example.id for example in examples}).scores
        return EvaluationBatch(
            [None] * len(examples), [_gepa_score(scores.get(example.id, 0.0)) for example in examples]
        )

    def make_reflective_dataset(
        self, candidate: Instructions, eval_batch: EvaluationBatch[Any, None], components_to_update: list[int]
    ) -> dict[int, list[dict[str, Any]]]:
        """Returns the calls of some modules in the rollouts of a batch, without modules that were not called."""
        runs = eval_batch.trajectories or []
        calls = {
            number: [call for run in runs for call in run["calls"].get(self._paths[number], ())]
            for number in components_to_update
        }
        return {number: module_calls for number, module_calls in calls.items() if module_calls}

    def propose_new_texts(
        self, candidate: Instructions, reflective_dataset: ReflectiveDataset, components_to_update: list[int]
    ) -> Instructions:
        """Returns new instructions for some modules, written from their calls; unusable ones are left out."""
        called = [number for number in components_to_update if number in reflective_dataset]
        with self._error:
            completions = self._reflect_on(
                [self._prompt(candidate[number], reflective_dataset[number]) for number in called]
            )
            texts = {number: _instruction(text) for number, text in zip(called, completions, strict=True)}
        useful = {number: text for number, text in texts.items() if text and text != candidate[number]}
        empty = sum(not text for text in texts.values())
        self.rewritten["unreadable"] += empty
        self.rewritten["unchanged"] += len(texts) - empty - len(useful)
        return useful

    def stop(self, gepa_state: GEPAState[Any, Any]) -> bool:
        """Whether a candidate is perfect or the budget is spent; raises an error that gepa ignored."""
        self._error.check()
        perfect = any(evaluation.mean >= self._perfect_mean for _, evaluation in self.scored.values())
        return perfect or bool(self._session.ledger.reached_limit())

    def _score(self, state: ProgramState, ids: Set[str]) -> Evaluation:
        """Evaluates a state on some or all validation examples, once for the same examples."""
        examples = [example for example in self._val if example.id in ids]
        key = (state, *(example.id for example in examples))
        if key not in self._evaluations:
            title = "candidate" if len(examples) == len(self._val) else "merged candidate"
            evaluation = evaluate_many(self._program, [state], examples, self._metric, self._session, title=title)[0]
            self._evaluations[key] = evaluation
            if evaluation.complete and len(examples) == len(self._val):
                name = f"candidate {len(self.scored)}" if self.scored else "start"
                self.scored[state] = name, evaluation
                self._session.notify(CandidateScored(self._session.stage, name, evaluation.mean, evaluation.n))
        return self._evaluations[key]

    def _run(self, state: ProgramState, examples: Sequence[Example]) -> list[dict[str, Any]]:
        """Runs a state on training examples to reflect on, once for the same examples."""
        key = (state, *(example.digest for example in examples))
        if key not in self._runs:
            jobs = [Job(state, example) for example in examples]
            title = "rollouts to reflect on"
            self._runs[key] = cached_rollout(
                self._program, jobs, self._session, reflection_record, self._metric, title=title
            )
        return self._runs[key]

    def _prompt(self, instruction: str, calls: Sequence[Mapping[str, Any]]) -> str:
        parts = {
            "current_instruction_doc": instruction,
            "dataset_with_feedback": calls,
            "prompt_template": self._template,
        }
        return str(InstructionProposalSignature.prompt_renderer(parts))

    def _reflect_on(self, prompts: Sequence[str]) -> list[str]:
        before = self.rewritten["asked"]
        self.rewritten["asked"] += len(prompts)
        jobs = [  # each sample number is used once, so a repeated prompt gets a new completion
            Job(self._reflect_state, Example({"prompt": prompt}), sample=before + number)
            for number, prompt in enumerate(prompts)
        ]
        return cached_rollout(self._reflect, jobs, self._reflect_session, completion, title="reflecting")


def run_gepa(
    adapter: ProgramAdapter, train: Sequence[Example], val: Sequence[Example], seed: int, **settings: Any
) -> dict[str, Any]:
    """Lets gepa evolve a program's instructions; the adapter keeps the scored candidates.

    Args:
        adapter: Adapter of the program.
        train: Examples to reflect on.
        val: Examples to validate candidates on.
        seed: Seed of all random choices.
        settings: Further arguments of ``gepa.optimize``.

    Returns:
        Figures of the search, as JSON.
    """
    result: GEPAResult[Any, Any] = optimize(
        seed_candidate=cast(dict[str, str], adapter.start()),
        trainset=[DataInst(example, for_validation=False) for example in train],
        valset=[DataInst(example, for_validation=True) for example in val],
        adapter=cast(GEPAAdapter[DataInst, Any, None], adapter),  # the protocol declares a settable attribute
        stop_callbacks=[adapter.stop],
        logger=_Logger(),
        track_best_outputs=False,
        seed=seed,
        **settings,
    )
    states = [adapter.state_of(cast(Instructions, candidate)) for candidate in result.candidates]
    names = [adapter.scored[state][0] if state in adapter.scored else "unfinished" for state in states]
    return {
        "metric_calls": result.total_metric_calls,
        "rewritten": dict(adapter.rewritten),
        "instructions": {
            name: {path: prompt.instructions for path, prompt in state.prompts.items()}
            for name, state in zip(names, states, strict=True)
        },
        "parents": {
            name: [names[parent] for parent in parents if parent is not None]
            for name, parents in zip(names, result.parents, strict=True)
        },
    }


def _gepa_score(score: float) -> float:
    """Returns the score that gepa sees. A score that is not a finite number becomes 0, because gepa adds scores up."""
    return (score if math.isfinite(score) else 0.0) + _SCORE_OFFSET


def _instruction(text: str) -> str:
    return str(InstructionProposalSignature.output_extractor(text)["new_instruction"]).strip()
