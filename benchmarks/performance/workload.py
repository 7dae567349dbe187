"""The workload of the engine benchmarks, and the minimum number of operations that it needs."""

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
    """Prompts that share a beginning, as those of a few-shot program do, and rows to train on.

    Attributes:
        prefix: Number of first tokens that the prompts share.
        prompts: Token ids of each prompt.
        new_tokens: Number of tokens that are generated greedily for each prompt; none of them ends a completion.
        rows: Token ids of each row to train on, of mixed length.
        trained: Number of last tokens of each row whose loss counts.
    """

    prefix: int
    prompts: list[list[int]]
    new_tokens: int
    rows: list[list[int]]
    trained: list[int]

    def write(self, path: Path) -> Path:
        """Writes the workload as JSON, for baselines that run in environments of their own."""
        path.write_text(json.dumps(asdict(self)))
        return path


def make_workload(
    tokenizer: Any, *, requests: int = 64, prefix: int = 600, suffix: int = 60, new_tokens: int = 64, rows: int = 32
) -> Workload:
    """Makes a workload of random words, the same every time.

    Args:
        tokenizer: Tokenizer of the LM.
        requests: Number of prompts.
        prefix: Number of tokens that the prompts share.
        suffix: Number of further tokens of each prompt.
        new_tokens: Number of tokens to generate for each prompt.
        rows: Number of rows to train on; a row has 50 to 460 tokens, of which the last 10 to 60 are trained.
    """
    rng, words = random.Random(0), _TEXT.split()

    def tokens(count: int, start: str = "") -> list[int]:
        text = start + " ".join(rng.choice(words) for _ in range(count))
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])[:count]

    shared = tokens(prefix)
    trained = [rng.randint(10, 60) for _ in range(rows)]
    return Workload(
        prefix,
        [shared + tokens(suffix, f" {number} ") for number in range(requests)],
        new_tokens,
        [tokens(rng.randint(40, 400) + last, f"{number} ") for number, last in enumerate(trained)],
        trained,
    )


def generation_flops(model: Any, workload: Workload) -> dict[str, float]:
    """Returns the operations of a generation that computes the shared prefix once; a product and a sum count as two."""
    config = model.config
    linear, head = _sizes(model)
    wide = int(config.hidden_size * config.num_hidden_layers)
    lengths = [len(prompt) - workload.prefix for prompt in workload.prompts]
    steps = workload.new_tokens - 1  # the last new token is not fed back

    def attention(queries: float, keys: float) -> float:
        return 4.0 * wide * queries * keys

    prefix = 2 * linear * workload.prefix + attention(workload.prefix, workload.prefix / 2)
    suffixes = sum(2 * linear * n + attention(n, workload.prefix + n / 2) + 2 * head for n in lengths)
    decode = sum(steps * (2 * linear + 2 * head) + attention(steps, workload.prefix + n + steps / 2) for n in lengths)
    return {"prefix": prefix, "suffixes": suffixes, "decode": decode}


def training_flops(model: Any, workload: Workload) -> float:
    """Returns the operations of one pass over the rows, forward and backward, with frozen base weights.

    The adapter's own operations are not counted.
    """
    config = model.config
    linear, head = _sizes(model)
    wide = int(config.hidden_size * config.num_hidden_layers)
    total = 0.0
    for row, trained in zip(workload.rows, workload.trained, strict=True):
        forward = 2 * linear * len(row) + 4 * wide * len(row) ** 2 / 2
        backward = 2 * linear * len(row) + 8 * wide * len(row) ** 2 / 2
        total += forward + backward + 4 * head * trained
    return total


def _sizes(model: Any) -> tuple[int, int]:
    """Returns the number of weights in all linear layers but the last, and in the last, which computes the logits."""
    head = model.get_output_embeddings().weight.numel()
    inner = sum(parameter.numel() for parameter in model.parameters() if parameter.dim() == 2)
    return inner - model.get_input_embeddings().weight.numel() - (0 if model.config.tie_word_embeddings else head), head
