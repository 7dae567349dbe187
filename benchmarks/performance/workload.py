"""What the engine benchmarks compute, and the arithmetic that nobody can avoid."""

from __future__ import annotations

import json
import random
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, final

_TEXT = """the of river city and a species was found in long narrow valley near old stone bridge where people met every
summer to trade cloth salt iron music"""


@final
@dataclass(frozen=True)
class Workload:
    """Prompts that share a beginning, as those of a few-shot program do; and rows to train on.

    Attributes:
        prefix: How many first tokens the prompts share.
        prompts: Token ids.
        new_tokens: How many tokens each prompt is continued by, greedily, whatever they are.
        rows: Token ids of rows to train on, of mixed length.
        trained: How many last tokens of each row carry the loss.
    """

    prefix: int
    prompts: list[list[int]]
    new_tokens: int
    rows: list[list[int]]
    trained: list[int]

    def write(self, path: Path) -> Path:
        """As JSON, for peers that run in environments of their own."""
        path.write_text(json.dumps(asdict(self)))
        return path


def make_workload(
    tokenizer: Any, *, requests: int = 64, prefix: int = 600, own: int = 60, new_tokens: int = 64, rows: int = 32
) -> Workload:
    """Random words, the same every time.

    Args:
        tokenizer: Of the LM.
        requests: How many prompts.
        prefix: Tokens that they share.
        own: Further tokens of each.
        new_tokens: Tokens to generate for each.
        rows: How many rows to train on: 50 to 460 tokens, of which the last 10 to 60 are trained.
    """
    rng, words = random.Random(0), _TEXT.split()

    def tokens(count: int, start: str = "") -> list[int]:
        text = start + " ".join(rng.choice(words) for _ in range(count))
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])[:count]

    shared = tokens(prefix)
    trained = [rng.randint(10, 60) for _ in range(rows)]
    return Workload(
        prefix,
        [shared + tokens(own, f" {number} ") for number in range(requests)],
        new_tokens,
        [tokens(rng.randint(40, 400) + last, f"{number} ") for number, last in enumerate(trained)],
        trained,
    )


def generation_flops(model: Any, work: Workload) -> dict[str, float]:
    """Operations of a generation in which the shared prefix is computed once: a product and a sum count as two."""
    config = model.config
    linear, head = _sizes(model)
    wide = int(config.hidden_size * config.num_hidden_layers)
    own = [len(prompt) - work.prefix for prompt in work.prompts]
    steps = work.new_tokens - 1  # the last new token is never read

    def attention(queries: float, keys: float) -> float:
        return 4.0 * wide * queries * keys

    prefix = 2 * linear * work.prefix + attention(work.prefix, work.prefix / 2)
    suffixes = sum(2 * linear * n + attention(n, work.prefix + n / 2) + 2 * head for n in own)
    decode = sum(steps * (2 * linear + 2 * head) + attention(steps, work.prefix + n + steps / 2) for n in own)
    return {"prefix": prefix, "suffixes": suffixes, "decode": decode}


def training_flops(model: Any, work: Workload) -> float:
    """Operations of one pass over the rows, backward pass included, with frozen base weights and a free adapter."""
    config = model.config
    linear, head = _sizes(model)
    wide = int(config.hidden_size * config.num_hidden_layers)
    total = 0.0
    for row, trained in zip(work.rows, work.trained, strict=True):
        forward = 2 * linear * len(row) + 4 * wide * len(row) ** 2 / 2
        backward = 2 * linear * len(row) + 8 * wide * len(row) ** 2 / 2
        total += forward + backward + 4 * head * trained
    return total


def _sizes(model: Any) -> tuple[int, int]:
    """Weights of all linear layers but the last, and of the last, which turns hidden states into logits."""
    head = model.get_output_embeddings().weight.numel()
    inner = sum(parameter.numel() for parameter in model.parameters() if parameter.dim() == 2)
    return inner - model.get_input_embeddings().weight.numel() - (0 if model.config.tie_word_embeddings else head), head
