"""Search over instructions and demonstrations together: MIPROv2 (Opsahl-Ong et al. 2024, arXiv 2406.11695).

Knows how trials are evaluated and which of them wins; proposals come from `optimizers.prompts.proposals`, choices from
`optimizers.prompts.tpe_sampler`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, final

from pydantic import PositiveInt

from lmpipe import Demo, Evaluation, Example, Module, OptimizeResult, ProgramState, PromptState, Session
from lmpipe.extend import CandidateScored, ConfigError, best_index, derive_seed, evaluate_many, subsample
from optimizers.choice import best_of, outcome
from optimizers.demos import Pool
from optimizers.prompts.few_shot import BootstrapSettings
from optimizers.prompts.instruction_writer import ProposalContext
from optimizers.prompts.proposals import propose
from optimizers.prompts.proposer import Proposer

if TYPE_CHECKING:
    from optimizers.prompts.tpe_sampler import Bayes, Choice


@final
@dataclass(frozen=True)
class MIPROv2(BootstrapSettings):
    """Lets an LM propose instructions, and searches over instructions and demonstrations of all modules together.

    The LM is shown a summary of the data, descriptions of the program and the module, successful calls and a style.
    Then a tree-structured Parzen estimator chooses an instruction and a set of demonstrations for each module, trial
    after trial, scored on a minibatch of validation examples; now and then the trial with the best mean is scored on
    all of them. The best of those wins, the state it began with among them, the earliest of equals. Needs the extra
    ``lmpipe[search]``.

    Args:
        num_candidates: How many instructions and how many sets of demos each module has to choose from. The first ones
            are those it came with.
        num_trials: How many choices are tried.
        minibatch: Whether trials are scored on a part of the validation examples.
        minibatch_size: How large a part; all trials that are tried at once see the same one.
        minibatch_full_eval_steps: After how many trials the best of them so far is scored on all validation examples.
        num_parallel_trials: How many trials are tried at once, in one wavefront. None of them learns from the others.
        program_aware_proposer: Whether proposals are grounded in descriptions of the program and the module.
        data_aware_proposer: Likewise in a summary of training examples.
        tip_aware_proposer: Likewise in a style of instructions.
        fewshot_aware_proposer: Likewise in the module's own calls in successful runs.
        view_data_batch_size: How many training examples at once are looked at for the summary.
        proposer: Who proposes.
        num_train: Of how many training examples demos are made; none means all.
        num_val: How many validation examples all of them are; none means all there are.
        stratify_by: Label whose classes the subsets hold in proportion, or none.

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
        bayes = _bayes()
        train = subsample(train, self.num_train, derive_seed(session.seed, "train"), self.stratify_by)
        val = subsample(val, self.num_val, derive_seed(session.seed, "val"), self.stratify_by)
        boot, labels, harvest = self.pools(program, state, train, session)
        grounds = ProposalContext(
            self.program_aware_proposer,
            self.data_aware_proposer,
            self.tip_aware_proposer,
            self.fewshot_aware_proposer,
            self.view_data_batch_size,
        )
        proposals = propose(
            program, state, train, boot, session, count=self.num_candidates, proposer=self.proposer, grounds=grounds
        )
        space = Space(state, proposals.instructions, self._demos(state, boot, labels, session.seed))
        search = _Search(self, space, program, val, session)
        search.run(bayes(space.sizes(), derive_seed(session.seed, "trials")))
        return search.result({**harvest.details(), **proposals.details()})

    def _demos(
        self, state: ProgramState, boot: Pool, labels: Pool, seed: int
    ) -> dict[str, tuple[tuple[Demo, ...], ...]]:
        """Sets of demos for each module, different from one another; the first is its own."""
        own_demos = {path: prompt.demos for path, prompt in state.prompts.items()}
        drawn = self.demo_sets(boot, labels, self.num_candidates, seed).values()
        sets: list[Mapping[str, Sequence[Demo]]] = [own_demos, {}, *drawn]
        own = {path: [tuple(demos.get(path, ())) for demos in sets] for path in state.prompts}
        return {path: tuple(dict.fromkeys(found))[: self.num_candidates] for path, found in own.items()}


def _bayes() -> type[Bayes]:
    try:
        from optimizers.prompts.tpe_sampler import Bayes
    except ImportError as error:
        raise ConfigError(f'MIPROv2 searches with Optuna: pip install "lmpipe[search]" ({error})') from error
    return Bayes


@final
@dataclass(frozen=True)
class Space:
    """What is chosen from.

    Args:
        state: Where the search begins: the choice of the first option everywhere.
        instructions: Module path → its options.
        demos: Module path → its options.
    """

    state: ProgramState
    instructions: Mapping[str, Sequence[str]]
    demos: Mapping[str, Sequence[tuple[Demo, ...]]]

    def sizes(self) -> dict[str, int]:
        """Parameter → number of options, for those with more than one."""
        options = [
            *((f"instruction {path}", len(own)) for path, own in self.instructions.items()),
            *((f"demos {path}", len(own)) for path, own in self.demos.items()),
        ]
        return {name: count for name, count in options if count > 1}

    def at(self, choice: Choice) -> ProgramState:
        """The state that a choice stands for."""
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
class _Search:
    """The trials of one search, and what came of them."""

    def __init__(
        self, settings: MIPROv2, space: Space, program: Module, val: Sequence[Example], session: Session
    ) -> None:
        self._settings, self._space, self._program, self._val, self._session = settings, space, program, val, session
        self._choices: dict[ProgramState, tuple[str, Choice]] = {}
        self._means: dict[ProgramState, list[float]] = {}  # on minibatches
        self._full: dict[ProgramState, Evaluation] = {}
        self._trials: list[dict[str, Any]] = []

    def run(self, bayes: Bayes) -> None:
        """Tries choices until there are enough of them, or the budget is spent."""
        settings, origin = self._settings, dict.fromkeys(self._space.sizes(), 0)
        self._remember([("start", origin)])
        self._evaluate_fully([self._space.state], bayes)
        in_parts = settings.minibatch and settings.minibatch_size < len(self._val)
        steps = settings.minibatch_full_eval_steps
        while (
            origin
            and self._full
            and len(self._trials) < settings.num_trials
            and not self._session.ledger.reached_limit()
        ):
            done = len(self._trials)
            most = min(settings.num_parallel_trials, settings.num_trials - done, steps - done % steps)
            trials, choices = zip(*bayes.ask(most), strict=True)
            evaluations = self._try(choices, in_parts)
            if not all(evaluation.complete for evaluation in evaluations):
                return
            bayes.tell(trials, [evaluation.mean for evaluation in evaluations])
            done = len(self._trials)
            if in_parts and (done % steps == 0 or done == settings.num_trials):
                self._evaluate_fully(self._most_promising(), bayes)

    def result(self, details: Mapping[str, Any]) -> OptimizeResult:
        """The best state among those scored on all validation examples."""
        details = {**details, "trials": self._trials, "demo_sets": {p: len(s) for p, s in self._space.demos.items()}}
        scored = [(self._choices[state][0], state, evaluation) for state, evaluation in self._full.items()]
        winner = best_of(scored)
        choice = {} if winner is None else {"choice": dict(self._choices[scored[winner][1]][1])}
        return outcome(self._space.state, scored, self._session, {**details, **choice}, winner=winner)

    def _try(self, choices: Sequence[Choice], in_parts: bool) -> list[Evaluation]:
        """Scores some choices in one wavefront."""
        first = len(self._trials) + 1
        named = [(f"trial {first + number}", choice) for number, choice in enumerate(choices)]
        states = self._remember(named)
        if in_parts:
            seed = derive_seed(self._session.seed, "minibatch", first)
            part = subsample(self._val, self._settings.minibatch_size, seed, self._settings.stratify_by)
            found = dict(zip(states, self._evaluate(states, part, "trials"), strict=True))
            for state, evaluation in found.items():
                if evaluation.complete:
                    self._means.setdefault(state, []).append(evaluation.mean)
        else:
            new = [state for state in dict.fromkeys(states) if state not in self._full]
            found = {**self._full, **dict(zip(new, self._evaluate(new, self._val, "trials"), strict=True))}
            self._full |= {state: found[state] for state in new if found[state].complete}
        for (name, choice), state in zip(named, states, strict=True):
            self._note(name, choice, found[state])
        return [found[state] for state in states]

    def _evaluate_fully(self, states: Sequence[ProgramState], bayes: Bayes) -> None:
        for state, evaluation in zip(states, self._evaluate(states, self._val, "candidates"), strict=True):
            name, choice = self._choices[state]
            if evaluation.complete:
                self._full[state] = evaluation
                self._notify(name, evaluation)
                if choice:
                    bayes.add(choice, evaluation.mean)

    def _most_promising(self) -> list[ProgramState]:
        """The state with the best mean over its minibatches that was not scored on everything yet, if there is one."""
        means = {state: sum(own) / len(own) for state, own in self._means.items() if state not in self._full}
        place = best_index(means.values())
        return [] if place is None else [list(means)[place]]

    def _remember(self, named: Sequence[tuple[str, Choice]]) -> list[ProgramState]:
        states = [self._space.at(choice) for _, choice in named]
        for state, name_and_choice in zip(states, named, strict=True):
            self._choices.setdefault(state, name_and_choice)
        return states

    def _evaluate(self, states: Sequence[ProgramState], examples: Sequence[Example], title: str) -> list[Evaluation]:
        metric = self._settings.metric
        return evaluate_many(self._program, states, examples, metric, self._session, title=title)

    def _note(self, name: str, choice: Choice, evaluation: Evaluation) -> None:
        if evaluation.complete:
            self._trials.append({"choice": dict(choice), "mean": evaluation.mean, "n": evaluation.n})
            self._notify(name, evaluation)

    def _notify(self, name: str, evaluation: Evaluation) -> None:
        self._session.notify(CandidateScored(self._session.stage, name, evaluation.mean, evaluation.n))
