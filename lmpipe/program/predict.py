"""Predictors: the leaves of a program, each one LM call with a signature.

Knows how a call becomes a request and a completion becomes a step; knows nothing of batching.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache, partial
from typing import Any, final

from lmpipe.data import Prediction, snapshot
from lmpipe.errors import ConfigError
from lmpipe.lm import Request, Sampling
from lmpipe.program.module import Module
from lmpipe.prompting.regex import completion_regex
from lmpipe.prompting.signature import Field, Signature, SignatureLike, signature
from lmpipe.runtime.call_context import CallContext, required_context
from lmpipe.runtime.session import Session
from lmpipe.state import ProgramState, PromptState
from lmpipe.text.cleaning import REPLACEMENT, clean_value
from lmpipe.validation.arguments import check_type


@lru_cache(maxsize=4096)
def check_prompt(signature: Signature, prompt: PromptState, path: str) -> None:
    """Looks whether the demonstrations of a prompt are of a signature; they may lack inputs and optional outputs.

    Raises:
        ConfigError: If they have other fields, or lack an output: the prompt was then made for another signature.
    """
    for side, fields in (("inputs", signature.inputs), ("outputs", signature.outputs)):
        known = {field.name for field in fields}
        unknown = sorted({name for demo in prompt.demos for name in getattr(demo, side)} - known)
        if unknown:
            raise ConfigError(
                f"the state does not fit the program: demonstrations of {path!r} have the {side} {', '.join(unknown)}, "
                f"and its signature has {', '.join(sorted(known))}; make the state with this program, or drop the demos"
            )
    wanted = {field.name for field in signature.outputs if not field.optional}
    missing = sorted({name for demo in prompt.demos for name in wanted - demo.outputs.keys()})
    if missing:
        raise ConfigError(f"a demonstration of {path!r} lacks the outputs {', '.join(missing)}; give it all outputs")


@final
class Predict(Module):
    """One LM call: inputs of a signature in, its outputs out.

    Args:
        source: A `Signature`, or its string or class form.
        instructions: For the string form: what to do.
        role: Which of the session's LMs answers.
        sampling: Overrides the session's.
    """

    takes_prompt = True

    def __init__(
        self, source: SignatureLike, instructions: str = "", *, role: str = "lm", sampling: Sampling | None = None
    ) -> None:
        self.signature = signature(source, instructions)
        self.role = role
        self.sampling = sampling
        self.vanilla = PromptState(instructions=self.signature.instructions)

    def forward(self, *args: Any, **inputs: Any) -> Prediction:
        """Raises:
        SignatureError: If the inputs do not fit the signature.
        ConfigError: If the state's prompt was made for another signature.
        ParseError: If the completion could not be read; a step with the error stays in the trace.
        EngineError: If the request could not be answered; likewise.
        """
        run = required_context()
        self.signature.check_inputs(inputs)
        inputs, replaced = snapshot(inputs), list[int]()
        path, index, seed = run.locate(self)
        template = run.session.template
        prompt = run.state.prompts.get(path, self.vanilla)
        if prompt.demos:
            check_prompt(self.signature, prompt, path)
        messages = run.session.messages(self.signature, prompt, inputs)
        if REPLACEMENT in messages[-1].content or "\\u00" in messages[-1].content:  # what was no text, or JSON of it
            inputs = clean_value(inputs, replaced.append)
        if replaced:
            messages = run.session.messages(self.signature, prompt, inputs)
        regex = completion_regex(self.signature) if run.session.structured else None
        request = Request(messages, self._sampling(run), run.state.weights_of(self.role, path), seed, regex)
        read = partial(template.parse, self.signature)
        return Prediction(**run.call(self.role, path, index, inputs, request, read, sum(replaced)))

    def _sampling(self, run: CallContext) -> Sampling:
        sampling = self.sampling or run.session.sampling
        return sampling if run.temperature is None else replace(sampling, temperature=run.temperature)


@final
class ChainOfThought(Module):
    """A predictor that reasons first: its signature with an output ``reasoning`` before the others.

    The reasoning is a means: a completion that gives the other outputs without it counts, which is also what
    labelled demonstrations show.

    Args:
        source: A `Signature`, or its string or class form.
        instructions: For the string form: what to do.
        role: Which of the session's LMs answers.
        sampling: Overrides the session's.
    """

    def __init__(
        self, source: SignatureLike, instructions: str = "", *, role: str = "lm", sampling: Sampling | None = None
    ) -> None:
        reasoning = Field("reasoning", str, "think step by step", optional=True)
        self.predict = Predict(signature(source, instructions).prepend(reasoning), role=role, sampling=sampling)

    def forward(self, *args: Any, **inputs: Any) -> Prediction:
        return self.predict(**inputs)


def predictors(program: Module) -> dict[str, Predict]:
    """Path → predictor, in the order of the program's structure."""
    return {path: module for path, module in program.named_modules() if isinstance(module, Predict)}


def initial_state(program: Module, session: Session) -> ProgramState:
    """The vanilla state: every predictor with its signature's instruction and no demonstrations, every LM untuned.

    Raises:
        ConfigError: If something else is passed than a program and a session.
    """
    check_type("program", program, Module)
    check_type("session", session, Session)
    prompts = {path: predictor.vanilla for path, predictor in predictors(program).items()}
    return ProgramState(prompts=prompts, weights=session.base_weights())
