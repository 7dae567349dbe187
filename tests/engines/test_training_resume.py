"""A training that was interrupted or ran out of disk space ends with the same result as an undisturbed one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal, final

import pytest

from lmpipe import RunStore, Session
from lmpipe.engines.local import LocalLM
from lmpipe.errors import StoreError
from lmpipe.trainer import TrainingResult, TrainingRow
from tests.disk import full_disk
from tests.engines.letters import BASE, ROWS, Interrupting, answers, trainer


def test_an_interrupted_training_resumes_from_its_checkpoint(tiny_folder: Path, tmp_path: Path) -> None:
    """It is interrupted at steps 25 and 38, and its newest checkpoint is damaged; the weights are identical."""
    shows = [Interrupting(), Interrupting(25), Interrupting(38), Interrupting()]
    adapters = []
    for show in shows:
        store = RunStore(tmp_path / ("one" if show is shows[0] else "two"))
        lm = LocalLM.from_pretrained(str(tiny_folder), name="tiny")
        tuner = trainer(lm, epochs=50, batch_size=3, checkpoint_steps=10, dropout=0.1)
        try:
            adapters.append(tuner.train(ROWS, BASE, Session(lm=lm, store=store, progress=show)).weights.adapter)
        except KeyboardInterrupt:
            newest = max(store.path.glob("training/*/checkpoint-*"), key=lambda path: path.stat().st_mtime)
            if show is shows[2]:
                (newest / "optimizer.pt").write_bytes(b"damaged")
        store.close()
    assert [show.advances[0] for show in shows] == [0, 0, 20, 20]
    assert adapters[0] == adapters[1]
    assert not list(tmp_path.glob("*/training/*"))


@final
class StoppingAtTheEnd(Interrupting):
    """Interrupts after the last step and the last checkpoint, before the result is recorded."""

    def remove_task(self, task_id: int) -> None:
        raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("then", "show", "settings"),
    [
        ("kept", Interrupting(31), {"patience": 2}),  # while patience lasts
        ("kept", StoppingAtTheEnd(), {"patience": 2}),
        ("moved", StoppingAtTheEnd(), {"epochs": 12, "learning_rate": 0.05, "patience": 50}),
        ("damaged", StoppingAtTheEnd(), {"epochs": 12, "learning_rate": 0.05, "patience": 50}),
    ],
)
def test_an_interrupted_training_stops_when_it_would_have_and_ends_with_its_best_weights(
    tiny_folder: Path,
    tmp_path: Path,
    then: Literal["kept", "moved", "damaged"],
    show: Interrupting,
    settings: dict[str, object],
) -> None:
    """The best weights are not the newest; the directory may be moved, or the best checkpoint damaged."""
    rows = [TrainingRow(ROWS[0].messages, f"it is {letter}") for letter in "aaaaaaab"]

    def train(name: str, progress: Interrupting) -> TrainingResult:
        lm, store = LocalLM.from_pretrained(str(tiny_folder), name="tiny"), RunStore(tmp_path / name)
        session = Session(lm=lm, store=store, seed=3, progress=progress)
        try:
            return trainer(lm, **{"epochs": 60, "eval_fraction": 0.25, **settings}).train(rows, BASE, session)
        finally:
            store.close()

    undisturbed = train("undisturbed", Interrupting())
    assert undisturbed.eval_losses[-1] > min(undisturbed.eval_losses)
    with pytest.raises(KeyboardInterrupt):
        train("cut", show)
    checkpoints = sorted(tmp_path.glob("cut/training/*/checkpoint-*"), key=lambda path: int(path.name[11:]))
    assert len(checkpoints) == 2
    if then == "damaged":
        (checkpoints[0] / "adapter_model.safetensors").write_bytes(b"damaged")
    if then == "moved":
        (tmp_path / "cut").rename(tmp_path / "moved")
    again = Interrupting()
    assert train("moved" if then == "moved" else "cut", again) == undisturbed
    assert (again.advances[0] == 0) == (then == "damaged")


def test_a_finished_training_is_recalled_and_its_leftover_files_are_deleted(tiny_lm: LocalLM, store: RunStore) -> None:
    """A run that was killed before its stage was recorded does not train again and counts the cost once."""
    first, again, show = Session(lm=tiny_lm, store=store), Session(lm=tiny_lm, store=store), Interrupting()
    result = trainer(tiny_lm, epochs=3).train(ROWS, BASE, first)
    key = next(word for word in (store.path / "journal.jsonl").read_text().split('"') if word.startswith("training "))
    leftover = store.path / "training" / key.partition(" ")[2]
    (leftover / "checkpoint-1").mkdir(parents=True)
    assert trainer(tiny_lm, epochs=3).train(ROWS, BASE, replace(again, progress=show)) == result
    assert not show.advances
    assert not leftover.exists()
    assert first.ledger.total.training_tokens == again.ledger.total.training_tokens == result.tokens


def test_a_training_that_ran_out_of_disk_space_resumes_in_the_same_process(
    tiny_folder: Path, tiny_lm: LocalLM, tmp_path: Path, store: RunStore
) -> None:
    settings = {"epochs": 20, "checkpoint_steps": 5}
    with full_disk(20_000), pytest.raises(StoreError, match=r"checkpoint-5 cannot be written: .*free space"):
        trainer(tiny_lm, **settings).train(ROWS, BASE, Session(lm=tiny_lm, store=store))
    result = trainer(tiny_lm, **settings).train(ROWS, BASE, Session(lm=tiny_lm, store=store))
    other, fresh = RunStore(tmp_path / "other"), LocalLM.from_pretrained(str(tiny_folder), name="tiny")
    assert trainer(fresh, **settings).train(ROWS, BASE, Session(lm=fresh, store=other)) == result
    other.close()
    assert answers(tiny_lm, BASE) == answers(fresh, BASE)
