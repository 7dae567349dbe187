"""DSPy's ``p -> w -> p`` on Iris: ``python dspy_iris.py MODEL WORKLOAD``.

DSPy 3.4.1 needs some changes for a fair comparison, and for the run to finish:

- ``BootstrapFewShotWithRandomSearch`` resets the LMs of its candidates, which then run on the globally configured LM.
  After fine-tuning, that LM is the base and not the tuned model. `SearchOnOwnLM` configures the student's own LM while
  the search runs.
- A completion that cannot be parsed ends a fine-tuning stage: ``bootstrap_trace_data`` divides two lists, or keeps the
  failed run as a success, since its score −1 is true. The program here answers None instead, which scores 0.
- Ten such completions end an evaluation by default; answering None prevents that too.
- DSPy deep-copies programs with their LMs, weights included. The engine returns itself when it is deep-copied.
- DSPy asks again in JSON if a completion cannot be parsed, which this LM does not write either. This is switched off,
  which saves DSPy calls.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from time import perf_counter, process_time
from typing import Any, Literal, final

import dspy
from dspy.teleprompt import BetterTogether, BootstrapFewShotWithRandomSearch, BootstrapFinetune
from dspy.utils.exceptions import AdapterParseError
from dspy_local import BASE, LocalEngine, LocalProvider, log


class ClassifyIris(dspy.Signature):
    """Predict the species of the iris from its measurements in centimetres."""

    petal_length: float = dspy.InputField()
    petal_width: float = dspy.InputField()
    sepal_length: float = dspy.InputField()
    sepal_width: float = dspy.InputField()
    answer: Literal["setosa", "versicolor", "virginica"] = dspy.OutputField()


@final
class Iris(dspy.Module):
    """Measurements of a flower → ``answer``, or None if the completion could not be parsed."""

    def __init__(self) -> None:
        super().__init__()
        self.classify = dspy.ChainOfThought(ClassifyIris)

    def forward(self, **measurements: float) -> dspy.Prediction:
        try:
            return self.classify(**measurements)
        except AdapterParseError:
            return dspy.Prediction(answer=None)


@final
class SearchOnOwnLM(BootstrapFewShotWithRandomSearch):
    """The random search, run on the student's own LM."""

    def compile(self, student: Any, *, teacher: Any = None, trainset: Any, valset: Any = None) -> Any:
        with dspy.context(lm=student.predictors()[0].lm):
            best = super().compile(student, teacher=teacher, trainset=trainset, valset=valset)
        log(f"search: {[(tried['seed'], tried['score']) for tried in best.candidate_programs]}")
        return best


def exact_match(example: Any, prediction: Any, trace: Any = None) -> bool:
    """Whether the species is correct."""
    return bool(example.answer == prediction.answer)


def examples(rows: list[dict[str, Any]]) -> list[Any]:
    """Converts the workload's examples into DSPy's."""
    return [dspy.Example(**row["inputs"], **row["labels"]).with_inputs(*row["inputs"]) for row in rows]


def main(folder: str, path: str) -> None:
    """Prints seconds, calls, and accuracy on the test examples."""
    workload = json.loads(Path(path).read_text())
    train, val, test, few_train, few_val = (
        examples(workload[name]) for name in ("train", "val", "test", "search_train", "search_val")
    )
    threads, seed = workload["batch"], workload["seed"]
    engine = LocalEngine(folder, threads)
    provider = LocalProvider(engine, workload["tuning"], seed)
    lm = dspy.LM(
        BASE,
        engine=engine,
        provider=provider,
        cache=False,
        num_retries=0,
        temperature=0.0,
        max_tokens=workload["max_tokens"],
    )
    dspy.configure(lm=lm, adapter=dspy.ChatAdapter(use_json_adapter_fallback=False), disable_history=True)
    program = Iris()
    program.set_lm(lm)
    search = SearchOnOwnLM(
        exact_match,
        max_bootstrapped_demos=workload["max_bootstrapped_demos"],
        max_labeled_demos=workload["max_labeled_demos"],
        num_candidate_programs=workload["num_candidate_programs"],
        num_threads=threads,
    )
    tuning = BootstrapFinetune(exact_match, exclude_demos=True, num_threads=threads)
    started, clock = process_time(), perf_counter()
    best = BetterTogether(exact_match, p=search, w=tuning).compile(
        program,
        trainset=train,
        valset=val,
        num_threads=threads,
        seed=seed,
        strategy="p -> w -> p",
        optimizer_compile_args={"p": {"trainset": few_train, "valset": few_val}},
    )
    stages = [[tried["strategy"] or "vanilla", tried["score"]] for tried in best.candidate_programs]
    log(f"stages, the best first: {stages}")
    scored = dspy.Evaluate(devset=test, metric=exact_match, num_threads=threads)(best)
    print(
        json.dumps(
            {
                "cpu_seconds": process_time() - started,
                "seconds": perf_counter() - clock,
                "calls": sum(engine.calls.values()),
                "calls_of": engine.calls,
                "tokens": engine.tokens,
                "test": scored.score / 100,
                "stages": stages,
                "jobs": provider.jobs,
                "failed": best.flag_compilation_error_occurred,
                "version": dspy.__version__,
            }
        )
    )


if __name__ == "__main__":
    main(*sys.argv[1:3])
