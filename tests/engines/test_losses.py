"""DPO and policy gradients on a real tiny LM: what they compute, that they learn, and when they stop."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, final

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from lmpipe import Budget, RunStore, Session, WeightState
from lmpipe.engines.local import LocalLM
from lmpipe.engines.training import LocalTrainer, TuningConfig
from lmpipe.errors import ConfigError
from lmpipe.events import EpochEnded, Event
from lmpipe.lm import Message
from lmpipe.trainer import DPOLoss, Objective, PolicyGradientLoss, SFTLoss, TrainingResult, TrainingRow
from tests.engines.test_training import Interrupting
from tests.launch import FORKING_TORCHRUN

BASE = WeightState(base="tiny")
PAIRS = [
    TrainingRow((Message("system", "Name the letter."), Message("user", letter)), f"it is {letter}", letter, "no idea")
    for letter in "abcd"
]
SAMPLED = [
    TrainingRow(row.messages, text, row.group, advantage=advantage)
    for row in PAIRS
    for text, advantage in ((row.completion, 1.0), ("no idea", -0.5), ("it may be", -0.5))
]
OBJECTIVES: dict[str, tuple[list[TrainingRow], Objective]] = {
    "DPO": (PAIRS, DPOLoss(beta=0.2)),
    "policy gradient": (SAMPLED, PolicyGradientLoss(temperature=0.9)),
}


def train(
    lm: LocalLM, session: Session, rows: Sequence[TrainingRow], objective: Objective, **settings: Any
) -> TrainingResult:
    defaults = {"target_modules": "all-linear", "rank": 8, "alpha": 16, "learning_rate": 0.003, "batch_size": 4}
    return LocalTrainer(lm, TuningConfig(**{**defaults, "bf16": False, **settings})).train(
        rows, BASE, session, objective
    )


def log_probabilities(model: Any, lm: LocalLM, row: TrainingRow, text: str, temperature: float = 1.0) -> torch.Tensor:
    """Computes the log-probability of each token of a completion and of its end token with transformers alone."""
    prompt, answer = lm.encode(row.messages), [*lm.encode_text(text), lm.end_token]
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt + answer])).logits[0] / temperature
    return logits[len(prompt) - 1 : -1].log_softmax(-1)[range(len(answer)), answer]


def tuned_and_base(folder: Path, store: RunStore, result: TrainingResult) -> tuple[Any, Any]:
    tuned, base = (AutoModelForCausalLM.from_pretrained(folder) for _ in range(2))
    return PeftModel.from_pretrained(tuned, store.folder(str(result.weights.adapter))), base


def dpo(tuned: Any, base: Any, lm: LocalLM, row: TrainingRow) -> float:
    """Equation 7 of arXiv 2305.18290."""
    assert row.rejected is not None
    gain, loss = (
        (log_probabilities(tuned, lm, row, text) - log_probabilities(base, lm, row, text)).sum().item()
        for text in (row.completion, row.rejected)
    )
    return -math.log(1 / (1 + math.exp(-0.2 * (gain - loss))))


def grpo(tuned: Any, base: Any, lm: LocalLM, row: TrainingRow) -> float:
    """Equation 3 of arXiv 2402.03300 for one completion, without its KL term."""
    assert row.advantage is not None
    new, old = (log_probabilities(model, lm, row, row.completion, 0.9).tolist() for model in (tuned, base))
    terms = []
    for logprob, old_logprob in zip(new, old, strict=True):
        ratio = math.exp(logprob - old_logprob)
        terms.append(min(ratio * row.advantage, min(max(ratio, 0.8), 1.2) * row.advantage))
    return -sum(terms) / len(terms)


@pytest.mark.parametrize(("name", "formula"), [("DPO", dpo), ("policy gradient", grpo)])
def test_the_loss_is_the_formula_of_the_paper(
    tiny_lm: LocalLM, tiny_folder: Path, store: RunStore, name: str, formula: Callable[..., float]
) -> None:
    """The losses of held-out rows after an epoch must equal those computed with plain PEFT."""
    rows, objective = OBJECTIVES[name]
    doubled = [replace(row, group=str(number)) for number, row in enumerate(rows)] * 2  # one copy of each is held out
    result = train(
        tiny_lm, Session(lm=tiny_lm, store=store), doubled, objective, epochs=1, eval_fraction=0.5, batch_size=32
    )
    assert len(result.losses) == len(result.eval_losses) == 1
    tuned, base = tuned_and_base(tiny_folder, store, result)
    expected = [formula(tuned, base, tiny_lm, row) for row in rows]
    assert result.eval_losses[0] == pytest.approx(sum(expected) / len(expected), rel=1e-3)


def test_dpo_widens_the_margin(tiny_lm: LocalLM, tiny_folder: Path, store: RunStore) -> None:
    result = train(tiny_lm, Session(lm=tiny_lm, store=store), PAIRS, DPOLoss(), epochs=20)
    assert result.losses[0] == pytest.approx(math.log(2), abs=1e-4)
    assert result.losses[-1] < 0.2
    tuned, base = tuned_and_base(tiny_folder, store, result)
    for row in PAIRS:
        margins = [
            (log_probabilities(model, tiny_lm, row, row.completion).sum())
            - log_probabilities(model, tiny_lm, row, "no idea").sum()
            for model in (tuned, base)
        ]
        assert margins[0] > margins[1] + 5


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("lora", {"micro_batch_size": 2, "gradient_checkpointing": True}),
        ("dora", {}),
        ("ia3", {"learning_rate": 0.03}),
        ("prefix", {"learning_rate": 0.05, "virtual_tokens": 20}),
        ("full", {}),
    ],
)
def test_every_method_learns_with_every_objective(
    tiny_lm: LocalLM, store: RunStore, name: str, method: str, settings: dict[str, object]
) -> None:
    rows, objective = OBJECTIVES[name]
    session = Session(lm=tiny_lm, store=store)
    result = train(tiny_lm, session, rows, objective, method=method, epochs=6, bf16=True, **settings)
    first, last = result.losses[: len(rows) // 4], result.losses[-len(rows) // 4 :]
    assert sum(last) / len(last) < sum(first) / len(first) - 0.02


@pytest.mark.parametrize("name", OBJECTIVES)
def test_losses_and_gradients_do_not_depend_on_the_micro_batch_size(
    tiny_lm: LocalLM, store: RunStore, name: str
) -> None:
    """In one batch, all rows share the system prompt, and rows with equal inputs share the whole prompt."""
    rows, objective = OBJECTIVES[name]
    results = [
        train(
            tiny_lm, Session(lm=tiny_lm, store=store), rows, objective, epochs=5, batch_size=12, micro_batch_size=size
        )
        for size in (12, 1)
    ]
    assert results[0].losses == pytest.approx(results[1].losses, rel=1e-3, abs=1e-4)
    assert results[0].losses[-1] < results[0].losses[0]


def test_an_interrupted_dpo_training_has_the_same_references(tiny_folder: Path, tmp_path: Path) -> None:
    adapters, events = [], list[Event]()
    for run, show in (("one", Interrupting()), ("two", Interrupting(7)), ("two", Interrupting())):
        store, lm = RunStore(tmp_path / run), LocalLM.from_pretrained(str(tiny_folder), name="tiny")
        session = Session(lm=lm, store=store, progress=show, callbacks=(events.append,))
        try:
            result = train(lm, session, PAIRS, DPOLoss(), epochs=10, batch_size=2, checkpoint_steps=3, dropout=0.1)
            adapters.append(
                (result.weights.adapter, result.losses, result.tokens, session.ledger.total.training_tokens)
            )
        except KeyboardInterrupt:
            events.clear()
        store.close()
    assert adapters[0] == adapters[1]
    assert [event.epoch for event in events if isinstance(event, EpochEnded)] == [4, 5, 6, 7, 8, 9, 10]


def test_epochs_are_reported_as_they_end(tiny_lm: LocalLM, store: RunStore) -> None:
    events: list[Event] = []
    session = Session(lm=tiny_lm, store=store, callbacks=(events.append,)).for_stage("p -> w")
    result = train(tiny_lm, session, PAIRS * 2, SFTLoss(), epochs=3, eval_fraction=0.5, patience=3, batch_size=2)
    assert [(event.stage, event.epoch, event.eval_loss) for event in events if isinstance(event, EpochEnded)] == [
        ("p -> w", number, pytest.approx(loss, abs=1e-6)) for number, loss in enumerate(result.eval_losses, 1)
    ]
    means = [sum(result.losses[first : first + 2]) / 2 for first in (0, 2, 4)]
    assert [event.loss for event in events if isinstance(event, EpochEnded)] == pytest.approx(means, rel=1e-4)


def test_training_stops_when_a_budget_is_spent_and_keeps_its_weights(tiny_folder: Path, tmp_path: Path) -> None:
    """It makes as many steps as the budget has tokens for, the same ones as without a budget."""
    results = []
    for number, budget in enumerate([Budget(), Budget(max_tokens=1000), Budget(max_seconds=1e-6)]):
        store, lm = RunStore(tmp_path / str(number)), LocalLM.from_pretrained(str(tiny_folder), name="tiny")
        session = Session(lm=lm, store=store).limited(budget)
        results.append(train(lm, session, PAIRS, DPOLoss(), epochs=8, batch_size=2))
        assert session.ledger.total.training_tokens == results[-1].tokens
        store.close()
    unlimited, tokens, seconds = results
    per_step = unlimited.tokens / unlimited.steps
    assert (unlimited.steps, tokens.steps, seconds.steps) == (16, math.ceil(1000 / per_step), 1)
    assert tokens.losses == unlimited.losses[: tokens.steps]
    assert (unlimited.stopped, tokens.stopped, seconds.stopped) == (
        "",
        "max_tokens=1000 is spent",
        "max_seconds=1e-06 is spent",
    )


@final
class KilledAtTheEnd:
    """A progress display that interrupts after the training, before its weights are in the store."""

    def add_task(self, description: str, *, total: float | None = None) -> int:
        return 0

    def advance(self, task_id: int, advance: float = 1) -> None:
        pass

    def remove_task(self, task_id: int) -> None:
        raise KeyboardInterrupt


def test_a_budget_that_ends_within_an_epoch_keeps_the_best_complete_epoch(tiny_folder: Path, tmp_path: Path) -> None:
    """All steps have the same rows and tokens; an epoch has three steps, so the sixth would end the second epoch."""
    rows = [replace(PAIRS[0], group=str(number)) for number in range(8)]
    results = []
    for number, steps in enumerate([5, 3, 2]):
        store, lm = RunStore(tmp_path / str(number)), LocalLM.from_pretrained(str(tiny_folder), name="tiny")
        per_step = 2 * (len(lm.encode(rows[0].messages)) * 2 + len("it is a") + len("no idea") + 2)
        session = Session(lm=lm, store=store).limited(Budget(max_tokens=per_step * steps))
        settings = {"epochs": 3, "batch_size": 2, "eval_fraction": 0.25, "patience": 3}
        with pytest.raises(KeyboardInterrupt):
            train(lm, replace(session, progress=KilledAtTheEnd()), rows, DPOLoss(), **settings)
        results.append(train(lm, session, rows, DPOLoss(), **settings))
        store.close()
    assert [(result.steps, len(result.eval_losses)) for result in results] == [(5, 1), (3, 1), (2, 0)]
    assert results[0].weights == results[1].weights != results[2].weights


def test_launched_processes_follow_the_objective_and_stop_together(tiny_lm: LocalLM, store: RunStore) -> None:
    events: list[Event] = []
    session = Session(lm=tiny_lm, store=store, callbacks=(events.append,)).limited(Budget(max_tokens=1000))
    alone = train(tiny_lm, session, PAIRS, DPOLoss(), epochs=9, batch_size=2)
    epochs = [event for event in events if isinstance(event, EpochEnded)]
    events.clear()
    session = Session(lm=tiny_lm, store=store, callbacks=(events.append,)).limited(Budget(max_tokens=1000))
    tuning = TuningConfig(
        target_modules="all-linear", rank=8, alpha=16, learning_rate=0.003, epochs=9, batch_size=1, bf16=False
    )
    trainer = LocalTrainer(tiny_lm, tuning, FORKING_TORCHRUN)
    pair = trainer.train(PAIRS, BASE, session, DPOLoss())
    assert pair.losses == pytest.approx(alone.losses, rel=1e-3)
    assert (pair.steps, pair.tokens, pair.stopped) == (alone.steps, alone.tokens, "max_tokens is spent")
    assert [event.epoch for event in events if isinstance(event, EpochEnded)] == [event.epoch for event in epochs]


def test_the_end_of_a_completion_that_was_cut_off_is_not_learned(tiny_lm: LocalLM, store: RunStore) -> None:
    session = Session(lm=tiny_lm, store=store)
    cut = [replace(row, rejected_complete=False) for row in PAIRS]
    tokens = [train(tiny_lm, session, rows, DPOLoss(), epochs=1).tokens for rows in (PAIRS, cut)]
    assert tokens[0] - tokens[1] == len(PAIRS)


def test_rows_that_lack_what_the_objective_needs_are_named(tiny_lm: LocalLM, store: RunStore) -> None:
    session = Session(lm=tiny_lm, store=store)
    with pytest.raises(ConfigError, match="needs a rejected completion in every row"):
        train(tiny_lm, session, SAMPLED, DPOLoss())
    with pytest.raises(ConfigError, match="needs a finite advantage in every row"):
        train(tiny_lm, session, PAIRS, PolicyGradientLoss())
    with pytest.raises(ConfigError, match="beta=0 must be above 0"):
        DPOLoss(beta=0)
    with pytest.raises(ConfigError, match="clip=-1"):
        PolicyGradientLoss(clip=-1)
