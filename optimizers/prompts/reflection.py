"""Reflection: what is shown of a program's runs, and the call that is asked what to make of it.

Knows traces and feedback; nothing of candidates or of who evolves them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, final

from lmpipe import Module, Prediction, Request, Sampling, Step, Trace
from lmpipe.extend import Message, clean_text, current_context, render_input
from optimizers.prompts.proposer import Proposer


@final
class Chat(Module):
    """One LM call with a prompt as it is, and the completion as it comes."""

    def __init__(self, proposer: Proposer) -> None:
        # plain values, which are part of the program's identity
        self.role, self.temperature, self.max_tokens = proposer.role, proposer.temperature, proposer.max_tokens

    def forward(self, prompt: str) -> Prediction:
        run = current_context()
        path, index, seed = run.next_call(self)
        sampling = Sampling(temperature=self.temperature, max_tokens=self.max_tokens)
        request = Request((Message("user", prompt),), sampling, run.state.weights_of(self.role, path), seed)
        return Prediction(**run.call_lm(self.role, path, index, {"prompt": prompt}, request, _as_it_is))


def _as_it_is(text: str) -> dict[str, str]:
    return {"text": text}


@final
class Reflect(Module):
    """The program that rewrites instructions: a prompt that shows runs, and the completion with the new instruction."""

    def __init__(self, proposer: Proposer) -> None:
        self.reflection = Chat(proposer)

    def forward(self, prompt: str) -> Prediction:
        return self.reflection(prompt=prompt)


def completion(trace: Trace) -> str:
    """What a prompt was answered; empty if it was not."""
    return str(trace.prediction["text"]) if trace.prediction else ""


def shown_run(trace: Trace) -> dict[str, Any]:
    """The score of a run, and for each module its calls with feedback, under the names that gepa has for them."""
    calls: dict[str, list[dict[str, Any]]] = {}
    for step in trace.lm_steps:
        calls.setdefault(step.path, []).append(
            {
                "Inputs": _texts(step.inputs),
                "Generated Outputs": _texts(step.outputs) if step.outputs is not None else "none that could be read",
                "Feedback": clean_text(_feedback(trace, step)),  # the metric and the program say what they like
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
