"""Search over instructions and demonstrations together: MIPROv2 (Opsahl-Ong et al. 2024, arXiv 2406.11695).

Knows how trials are evaluated and which of them wins. Instructions come from `optimizers.prompts.proposals`, choices
from `optimizers.prompts.tpe_sampler`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, final

from pydantic import PositiveInt

from lmpipe import Demo, Evaluation, Example, Module, OptimizeResult, ProgramState, PromptState, Session
from lmpipe.extend import CandidateScored, ConfigError, best_index, derive_seed, evaluate_many, subsample
from optimizers.demos import DemoPool
from optimizers.prompts.few_shot import BootstrapSettings
from optimizers.prompts.instruction_writer import ProposalContext
from optimizers.prompts.proposals import propose
from optimizers.prompts.proposer import Proposer
from optimizers.selection import best_candidate, selection_result

if TYPE_CHECKING:
    from optimizers.prompts.tpe_sampler import Choice, TPESampler


@final
@dataclass(frozen=True, repr=False)
class MIPROv2(BootstrapSettings):
    """Lets an LM propose instructions, and searches over instructions and demonstrations of all modules together.

    The LM sees a summary of the data, descriptions of the program and the module, successful calls and a tip on style.
    Then a tree-structured Parzen estimator chooses an instruction and a set of demonstrations for each module, trial
    after trial. Each trial is scored on a minibatch of validation examples; every few trials the one with the best mean
    is scored on all of them. The best fully scored state wins, the earliest of equals; the initial state is among them.
    `BootstrapSettings` documents the other parameters. Needs the extra ``lmpipe[search]``.

    Args:
        num_candidates: Number of instructions, and of sets of demos, that each module chooses from. The first option is
            the current one.
        num_trials: Number of trials.
        minibatch: Whether trials are scored on minibatches of the validation examples.
        minibatch_size: Number of examples in a minibatch; trials that run together see the same one.
        minibatch_full_eval_steps: Number of trials after which the best one so far is scored on all validation
            examples.
        num_parallel_trials: Number of trials that run together in one wavefront, without learning from one another.
        program_aware_proposer: Whether the LM sees descriptions of the program and the module.
        data_aware_proposer: Whether the LM sees a summary of training examples.
        tip_aware_proposer: Whether the LM sees a tip on the style of the instruction.
        fewshot_aware_proposer: Whether the LM sees the module's own calls in successful rollouts.
        view_data_batch_size: Number of training examples in each call that observes the data for the summary.
        proposer: The LM that proposes instructions.
        num_train: Number of training examples that demos are made from; None means all.
        num_val: Number of validation examples that the search uses; None means all.
        stratify_by: Label whose classes the subsets keep in proportion; None does not stratify.

    Raises:
        ConfigError: If a setting is out of its range; in `optimize`, if Optuna is not installed, or there are no
            training or validation examples.
    """

    needs: ClassVar[tuple[Literal["train", "val"], ...]] = ("train", "val")

    num_candidates: PositiveInt = 6
    num_trials: PositiveInt = 20
    minibatch: bool = True
    minibatch_size: PositiveInt = 35
    minibatch_full_eval_steps: PositiveInt = 5
    num_parallel_trials: PositiveInt = 5
    program_aware_proposer: bool = True
    data_aware_proposer: bool = True
    tip_aware_proposer: bool = True
    fewshot_aware_proposer: bool = True
    view_data_batch_size: PositiveInt = 10
    proposer: Proposer = field(default=Proposer())
    num_train: PositiveInt | None = 100
    num_val: PositiveInt | None = 250
    stratify_by: str | None = None

    def search(
        self, program: Module, state: ProgramState, train: Sequence[Example], val: Sequence[Example], session: Session
    ) -> OptimizeResult:
        try:
            from optimizers.prompts.tpe_sampler import TPESampler
        except ImportError as error:
            raise ConfigError(f'MIPROv2 needs the package optuna: pip install "lmpipe[search]" ({error})') from error
        train = subsample(train, self.num_train, derive_seed(session.seed, "train"), self.stratify_by)
        val = subsample(val, self.num_val, derive_seed(session.seed, "val"), self.stratify_by)
        bootstrapped, labelled, rollouts = self.demo_pools(program, state, train, session)
        context = ProposalContext(
            self.program_aware_proposer,
            self.data_aware_proposer,
            self.tip_aware_proposer,
            self.fewshot_aware_proposer,
            self.view_data_batch_size,
        )
        proposals = propose(
            program,
            state,
            train,
            bootstrapped,
            session,
            count=self.num_candidates,
            proposer=self.proposer,
            context=context,
        )
        demos = self._demo_options(state, bootstrapped, labelled, session.seed)
        space = SearchSpace(state, proposals.instructions, demos)
        runner = _TrialRunner(self, space, program, val, session)
        runner.run(TPESampler(space.sizes(), derive_seed(session.seed, "trials")))
        return runner.result({**rollouts.details(), **proposals.details()})

    def _demo_options(
        self, state: ProgramState, bootstrapped: DemoPool, labelled: DemoPool, seed: int
    ) -> dict[str, tuple[tuple[Demo, ...], ...]]:
        """Returns distinct sets of demos for each module; the first one is the current set."""
        current = {path: prompt.demos for path, prompt in state.prompts.items()}
        drawn = self.demo_sets(bootstrapped, labelled, self.num_candidates, seed).values()
        demo_sets: list[Mapping[str, Sequence[Demo]]] = [current, {}, *drawn]
        return {
            path: tuple(dict.fromkeys(tuple(demos.get(path, ())) for demos in demo_sets))[: self.num_candidates]
            for path in state.prompts
        }


@final
@dataclass(frozen=True)
class SearchSpace:
    """The instructions and demonstrations that the search chooses from.

    Args:
        state: The initial state, which is the choice of the first option everywhere.
        instructions: Module path → the instructions to choose from.
        demos: Module path → the sets of demonstrations to choose from.
    """

    state: ProgramState
    instructions: Mapping[str, Sequence[str]]
    demos: Mapping[str, Sequence[tuple[Demo, ...]]]

    def sizes(self) -> dict[str, int]:
        """Returns the number of options of each parameter that has more than one."""
        sizes = [
            *((f"instruction {path}", len(options)) for path, options in self.instructions.items()),
            *((f"demos {path}", len(options)) for path, options in self.demos.items()),
        ]
        return {name: size for name, size in sizes if size > 1}

    def state_of(self, choice: Choice) -> ProgramState:
        """Returns the state with the chosen instructions and demonstrations."""
        return self.state.with_prompts(
            {
                path: PromptState(
                    instructions=self.instructions[path][choice.get(f"instruction {path}", 0)],
                    demos=self.demos[path][choice.get(f"demos {path}", 0)],
                )
                for path in self.instructions
            }
        )


@final
class _TrialRunner:
    """Runs the trials of one search and keeps their scores."""

    def __init__(
        self, settings: MIPROv2, space: SearchSpace, program: Module, val: Sequence[Example], session: Session
    ) -> None:
        self._settings, self._space, self._program, self._val, self._session = settings, space, program, val, session
        self._choices: dict[ProgramState, tuple[str, Choice]] = {}
        self._means: dict[ProgramState, list[float]] = {}  # on minibatches
        self._full: dict[ProgramState, Evaluation] = {}
        self._trials: list[dict[str, Any]] = []

    def run(self, sampler: TPESampler) -> None:
        """Runs trials until there are enough of them or the budget is spent."""
        settings, first_options = self._settings, dict.fromkeys(self._space.sizes(), 0)
        self._register([("start", first_options)])
        self._evaluate_fully([self._space.state], sampler)
        minibatch = settings.minibatch and settings.minibatch_size < len(self._val)
        steps = settings.minibatch_full_eval_steps
        while (
            first_options
            and self._full
            and len(self._trials) < settings.num_trials
            and not self._session.ledger.reached_limit()
        ):
            done = len(self._trials)
            count = min(settings.num_parallel_trials, settings.num_trials - done, steps - done % steps)
            trials, choices = zip(*sampler.ask(count), strict=True)
            evaluations = self._run_trials(choices, minibatch=minibatch)
            if not all(evaluation.complete for evaluation in evaluations):
                return
            sampler.tell(trials, [evaluation.mean for evaluation in evaluations])
            done = len(self._trials)
            if minibatch and (done % steps == 0 or done == settings.num_trials):
                self._evaluate_fully(self._most_promising(), sampler)

    def result(self, details: Mapping[str, Any]) -> OptimizeResult:
        """Returns the best state among those scored on all validation examples."""
        details = {**details, "trials": self._trials, "demo_sets": {p: len(s) for p, s in self._space.demos.items()}}
        scored = [(self._choices[state][0], state, evaluation) for state, evaluation in self._full.items()]
        winner = best_candidate(scored)
        choice = {} if winner is None else {"choice": dict(self._choices[scored[winner][1]][1])}
        return selection_result(self._space.state, scored, self._session, {**details, **choice}, winner=winner)

    def _run_trials(self, choices: Sequence[Choice], *, minibatch: bool) -> list[Evaluation]:
        """Scores some choices in one wavefront."""
        first = len(self._trials) + 1
        named = [(f"trial {first + number}", choice) for number, choice in enumerate(choices)]
        states = self._register(named)
        if minibatch:
            seed = derive_seed(self._session.seed, "minibatch", first)
            examples = subsample(self._val, self._settings.minibatch_size, seed, self._settings.stratify_by)
            evaluations = dict(zip(states, self._evaluate(states, examples, "trials"), strict=True))
            for state, evaluation in evaluations.items():
                if evaluation.complete:
                    self._means.setdefault(state, []).append(evaluation.mean)
        else:
            new = [state for state in dict.fromkeys(states) if state not in self._full]
            evaluations = {**self._full, **dict(zip(new, self._evaluate(new, self._val, "trials"), strict=True))}
            self._full |= {state: evaluations[state] for state in new if evaluations[state].complete}
        for (name, choice), state in zip(named, states, strict=True):
            evaluation = evaluations[state]
            if evaluation.complete:
                self._trials.append({"choice": dict(choice), "mean": evaluation.mean, "n": evaluation.n})
                self._notify(name, evaluation)
        return [evaluations[state] for state in states]

    def _evaluate_fully(self, states: Sequence[ProgramState], sampler: TPESampler) -> None:
        for state, evaluation in zip(states, self._evaluate(states, self._val, "candidates"), strict=True):
            name, choice = self._choices[state]
            if evaluation.complete:
                self._full[state] = evaluation
                self._notify(name, evaluation)
                if choice:
                    sampler.add(choice, evaluation.mean)

    def _most_promising(self) -> list[ProgramState]:
        """Returns the state with the best mean over minibatches of those not fully scored; empty if there is none."""
        means = {
            state: sum(batch_means) / len(batch_means)
            for state, batch_means in self._means.items()
            if state not in self._full
        }
        position = best_index(means.values())
        return [] if position is None else [list(means)[position]]

    def _register(self, named: Sequence[tuple[str, Choice]]) -> list[ProgramState]:
        states = [self._space.state_of(choice) for _, choice in named]
        for state, name_and_choice in zip(states, named, strict=True):
            self._choices.setdefault(state, name_and_choice)
        return states

    def _evaluate(self, states: Sequence[ProgramState], examples: Sequence[Example], title: str) -> list[Evaluation]:
        metric = self._settings.metric
        return evaluate_many(self._program, states, examples, metric, self._session, title=title)

    def _notify(self, name: str, evaluation: Evaluation) -> None:
        self._session.notify(CandidateScored(self._session.stage, name, evaluation.mean, evaluation.n))
