"""Demonstrations: where they come from and how they are drawn.

Labelled demos are training examples as they are; bootstrapped demos are a program's own successful calls. Knows
nothing of who makes the runs, or of search.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

from lmpipe import Demo, Example, Module, Predict, ProgramState, Trace, predictors

Pool = Mapping[str, Sequence[tuple[str, Demo]]]
"""Module path → (example id, demo) pairs."""


def labelled_pool(
    program: Module, examples: Sequence[Example], *, partial: bool = False
) -> dict[str, list[tuple[str, Demo]]]:
    """Demos from labels, for the predictors whose inputs and required outputs an example holds.

    A module in the middle of a program, whose outputs nobody labelled, gets none.

    Args:
        program: Whose predictors they are for.
        examples: What they are made of.
        partial: Whether some of the inputs suffice; a demo then lacks the others, such as what was retrieved.
    """
    pool: dict[str, list[tuple[str, Demo]]] = {}
    for path, predictor in predictors(program).items():
        found = [(example.id, _labelled(predictor, example, partial)) for example in examples]
        pool[path] = [(name, demo) for name, demo in found if demo is not None]
    return pool


def _labelled(predictor: Predict, example: Example, partial: bool) -> Demo | None:
    known: dict[str, Any] = {**example.inputs, **example.labels}
    wanted = [field.name for field in predictor.signature.inputs]
    inputs = [name for name in wanted if name in known]
    outputs = [field.name for field in predictor.signature.outputs if not field.optional or field.name in known]
    if not all(name in known for name in outputs) or (inputs != wanted and not (partial and inputs)):
        return None
    return Demo(inputs={name: known[name] for name in inputs}, outputs={name: known[name] for name in outputs})


def trace_pool(traces: Sequence[Trace], seed: int) -> dict[str, list[tuple[str, Demo]]]:
    """Demos from the steps of successful traces: one for each module and example, drawn where a module ran often."""
    steps: dict[tuple[str, str], list[Demo]] = {}
    for trace in traces:
        for step in trace.lm_steps:
            if step.outputs is not None:
                steps.setdefault((step.path, trace.example.id), []).append(
                    Demo(inputs=step.inputs, outputs=step.outputs)
                )
    pool: dict[str, list[tuple[str, Demo]]] = {}
    rng = random.Random(seed)
    for (path, example), demos in steps.items():
        pool.setdefault(path, []).append((example, rng.choice(demos)))
    return pool


def with_demos(state: ProgramState, demos: Mapping[str, Sequence[Demo]]) -> ProgramState:
    """The state with these demos in place of its own, all of them shown, instructions kept."""
    return state.with_prompts(
        {
            path: prompt.model_copy(update={"demos": tuple(demos.get(path, ())), "nearest": None})
            for path, prompt in state.prompts.items()
        }
    )


def draw(
    pool: Pool, count: int, rng: random.Random | None, taken: Mapping[str, set[str]] | None = None
) -> dict[str, list[tuple[str, Demo]]]:
    """Up to `count` demos for each module, of examples that are not taken; the first ones if there is no `rng`."""
    drawn = {}
    for path, pairs in pool.items():
        free = [pair for pair in pairs if pair[0] not in (taken or {}).get(path, ())]
        drawn[path] = rng.sample(free, min(count, len(free))) if rng else free[:count]
    return drawn


def redraw(state: ProgramState, pool: Pool, rng: random.Random) -> dict[str, list[tuple[str, Demo]]]:
    """As many demos of the pool for each module as its prompt has now."""
    drawn: dict[str, list[tuple[str, Demo]]] = {}
    for path, prompt in state.prompts.items():
        drawn.update(draw({path: pool.get(path, ())}, len(prompt.demos), rng))
    return drawn


def prompted(state: ProgramState, demos: Pool, example: str) -> ProgramState:
    """The state with these demos, but none made of the example itself; modules without any keep their own."""
    shown = {path: tuple(demo for name, demo in pairs if name != example) for path, pairs in demos.items() if pairs}
    return state.with_prompts(
        {path: state.prompts[path].model_copy(update={"demos": own}) for path, own in shown.items()}
    )
