"""Every kind of decoder in transformers runs unchanged, with the same tokens as from its own generate()."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma2Config,
    GPT2Config,
    GptOssConfig,
    MistralConfig,
    PretrainedConfig,
    Qwen3Config,
)

from lmpipe.engines.local import LocalLM
from lmpipe.engines.local.sampling import SequenceState
from lmpipe.errors import ConfigError
from lmpipe.lm import Sampling

SMALL: dict[str, Any] = {
    "vocab_size": 261,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "initializer_range": 0.4,
    "pad_token_id": 257,
    "bos_token_id": None,
    "eos_token_id": 256,
}
CONFIGS: dict[str, PretrainedConfig] = {
    "plain heads, learned positions": GPT2Config(
        vocab_size=261, n_embd=32, n_layer=2, n_head=4, n_positions=512, initializer_range=0.4, eos_token_id=256
    ),
    "grouped heads, normalised": Qwen3Config(**SMALL),
    "sliding window": MistralConfig(**SMALL, sliding_window=24),
    "sliding window, bounded scores": Gemma2Config(
        **SMALL, sliding_window=24, attn_logit_softcapping=5.0, query_pre_attn_scalar=8
    ),
    "sinks, experts": GptOssConfig(**SMALL, sliding_window=24, num_local_experts=4, num_experts_per_tok=2),
}


def prompts() -> list[tuple[int, ...]]:
    """Returns prompts that share a long prefix, some of them equal, and prompts that share nothing."""
    generator = torch.Generator().manual_seed(0)

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(0, 250, (count,), generator=generator).tolist())

    first, second = tokens(70), tokens(40)
    sharing = [first + tokens(5), first + second + tokens(3), first + second + tokens(30), first + tokens(1)]
    return [*sharing, sharing[1], tokens(60), tokens(2), *(second + tokens(20) for _ in range(3))]


def greedy_tokens(model: Any) -> list[list[int]]:
    """Returns the tokens that transformers' own generate() adds to each prompt."""
    tokens = []
    for prompt in prompts():
        out = model.eval().generate(torch.tensor([prompt]), max_new_tokens=40, do_sample=False, pad_token_id=257)
        tokens.append([token for token in out[0, len(prompt) :].tolist() if token != 256])
    return tokens


@pytest.mark.parametrize("name", CONFIGS)
def test_greedy_tokens_are_those_of_transformers_generate(name: str, tiny_folder: Path) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name])
    expected = greedy_tokens(model)
    lm = LocalLM(model, AutoTokenizer.from_pretrained(tiny_folder), "tiny", max_cached_answers=0)
    sequences = [SequenceState(prompt, Sampling(max_tokens=40)) for prompt in prompts()]
    lm.generate(sequences)
    assert [sequence.tokens for sequence in sequences] == expected


def test_a_model_with_recurrent_state_is_refused(tiny_folder: Path) -> None:
    config = AutoConfig.for_model("mamba", vocab_size=261, hidden_size=32, num_hidden_layers=2)
    with pytest.raises(ConfigError, match=r"linear_attention\) cannot run in this process; run it on a server"):
        LocalLM(AutoModelForCausalLM.from_config(config), AutoTokenizer.from_pretrained(tiny_folder), "mamba")
