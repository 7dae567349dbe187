"""Optimizing programs that retrieve."""

from __future__ import annotations

import pytest

from lmpipe import (
    Request,
    RunStore,
    ScriptedLM,
    Session,
    exact_match,
    initial_state,
    predictors,
)
from optimizers import BetterTogether, BootstrapFewShot, BootstrapFewShotRandomSearch, BootstrapFinetune
from tests.rivers import EXAMPLES, ToTheSea, WordOverlap, reader
from tests.scripted import KeepingTrainer


def coy(request: Request) -> str:
    """Reads like `reader`, but answers for cities other than Paris only with demos or tuned weights."""
    text = reader(request)
    taught = len(request.messages) > 2 or request.weights.adapter
    return text if taught or text.startswith("query") or "city: Paris" in request.messages[-1].content else "No idea"


STAGES = {
    "few": BootstrapFewShot(exact_match, max_labeled_demos=0),
    "p": BootstrapFewShotRandomSearch(exact_match, num_candidate_programs=2, max_labeled_demos=0),
    "w": BootstrapFinetune(exact_match, KeepingTrainer()),
}


@pytest.mark.parametrize("strategy", ["few", "p", "w", "p -> w -> p"])
def test_a_program_that_retrieves_is_optimized(store: RunStore, strategy: str) -> None:
    program = ToTheSea()
    session = Session(lm=ScriptedLM(coy), retriever=WordOverlap(), store=store)
    state = initial_state(program, session)
    assert set(state.prompts) == set(predictors(program)) == {"query", "answer"}
    better = BetterTogether(exact_match, STAGES, strategy)
    result = better.optimize(program, state, EXAMPLES[:2], EXAMPLES[2:], session)
    assert result.evaluation is not None
    assert result.evaluation.mean == 1
    assert set(result.state.prompts) == {"query", "answer"}
    assert result.stages[0].result.details["kept_by_module"] == {"query": 2, "answer": 1}
    modules = session.ledger.total.modules
    assert modules["retrieve"].kept == 0
    assert modules["retrieve"].retrievals == modules["query"].calls > 0


def test_demos_and_training_rows_come_from_lm_calls_only(store: RunStore) -> None:
    program, trainer = ToTheSea(), KeepingTrainer()
    session = Session(lm=ScriptedLM(coy), retriever=WordOverlap(), store=store)
    state = initial_state(program, session)
    shown = STAGES["few"].optimize(program, state, EXAMPLES[:2], [], session).state
    assert {path: [set(demo.outputs) for demo in prompt.demos] for path, prompt in shown.prompts.items()} == {
        "query": [{"query"}],
        "answer": [{"answer"}],
    }
    BootstrapFinetune(exact_match, trainer).optimize(program, shown, EXAMPLES[:2], [], session)
    rows, _ = trainer.calls[0]
    assert [row.completion.partition(":")[0] for row in rows] == ["query", "query", "answer"] * 2
