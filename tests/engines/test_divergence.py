"""A model or a training with NaN or infinite values raises an error, and its results are not used."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import TrainerState

from lmpipe import (
    Completion,
    EngineError,
    Example,
    Predict,
    Prediction,
    Request,
    RunStore,
    Sampling,
    Session,
    TuningConfig,
    WeightState,
    initial_state,
)
from lmpipe.engines.local import LocalLM
from lmpipe.engines.training import LocalTrainer
from lmpipe.engines.training.batch_sampler import train_eval_split
from lmpipe.engines.training.divergence import DivergenceCallback
from lmpipe.engines.training.packed_batch import TokenizedRow
from lmpipe.errors import ConfigError, TrainingDiverged
from lmpipe.lm import Message
from lmpipe.trainer import DPOLoss, Objective, PolicyGradientLoss, SFTLoss, TrainingRow
from optimizers import BootstrapFinetune
from tests.engines.letters import BASE, ROWS, answers, trainer
from tests.launch import FORKING_TORCHRUN

PAIRS = [TrainingRow(row.messages, row.completion, row.group, "no", advantage=1.0) for row in ROWS]


def stored(store: RunStore) -> list[str]:
    """Lists the adapters and trainings in the store."""
    return [str(path) for path in store.path.rglob("*") if "adapter" in path.name or path.parent.name == "training"]


@pytest.mark.parametrize(
    ("settings", "objective"),
    [
        ({"method": "lora", "checkpoint_steps": 1}, SFTLoss()),
        ({"method": "dora"}, SFTLoss()),
        ({"method": "ia3"}, SFTLoss()),
        ({"method": "prefix"}, SFTLoss()),
        ({"method": "full"}, SFTLoss()),
        ({"method": "lora", "micro_batch_size": 2}, DPOLoss()),
        ({"method": "lora"}, PolicyGradientLoss()),
        ({"method": "full", "bf16": False}, PolicyGradientLoss()),
    ],
)
def test_a_training_that_diverges_ends_at_that_step(
    tiny_lm: LocalLM, store: RunStore, settings: dict[str, Any], objective: Objective
) -> None:
    before = answers(tiny_lm, BASE)
    diverging = trainer(tiny_lm, learning_rate=1e38, epochs=9, **settings)
    errors = []
    for _ in range(2):  # the second training must not resume from a checkpoint of the first
        with pytest.raises(
            TrainingDiverged, match=r"the training diverged: at step [1-9] .* lower than 1e\+38"
        ) as caught:
            diverging.train(PAIRS, BASE, Session(lm=tiny_lm, store=store), objective)
        assert not stored(store)
        errors.append((str(caught.value), caught.value.step, caught.value.losses))
    assert errors[0] == errors[1]
    assert 1 <= errors[0][1] <= 9
    assert len(errors[0][2]) <= errors[0][1]
    assert answers(tiny_lm, BASE) == before
    assert trainer(tiny_lm, epochs=1, **settings).train(PAIRS, BASE, Session(lm=tiny_lm, store=store), objective)


def test_the_last_update_is_checked(tiny_lm: LocalLM, store: RunStore) -> None:
    """The loss and gradient of the last step are finite, but the updated weights are not."""
    with pytest.raises(TrainingDiverged, match="at step 1 a trained weight is NaN or infinite after losses of"):
        trainer(tiny_lm, learning_rate=1e300, epochs=1).train(ROWS, BASE, Session(lm=tiny_lm, store=store))
    assert not stored(store)


@pytest.mark.parametrize("odd", [[torch.nan], [torch.inf, -torch.inf], [-torch.inf, 1.0]])
def test_weights_have_diverged_only_if_a_number_is_not_finite(odd: list[float]) -> None:
    large = [torch.full((4,), 2e38), torch.ones(3)]  # their sum is infinite in float32
    state = TrainerState()
    DivergenceCallback(TuningConfig(), large).check([], state)
    with pytest.raises(TrainingDiverged, match="a trained weight is NaN or infinite"):
        DivergenceCallback(TuningConfig(), [*large, torch.tensor(odd)]).check([], state)


def corrupt_letter(lm: LocalLM) -> None:
    """Makes the model compute NaN for every prompt with a ``~``."""
    lm.model.get_input_embeddings().weight[lm.encode_text("~")[0]] = torch.nan


def test_an_epoch_whose_held_out_loss_is_nan_is_not_selected(tiny_lm: LocalLM, store: RunStore) -> None:
    corrupt_letter(tiny_lm)
    session = Session(lm=tiny_lm, store=store)
    rows = [ROWS[0]] * 8
    tokenized = [TokenizedRow((number,), 1, rows[0].group) for number in range(8)]
    unseen = train_eval_split(tokenized, 0.25, session.seed)[1][0].tokens[0]
    rows[unseen] = TrainingRow((Message("user", "~"),), "it is", rows[0].group)
    with pytest.raises(TrainingDiverged, match="at step 2 the loss on held-out rows is nan"):
        trainer(tiny_lm, eval_fraction=0.25, patience=9, epochs=3).train(rows, BASE, session)
    assert not stored(store)


def test_a_reference_that_is_nan_is_reported_before_the_first_step(tiny_lm: LocalLM, store: RunStore) -> None:
    corrupt_letter(tiny_lm)
    rows = [TrainingRow((Message("user", "~"),), "yes", rejected="no", advantage=1.0)]
    for objective in (DPOLoss(), PolicyGradientLoss()):
        with pytest.raises(TrainingDiverged, match="under the initial weights are NaN or infinite") as caught:
            trainer(tiny_lm).train(rows, BASE, Session(lm=tiny_lm, store=store), objective)
        assert caught.value.step == 0
    with pytest.raises(ConfigError, match="needs a finite advantage in every row"):
        trainer(tiny_lm).train(
            [TrainingRow(rows[0].messages, "yes", advantage=float("nan"))],
            BASE,
            Session(lm=tiny_lm, store=store),
            PolicyGradientLoss(),
        )


def test_launched_processes_end_together_with_the_same_error(tiny_lm: LocalLM, store: RunStore) -> None:
    tuning = trainer(tiny_lm, learning_rate=1e30, epochs=5, batch_size=2).tuning
    launched = LocalTrainer(tiny_lm, tuning, FORKING_TORCHRUN)
    with pytest.raises(TrainingDiverged, match="the training diverged: at step 2 the loss is nan") as caught:
        launched.train(ROWS, BASE, Session(lm=tiny_lm, store=store))
    assert caught.value.step == 2
    assert len(caught.value.losses) == 1
    assert not stored(store)


def test_weights_with_nan_are_not_loaded(tiny_lm: LocalLM, store: RunStore, tmp_path: Path) -> None:
    """An adapter of layers, a prefix and a whole model, registered by hand; good weights still work afterwards."""
    before = answers(tiny_lm, BASE)
    session = Session(lm=tiny_lm, store=store)
    for method in ("lora", "prefix", "full"):
        good = trainer(tiny_lm, method=method, epochs=1).train(ROWS, BASE, session).weights
        bad = tmp_path / method
        bad.mkdir()
        for file in store.folder(str(good.adapter)).iterdir():
            (bad / file.name).write_bytes(file.read_bytes())
        weights = next(bad.glob("*.safetensors"))
        tensors = load_file(weights)
        tensors[min(tensors)].view(-1)[0] = torch.inf
        save_file(tensors, weights, metadata={"format": "pt"})
        tiny_lm.register_adapter("bad", bad)
        tiny_lm.register_adapter(str(good.adapter), store.folder(str(good.adapter)))
        told = f"holds NaN or infinity in 1 of {len(tensors)} weights"
        with pytest.raises(EngineError, match=told):
            answers(tiny_lm, WeightState(base="tiny", adapter="bad"))
        assert answers(tiny_lm, BASE) == before
        assert len(answers(tiny_lm, good)) == len(ROWS)
        start = WeightState(base="tiny", adapter=store.put_folder(bad))
        with pytest.raises(EngineError, match=told):
            trainer(tiny_lm, method=method, epochs=1).train(ROWS, start, session)
        assert answers(tiny_lm, BASE) == before


def test_nan_logits_fail_only_their_own_request(tiny_folder: Path) -> None:
    """This also holds when other sequences take over the memory of those that failed."""
    clean, lm = (
        LocalLM.from_pretrained(str(tiny_folder), name="tiny", max_sequences=3, max_cached_answers=0) for _ in range(2)
    )
    corrupt_letter(lm)
    texts = ["a", "b", "~", "c", "say ~", "d", "e", "~~", "f"]
    requests = [
        Request((Message("user", text),), Sampling(max_tokens=4 + n, temperature=n % 2), BASE, n)
        for n, text in enumerate(texts)
    ]
    for _ in range(2):
        for text, answer, usual in zip(texts, lm.complete(requests), clean.complete(requests), strict=True):
            assert isinstance(usual, Completion)
            if "~" in text + usual.text[:-1]:
                assert isinstance(answer, EngineError)
                assert "tiny cannot answer this request" in str(answer)
            else:
                assert answer == usual


def test_a_failed_sequence_leaves_no_nan_to_the_sequence_that_takes_its_place(tiny_folder: Path) -> None:
    clean, lm = (
        LocalLM.from_pretrained(str(tiny_folder), name="tiny", max_sequences=2, max_cached_answers=0) for _ in range(2)
    )
    corrupt_letter(lm)
    long, failing, short = (
        Request((Message("user", text),), Sampling(max_tokens=tokens), BASE)
        for text, tokens in (("a", 30), ("b~" + "x" * 60, 8), ("c", 8))
    )
    usual = clean.complete([long, failing, short])
    answers = lm.complete([long, failing, short])
    assert isinstance(answers[1], EngineError)
    assert (answers[0], answers[2]) == (usual[0], usual[2])


def test_a_stage_whose_training_diverges_is_skipped(tiny_lm: LocalLM, store: RunStore) -> None:
    def answered(example: Example, prediction: Prediction) -> float:
        return 1.0

    session = Session(lm=tiny_lm, store=store, sampling=Sampling(max_tokens=4))
    program = Predict("letter -> answer")
    state = initial_state(program, session)
    examples = [Example({"letter": letter}, {"answer": letter}) for letter in "abcd"]
    stage = BootstrapFinetune(answered, trainer(tiny_lm, learning_rate=1e38, epochs=5), temperature=1.0)
    result = stage.optimize(program, state, examples, examples, session)
    assert result.status == "skipped"
    assert "lm: the training diverged: at step" in result.reason
    assert result.state.weights == state.weights
    assert result.details["training"]["lm"]["diverged"] in result.reason
