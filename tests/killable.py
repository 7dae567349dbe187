"""A run of the scheduler to be killed: ``python -m tests.killable RUN`` writes the final state when it ends."""

from __future__ import annotations

import sys

from lmpipe import RunStore, ScriptedLM, Session, initial_state
from tests.scripted import Colour, KeepingTrainer, examples, scheduler, slow_script


def main(path: str) -> None:
    """Optimizes on a store and writes the state beside it."""
    store = RunStore(path, {"task": "colours"})
    program, session = Colour(), Session(lm=ScriptedLM(slow_script), store=store, seed=3)
    better = scheduler(KeepingTrainer())
    result = better.optimize(program, initial_state(program, session), examples(24), examples(24, start=50), session)
    (store.path / "state.json").write_text(result.state.model_dump_json())


if __name__ == "__main__":
    main(sys.argv[1])
