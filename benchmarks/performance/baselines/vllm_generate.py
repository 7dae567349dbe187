"""vLLM in this process, with its prefix cache: ``python vllm_generate.py MODEL WORKLOAD DTYPE``."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from time import perf_counter, process_time

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # all work in this process, whose CPU time is measured
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "4")

from vllm import LLM, SamplingParams, TokensPrompt


def main(folder: str, path: str, dtype: str) -> None:
    """Prints CPU seconds, seconds and the new tokens."""
    workload = json.loads(Path(path).read_text())
    engine = LLM(folder, dtype=dtype, max_model_len=2048, enable_prefix_caching=True, generation_config="vllm")
    sampling = SamplingParams(temperature=0, max_tokens=workload["new_tokens"], ignore_eos=True)
    engine.generate([TokensPrompt(prompt_token_ids=[1, 2, 3])], sampling, use_tqdm=False)  # compiles kernels
    started, clock = process_time(), perf_counter()
    prompts = [TokensPrompt(prompt_token_ids=prompt) for prompt in workload["prompts"]]
    answers = engine.generate(prompts, sampling, use_tqdm=False)
    seconds, wall = process_time() - started, perf_counter() - clock
    print(
        json.dumps(
            {
                "cpu_seconds": seconds,
                "seconds": wall,
                "tokens": [list(answer.outputs[0].token_ids) for answer in answers],
            }
        )
    )


if __name__ == "__main__":
    main(*sys.argv[1:4])
