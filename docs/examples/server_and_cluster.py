"""A server and a cluster.

This script scores a program on an OpenAI-compatible server, such as the one that ``vllm serve Qwen/Qwen3-8B`` starts.
Up to ``--max-concurrency`` calls are under way at one time, and the server batches them.

    python server_and_cluster.py --model Qwen/Qwen3-8B --url http://localhost:8000/v1

A benchmark on a cluster needs no code: one command in the checkout runs every stage of every seed as a task of Ray.
``ray start --head --port=6379`` on one machine and ``ray start --address=HEAD:6379`` on the others come before it:

    python -m benchmarks.gsm8k --data DIR --lm openai:Qwen/Qwen3-8B@http://localhost:8000/v1 \\
      --strategy vanilla --strategy p --seeds 0,1,2 --out runs/gsm8k --ray HEAD:6379
"""

from __future__ import annotations

import argparse

from lmpipe import Example, Predict, Sampling, Session, evaluate, exact_match, load_lm

CAPITALS = {"France": "Paris", "Austria": "Vienna", "Italy": "Rome", "Spain": "Madrid", "Norway": "Oslo"}


def main() -> None:
    """Scores a program of one call on the server."""
    parser = argparse.ArgumentParser(description="Score a program on an OpenAI-compatible server.")
    parser.add_argument("--url", required=True, help="base URL of the server, or several with commas between them")
    parser.add_argument("--model", required=True, help="name of the model, as the server knows it")
    parser.add_argument("--max-concurrency", type=int, default=64, help="most calls under way at one time")
    options = parser.parse_args()

    lm = load_lm(f"openai:{options.model}@{options.url}")
    session = Session(lm=lm, sampling=Sampling(max_tokens=32), max_concurrency=options.max_concurrency)
    program = Predict("country -> answer")
    examples = [Example({"country": country}, {"answer": capital}) for country, capital in CAPITALS.items()]
    evaluation = evaluate(program, examples, exact_match, session)
    print(f"accuracy {evaluation.mean:.2f} on {len(examples)} questions; failed runs: {dict(evaluation.failures)}")
    print(f"{session.ledger.total.lm_calls} LM calls")


if __name__ == "__main__":
    main()
