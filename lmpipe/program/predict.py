"""Predictors: the leaves of a program, each of which makes one LM call with a signature.

This module turns inputs into a request and a completion into outputs. It knows nothing about batching.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache, partial
from types import NoneType
from typing import Any, final

from typing_extensions import Never

from lmpipe.data import Prediction, snapshot
from lmpipe.errors import ConfigError, SignatureError
from lmpipe.lm import Request, Sampling
from lmpipe.program.module import Module
from lmpipe.prompting.regex import completion_regex
from lmpipe.prompting.signature import Field, Signature, SignatureLike, signature
from lmpipe.runtime.call_context import current_context
from lmpipe.runtime.session import Session
from lmpipe.state import ProgramState, PromptState
from lmpipe.text.cleaning import REPLACEMENT, clean_value
from lmpipe.text.display import did_you_mean, shown
from lmpipe.text.reprs import Name, short_repr
from lmpipe.validation.arguments import check_type


@lru_cache(maxsize=4096)
def check_demos(signature: Signature, prompt: PromptState, path: str) -> None:
    """Checks that the demonstrations of a prompt fit a signature. Inputs and optional outputs may be missing.

    Raises:
        ConfigError: If a demonstration has other fields or lacks an output, so it was made for another signature.
    """
    for side, fields in (("inputs", signature.inputs), ("outputs", signature.outputs)):
        names = {field.name for field in fields}
        unknown = sorted({name for demo in prompt.demos for name in getattr(demo, side)} - names)
        if unknown:
            raise ConfigError(
                f"the state does not fit the program: demonstrations of {path!r} have the {side} {', '.join(unknown)}, "
                f"and its signature has {', '.join(sorted(names))}; make the state with this program, or drop the demos"
            )
    required = {field.name for field in signature.outputs if not field.optional}
    missing = sorted({name for demo in prompt.demos for name in required - demo.outputs.keys()})
    if missing:
        raise ConfigError(f"a demonstration of {path!r} lacks the outputs {', '.join(missing)}; give it all outputs")


@final
class Predict(Module):
    """One LM call, from the inputs of a signature to its outputs.

    Args:
        source: A `Signature`, or its string or class form.
        instructions: Instructions for a signature in string form.
        role: Role of the LM that answers.
        sampling: Sampling settings; by default those of the session.
        types: Additional type names for a signature in string form, such as ``{"Colour": Colour}``.

    Attributes:
        initial_prompt: The instructions of the signature without demonstrations.

    Raises:
        ConfigError: If an argument has the wrong type or does not exist.
        SignatureError: If the signature is invalid.
    """

    has_prompt = True

    def __init__(
        self,
        source: SignatureLike,
        instructions: str = "",
        *,
        role: str = "lm",
        sampling: Sampling | None = None,
        types: Mapping[str, Any] | None = None,
        **unknown: Never,
    ) -> None:
        _refuse_unknown(unknown)
        check_type("role", role, str)
        check_type("sampling", sampling, (Sampling, NoneType), "Predict(…, sampling={})")
        self.signature = signature(source, instructions, types)
        self.role = role
        self.sampling = sampling
        self.initial_prompt = PromptState(instructions=self.signature.instructions)
        self.input_names = tuple(field.name for field in self.signature.inputs)

    def __repr__(self) -> str:
        return short_repr(self, Name(self.signature.text))

    def forward(self, *args: Any, **inputs: Any) -> Prediction:
        """Renders the prompt, makes the LM call and parses its completion. A failed call stays in the trace as a step.

        Raises:
            SignatureError: If the inputs do not fit the signature.
            ConfigError: If the demonstrations of the state's prompt were made for another signature.
            ParseError: If the completion could not be parsed.
            EngineError: If the request could not be answered.
        """
        context = current_context()
        session = context.session
        self.signature.check_inputs(inputs)
        inputs, replaced = snapshot(inputs), list[int]()
        path, index, seed = context.next_call(self)
        prompt = context.state.prompts.get(path, self.initial_prompt)
        if prompt.demos:
            check_demos(self.signature, prompt, path)
        messages = session.render_messages(self.signature, prompt, inputs)
        rendered = messages[-1].content
        if REPLACEMENT in rendered or "\\u00" in rendered:  # an input may hold invalid text, or JSON that escapes it
            inputs = clean_value(inputs, replaced.append)
        if replaced:
            messages = session.render_messages(self.signature, prompt, inputs)
        regex = completion_regex(self.signature) if session.structured else None
        sampling = self.sampling or session.sampling
        if context.temperature is not None:
            sampling = replace(sampling, temperature=context.temperature)
        request = Request(messages, sampling, context.state.weights_of(self.role, path), seed, regex)
        parse = partial(session.template.parse, self.signature)
        return Prediction(**context.call_lm(self.role, path, index, inputs, request, parse, sum(replaced)))


@final
class ChainOfThought(Module):
    """A predictor that reasons first: its signature gets an output ``reasoning`` before the others.

    The reasoning is optional: a completion without it is valid, and labelled demonstrations show none.

    Args:
        source: A `Signature`, or its string or class form.
        instructions: Instructions for a signature in string form.
        role: Role of the LM that answers.
        sampling: Sampling settings; by default those of the session.
        types: Additional type names for a signature in string form, such as ``{"Colour": Colour}``.

    Raises:
        ConfigError: If an argument has the wrong type or does not exist.
        SignatureError: If the signature is invalid, or already has an output ``reasoning``.
    """

    def __init__(
        self,
        source: SignatureLike,
        instructions: str = "",
        *,
        role: str = "lm",
        sampling: Sampling | None = None,
        types: Mapping[str, Any] | None = None,
        **unknown: Never,
    ) -> None:
        base = signature(source, instructions, types)
        if "reasoning" in (field.name for field in base.outputs):
            raise SignatureError("ChainOfThought adds the output 'reasoning' itself; leave it out of the signature")
        reasoning = Field("reasoning", str, "think step by step", optional=True)
        self.predict = Predict(base.prepend(reasoning), role=role, sampling=sampling, **unknown)
        self.input_names = self.predict.input_names

    def __repr__(self) -> str:
        return short_repr(self, Name(self.predict.signature.text))

    def forward(self, *args: Any, **inputs: Any) -> Prediction:
        return self.predict(**inputs)


def _refuse_unknown(unknown: Mapping[str, object]) -> None:
    """Raises a ConfigError if a predictor was given arguments that it does not have."""
    for name, value in unknown.items():
        if name in {field.name for field in dataclasses.fields(Sampling)}:
            raise ConfigError(
                f"a predictor has no argument {name!r}; write sampling=Sampling({name}={shown(value, 50)}), here or "
                "in the Session"
            )
        known = ("instructions", "role", "sampling", "types")
        raise ConfigError(f"a predictor has no argument {name!r}; it has {', '.join(known)}{did_you_mean(name, known)}")


def predictors(program: Module) -> dict[str, Predict]:
    """Returns path → predictor, in the order of the program's structure.

    Raises:
        ConfigError: If the argument is not a program.
    """
    check_type("program", program, Module)
    return {path: module for path, module in program.named_modules() if isinstance(module, Predict)}


def resolve_state(program: Module, session: Session, state: ProgramState | None) -> ProgramState:
    """Returns a state or, for None, the session's state or, if it has none, the initial state of the program.

    Raises:
        ConfigError: If the arguments are not a program and a session.
    """
    if state is not None:
        return state
    return session.state or initial_state(program, session)


def initial_state(program: Module, session: Session) -> ProgramState:
    """Returns the vanilla state of a program: the signatures' instructions, no demonstrations, and untuned LMs.

    Raises:
        ConfigError: If the arguments are not a program and a session.
    """
    check_type("program", program, Module)
    check_type("session", session, Session)
    prompts = {path: predictor.initial_prompt for path, predictor in predictors(program).items()}
    return ProgramState(prompts=prompts, weights=session.untuned_weights())
