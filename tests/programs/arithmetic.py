"""An LM that is unsure: it answers by chance, so the seed of a request decides what it says."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence

from lmpipe import (
    Evaluation,
    Example,
    Job,
    Module,
    Predict,
    ProgramState,
    Request,
    ScriptedLM,
    Session,
    Trace,
    evaluate,
    exact_match,
    initial_state,
    rollout,
)

ADD = "a: int, b: int -> answer: int"
EXAMPLES = [Example({"a": a, "b": b}, {"answer": a + b}) for a in range(5) for b in range(8)]


def adding(request: Request) -> str:
    """Is right six times in ten, and nine times in ten with demonstrations or feedback.

    One wrong answer in three is not a number. At temperature 0 the question alone decides.
    """
    question = request.messages[-1].content
    if "feedback:" in request.messages[0].content:
        return "feedback: count on your fingers"
    a, b = map(int, re.findall(r"\d+", question)[:2])
    rng = random.Random(request.seed if request.sampling.temperature else question)
    if rng.random() < (0.9 if len(request.messages) > 2 or "feedback:" in question else 0.6):
        return f"answer: {a + b}"
    return f"answer: {rng.choice([a + b - 1, a + b + 2, 'many'])}"


def session() -> Session:
    return Session(lm=ScriptedLM(adding))


def said(*texts: str) -> Session:
    """A session whose LM says these texts, one after another."""
    lines = iter(texts)
    return Session(lm=ScriptedLM(lambda request: next(lines)))


def score(program: Module, state: ProgramState | None = None, in_session: Session | None = None) -> Evaluation:
    in_session = in_session or session()
    return evaluate(program, EXAMPLES, exact_match, in_session, state=state)


def traces(
    program: Module, in_session: Session, examples: Sequence[Example] = EXAMPLES, temperature: float | None = None
) -> list[Trace]:
    state = initial_state(program, in_session)
    jobs = [Job(state, example, temperature=temperature) for example in examples]
    return rollout(program, jobs, in_session, exact_match)


def adder() -> Predict:
    return Predict(ADD)
