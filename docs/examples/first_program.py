"""A first program.

It makes two LM calls, one that summarizes a review and one that judges the summary, and a metric scores the judgement.
The small LM that comes with lmpipe is often wrong; ``--lm hf:Qwen/Qwen3-0.6B`` or
``--lm openai:MODEL@http://localhost:8000/v1`` runs the same program on a better one.

    python first_program.py
"""

from __future__ import annotations

import argparse
from typing import Literal

from lmpipe import (
    Example,
    Input,
    Module,
    Output,
    Predict,
    Prediction,
    Sampling,
    Session,
    evaluate,
    exact_match,
    load_lm,
)


class Judge:
    """Decide whether the writer of the summary liked the film."""

    summary: str = Input()
    answer: Literal["yes", "no"] = Output()


class Sentiment(Module):
    """A review → ``answer``, whether its writer liked the film."""

    def __init__(self) -> None:
        self.summarize = Predict("review -> summary")
        self.judge = Predict(Judge)

    def forward(self, review: str) -> Prediction:
        return self.judge(summary=self.summarize(review=review).summary)


REVIEWS = {
    "A joy from start to end. I laughed, I cried, and I went again the next day.": "yes",
    "I fell asleep after ten minutes and regret that I woke up before the end.": "no",
    "Superb acting, and not one scene too many.": "yes",
    "Two hours of my life that I will never get back.": "no",
}


def main() -> None:
    """Runs the program on one review and then scores it on all of them."""
    parser = argparse.ArgumentParser(description="Run and score a program of two LM calls.")
    parser.add_argument("--lm", default="bundled", help="the LM to run on, in the form that load_lm reads")
    session = Session(lm=load_lm(parser.parse_args().lm), sampling=Sampling(max_tokens=32), structured=True)
    program = Sentiment()

    with session:  # a call inside a session runs on its LM
        print(program(review="I would watch it again tonight."))

    examples = [Example({"review": review}, {"answer": answer}) for review, answer in REVIEWS.items()]
    evaluation = evaluate(program, examples, exact_match, session)
    print(f"accuracy {evaluation.mean:.2f} on {len(examples)} reviews; failed runs: {dict(evaluation.failures)}")


if __name__ == "__main__":
    main()
