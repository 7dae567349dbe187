"""Proposals of instructions, grounded in the data, the program and its runs (Opsahl-Ong et al. 2024, arXiv 2406.11695).

They are made in a few rollouts of a program, so its calls are batched, seeded and accounted for like any others, and
an answer that cannot be read is data. Knows nothing of how instructions are chosen.
"""

from __future__ import annotations

import inspect
import random
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, final

from lmpipe import Demo, Example, Job, Module, Predict, ProgramState, Session, initial_state, predictors
from lmpipe.extend import derive_seed, render_input
from optimizers.demos import Pool
from optimizers.prompts.cached_rollout import recorded_rollout
from optimizers.prompts.instruction_writer import InstructionWriter, ProposalContext, written
from optimizers.prompts.proposer import Proposer

_MOST_VIEWS = 10  # batches of training examples that are looked at
_MOST_SHOWN = 3  # demonstrations that a proposal is shown

TIPS = (
    "",
    "Write a short and clear instruction.",
    "Be creative: approach the task in a way that is not obvious.",
    "Say in detail what the task is and how to solve it, step by step.",
    "Name what is known of the subject that helps to find the right answer.",
    "Describe a situation in which a great deal depends on the right answer.",
    "Give the reader a role, such as that of an expert in the subject.",
)
"""Styles of instructions; each proposal is given one, drawn at random."""


@final
@dataclass(frozen=True)
class Proposals:
    """What was proposed.

    Attributes:
        instructions: Module path → instructions, different from one another; the first is the present one.
        asked: How many proposals were asked for.
        unreadable: How many of them could not be read, or were empty.
        duplicates: How many said what another had said.
        grounds: What they are grounded in, by name.
    """

    instructions: Mapping[str, tuple[str, ...]]
    asked: int = 0
    unreadable: int = 0
    duplicates: int = 0
    grounds: Mapping[str, str] = field(default_factory=dict)

    def details(self) -> dict[str, Any]:
        """The figures and the texts, as JSON."""
        counts = {"asked": self.asked, "unreadable": self.unreadable, "duplicates": self.duplicates}
        texts = {path: list(texts) for path, texts in self.instructions.items()}
        return {"proposals": counts, "instructions": texts, "grounds": dict(self.grounds)}


def propose(
    program: Module,
    state: ProgramState,
    train: Sequence[Example],
    boot: Pool,
    session: Session,
    *,
    count: int,
    proposer: Proposer,
    grounds: ProposalContext,
) -> Proposals:
    """Proposes instructions for every module of a program.

    Args:
        program: The program.
        state: Its present instructions.
        train: Examples that the summary of the data is made from.
        boot: Demos from successful runs.
        session: LMs and seed.
        count: How many instructions each module is to have, the present one included.
        proposer: Who writes.
        grounds: What is to be known when writing.
    """
    author = _Author(program, state, session, proposer, grounds)
    known = author.ground(train) if count > 1 else {}
    wanted = [(path, number) for path in predictors(program) for number in range(1, count)]
    calls = [author.call(path, number, known, boot) for path, number in wanted]
    texts: dict[str, list[str]] = {path: [state.prompts[path].instructions] for path in predictors(program)}
    unreadable = duplicates = 0
    for (path, _), text in zip(wanted, author.ask("write", calls), strict=True):
        unreadable += not text
        duplicates += bool(text) and _told_apart(text) in map(_told_apart, texts[path])
        if text and _told_apart(text) not in map(_told_apart, texts[path]):
            texts[path].append(text)
    return Proposals({path: tuple(own) for path, own in texts.items()}, len(wanted), unreadable, duplicates, known)


@final
class _Author:
    """Asks the program that writes instructions."""

    def __init__(
        self, program: Module, state: ProgramState, session: Session, proposer: Proposer, grounds: ProposalContext
    ) -> None:
        self._program, self._student, self._grounds, self._seed = program, state, grounds, session.seed
        self._writer = InstructionWriter(grounds, proposer)
        placed, self._session = proposer.place(state, session)
        self._state = placed.with_prompts_of(initial_state(self._writer, self._session))

    def ask(self, step: str, calls: Sequence[Mapping[str, str]]) -> list[str]:
        """What is answered to each call; empty where the answer could not be read."""
        jobs = [Job(self._state, Example({"step": step, **call}), sample=number) for number, call in enumerate(calls)]
        return recorded_rollout(self._writer, jobs, self._session, written, title="proposing instructions")

    def ground(self, train: Sequence[Example]) -> dict[str, str]:
        """Texts that all proposals share, by name; one that could not be read is absent."""
        known: dict[str, str] = {}
        if self._grounds.data_aware and train:
            known["data"] = self._summary(train)
        if self._grounds.program_aware:
            structure = program_text(self._program)
            known["program"] = self.ask("describe_program", [{"program": structure}])[0]
            modules = predictors(self._program)
            calls = [{"program": structure, "module": module_text(path, modules[path])} for path in modules]
            roles = self.ask("describe_module", calls)
            known |= {f"module {path}": role for path, role in zip(modules, roles, strict=True)}
        return {name: text for name, text in known.items() if text}

    def call(self, path: str, number: int, known: Mapping[str, str], boot: Pool) -> dict[str, str]:
        """The inputs of one proposal."""
        rng = random.Random(derive_seed(self._seed, "proposal", path, number))
        own = [source.demo for source in boot.get(path, ())]
        shown = rng.sample(own, min(_MOST_SHOWN, len(own)))
        everything = {
            "dataset_summary": known.get("data", ""),
            "program_description": known.get("program", ""),
            "module_description": known.get(f"module {path}", ""),
            "module": module_text(path, predictors(self._program)[path]),
            "demonstrations": "\n\n".join(map(_demo_text, shown)),
            "current_instruction": self._student.prompts[path].instructions,
            "tip": rng.choice(TIPS),
        }
        return {field.name: everything[field.name] for field in self._grounds.signature().inputs}

    def _summary(self, train: Sequence[Example]) -> str:
        size = self._grounds.view_data_batch_size
        views = [train[start : start + size] for start in range(0, len(train), size)][:_MOST_VIEWS]
        calls = [{"examples": "\n\n".join(map(_example_text, view))} for view in views]
        observed = [text for text in self.ask("observe", calls) if text]
        return self.ask("summarize", [{"observations": "\n\n".join(observed)}])[0] if observed else ""


def program_text(program: Module) -> str:
    """The source of a program's own classes where there is one, and its modules."""
    own = dict.fromkeys(type(module) for _, module in program.named_modules())
    sources = [_source(kind) for kind in own if not kind.__module__.startswith("lmpipe.")]
    modules = [module_text(path, predictor) for path, predictor in predictors(program).items()]
    return "\n\n".join([source for source in sources if source] + modules)


def module_text(path: str, predictor: Predict) -> str:
    """A module in one line: its path, and what it takes and gives."""
    sides = (predictor.signature.inputs, predictor.signature.outputs)
    taken, given = (", ".join(f"{field.name}: {field.type_name}" for field in side) for side in sides)
    return f"{path}: {taken} -> {given}"


def _source(kind: type) -> str:
    try:
        return textwrap.dedent(inspect.getsource(kind)).strip()
    except (OSError, TypeError):  # typed at a prompt
        return ""


def _example_text(example: Example) -> str:
    return _lines({**example.inputs, **example.labels})


def _demo_text(demo: Demo) -> str:
    return _lines({**demo.inputs, **demo.outputs})


def _lines(values: Mapping[str, Any]) -> str:
    return "\n".join(f"{name}: {render_input(value)}" for name, value in values.items())


def _told_apart(text: str) -> str:
    return " ".join(text.lower().split())
