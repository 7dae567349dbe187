"""What the package gepa talks to: candidates are scored, their runs are shown, and an LM rewrites instructions.

Knows gepa's interfaces, and makes rollouts and evaluations of the session of what it asks for. Loaded only by what
evolves, so that gepa is needed only there.
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
from optimizers.prompts.cached_rollout import recorded_rollout
from optimizers.prompts.proposer import Proposer
from optimizers.prompts.reflection import Reflect, completion, shown_run

logger = logging.getLogger(__name__)

_FLOOR = 2.0**-20  # added to scores: gepa draws ancestors to merge by their scores, which must not all be 0

Candidate = dict[int, str]
"""Number of a module → instruction. gepa iterates over sets of these names: numbers have one order in all processes."""
Calls = Mapping[int, Sequence[Mapping[str, Any]]]
"""Number of a module → calls of it, as the LM that reflects is shown them."""


@final
@dataclass(frozen=True)
class Item:
    """An example, and whether it is there to choose by, or to reflect on."""

    example: Example
    chooses: bool


@final
class _Faults:
    """A block whose error is kept: gepa goes on where its adapter fails, and the error is raised again later."""

    def __init__(self) -> None:
        self._error: BaseException | None = None

    def __enter__(self) -> None:
        self.check()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self._error = error

    def check(self) -> None:
        """Raises what was kept."""
        if self._error is not None:
            raise self._error


@final
class _Log:
    """Where gepa's messages go."""

    def log(self, message: str) -> None:
        """Passes a message on."""
        logger.debug("%s", message)


@final
class Adapter:
    """gepa's adapter for a program.

    Args:
        program: The program.
        state: Demos and weights of every candidate.
        val: What candidates are scored on.
        metric: Scores a prediction, and may say what is wrong with it.
        session: LMs, seed, store and limits.
        proposer: Who rewrites instructions.
        template: What it is told; by default what gepa has.
        enough: Mean score at which nothing is left to improve.

    Attributes:
        scored: The states of the candidates that were scored on all validation examples → name and evaluation.
        rewritten: How many rewritten instructions were asked for, and how many of them were unusable.
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
        enough: float,
    ) -> None:
        self._program, self._state, self._val, self._metric = program, state, val, metric
        self._session, self._template, self._enough = session, template, enough
        self._paths = tuple(predictors(program))
        self._reflect = Reflect(proposer)
        self._place = proposer.place(state, session)
        self._evaluations: dict[Any, Evaluation] = {}
        self._runs: dict[Any, list[dict[str, Any]]] = {}
        self._faults = _Faults()
        self.scored: dict[ProgramState, tuple[str, Evaluation]] = {}
        self.rewritten = {"asked": 0, "unreadable": 0, "unchanged": 0}

    def start(self) -> Candidate:
        """The present instructions."""
        return {number: self._state.prompts[path].instructions for number, path in enumerate(self._paths)}

    def state_of(self, candidate: Candidate) -> ProgramState:
        """The state with a candidate's instructions."""
        own = self._state.prompts
        texts = {self._paths[number]: text for number, text in candidate.items()}
        return self._state.with_prompts(
            {path: own[path].model_copy(update={"instructions": text}) for path, text in texts.items()}
        )

    def evaluate(
        self, batch: list[Item], candidate: Candidate, capture_traces: bool = False
    ) -> EvaluationBatch[Any, None]:
        """Scores of a candidate on some examples, and its calls on those to reflect on."""
        state, examples = self.state_of(candidate), [item.example for item in batch]
        if not all(item.chooses for item in batch):
            runs = self._run(state, examples)
            return EvaluationBatch([None] * len(runs), [_raised(run["score"]) for run in runs], runs)
        scores = self._score(state, {example.id for example in examples}).scores
        return EvaluationBatch([None] * len(examples), [_raised(scores.get(own.id, 0.0)) for own in examples])

    def make_reflective_dataset(
        self, candidate: Candidate, eval_batch: EvaluationBatch[Any, None], components_to_update: list[int]
    ) -> dict[int, list[dict[str, Any]]]:
        """The calls of some modules in the runs of a batch; a module that was not called has none."""
        runs = eval_batch.trajectories or []
        calls = {
            number: [call for run in runs for call in run["calls"].get(self._paths[number], ())]
            for number in components_to_update
        }
        return {number: own for number, own in calls.items() if own}

    def propose_new_texts(
        self, candidate: Candidate, reflective_dataset: Calls, components_to_update: list[int]
    ) -> Candidate:
        """New instructions for some modules, from their calls; those that cannot be used are left out."""
        called = [number for number in components_to_update if number in reflective_dataset]
        with self._faults:
            answers = self._ask([self._prompt(candidate[number], reflective_dataset[number]) for number in called])
            texts = {number: _instruction(answer) for number, answer in zip(called, answers, strict=True)}
        useful = {number: text for number, text in texts.items() if text and text != candidate[number]}
        empty = sum(not text for text in texts.values())
        self.rewritten["unreadable"] += empty
        self.rewritten["unchanged"] += len(texts) - empty - len(useful)
        return useful

    def stop(self, gepa_state: GEPAState[Any, Any]) -> bool:
        """Whether nothing is left to improve or to spend; raises what ended a block that gepa went on after."""
        self._faults.check()
        perfect = any(evaluation.mean >= self._enough for _, evaluation in self.scored.values())
        return perfect or bool(self._session.ledger.reached_limit())

    def _score(self, state: ProgramState, ids: Set[str]) -> Evaluation:
        """On validation examples, some or all; the same ones only once."""
        part = [example for example in self._val if example.id in ids]
        key = (state, *(example.id for example in part))
        if key not in self._evaluations:
            title = "candidate" if len(part) == len(self._val) else "merged candidate"
            evaluation = evaluate_many(self._program, [state], part, self._metric, self._session, title=title)[0]
            self._evaluations[key] = evaluation
            if evaluation.complete and len(part) == len(self._val):
                name = f"candidate {len(self.scored)}" if self.scored else "start"
                self.scored[state] = name, evaluation
                self._session.notify(CandidateScored(self._session.stage, name, evaluation.mean, evaluation.n))
        return self._evaluations[key]

    def _run(self, state: ProgramState, examples: Sequence[Example]) -> list[dict[str, Any]]:
        """On training examples: runs to reflect on."""
        key = (state, *(example.digest for example in examples))
        if key not in self._runs:
            jobs = [Job(state, example) for example in examples]
            title = "rollouts to reflect on"
            self._runs[key] = recorded_rollout(self._program, jobs, self._session, shown_run, self._metric, title=title)
        return self._runs[key]

    def _prompt(self, instruction: str, calls: Sequence[Mapping[str, Any]]) -> str:
        parts = {
            "current_instruction_doc": instruction,
            "dataset_with_feedback": calls,
            "prompt_template": self._template,
        }
        return str(InstructionProposalSignature.prompt_renderer(parts))

    def _ask(self, prompts: Sequence[str]) -> list[str]:
        state, session = self._place
        before = self.rewritten["asked"]
        self.rewritten["asked"] += len(prompts)
        jobs = [  # the same prompt is answered anew when it comes again
            Job(state, Example({"prompt": prompt}), sample=before + number) for number, prompt in enumerate(prompts)
        ]
        return recorded_rollout(self._reflect, jobs, session, completion, title="reflecting")


def evolve(
    adapter: Adapter, train: Sequence[Example], val: Sequence[Example], seed: int, **settings: Any
) -> dict[str, Any]:
    """Lets gepa evolve a program's instructions; the adapter has the candidates.

    Args:
        adapter: Runs the program.
        train: Examples to reflect on.
        val: Examples to choose by.
        seed: Decides every draw.
        settings: Of ``gepa.optimize``.

    Returns:
        Figures of the search, as JSON.
    """
    result: GEPAResult[Any, Any] = optimize(
        seed_candidate=cast(dict[str, str], adapter.start()),
        trainset=[Item(example, chooses=False) for example in train],
        valset=[Item(example, chooses=True) for example in val],
        adapter=cast(GEPAAdapter[Item, Any, None], adapter),  # a protocol with a member that may be set
        stop_callbacks=[adapter.stop],
        logger=_Log(),
        track_best_outputs=False,
        seed=seed,
        **settings,
    )
    states = [adapter.state_of(cast(Candidate, found)) for found in result.candidates]
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


def _raised(score: float) -> float:
    """A score as gepa is told it, which adds scores up: one that is not a number is 0."""
    return (score if math.isfinite(score) else 0.0) + _FLOOR


def _instruction(answer: str) -> str:
    return str(InstructionProposalSignature.output_extractor(answer)["new_instruction"]).strip()
