"""The program that writes instructions, as MIPROv2 has it (Opsahl-Ong et al. 2024, arXiv 2406.11695).

Knows which texts an instruction is written from; nothing of where they come from.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, final

from lmpipe import Input, Module, Output, Predict, Prediction, Signature, Trace, signature
from lmpipe.extend import Field
from optimizers.prompts.proposer import Proposer

_MARKS = ("```", "**", '"', "'", "`")


class Observe:
    """Note what these examples of a dataset are about, which form they have, and what the right outputs depend on."""

    examples: str = Input()
    observations: str = Output("a few sentences")


class Summarize:
    """Sum up what was observed in a dataset."""

    observations: str = Input()
    summary: str = Output("two or three sentences on what the data is and what the task seems to be")


class DescribeProgram:
    """Say which task this program solves. It calls a language model through the modules that are listed at its end."""

    program: str = Input()
    description: str = Output("a few sentences")


class DescribeModule:
    """Say what one module of a program of language-model calls is there for."""

    program: str = Input()
    module: str = Input()
    description: str = Output("one or two sentences")


@final
@dataclass(frozen=True)
class ProposalContext:
    """What proposals are grounded in: names as in MIPROv2.

    Args:
        program_aware: On a description of the program and of the module.
        data_aware: On a summary of training examples.
        tip_aware: On a style of instructions.
        fewshot_aware: On some of the module's own calls in successful runs.
        view_data_batch_size: How many training examples are looked at at once.
    """

    program_aware: bool = True
    data_aware: bool = True
    tip_aware: bool = True
    fewshot_aware: bool = True
    view_data_batch_size: int = 10

    def signature(self) -> Signature:
        """Of the call that writes an instruction: an input for each ground."""
        grounds = [
            (self.data_aware, "dataset_summary", "what the data is like"),
            (self.program_aware, "program_description", "what the whole program does"),
            (self.program_aware, "module_description", "what the module is there for"),
            (True, "module", "what the module takes and gives"),
            (self.fewshot_aware, "demonstrations", "calls of the module in successful runs"),
            (True, "current_instruction", "what the module is told at present"),
            (self.tip_aware, "tip", "how to write the new instruction"),
        ]
        return Signature(
            tuple(Field(name, desc=desc) for wanted, name, desc in grounds if wanted),
            (Field("instruction", desc="the new instruction and nothing else"),),
            "Write a better instruction for one module of a program that calls a language model. The instruction is "
            "shown with every input of the module; it must help a language model to give the right outputs.",
        )


@final
class InstructionWriter(Module):
    """Writes instructions, and greedily what they are grounded in: one call, of the kind that ``step`` names."""

    def __init__(self, grounds: ProposalContext, proposer: Proposer) -> None:
        kinds: Mapping[str, Any] = {
            "observe": Observe,
            "summarize": Summarize,
            "describe_program": DescribeProgram,
            "describe_module": DescribeModule,
            "write": grounds.signature(),
        }
        greedy = replace(proposer.sampling, temperature=0.0)
        self.proposal = {
            name: Predict(
                signature(kind), role=proposer.role, sampling=proposer.sampling if name == "write" else greedy
            )
            for name, kind in kinds.items()
        }

    def forward(self, step: str, **inputs: Any) -> Prediction:
        return self.proposal[step](**inputs)


def written(trace: Trace) -> str:
    """The text that a call gave, without marks that LMs put around a whole text; empty if it could not be read."""
    text = str(next(iter(trace.prediction.values()))).strip() if trace.prediction else ""
    for mark in _MARKS:
        if text.startswith(mark) and text.endswith(mark) and text.count(mark) == 2:
            text = text[len(mark) : -len(mark)].strip()
    return text
