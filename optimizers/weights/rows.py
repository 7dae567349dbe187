"""Training rows from traces: one for each module call, with the prompt that inference would send.

Knows nothing about where traces come from, or about training.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence

from lmpipe import Module, Predict, ProgramState, Session, Trace, predictors
from lmpipe.extend import TrainingRow
from optimizers.weights.settings import step_messages


def rows_of_traces(
    program: Module,
    state: ProgramState,
    traces: Sequence[Trace],
    session: Session,
    weight_key: Callable[[Predict, str], str],
    *,
    label: str | None,
    include_demos: bool = False,
) -> dict[str, list[TrainingRow]]:
    """Makes one training row from each module call of each trace.

    A row contains the messages that inference would send for the same inputs, and the outputs of the call in the form
    that the template asks for.

    Args:
        program: The program that learns.
        state: Its prompts, for `include_demos`.
        traces: Successful traces.
        session: Session that renders the messages.
        weight_key: Returns the key of the weights that a module's calls train, given its path.
        label: Label whose values are the groups of the rows; None puts all rows into one group.
        include_demos: Whether rows show the current prompt with its demos, instead of the vanilla prompt.

    Returns:
        Weight key → its rows, in the order of the traces.
    """
    modules = predictors(program)
    rows: dict[str, list[TrainingRow]] = {}
    for trace in traces:
        group = str(trace.example.labels[label]) if label else ""
        for step in trace.lm_steps:
            predictor = modules.get(step.path)
            if predictor is None or step.outputs is None:
                continue
            row = TrainingRow(
                step_messages(predictor, step, state, session, include_demos=include_demos),
                session.template.completion(predictor.signature, step.outputs),
                group,
            )
            rows.setdefault(weight_key(predictor, step.path), []).append(row)
    return rows


def by_group(rows: Sequence[TrainingRow]) -> dict[str, list[TrainingRow]]:
    """Returns group → its rows."""
    groups: dict[str, list[TrainingRow]] = {}
    for row in rows:
        groups.setdefault(row.group, []).append(row)
    return groups


def balanced_stream(rows: Sequence[TrainingRow], rng: random.Random) -> Iterator[TrainingRow]:
    """Yields rows without end: one of each group in turn, and all rows of a group before one of them comes again.

    Args:
        rows: The rows, at least one.
        rng: Source of randomness, which orders the rows of a group anew each time.
    """
    groups = by_group(rows)
    left: dict[str, list[TrainingRow]] = {group: [] for group in groups}
    while True:
        for group, members in groups.items():
            if not left[group]:
                left[group] = rng.sample(members, len(members))
            yield left[group].pop()
