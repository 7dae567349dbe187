"""The fused forward pass of decoders like Llama: which models it computes, and the same numbers as from other code."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftConfig, PeftModel, PrefixTuningConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma2Config,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    Ministral3Config,
    MistralConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)
from transformers.models.llama.modeling_llama import LlamaMLP

from lmpipe.engines import load_lm
from lmpipe.engines.kernels import has_kernels
from lmpipe.engines.kernels.library import kernels
from lmpipe.engines.local import LocalLM
from lmpipe.engines.local.sampling import SequenceState
from lmpipe.lm import Sampling
from tests.engines.test_architectures import SMALL, greedy_tokens, prompts

SIZES = SMALL | {"hidden_size": 64, "intermediate_size": 96, "head_dim": 32, "initializer_range": 0.2}
FUSED: dict[str, PretrainedConfig] = {
    "Llama": LlamaConfig(**SIZES),
    "Llama, one head a key head": LlamaConfig(**SIZES | {"num_key_value_heads": 4}),
    "Llama, scaled positions": LlamaConfig(
        **SIZES,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 1e4,
            "factor": 4.0,
            "original_max_position_embeddings": 64,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
        },
    ),
    "Qwen 2, with bias": Qwen2Config(**SIZES),
    "Qwen 3, normalized heads": Qwen3Config(**SIZES, tie_word_embeddings=True),
    "Mistral, full attention": MistralConfig(**SIZES, sliding_window=None),
}
OTHERS: dict[str, PretrainedConfig] = {
    "plain heads, learned positions": GPT2Config(
        vocab_size=261, n_embd=128, n_layer=2, n_head=4, n_positions=512, initializer_range=0.2, eos_token_id=256
    ),
    "Gemma 2": Gemma2Config(**SIZES, sliding_window=24, attn_logit_softcapping=5.0, query_pre_attn_scalar=8),
    "Granite, multipliers": GraniteConfig(
        **SIZES, attention_multiplier=0.1, embedding_multiplier=3.0, residual_multiplier=0.7, logits_scaling=2.0
    ),
    "Mistral, sliding window": MistralConfig(**SIZES, sliding_window=24),
    "Ministral 3, queries scaled by position": Ministral3Config(
        **SIZES,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 1e4,
            "original_max_position_embeddings": 40,
            "llama_4_scaling_beta": 2.0,
        },
    ),
}

TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.6}  # of log-probabilities


def create(config: PretrainedConfig, dtype: torch.dtype = torch.float32) -> Any:
    """Returns a model with random weights, none of which is a constant, so that each of them counts."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(deepcopy(config), dtype=dtype).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def load(model: Any, folder: Path) -> LocalLM:
    return LocalLM(model, AutoTokenizer.from_pretrained(folder), "tiny", max_cached_answers=0)


def is_fused(lm: LocalLM, adapter: str | None = None) -> bool:
    """Whether the engine computes tokens without transformers' forward pass."""
    calls: list[None] = []
    handle = lm.model.register_forward_pre_hook(lambda module, args: calls.append(None))
    lm.generate([SequenceState((1, 2, 3), Sampling(max_tokens=2))], adapter)
    handle.remove()
    return not calls


@pytest.fixture(params=["kernels", "no kernels"])
def kernel_setting(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    if request.param == "no kernels":
        monkeypatch.setenv("LMPIPE_KERNELS", "0")
        kernels.cache_clear()
    assert has_kernels() is (request.param == "kernels")
    yield request.param
    kernels.cache_clear()


@pytest.mark.parametrize("name", [*FUSED, *OTHERS])
def test_greedy_tokens_are_those_of_transformers_generate(name: str, kernel_setting: str, tiny_folder: Path) -> None:
    model = create((FUSED | OTHERS)[name])
    expected = greedy_tokens(model)
    lm = load(model, tiny_folder)
    sequences = [SequenceState(prompt, Sampling(max_tokens=40)) for prompt in prompts()]
    lm.generate(sequences)
    assert [sequence.tokens for sequence in sequences] == expected
    assert is_fused(lm) is (name in FUSED and kernel_setting == "kernels")


def assert_logprobs(lm: LocalLM, adapter: str | None, model: Any, tolerance: float) -> None:
    """Checks the log-probabilities of sampled tokens against a model's own forward pass."""
    sequences = [SequenceState(prompt, Sampling(1.0, max_tokens=8, logprobs=True), 1) for prompt in prompts()]
    lm.generate(sequences, adapter)
    for sequence in sequences:
        with torch.no_grad():
            logits = model(torch.tensor([[*sequence.prompt, *sequence.tokens]])).logits[0].float()
        completion = logits[len(sequence.prompt) - 1 : -1].log_softmax(-1)
        expected = completion.gather(-1, torch.tensor(sequence.tokens)[:, None])[:, 0]
        assert sequence.logprobs[: len(expected)] == pytest.approx(expected.tolist(), abs=tolerance)


@pytest.mark.parametrize("name", [*FUSED, *OTHERS])
def test_log_probabilities_in_bfloat16_are_those_of_the_model(name: str, tiny_folder: Path) -> None:
    config = (FUSED | OTHERS)[name]
    lm = load(create(config, torch.bfloat16), tiny_folder)
    assert is_fused(lm) is (name in FUSED)
    assert_logprobs(lm, None, create(config, torch.bfloat16), TOLERANCE[torch.bfloat16])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_bundled_lm_is_fused(dtype: str) -> None:
    assert is_fused(cast(LocalLM, load_lm("bundled", dtype=dtype)))


ATTENTION, MLP = ["q_proj", "k_proj", "v_proj", "o_proj"], ["gate_proj", "up_proj", "down_proj"]
LORA: dict[str, Any] = {"r": 4, "task_type": "CAUSAL_LM", "init_lora_weights": False}
ADAPTERS: dict[str, PeftConfig] = {
    "LoRA": LoraConfig(**LORA, target_modules=ATTENTION + MLP),
    "LoRA of some layers": LoraConfig(**LORA, target_modules=["q_proj", "v_proj", "up_proj"], layers_to_transform=[1]),
    "LoRA, rank-stabilized, with patterns": LoraConfig(
        **LORA,
        target_modules=ATTENTION + MLP,
        use_rslora=True,
        rank_pattern={"up_proj": 2},
        alpha_pattern={"k_proj": 3},
    ),
    "LoRA of the output embeddings": LoraConfig(**LORA, target_modules=["lm_head", "embed_tokens", "o_proj"]),
    "embeddings": LoraConfig(**LORA, target_modules=["o_proj"], modules_to_save=["embed_tokens", "lm_head"]),
    "DoRA": LoraConfig(**LORA, target_modules=ATTENTION + MLP, use_dora=True),
    "IA3": IA3Config(
        task_type="CAUSAL_LM",
        target_modules=["k_proj", "v_proj", "down_proj"],
        feedforward_modules=["down_proj"],
        init_ia3_weights=False,
    ),
    "prefix": PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5),
}
ON_OTHER_MODULES: dict[str, PeftConfig] = {
    "norms": LoraConfig(**LORA, target_modules=["q_proj"], modules_to_save=["input_layernorm", "norm"]),
    "whole MLPs": LoraConfig(**LORA, target_modules=["q_proj"], modules_to_save=["mlp"]),
}


def tune(config: PeftConfig, model: Any, seed: int, folder: Path) -> Path:
    """Saves an adapter with random weights."""
    torch.manual_seed(seed)
    peft = get_peft_model(model, config)
    with torch.no_grad():
        for parameter in peft.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    peft.save_pretrained(str(folder), save_embedding_layers=False)
    return folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [*ADAPTERS, *ON_OTHER_MODULES])
def test_adapters_in_turn_give_the_log_probabilities_of_peft(
    name: str, dtype: torch.dtype, tiny_folder: Path, tmp_path: Path
) -> None:
    base = FUSED["Qwen 2, with bias"]
    lm = load(create(base, dtype), tiny_folder)
    models: dict[str | None, Any] = {None: create(base, dtype)}
    for seed, adapter in enumerate("ab"):
        folder = tune((ADAPTERS | ON_OTHER_MODULES)[name], create(base, dtype), seed, tmp_path / adapter)
        models[adapter] = PeftModel.from_pretrained(create(base, dtype), str(folder)).eval()
        lm.register_adapter(adapter, folder)
    for adapter in ("a", "b", None, "a"):
        assert_logprobs(lm, adapter, models[adapter], TOLERANCE[dtype])
    assert is_fused(lm, "a") is (name in ADAPTERS)


def test_weights_of_a_whole_model_replace_those_of_the_base(tiny_folder: Path, tmp_path: Path) -> None:
    config = FUSED["Qwen 3, normalized heads"]
    lm, tuned = load(create(config), tiny_folder), create(config)
    for parameter in tuned.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    tuned.save_pretrained(tmp_path)
    lm.register_adapter("tuned", tmp_path)
    for adapter, model in (("tuned", tuned), (None, create(config)), ("tuned", tuned)):
        assert_logprobs(lm, adapter, model, TOLERANCE[torch.float32])
    assert is_fused(lm, "tuned")


class DoubledMLP(LlamaMLP):
    """An MLP with the modules of Llama's and another output."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


def test_a_model_that_only_looks_like_llama_runs_by_its_own_code(
    tiny_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = create(FUSED["Llama"])
    layer = model.model.layers[1]
    doubled = DoubledMLP(model.config)
    doubled.load_state_dict(layer.mlp.state_dict())
    layer.mlp = doubled.requires_grad_(False)
    expected = greedy_tokens(model)
    with caplog.at_level("INFO"):
        lm = load(model, tiny_folder)
    assert "LlamaForCausalLM looks like Llama, but computes otherwise" in caplog.text
    assert not is_fused(lm)
    sequences = [SequenceState(prompt, Sampling(max_tokens=40)) for prompt in prompts()]
    lm.generate(sequences)
    assert [sequence.tokens for sequence in sequences] == expected
