"""Products in int8: close to those in float32, the same in every batch, and only in inference."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lmpipe import TuningConfig
from lmpipe.engines import load_lm
from lmpipe.engines.int8_linear import Int8Linear
from lmpipe.engines.local import LocalLM
from lmpipe.engines.local.adapters import swapped_parameters
from lmpipe.engines.precision import multiplies_int8
from lmpipe.engines.training import LocalTrainer
from lmpipe.errors import ConfigError

needs_int8_products = pytest.mark.skipif(not multiplies_int8(), reason="this processor does not multiply int8")


@pytest.fixture
def layer() -> torch.nn.Linear:
    torch.manual_seed(0)
    return torch.nn.Linear(96, 40)


@needs_int8_products
@torch.inference_mode()
def test_products_differ_from_those_in_float32_by_the_rounding(layer: torch.nn.Linear) -> None:
    x = torch.randn(3, 5, 96, generator=torch.Generator().manual_seed(1))
    x[0, 0] *= 1000  # a row's scale does not affect the others
    expected, product = layer(x), Int8Linear(layer)(x)
    half = Int8Linear(layer.bfloat16())(x.bfloat16())
    assert half.dtype == torch.bfloat16
    for rounded in (product, half.float()):
        errors = (rounded - expected).norm(dim=-1) / expected.norm(dim=-1)
        assert 0 < errors.max() < 0.02


@needs_int8_products
@torch.inference_mode()
def test_a_column_of_large_inputs_does_not_cost_the_others_their_precision(layer: torch.nn.Linear) -> None:
    x = torch.randn(20, 96, generator=torch.Generator().manual_seed(3))
    x[:, 7] *= 100
    expected = layer(x)
    unknown, known = (
        float((Int8Linear(layer, largest)(x) - expected).norm() / expected.norm())
        for largest in (None, x.abs().amax(0))
    )
    assert known < unknown / 2


@needs_int8_products
@torch.inference_mode()
def test_a_row_has_the_same_product_in_every_batch(layer: torch.nn.Linear) -> None:
    quantized = Int8Linear(layer)
    x = torch.randn(130, 96, generator=torch.Generator().manual_seed(2))
    together = quantized(x)
    assert all(torch.equal(quantized(x[number : number + 1])[0], together[number]) for number in (0, 64, 129))
    assert torch.equal(quantized(x[7:71]), together[7:71])


@needs_int8_products
@torch.inference_mode()
def test_a_row_of_zeros_gives_the_bias_and_nan_stays_nan(layer: torch.nn.Linear) -> None:
    x = torch.zeros(3, 96)
    x[1, 5], x[2, 6] = torch.nan, torch.inf
    product = Int8Linear(layer)(x)
    assert torch.equal(product[0], layer.bias)
    assert not product[1:].isfinite().any()


@needs_int8_products
def test_training_and_swapped_weights_are_not_rounded(layer: torch.nn.Linear) -> None:
    quantized = Int8Linear(layer)
    x = torch.randn(4, 96)
    assert torch.equal(quantized(x), layer(x))
    with torch.no_grad():
        assert torch.equal(quantized(x), layer(x))
    other = torch.randn(40, 96)
    with torch.inference_mode():
        rounded = quantized(x)
        with swapped_parameters(quantized, {"weight": other}):
            assert torch.equal(quantized(x), torch.nn.functional.linear(x, other, layer.bias))
        assert torch.equal(quantized(x), rounded)


@needs_int8_products
def test_the_last_layer_is_not_quantized(tiny_folder: Path) -> None:
    model = LocalLM.from_pretrained(str(tiny_folder), quantization="int8-dynamic").model
    kinds = {name: type(module) for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    assert kinds.pop("lm_head") is torch.nn.Linear
    assert set(kinds.values()) == {Int8Linear}


@needs_int8_products
def test_trainings_that_need_another_base_are_refused(tiny_folder: Path) -> None:
    lm = LocalLM.from_pretrained(str(tiny_folder), quantization="int8-dynamic")
    with pytest.raises(ConfigError, match="qlora needs a base in 4 bits"):
        LocalTrainer(lm, TuningConfig(method="qlora"))
    with pytest.raises(ConfigError, match="full fine-tuning is not possible on a quantized base"):
        LocalTrainer(lm, TuningConfig(method="full"))


def test_processors_without_products_of_int8_are_refused(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lmpipe.engines.local.models.multiplies_int8", lambda: False)
    with pytest.raises(ConfigError, match=r"does not multiply int8 in hardware; write .*'nf4', or leave it out"):
        load_lm(f"hf:{tiny_folder}", quantization="int8-dynamic")
