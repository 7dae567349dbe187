"""Demonstrations: where they come from and how they are drawn.

Labelled demos are training examples as they are; bootstrapped demos are a program's own successful calls. Knows
nothing of who makes the runs, or of search.
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
class Source:
    """A demonstration that may be shown.

    Attributes:
        demo: What is shown.
        examples: The `content` of every example that gives it; none of them may see it.
    """

    demo: Demo
    examples: frozenset[str]


Pool = Mapping[str, Sequence[Source]]
"""Module path → demonstrations, different from one another."""


def labelled_pool(program: Module, examples: Sequence[Example], *, partial: bool = False) -> dict[str, list[Source]]:
    """Demos from labels, for the predictors whose inputs and required outputs an example holds.

    A module in the middle of a program, whose outputs nobody labelled, gets none. What several examples say alike is
    there once.

    Args:
        program: Whose predictors they are for.
        examples: What they are made of.
        partial: Whether some of the inputs suffice; a demo then lacks the others, such as what was retrieved.
    """
    named = [(digest_without_id(example), example) for example in examples]
    return {
        path: _once((name, _labelled(predictor, example, partial)) for name, example in named)
        for path, predictor in predictors(program).items()
    }


def _once(found: Iterable[tuple[str, Demo | None]]) -> list[Source]:
    """Each demo once, in the order in which it came first."""
    givers: dict[Demo, set[str]] = {}
    for name, demo in found:
        if demo is not None:
            givers.setdefault(demo, set()).add(name)
    return [Source(demo, frozenset(names)) for demo, names in givers.items()]


def _labelled(predictor: Predict, example: Example, partial: bool) -> Demo | None:
    known: dict[str, Any] = {**example.inputs, **example.labels}
    wanted = [field.name for field in predictor.signature.inputs]
    inputs = [name for name in wanted if name in known]
    outputs = [field.name for field in predictor.signature.outputs if not field.optional or field.name in known]
    if not all(name in known for name in outputs) or (inputs != wanted and not (partial and inputs)):
        return None
    return Demo(inputs={name: known[name] for name in inputs}, outputs={name: known[name] for name in outputs})


def trace_pool(traces: Sequence[Trace], seed: int) -> dict[str, list[Source]]:
    """Demos from the steps of successful traces: one for each module and example, drawn where a module ran often."""
    steps: dict[tuple[str, str], list[Demo]] = {}
    for trace in traces:
        name = digest_without_id(trace.example)
        for step in trace.lm_steps:
            if step.outputs is not None:
                steps.setdefault((step.path, name), []).append(Demo(inputs=step.inputs, outputs=step.outputs))
    drawn: dict[str, list[tuple[str, Demo]]] = {}
    rng = random.Random(seed)
    for (path, name), demos in steps.items():
        drawn.setdefault(path, []).append((name, rng.choice(demos)))
    return {path: _once(found) for path, found in drawn.items()}


def with_demos(state: ProgramState, demos: Mapping[str, Sequence[Demo]]) -> ProgramState:
    """The state with these demos in place of its own, all of them shown, instructions kept."""
    return state.with_prompts(
        {
            path: prompt.model_copy(update={"demos": tuple(demos.get(path, ())), "nearest": None})
            for path, prompt in state.prompts.items()
        }
    )


def draw(pool: Pool, count: int, rng: random.Random | None, taken: Pool | None = None) -> dict[str, list[Source]]:
    """Up to `count` demos for each module, of examples that are not taken; the first ones if there is no `rng`."""
    drawn = {}
    for path, sources in pool.items():
        shown = (taken or {}).get(path, ())
        demos = {source.demo for source in shown}
        examples = {name for source in shown for name in source.examples}
        free = [source for source in sources if source.demo not in demos and examples.isdisjoint(source.examples)]
        drawn[path] = rng.sample(free, min(count, len(free))) if rng else free[:count]
    return drawn


def redraw(state: ProgramState, pool: Pool, rng: random.Random) -> dict[str, list[Source]]:
    """As many demos of the pool for each module as its prompt has now."""
    drawn: dict[str, list[Source]] = {}
    for path, prompt in state.prompts.items():
        drawn.update(draw({path: pool.get(path, ())}, len(prompt.demos), rng))
    return drawn


def prompted(state: ProgramState, demos: Pool, example: Example) -> ProgramState:
    """The state with these demos, but none made of the example itself; modules without any keep their own."""
    if not any(demos.values()):
        return state
    name = digest_without_id(example)
    shown = {
        path: tuple(source.demo for source in sources if name not in source.examples)
        for path, sources in demos.items()
        if sources
    }
    return state.with_prompts(
        {path: state.prompts[path].model_copy(update={"demos": own}) for path, own in shown.items()}
    )
