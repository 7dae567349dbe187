"""A run to be killed: ``python -m tests.killable RUN [MODEL]`` writes the final state when it ends.

Without a model the LM and the trainer are scripted; with one both are real.
"""

from __future__ import annotations

import sys

from lmpipe import Example, Predict, Prediction, RunStore, Sampling, ScriptedLM, Session, exact_match, initial_state
from optimizers import BetterTogether, BootstrapFewShotRandomSearch, BootstrapFinetune
from tests.scripted import Colour, KeepingTrainer, examples, scheduler, slow_script


def even_length(example: Example, prediction: Prediction) -> float:
    """A metric that some answers of an untaught LM pass."""
    return float(len(prediction.answer) % 2 == 0)


def scripted_run(store: RunStore) -> str:
    program, session = Colour(), Session(lm=ScriptedLM(slow_script), store=store, seed=3)
    better = scheduler(KeepingTrainer())
    result = better.optimize(program, initial_state(program, session), examples(24), examples(24, start=50), session)
    return result.state.model_dump_json()


def real_run(store: RunStore, model: str) -> str:
    from lmpipe.engines.local import LocalLM
    from lmpipe.engines.training import LocalTrainer, Tuning

    lm = LocalLM.from_pretrained(model, name="tiny")
    tuning = Tuning(learning_rate=0.01, epochs=40, checkpoint_steps=5, batch_size=4, dropout=0.1)
    stages = {
        "p": BootstrapFewShotRandomSearch(exact_match, num_candidate_programs=1),
        "w": BootstrapFinetune(even_length, LocalTrainer(lm, tuning), temperature=1.0),
    }
    program = Predict("number: int -> answer")
    session = Session(lm=lm, store=store, sampling=Sampling(max_tokens=6))
    better = BetterTogether(even_length, stages, "p -> w -> p")
    result = better.optimize(program, initial_state(program, session), examples(12), examples(6, start=50), session)
    return result.state.model_dump_json()


def main(path: str, model: str | None = None) -> None:
    """Optimizes on a store and writes the state beside it."""
    store = RunStore(path, {"model": "real" if model else "scripted"})
    state = real_run(store, model) if model else scripted_run(store)
    (store.path / "state.json").write_text(state)


if __name__ == "__main__":
    main(*sys.argv[1:])
