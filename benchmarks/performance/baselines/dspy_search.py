"""DSPy's random search with an LM that answers at once: ``python dspy_search.py MODEL WORKLOAD``; MODEL is not read.

DSPy is set up to be fast: no cache, no history, no checks of input types, an LM class of its own, and the number of
threads that the workload names.
"""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path
from time import perf_counter, process_time
from types import SimpleNamespace
from typing import Any, final

import dspy
from dspy.teleprompt import BootstrapFewShotWithRandomSearch


@final
class Instant(dspy.BaseLM):
    """Answers every request with the same text.

    DSPy calls this kind of LM old; its new engines take a fifth more time.

    Args:
        text: The text.
    """

    calls = itertools.count()

    def __init__(self, text: str) -> None:
        super().__init__("instant", cache=False)
        choice = SimpleNamespace(message=SimpleNamespace(content=text), finish_reason="stop")
        self.response = SimpleNamespace(choices=[choice], usage={}, model="instant")

    def forward(self, prompt: str | None = None, messages: Any = None, **options: Any) -> SimpleNamespace:
        next(self.calls)
        return self.response


@final
class ThreeModules(dspy.Module):
    """Two modules that write a query and one that answers, as in lmpipe's benchmark."""

    def __init__(self) -> None:
        super().__init__()
        self.hops = [dspy.ChainOfThought("context: list[str], question -> query") for _ in range(2)]
        self.answer = dspy.ChainOfThought("context: list[str], question -> answer")

    def forward(self, question: str) -> dspy.Prediction:
        context: list[str] = []
        for hop in self.hops:
            context.append(hop(context=context, question=question).query)
        return self.answer(context=context, question=question)


def exact_match(example: Any, prediction: Any, trace: Any = None) -> bool:
    """Whether the answer is correct."""
    return bool(example.answer == prediction.answer)


def main(_: str, path: str) -> None:
    """Prints seconds, calls and scores."""
    workload = json.loads(Path(path).read_text())
    train, val = (
        [dspy.Example(**row["inputs"], **row["labels"]).with_inputs(*row["inputs"]) for row in workload[name]]
        for name in ("train", "val")
    )
    lines = [f"[[ ## {name} ## ]]\n{value}" for name, value in workload["reply"].items()]
    lm = Instant("\n\n".join([*lines, "[[ ## completed ## ]]"]))
    dspy.configure(lm=lm, adapter=dspy.ChatAdapter(), disable_history=True, warn_on_type_mismatch=False)
    search = BootstrapFewShotWithRandomSearch(
        exact_match,
        max_bootstrapped_demos=workload["max_bootstrapped_demos"],
        max_labeled_demos=workload["max_labeled_demos"],
        num_candidate_programs=workload["num_candidate_programs"],
        num_threads=workload["threads"],
    )
    started, clock = process_time(), perf_counter()
    best = search.compile(ThreeModules(), trainset=train, valset=val)
    print(
        json.dumps(
            {
                "cpu_seconds": process_time() - started,
                "seconds": perf_counter() - clock,
                "calls": next(lm.calls),
                "scores": [tried["score"] for tried in best.candidate_programs],
            }
        )
    )


if __name__ == "__main__":
    main(*sys.argv[1:3])
