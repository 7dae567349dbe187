"""Training by fused passes: the logits, losses and gradients of PEFT and autograd, and which models they serve."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftConfig

from lmpipe import RunStore, Session
from lmpipe.engines.kernels import has_kernels
from lmpipe.engines.kernels.library import kernels
from lmpipe.engines.local import LocalLM
from lmpipe.engines.training.fused_decoder import FusedTrainingDecoder
from lmpipe.engines.training.losses import num_items, summed_loss
from lmpipe.engines.training.packed_batch import TokenizedRow, collate
from lmpipe.trainer import DPOLoss, Objective, SFTLoss
from tests.engines.letters import BASE, ROWS, Interrupting, trainer
from tests.engines.test_decoder import ADAPTERS, ATTENTION, FUSED, LORA, MLP, ON_OTHER_MODULES, OTHERS, create, load
from tests.tiny import tiny_llama

MODELS = ["Llama", "Llama, one head a key head", "Qwen 2, with bias"]
TUNED: dict[str, PeftConfig] = {
    "all layers": LoraConfig(**LORA, target_modules=ATTENTION + MLP),
    "queries and values": LoraConfig(**LORA, target_modules=["q_proj", "v_proj"]),
    "the upper half": LoraConfig(**LORA, target_modules=ATTENTION + MLP, layers_to_transform=[1]),
    "the lower half": LoraConfig(**LORA, target_modules=["k_proj", "up_proj", "down_proj"], layers_to_transform=[0]),
    "rank-stabilized, with patterns": ADAPTERS["LoRA, rank-stabilized, with patterns"],
}
TOLERANCE = 1e-4  # of logits, losses and gradients in float32, relative to their norm


def tokens(seed: int, count: int) -> tuple[int, ...]:
    return tuple(torch.randint(0, 250, (count,), generator=torch.Generator().manual_seed(seed)).tolist())


def row(seed: int, shared: int, own: int, completion: int, rejected: int = 0) -> TokenizedRow:
    """Returns a row whose prompt begins with some tokens that all rows have."""
    return TokenizedRow(
        tokens(0, shared) + tokens(seed, own + completion),
        completion,
        rejected=tokens(seed + 100, rejected),
        reference_logprobs=(-3.0, -4.0) if rejected else (),
    )


BATCHES: dict[str, tuple[Objective, list[TokenizedRow]]] = {
    "no common prefix": (SFTLoss(), [row(1, 0, 90, 7), row(2, 0, 3, 20), row(3, 0, 40, 1)]),
    "a common prefix": (SFTLoss(), [row(1, 70, 5, 7), row(2, 70, 31, 9)]),
    "one row": (SFTLoss(), [row(1, 30, 10, 8)]),
    "rejected completions": (DPOLoss(), [row(1, 20, 9, 7, 12), row(2, 20, 31, 5, 3)]),
    "the same prompt twice": (SFTLoss(), [row(1, 60, 0, 6), row(2, 60, 0, 9), row(3, 60, 0, 4)]),
}

Result = tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]


@contextmanager
def tuned(model: Any, config: PeftConfig | None, folder: Path) -> Iterator[Any]:
    """Gives a model in training, whose adapter has random weights."""
    torch.manual_seed(1)
    with load(model, folder).adapters.trainable(config, None) as peft:
        yield peft


def in_dtype(dtype: torch.dtype) -> Any:
    return torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16)


def model_logits(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    logits: torch.Tensor = model(**inputs).logits[0]
    return logits


def fused_logits(fused: FusedTrainingDecoder, inputs: dict[str, Any]) -> torch.Tensor:
    return fused.logits(*(inputs[name] for name in ("input_ids", "position_ids", "logits_to_keep", "forward_batch")))


def differentiated(
    model: Any, logits_of: Callable[[dict[str, Any]], torch.Tensor], batch: str, dtype: torch.dtype
) -> Result:
    """Returns logits, loss and the gradients of all trained weights."""
    objective, rows = BATCHES[batch]
    inputs = collate(rows, num_items=partial(num_items, objective))
    targets, _ = inputs.pop("targets"), inputs.pop("labels")
    model.zero_grad()
    with in_dtype(dtype):
        logits = logits_of(inputs)
        loss = summed_loss(objective, logits, targets)
    loss.backward()
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    return logits.detach(), loss.detach(), {name: weight.grad.clone() for name, weight in trained.items()}


def difference(x: torch.Tensor, y: torch.Tensor) -> float:
    return float((x.float() - y.float()).norm() / y.float().norm().clamp(min=1e-6))


def assert_same(actual: Result, expected: Result) -> None:
    assert difference(actual[0], expected[0]) <= TOLERANCE
    assert difference(actual[1], expected[1]) <= TOLERANCE
    assert actual[2].keys() == expected[2].keys()
    differences = {name: difference(gradient, expected[2][name]) for name, gradient in actual[2].items()}
    assert max(differences.values()) <= TOLERANCE, differences


def created(model: Any, dtype: torch.dtype = torch.float32) -> FusedTrainingDecoder:
    fused = FusedTrainingDecoder.create(model, dtype)
    assert fused is not None
    return fused


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_those_of_autograd(name: str, batch: str, tiny_folder: Path) -> None:
    with tuned(create(FUSED[name]), TUNED["all layers"], tiny_folder) as model:
        actual = differentiated(model, partial(fused_logits, created(model)), batch, torch.float32)
        expected = differentiated(model, partial(model_logits, model), batch, torch.float32)
    assert_same(actual, expected)


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("name", MODELS)
def test_bfloat16_is_as_close_to_float32_as_autocast(name: str, batch: str, tiny_folder: Path) -> None:
    with tuned(create(FUSED[name]), TUNED["all layers"], tiny_folder) as model:
        fused = partial(fused_logits, created(model, torch.bfloat16))
        own = partial(model_logits, model)
        exact, expected, actual = (
            differentiated(model, logits_of, batch, dtype)
            for logits_of, dtype in ((own, torch.float32), (own, torch.bfloat16), (fused, torch.bfloat16))
        )
    assert actual[0].dtype == torch.bfloat16
    for result, allowed, true in (
        (actual[0], expected[0], exact[0]),
        *((torch.cat([g.flatten() for g in x[2].values()]) for x in (actual, expected, exact)),),
    ):
        assert difference(result, true) <= 1.5 * difference(allowed, true)


@pytest.mark.parametrize("adapter", TUNED)
def test_other_parts_of_the_model_are_tuned(adapter: str, tiny_folder: Path) -> None:
    with tuned(create(FUSED["Qwen 2, with bias"]), TUNED[adapter], tiny_folder) as model:
        actual = differentiated(model, partial(fused_logits, created(model)), "a common prefix", torch.float32)
        expected = differentiated(model, partial(model_logits, model), "a common prefix", torch.float32)
    assert_same(actual, expected)


def test_steps_in_turn_use_the_weights_of_the_moment(tiny_folder: Path) -> None:
    with tuned(create(FUSED["Llama"]), TUNED["all layers"], tiny_folder) as model:
        fused = created(model)
        optimizer = torch.optim.SGD([weight for weight in model.parameters() if weight.requires_grad], 1e-4)
        losses = []
        for batch in ("no common prefix", "a common prefix", "no common prefix"):
            actual = differentiated(model, partial(fused_logits, fused), batch, torch.float32)
            assert_same(actual, differentiated(model, partial(model_logits, model), batch, torch.float32))
            losses.append(float(actual[1]))
            optimizer.step()
    assert losses[2] < losses[0]


def test_two_batches_before_their_backward_passes(tiny_folder: Path) -> None:
    inputs = [collate(rows) for _, rows in (BATCHES["one row"], BATCHES["a common prefix"])]
    with tuned(create(FUSED["Llama"]), TUNED["all layers"], tiny_folder) as model:
        weights = [weight for weight in model.parameters() if weight.requires_grad]
        fused = created(model)
        together = torch.autograd.grad(sum(fused_logits(fused, x).square().sum() for x in inputs), weights)  # type: ignore[arg-type]
        alone = [torch.autograd.grad(fused_logits(fused, x).square().sum(), weights) for x in inputs]
    for total, *parts in zip(together, *alone, strict=True):
        torch.testing.assert_close(total, sum(parts))


def test_without_gradients_the_logits_are_the_same(tiny_folder: Path) -> None:
    inputs = collate(BATCHES["a common prefix"][1])
    with tuned(create(FUSED["Llama"]), TUNED["all layers"], tiny_folder) as model:
        fused = created(model)
        logits = fused_logits(fused, inputs)
        with torch.no_grad():
            without = fused_logits(fused, inputs)
    assert torch.equal(without, logits)
    assert not without.requires_grad


def test_a_second_backward_pass_is_an_error(tiny_folder: Path) -> None:
    with tuned(create(FUSED["Llama"]), TUNED["all layers"], tiny_folder) as model:
        loss = fused_logits(created(model), collate(BATCHES["one row"][1])).sum()
        loss.backward(retain_graph=True)
        with pytest.raises(RuntimeError, match="ran twice"):
            loss.backward()


def test_nan_reaches_the_loss_and_the_gradients(tiny_folder: Path) -> None:
    with tuned(create(FUSED["Llama"]), TUNED["all layers"], tiny_folder) as model:
        fused = created(model)
        with torch.no_grad():
            next(weight for weight in model.parameters() if weight.requires_grad)[0, 0] = torch.nan
        _, loss, gradients = differentiated(model, partial(fused_logits, fused), "one row", torch.float32)
    assert loss.isnan()
    assert all(gradient.isnan().any() for gradient in gradients.values())


@pytest.mark.parametrize(
    "config",
    [
        *(ADAPTERS[name] for name in ("DoRA", "LoRA of the output embeddings", "embeddings", "IA3", "prefix")),
        *ON_OTHER_MODULES.values(),
        LoraConfig(**LORA, target_modules=ATTENTION, lora_dropout=0.1),
        LoraConfig(**LORA, target_modules=ATTENTION, bias="lora_only"),
        LoraConfig(**LORA, target_modules=["q_proj"], lora_bias=True),
        None,
    ],
)
def test_other_methods_use_the_code_of_the_model(config: PeftConfig | None, tiny_folder: Path) -> None:
    with tuned(create(FUSED["Qwen 2, with bias"]), config, tiny_folder) as model:
        assert FusedTrainingDecoder.create(model, torch.float32) is None


@pytest.mark.parametrize("name", ["Qwen 3, normalized heads", *OTHERS])
def test_models_that_compute_otherwise_use_their_own_code(name: str, tiny_folder: Path) -> None:
    config = LoraConfig(**LORA, target_modules="all-linear", fan_in_fan_out=name.startswith("plain heads"))
    with tuned(create((FUSED | OTHERS)[name]), config, tiny_folder) as model:
        assert FusedTrainingDecoder.create(model, torch.float32) is None


@pytest.fixture
def no_kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], None]]:
    def turn_off() -> None:
        monkeypatch.setenv("LMPIPE_KERNELS", "0")
        kernels.cache_clear()

    yield turn_off
    monkeypatch.undo()
    kernels.cache_clear()


def test_without_kernels_the_code_of_the_model_is_used(no_kernels: Callable[[], None], tiny_folder: Path) -> None:
    with tuned(create(FUSED["Llama"]), TUNED["all layers"], tiny_folder) as model:
        assert FusedTrainingDecoder.create(model, torch.float32) is not None
        no_kernels()
        assert not has_kernels()
        assert FusedTrainingDecoder.create(model, torch.float32) is None


def losses_and_calls(folder: Path, store: RunStore, **settings: object) -> tuple[list[float], int]:
    """Trains, and returns all losses and how often the model's own code computed logits."""
    lm = LocalLM.from_pretrained(str(folder), name="tiny")
    calls: list[None] = []
    lm.model.register_forward_pre_hook(lambda module, args: calls.append(None))
    settings = {"learning_rate": 2e-3, "bf16": False, "epochs": 6} | settings
    result = trainer(lm, **settings).train(ROWS, BASE, Session(lm=lm, store=store))
    return [*result.losses, *result.eval_losses], len(calls)


@pytest.mark.parametrize("eval_fraction", [0.0, 0.25])
def test_a_training_has_the_losses_of_one_without_kernels(
    eval_fraction: float, no_kernels: Callable[[], None], tmp_path: Path
) -> None:
    folder = tiny_llama(tmp_path / "model", hidden_size=128)
    with RunStore(tmp_path / "1") as store, RunStore(tmp_path / "2") as other:
        losses, calls = losses_and_calls(folder, store, eval_fraction=eval_fraction)
        assert calls == 1  # the comparison of both passes
        no_kernels()
        expected, calls = losses_and_calls(folder, other, eval_fraction=eval_fraction)
    assert calls > 1
    assert losses == pytest.approx(expected, rel=1e-3)


def test_gradient_checkpointing_uses_the_code_of_the_model(tmp_path: Path, store: RunStore) -> None:
    folder = tiny_llama(tmp_path / "model", hidden_size=128)
    _, calls = losses_and_calls(folder, store, gradient_checkpointing=True, epochs=1)
    assert calls > 1


def test_an_interrupted_training_ends_in_the_same_bytes(tmp_path: Path) -> None:
    folder, adapters = tiny_llama(tmp_path / "model", hidden_size=128), []
    for name, show in (("one", Interrupting()), ("two", Interrupting(5)), ("two", Interrupting())):
        lm = LocalLM.from_pretrained(str(folder), name="tiny")
        tuner = trainer(lm, epochs=8, checkpoint_steps=2)
        with RunStore(tmp_path / name) as store, suppress(KeyboardInterrupt):
            adapters.append(tuner.train(ROWS, BASE, Session(lm=lm, store=store, progress=show)).weights.adapter)
    assert show.advances[0] == 4
    assert adapters[0] == adapters[1]
