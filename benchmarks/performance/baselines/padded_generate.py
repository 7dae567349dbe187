"""transformers' own ``generate`` on padded batches: ``padded_generate.py MODEL WORKLOAD DTYPE BATCH [REQUESTS]``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from time import process_time

import torch
from transformers import AutoModelForCausalLM


def main(folder: str, path: str, dtype: str, batch: int, requests: int | None = None) -> None:
    """Prints CPU seconds and the new tokens."""
    workload = json.loads(Path(path).read_text())
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
    model.generation_config.eos_token_id = None
    prompts, new = workload["prompts"][:requests], workload["new_tokens"]
    tokens: list[list[int]] = []
    started = process_time()
    for first in range(0, len(prompts), batch):
        rows = prompts[first : first + batch]
        width = max(map(len, rows))
        ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        out = model.generate(ids, attention_mask=mask, max_new_tokens=new, do_sample=False, pad_token_id=0)
        tokens += out[:, width:].tolist()
    print(json.dumps({"cpu_seconds": process_time() - started, "tokens": tokens}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]), int(sys.argv[5]) if len(sys.argv) > 5 else None)
