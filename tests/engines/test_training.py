"""Training a real tiny LM: it learns, its base does not change, and the result is the same to the byte."""

from __future__ import annotations

import shutil
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lmpipe import (
    Completion,
    Example,
    Predict,
    Prediction,
    ProgramState,
    Request,
    RunStore,
    Sampling,
    Session,
    WeightState,
    initial_state,
)
from lmpipe.engines.local import LocalLM
from lmpipe.engines.local.models import Quantization
from lmpipe.engines.precision import multiplies_int8
from lmpipe.engines.training import LocalTrainer, TuningConfig
from lmpipe.errors import ConfigError, EngineError, SessionError
from lmpipe.trainer import TrainingRow
from optimizers import BetterTogether, BootstrapFewShotRandomSearch, BootstrapFinetune
from tests.engines.letters import BASE, ROWS, Interrupting, answers, trainer
from tests.tiny import tiny_llama

needs_int8_products = pytest.mark.skipif(not multiplies_int8(), reason="this processor does not multiply int8")


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


def test_lora_can_adapt_the_top_layers_alone(tiny_lm: LocalLM, store: RunStore) -> None:
    tuned = trainer(tiny_lm, top_layers=0.5).train(ROWS, BASE, Session(lm=tiny_lm, store=store)).weights
    folder = store.folder(str(tuned.adapter))
    assert {name.split(".layers.")[1][0] for name in load_file(folder / "adapter_model.safetensors")} == {"1"}
    tiny_lm.register_adapter(str(tuned.adapter), folder)
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
        torch.rand(number)  # earlier random draws must not matter
        store = RunStore(tmp_path / str(number))
        digests.append(trainer(lm, epochs=3).train(ROWS, BASE, Session(lm=lm, store=store, seed=seed)).weights.adapter)
        store.close()
    assert digests[0] == digests[1] != digests[2]


def test_training_does_not_change_the_global_generators(tiny_lm: LocalLM, store: RunStore) -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    trainer(tiny_lm, epochs=1).train(ROWS, BASE, Session(lm=tiny_lm, store=store))
    assert torch.rand(1) == expected


def test_training_can_start_from_an_adapter(tiny_lm: LocalLM, store: RunStore) -> None:
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


def test_the_loss_does_not_depend_on_sharing_a_prefix(tiny_folder: Path, tmp_path: Path) -> None:
    """The loss of rows packed behind a shared prefix must equal the loss that transformers computes row by row."""
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


def test_half_precision_is_float32_where_it_would_be_emulated(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def losses(*, bf16: bool, native: bool) -> tuple[float, ...]:
        monkeypatch.setattr("lmpipe.engines.training.fit.multiplies_bfloat16", lambda device: native)
        lm = LocalLM.from_pretrained(str(tiny_folder), name="tiny")
        with closing(RunStore(tmp_path / f"{bf16}-{native}")) as store:
            return trainer(lm, epochs=2, bf16=bf16).train(ROWS, BASE, Session(lm=lm, store=store)).losses

    exact = losses(bf16=False, native=True)
    assert losses(bf16=True, native=False) == exact
    assert losses(bf16=True, native=True) != exact


def test_bad_input_is_named(tiny_lm: LocalLM, store: RunStore) -> None:
    with pytest.raises(ConfigError, match="no rows to train on"):
        trainer(tiny_lm).train([], BASE, Session(lm=tiny_lm, store=store))
    with pytest.raises(SessionError, match="create the session with a store"):
        trainer(tiny_lm).train(ROWS, BASE, Session(lm=tiny_lm))
    state = ProgramState(prompts={}, weights={"lm": WeightState(base="large")})
    with pytest.raises(SessionError, match=r"belong to 'large', but its LM is 'tiny'"):
        Session(lm=tiny_lm).register_adapters(state)


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("lora", {"micro_batch_size": 1}),
        ("lora", {"gradient_checkpointing": True}),
        ("dora", {}),
        ("ia3", {"learning_rate": 0.03}),
        ("prefix", {"learning_rate": 0.05, "virtual_tokens": 20}),
        ("full", {"learning_rate": 0.003}),
    ],
)
def test_every_method_learns_and_its_weights_are_switched_in_place(
    tiny_lm: LocalLM, store: RunStore, method: str, settings: dict[str, object]
) -> None:
    before = answers(tiny_lm, BASE)
    session = Session(lm=tiny_lm, store=store)
    result = trainer(tiny_lm, method=method, epochs=60, **settings).train(ROWS, BASE, session)
    assert result.losses[-1] < result.losses[0] * 0.6
    tuned = result.weights
    tiny_lm.register_adapter(str(tuned.adapter), store.folder(str(tuned.adapter)))
    switched = answers(tiny_lm, tuned)
    assert switched != before
    assert answers(tiny_lm, BASE) == before
    assert answers(tiny_lm, tuned) == switched
    further = trainer(tiny_lm, method=method, epochs=1, **settings).train(ROWS, tuned, session)
    assert further.losses[0] < result.losses[0] * 0.6


def test_a_learned_prefix_is_used_as_peft_uses_it(tiny_lm: LocalLM, tiny_folder: Path, store: RunStore) -> None:
    result = trainer(tiny_lm, method="prefix", learning_rate=0.1, virtual_tokens=20, epochs=30).train(
        ROWS, BASE, Session(lm=tiny_lm, store=store)
    )
    folder = store.folder(str(result.weights.adapter))
    tiny_lm.register_adapter(str(result.weights.adapter), folder)
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_folder), folder)
    for row, answer in zip(ROWS, answers(tiny_lm, result.weights), strict=True):
        prompt = tiny_lm.encode(row.messages)
        out = plain.generate(input_ids=torch.tensor([prompt]), max_new_tokens=12, do_sample=False)
        assert tiny_lm.tokenizer.decode(out[0][len(prompt) :], skip_special_tokens=True) == answer


def test_training_stops_when_held_out_rows_get_worse(tiny_lm: LocalLM, store: RunStore) -> None:
    """The held-out row contradicts the others, so learning from them increases its loss."""
    rows = [TrainingRow(ROWS[0].messages, f"it is {letter}") for letter in "aaaaaaab"]
    result = trainer(tiny_lm, epochs=60, eval_fraction=0.25, patience=2).train(
        rows, BASE, Session(lm=tiny_lm, store=store, seed=3)
    )
    assert result.steps < 60 * 2
    best = min(result.eval_losses)
    assert result.eval_losses[-3] == best
    assert len(result.eval_losses) * 2 == result.steps


@pytest.mark.parametrize("quantization", ["nf4", "int8", pytest.param("int8-dynamic", marks=needs_int8_products)])
def test_a_quantized_base_answers_and_is_tuned(tmp_path: Path, store: RunStore, quantization: Quantization) -> None:
    """It generates before it is trained: bitsandbytes must not repack its weights for that."""
    folder = tiny_llama(tmp_path / "wide", hidden_size=128, intermediate_size=256)
    lm = LocalLM.from_pretrained(str(folder), quantization=quantization)
    assert lm.name == f"{folder}@{quantization}"
    base = WeightState(base=lm.name)
    before = answers(lm, base)
    method = "qlora" if quantization == "nf4" else "lora"
    result = trainer(lm, method=method, epochs=100).train(ROWS, base, Session(lm=lm, store=store))
    assert result.losses[-1] < result.losses[0] / 2
    lm.register_adapter(str(result.weights.adapter), store.folder(str(result.weights.adapter)))
    assert answers(lm, base) == before != answers(lm, result.weights)


def test_two_processes_train_one_adapter(tiny_lm: LocalLM, store: RunStore) -> None:
    """Each process has half of the rows; together they make the same steps as one process with all rows."""
    session, progress = Session(lm=tiny_lm, store=store), Interrupting()
    alone = trainer(tiny_lm, epochs=4, bf16=False).train(ROWS, BASE, session)
    pair = LocalTrainer(
        tiny_lm,
        TuningConfig(**{**asdict(trainer(tiny_lm, epochs=4, bf16=False).tuning), "batch_size": 2}),
        launcher=("torchrun", "--nproc-per-node=2"),
    ).train(ROWS, BASE, replace(session, progress=progress))
    assert pair.steps == alone.steps == 4
    assert sum(progress.advances) == 4
    assert pair.losses == pytest.approx(alone.losses, rel=1e-3)


def test_impossible_trainings_are_rejected_in_advance(tiny_lm: LocalLM, store: RunStore) -> None:
    session = Session(lm=tiny_lm, store=store)
    with pytest.raises(ConfigError, match="qlora needs a base in 4 bits"):
        trainer(tiny_lm, method="qlora").train(ROWS, BASE, session)
    with pytest.raises(ConfigError, match="batch_size=8 is not a multiple of micro_batch_size=3"):
        TuningConfig(micro_batch_size=3)
    with pytest.raises(ConfigError, match="prefix tuning runs in one process"):
        LocalTrainer(tiny_lm, TuningConfig(method="prefix"), launcher=("torchrun",)).train(ROWS, BASE, session)
    with pytest.raises(ConfigError, match="no command 'mpirunner'; install it"):
        LocalTrainer(tiny_lm, TuningConfig(), launcher=("mpirunner",)).train(ROWS, BASE, session)
    with pytest.raises(
        EngineError,
        match=r"(?s)the training launched with torchrun failed with exit code 2.*unrecognized arguments: --nonsense",
    ):
        LocalTrainer(tiny_lm, TuningConfig(), launcher=("torchrun", "--nonsense")).train(ROWS, BASE, session)


def test_the_base_is_loaded_once(tmp_path: Path, store: RunStore) -> None:
    """Its files may be deleted before prompts are searched, weights tuned, and prompts searched again."""
    folder = tiny_llama(tmp_path / "model")
    lm = LocalLM.from_pretrained(str(folder), name="tiny")
    shutil.rmtree(folder)
    program = Predict("letter -> answer")
    stages = {
        "p": BootstrapFewShotRandomSearch(answered, num_candidate_programs=1),
        "w": BootstrapFinetune(answered, LocalTrainer(lm, TuningConfig(epochs=2)), temperature=1.0),
    }
    examples = [Example({"letter": letter}, {"answer": letter}) for letter in "abcdef"]
    session = Session(lm=lm, store=store, sampling=Sampling(max_tokens=4))
    scheduler = BetterTogether(answered, stages, "p -> w -> p")
    result = scheduler.optimize(program, initial_state(program, session), examples[:4], examples[4:], session)
    assert [stage.result.status for stage in result.stages] == ["done"] * 3
    assert result.state.weights["lm"].adapter is not None


def answered(example: Example, prediction: Prediction) -> float:
    """Scores every answer as correct."""
    return 1.0
