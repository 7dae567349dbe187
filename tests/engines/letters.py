"""A small, real training: four rows that each teach a tiny LM one letter."""

from __future__ import annotations

from lmpipe import Completion, Request, Sampling, WeightState
from lmpipe.engines.local import LocalLM
from lmpipe.engines.training import LocalTrainer, TuningConfig
from lmpipe.lm import Message
from lmpipe.trainer import TrainingRow

BASE = WeightState(base="tiny")
ROWS = [
    TrainingRow((Message("system", "Name the letter."), Message("user", letter)), f"it is {letter * 3}", letter)
    for letter in "abcd"
]


def trainer(lm: LocalLM, **settings: object) -> LocalTrainer:
    defaults = {
        "target_modules": "all-linear",
        "rank": 8,
        "alpha": 16,
        "learning_rate": 0.005,
        "epochs": 200,
        "batch_size": 4,
    }
    return LocalTrainer(lm, TuningConfig(**{**defaults, **settings}))  # type: ignore[arg-type]


def answers(lm: LocalLM, weights: WeightState) -> list[str]:
    requests = [Request(row.messages, Sampling(max_tokens=12), weights) for row in ROWS]
    return [answer.text for answer in lm.complete(requests) if isinstance(answer, Completion)]


class Interrupting:
    """A progress display that records every advance and interrupts the work after some steps, as Ctrl-C would."""

    def __init__(self, after: int = 10**9) -> None:
        self.after = after
        self.advances: list[float] = []

    def add_task(self, description: str, *, total: float | None = None) -> int:
        return 0

    def advance(self, task_id: int, advance: float = 1) -> None:
        self.advances.append(advance)
        if sum(self.advances) >= self.after:
            raise KeyboardInterrupt

    def remove_task(self, task_id: int) -> None:
        pass
