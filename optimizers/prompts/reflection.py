"""Reflection: records of a program's rollouts with feedback, and the LM call that learns from them.

Knows traces and feedback, but nothing about candidates or how they evolve.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, final

from lmpipe import Module, Prediction, Request, Sampling, Step, Trace
from lmpipe.extend import Message, clean_text, current_context, render_input
from optimizers.prompts.proposer import Proposer


@final
class RawCall(Module):
    """One LM call with an unformatted prompt, which returns the unparsed completion."""

    def __init__(self, proposer: Proposer) -> None:
        # plain values, because they are part of the program's identity
        self.role, self.temperature, self.max_tokens = proposer.role, proposer.temperature, proposer.max_tokens

    def forward(self, prompt: str) -> Prediction:
        context = current_context()
        path, index, seed = context.next_call(self)
        sampling = Sampling(temperature=self.temperature, max_tokens=self.max_tokens)
        request = Request((Message("user", prompt),), sampling, context.state.weights_of(self.role, path), seed)
        return Prediction(**context.call_lm(self.role, path, index, {"prompt": prompt}, request, _unparsed))


def _unparsed(text: str) -> dict[str, str]:
    return {"text": text}


@final
class Reflect(Module):
    """Rewrites instructions: the prompt shows calls with feedback, and the completion is the new instruction."""

    def __init__(self, proposer: Proposer) -> None:
        self.reflection = RawCall(proposer)

    def forward(self, prompt: str) -> Prediction:
        return self.reflection(prompt=prompt)


def completion(trace: Trace) -> str:
    """Returns the completion of a reflection; empty if the call failed."""
    return str(trace.prediction["text"]) if trace.prediction else ""


def reflection_record(trace: Trace) -> dict[str, Any]:
    """Returns the score of a rollout, and the calls of each module with feedback, under gepa's names."""
    calls: dict[str, list[dict[str, Any]]] = {}
    for step in trace.lm_steps:
        calls.setdefault(step.path, []).append(
            {
                "Inputs": _texts(step.inputs),
                "Generated Outputs": _texts(step.outputs) if step.outputs is not None else "none that could be read",
                "Feedback": clean_text(_feedback(trace, step)),  # may contain any text of the metric or the program
            }
        )
    return {"score": trace.score, "calls": calls}


def _feedback(trace: Trace, step: Step) -> str:
    if step.error is not None:
        return f"This call failed, and the run with it. {step.error}"
    if trace.failure is not None:
        return f"The run failed after this call. {trace.error}"
    score = f"The run scored {trace.score:g}."
    if trace.feedback:
        return f"{score} {trace.feedback}"
    labels = "; ".join(f"{name}: {text}" for name, text in _texts(trace.example.labels).items())
    return f"{score} Right for the whole run is {labels}" if labels else score


def _texts(values: Mapping[str, Any]) -> dict[str, str]:
    return {name: render_input(value) for name, value in values.items()}
