"""Proposals of instructions from the data, the program and its rollouts (Opsahl-Ong et al. 2024, arXiv 2406.11695).

They are written by rollouts of a program, so its LM calls are batched, seeded and counted like any others, and an
unreadable completion is data. Knows nothing about how instructions are chosen.
"""

from __future__ import annotations

import inspect
import random
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, final

from lmpipe import Example, Job, Module, Predict, ProgramState, Session, initial_state, predictors
from lmpipe.extend import derive_seed, render_input
from optimizers.demos import DemoPool
from optimizers.prompts.cached_rollout import cached_rollout
from optimizers.prompts.instruction_writer import InstructionWriter, ProposalContext, written_text
from optimizers.prompts.proposer import Proposer

_MAX_VIEWS = 10  # batches of training examples that the data summary is made from
_MAX_DEMOS_SHOWN = 3  # demonstrations in the prompt of a proposal

TIPS = (
    "",
    "Write a short and clear instruction.",
    "Be creative: approach the task in a way that is not obvious.",
    "Say in detail what the task is and how to solve it, step by step.",
    "Name what is known of the subject that helps to find the right answer.",
    "Describe a situation in which a great deal depends on the right answer.",
    "Give the reader a role, such as that of an expert in the subject.",
)
"""Styles of instructions; each proposal gets a random one."""


@final
@dataclass(frozen=True)
class Proposals:
    """The proposed instructions of all modules.

    Attributes:
        instructions: Module path → distinct instructions; the first is the current one.
        requested: Number of requested proposals.
        unreadable: Number of proposals that could not be parsed or were empty.
        duplicates: Number of proposals that repeated another one.
        context: The texts that all proposals were written from, by name.
    """

    instructions: Mapping[str, tuple[str, ...]]
    requested: int = 0
    unreadable: int = 0
    duplicates: int = 0
    context: Mapping[str, str] = field(default_factory=dict)

    def details(self) -> dict[str, Any]:
        """Returns the figures and the texts, as JSON."""
        counts = {"asked": self.requested, "unreadable": self.unreadable, "duplicates": self.duplicates}
        texts = {path: list(texts) for path, texts in self.instructions.items()}
        return {"proposals": counts, "instructions": texts, "grounds": dict(self.context)}


def propose(
    program: Module,
    state: ProgramState,
    train: Sequence[Example],
    bootstrapped: DemoPool,
    session: Session,
    *,
    count: int,
    proposer: Proposer,
    context: ProposalContext,
) -> Proposals:
    """Proposes instructions for every module of a program.

    Args:
        program: The program.
        state: The state with the current instructions.
        train: Examples that the summary of the data is made from.
        bootstrapped: Demos from successful rollouts.
        session: Session with the LMs and the seed.
        count: Number of instructions for each module, including the current one.
        proposer: The LM that writes.
        context: The texts that the LM sees.
    """
    instruction_proposer = _InstructionProposer(program, state, session, proposer, context)
    shared = instruction_proposer.shared_texts(train) if count > 1 else {}
    slots = [(path, number) for path in predictors(program) for number in range(1, count)]
    calls = [instruction_proposer.inputs(path, number, shared, bootstrapped) for path, number in slots]
    texts: dict[str, list[str]] = {path: [state.prompts[path].instructions] for path in predictors(program)}
    unreadable = duplicates = 0
    for (path, _), text in zip(slots, instruction_proposer.call("write", calls), strict=True):
        unreadable += not text
        duplicates += bool(text) and _normalized(text) in map(_normalized, texts[path])
        if text and _normalized(text) not in map(_normalized, texts[path]):
            texts[path].append(text)
    instructions = {path: tuple(module_texts) for path, module_texts in texts.items()}
    return Proposals(instructions, len(slots), unreadable, duplicates, shared)


@final
class _InstructionProposer:
    """Calls the program that writes instructions."""

    def __init__(
        self, program: Module, state: ProgramState, session: Session, proposer: Proposer, context: ProposalContext
    ) -> None:
        self._program, self._student, self._context, self._seed = program, state, context, session.seed
        self._modules = predictors(program)
        self._writer = InstructionWriter(context, proposer)
        writer_state, self._session = proposer.bind(state, session)
        self._state = writer_state.with_prompts_of(initial_state(self._writer, self._session))

    def call(self, step: str, calls: Sequence[Mapping[str, str]]) -> list[str]:
        """Returns the text that each call writes; it is empty if the completion could not be parsed."""
        jobs = [Job(self._state, Example({"step": step, **call}), sample=number) for number, call in enumerate(calls)]
        return cached_rollout(self._writer, jobs, self._session, written_text, title="proposing instructions")

    def shared_texts(self, train: Sequence[Example]) -> dict[str, str]:
        """Returns the texts that all proposals share, by name, without those that could not be parsed."""
        texts: dict[str, str] = {}
        if self._context.data_aware and train:
            texts["data"] = self._summary(train)
        if self._context.program_aware:
            structure = program_text(self._program)
            texts["program"] = self.call("describe_program", [{"program": structure}])[0]
            calls = [{"program": structure, "module": module_text(*module)} for module in self._modules.items()]
            descriptions = self.call("describe_module", calls)
            texts |= {f"module {path}": text for path, text in zip(self._modules, descriptions, strict=True)}
        return {name: text for name, text in texts.items() if text}

    def inputs(self, path: str, number: int, shared: Mapping[str, str], bootstrapped: DemoPool) -> dict[str, str]:
        """Returns the inputs of the call that writes one instruction."""
        rng = random.Random(derive_seed(self._seed, "proposal", path, number))
        demos = [pooled.demo for pooled in bootstrapped.get(path, ())]
        drawn = rng.sample(demos, min(_MAX_DEMOS_SHOWN, len(demos)))
        inputs = {
            "dataset_summary": shared.get("data", ""),
            "program_description": shared.get("program", ""),
            "module_description": shared.get(f"module {path}", ""),
            "module": module_text(path, self._modules[path]),
            "demonstrations": "\n\n".join(_text(demo.inputs, demo.outputs) for demo in drawn),
            "current_instruction": self._student.prompts[path].instructions,
            "tip": rng.choice(TIPS),
        }
        return {field.name: inputs[field.name] for field in self._context.signature().inputs}

    def _summary(self, train: Sequence[Example]) -> str:
        size = self._context.view_data_batch_size
        views = [train[start : start + size] for start in range(0, len(train), size)][:_MAX_VIEWS]
        calls = [{"examples": "\n\n".join(_text(example.inputs, example.labels) for example in view)} for view in views]
        observations = [text for text in self.call("observe", calls) if text]
        if not observations:
            return ""
        return self.call("summarize", [{"observations": "\n\n".join(observations)}])[0]


def program_text(program: Module) -> str:
    """Returns the source code of a program's own classes, as far as it is available, and a list of its modules."""
    classes = dict.fromkeys(type(module) for _, module in program.named_modules())
    sources = [_source(kind) for kind in classes if not kind.__module__.startswith("lmpipe.")]
    modules = [module_text(path, predictor) for path, predictor in predictors(program).items()]
    return "\n\n".join([source for source in sources if source] + modules)


def module_text(path: str, predictor: Predict) -> str:
    """Describes a module in one line: its path, its inputs and its outputs."""
    sides = (predictor.signature.inputs, predictor.signature.outputs)
    inputs, outputs = (", ".join(f"{field.name}: {field.type_name}" for field in side) for side in sides)
    return f"{path}: {inputs} -> {outputs}"


def _source(kind: type) -> str:
    try:
        return textwrap.dedent(inspect.getsource(kind)).strip()
    except (OSError, TypeError):  # a class that was typed at the interactive prompt
        return ""


def _text(inputs: Mapping[str, Any], outputs: Mapping[str, Any]) -> str:
    return "\n".join(f"{name}: {render_input(value)}" for name, value in {**inputs, **outputs}.items())


def _normalized(text: str) -> str:
    return " ".join(text.lower().split())
