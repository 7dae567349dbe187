"""Training a real tiny LM: it learns, the base stays, and the bytes are the same every time."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from lmpipe import Completion, ProgramState, Request, RunStore, Sampling, Session, WeightState
from lmpipe.engines.local import LocalLM
from lmpipe.engines.local_trainer import LocalTrainer
from lmpipe.engines.tuning import Tuning
from lmpipe.errors import ConfigError, SessionError
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
    return LocalTrainer(lm, Tuning(**{**defaults, **settings}))  # type: ignore[arg-type]


def answers(lm: LocalLM, weights: WeightState) -> list[str]:
    requests = [Request(row.messages, Sampling(max_tokens=12), weights) for row in ROWS]
    return [answer.text for answer in lm.complete(requests) if isinstance(answer, Completion)]


def test_it_learns_its_rows_and_leaves_the_base_as_it_was(tiny_lm: LocalLM, store: RunStore) -> None:
    session = Session(lm=tiny_lm, store=store)
    before = answers(tiny_lm, BASE)
    result = trainer(tiny_lm).train(ROWS, BASE, session)
    assert result.steps == 200
    assert result.losses[-1] < 0.1 < result.losses[0]
    assert session.ledger.total.training_tokens == result.tokens > 0
    tuned = result.weights
    tiny_lm.register_adapter(str(tuned.adapter), store.folder(str(tuned.adapter)))
    assert answers(tiny_lm, tuned) == [row.completion for row in ROWS]
    assert answers(tiny_lm, BASE) == before
    assert answers(tiny_lm, tuned) == [row.completion for row in ROWS]


def test_requests_on_different_weights_are_answered_together(tiny_lm: LocalLM, store: RunStore) -> None:
    session = Session(lm=tiny_lm, store=store)
    tuned = trainer(tiny_lm).train(ROWS, BASE, session).weights
    tiny_lm.register_adapter(str(tuned.adapter), store.folder(str(tuned.adapter)))
    requests = [Request(row.messages, Sampling(max_tokens=12), weights) for row in ROWS for weights in (BASE, tuned)]
    mixed = [answer.text for answer in tiny_lm.complete(requests) if isinstance(answer, Completion)]
    assert mixed[0::2] == answers(tiny_lm, BASE)
    assert mixed[1::2] == answers(tiny_lm, tuned)


def test_the_same_seed_gives_the_same_bytes(tiny_folder: Path, tmp_path: Path) -> None:
    digests = []
    for number, seed in enumerate([1, 1, 2]):
        lm = LocalLM.from_pretrained(str(tiny_folder), name="tiny")
        torch.rand(number)  # whatever was drawn before does not matter
        store = RunStore(tmp_path / str(number))
        digests.append(trainer(lm, epochs=3).train(ROWS, BASE, Session(lm=lm, store=store, seed=seed)).weights.adapter)
        store.close()
    assert digests[0] == digests[1] != digests[2]


def test_training_leaves_the_global_generators_alone(tiny_lm: LocalLM, store: RunStore) -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    trainer(tiny_lm, epochs=1).train(ROWS, BASE, Session(lm=tiny_lm, store=store))
    assert torch.rand(1) == expected


def test_training_can_go_on_from_an_adapter(tiny_lm: LocalLM, store: RunStore) -> None:
    session = Session(lm=tiny_lm, store=store)
    first = trainer(tiny_lm, epochs=30).train(ROWS, BASE, session)
    tiny_lm.register_adapter(str(first.weights.adapter), store.folder(str(first.weights.adapter)))
    second = trainer(tiny_lm, epochs=2).train(ROWS, first.weights, session)
    assert second.losses[0] < first.losses[0] / 2


def test_plain_peft_loads_the_adapter(tiny_lm: LocalLM, tiny_folder: Path, store: RunStore) -> None:
    result = trainer(tiny_lm).train(ROWS, BASE, Session(lm=tiny_lm, store=store))
    folder = store.folder(str(result.weights.adapter))
    assert sorted(path.name for path in folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_folder), folder)
    prompt = tiny_lm.encode(ROWS[0].messages)
    out = plain.generate(input_ids=torch.tensor([prompt]), max_new_tokens=12, do_sample=False)
    assert tiny_lm.tokenizer.decode(out[0][len(prompt) :], skip_special_tokens=True) == ROWS[0].completion


def test_loss_and_gradient_do_not_depend_on_sharing_the_beginning(tiny_folder: Path, tmp_path: Path) -> None:
    """Rows without a common beginning are computed the ordinary way; both must agree with transformers' own loss."""
    lm = LocalLM.from_pretrained(str(tiny_folder), name="tiny")
    store = RunStore(tmp_path)
    result = trainer(lm, epochs=1, bf16=False).train(ROWS, BASE, Session(lm=lm, store=store))
    store.close()
    plain = AutoModelForCausalLM.from_pretrained(tiny_folder)
    losses = []
    for row in ROWS:
        prompt = lm.encode(row.messages)
        completion = [*lm.encode_text(row.completion), lm.end_token]
        labels = torch.tensor([[-100] * len(prompt) + completion])
        losses += [plain(input_ids=torch.tensor([prompt + completion]), labels=labels).loss * len(completion)]
    tokens = sum(len(lm.encode_text(row.completion)) + 1 for row in ROWS)
    assert result.losses[0] == pytest.approx(sum(loss.item() for loss in losses) / tokens, rel=1e-4)


def test_bad_input_is_named(tiny_lm: LocalLM, store: RunStore) -> None:
    with pytest.raises(ConfigError, match="no rows to train on"):
        trainer(tiny_lm).train([], BASE, Session(lm=tiny_lm, store=store))
    with pytest.raises(SessionError, match="make the session with a store"):
        trainer(tiny_lm).train(ROWS, BASE, Session(lm=tiny_lm))
    state = ProgramState(prompts={}, weights={"lm": WeightState(base="large")})
    with pytest.raises(SessionError, match=r"belong to 'large', but its LM is 'tiny'"):
        Session(lm=tiny_lm).prepare(state)
