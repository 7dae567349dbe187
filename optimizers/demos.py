"""Pools of demonstrations, and random draws from them.

Labelled demos are training examples as they are; bootstrapped demos are a program's own successful calls. Knows
nothing about who runs the program, or about search.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

from lmpipe import Demo, Example, Module, Predict, ProgramState, Trace, predictors
from lmpipe.extend import digest_without_id


@final
@dataclass(frozen=True, slots=True)
class PooledDemo:
    """A demonstration that a prompt may show, and the examples that it comes from.

    Attributes:
        demo: The demonstration.
        sources: Digests (`digest_without_id`) of the examples that the demo comes from; their prompts must not show it.
    """

    demo: Demo
    sources: frozenset[str]


DemoPool = Mapping[str, Sequence[PooledDemo]]
"""Module path → its demonstrations, each once."""


def labelled_pool(
    program: Module, examples: Sequence[Example], *, partial: bool = False
) -> dict[str, list[PooledDemo]]:
    """Makes demos from labels, for each predictor whose inputs and required outputs an example contains.

    A module in the middle of a program gets no demos if its outputs are not labelled. Equal demos of several examples
    are in the pool once.

    Args:
        program: The program whose predictors show the demos.
        examples: The labelled examples.
        partial: Whether some of the inputs suffice; the demo then lacks the others, such as retrieved passages.
    """
    keyed = [(digest_without_id(example), example) for example in examples]
    return {
        path: _deduplicated((key, _labelled_demo(predictor, example, partial)) for key, example in keyed)
        for path, predictor in predictors(program).items()
    }


def _deduplicated(demos: Iterable[tuple[str, Demo | None]]) -> list[PooledDemo]:
    """Returns each demo once with all its sources, in order of first appearance."""
    sources: dict[Demo, set[str]] = {}
    for key, demo in demos:
        if demo is not None:
            sources.setdefault(demo, set()).add(key)
    return [PooledDemo(demo, frozenset(keys)) for demo, keys in sources.items()]


def _labelled_demo(predictor: Predict, example: Example, partial: bool) -> Demo | None:
    values: dict[str, Any] = {**example.inputs, **example.labels}
    required = [field.name for field in predictor.signature.inputs]
    inputs = [name for name in required if name in values]
    outputs = [field.name for field in predictor.signature.outputs if not field.optional or field.name in values]
    if not all(name in values for name in outputs) or (inputs != required and not (partial and inputs)):
        return None
    return Demo(inputs={name: values[name] for name in inputs}, outputs={name: values[name] for name in outputs})


def trace_pool(traces: Sequence[Trace], seed: int) -> dict[str, list[PooledDemo]]:
    """Makes one demo for each module and example from successful traces; one of several calls is drawn at random."""
    steps: dict[tuple[str, str], list[Demo]] = {}
    for trace in traces:
        key = digest_without_id(trace.example)
        for step in trace.lm_steps:
            if step.outputs is not None:
                steps.setdefault((step.path, key), []).append(Demo(inputs=step.inputs, outputs=step.outputs))
    drawn: dict[str, list[tuple[str, Demo]]] = {}
    rng = random.Random(seed)
    for (path, key), demos in steps.items():
        drawn.setdefault(path, []).append((key, rng.choice(demos)))
    return {path: _deduplicated(demos) for path, demos in drawn.items()}


def with_demos(state: ProgramState, demos: Mapping[str, Sequence[Demo]]) -> ProgramState:
    """Replaces the demos of all prompts. Each prompt shows all its new demos and keeps its instructions."""
    return state.with_prompts(
        {
            path: prompt.model_copy(update={"demos": tuple(demos.get(path, ())), "nearest": None})
            for path, prompt in state.prompts.items()
        }
    )


def draw_demos(
    pool: DemoPool, count: int, rng: random.Random | None, excluded: DemoPool | None = None
) -> dict[str, list[PooledDemo]]:
    """Draws up to `count` demos for each module.

    Args:
        pool: The demos to draw from.
        count: Maximum number of demos for each module.
        rng: Source of randomness; None takes the first demos.
        excluded: Demos that were already chosen; neither these nor other demos of their examples are drawn.
    """
    drawn = {}
    for path, pooled in pool.items():
        chosen = (excluded or {}).get(path, ())
        demos = {item.demo for item in chosen}
        sources = {key for item in chosen for key in item.sources}
        free = [item for item in pooled if item.demo not in demos and sources.isdisjoint(item.sources)]
        drawn[path] = rng.sample(free, min(count, len(free))) if rng else free[:count]
    return drawn


def resample_demos(state: ProgramState, pool: DemoPool, rng: random.Random) -> dict[str, list[PooledDemo]]:
    """Draws as many demos from the pool for each module as its prompt has now."""
    drawn: dict[str, list[PooledDemo]] = {}
    for path, prompt in state.prompts.items():
        drawn.update(draw_demos({path: pool.get(path, ())}, len(prompt.demos), rng))
    return drawn


def with_demos_for(example: Example, state: ProgramState, demos: DemoPool) -> ProgramState:
    """Returns the state with these demos, except those of the example itself; other modules keep their demos."""
    if not any(demos.values()):
        return state
    key = digest_without_id(example)
    new_demos = {
        path: tuple(item.demo for item in pooled if key not in item.sources) for path, pooled in demos.items() if pooled
    }
    return state.with_prompts(
        {
            path: state.prompts[path].model_copy(update={"demos": prompt_demos})
            for path, prompt_demos in new_demos.items()
        }
    )
