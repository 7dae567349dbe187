"""Every optimizer is a stage of a strategy like any other, and is recalled from the store."""

from __future__ import annotations

import pytest

from benchmarks.performance.modules import OPTIMIZERS, Grove, LetterCounts, RowKeeper, examples, reply
from lmpipe import EngineError, Request, RunStore, ScriptedLM, Session, exact_match, initial_state
from optimizers import BetterTogether


def silent(request: Request) -> str:
    raise EngineError("nobody should ask")


@pytest.mark.parametrize("strategy", ["s", "p -> s", "w -> s -> p"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_any_optimizer_is_a_stage_and_is_recalled(name: str, strategy: str, store: RunStore) -> None:
    program, trainer = Grove(3), RowKeeper()
    stages = {
        "s": OPTIMIZERS[name](trainer),
        "p": OPTIMIZERS["BootstrapFewShot"](trainer),
        "w": OPTIMIZERS["BootstrapFinetune"](trainer),
    }
    better = BetterTogether(exact_match, stages, strategy)
    session = Session(lm=ScriptedLM(reply), store=store, embedder=LetterCounts())
    result = better.optimize(program, initial_state(program, session), examples(6), examples(8, start=50), session)
    assert [stage.name for stage in result.stages] == strategy.split(" -> ")
    assert result.evaluation is not None
    assert result.evaluation.mean == 1.0
    again = Session(lm=ScriptedLM(silent), store=store, embedder=LetterCounts())
    assert better.optimize(program, initial_state(program, again), examples(6), examples(8, start=50), again) == result
