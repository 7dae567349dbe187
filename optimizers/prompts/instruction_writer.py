"""The program that writes instructions for MIPROv2 (Opsahl-Ong et al. 2024, arXiv 2406.11695).

Knows which texts the LM sees when it writes an instruction, but not where they come from. The docstrings and
descriptions of the signatures are the prompts of its calls.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, final

from lmpipe import Input, Module, Output, Predict, Prediction, Signature, Trace, signature
from lmpipe.extend import Field
from optimizers.prompts.proposer import Proposer

_QUOTES = ("```", "**", '"', "'", "`")


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
    """The texts that the LM sees when it proposes an instruction, under MIPROv2's names.

    Args:
        program_aware: Whether it sees descriptions of the program and the module.
        data_aware: Whether it sees a summary of training examples.
        tip_aware: Whether it sees a tip on the style of the instruction.
        fewshot_aware: Whether it sees some of the module's own calls in successful rollouts.
        view_data_batch_size: Number of training examples in each call that observes the data.
    """

    program_aware: bool = True
    data_aware: bool = True
    tip_aware: bool = True
    fewshot_aware: bool = True
    view_data_batch_size: int = 10

    def signature(self) -> Signature:
        """Returns the signature of the call that writes an instruction, with an input for each text."""
        inputs = [
            (self.data_aware, "dataset_summary", "what the data is like"),
            (self.program_aware, "program_description", "what the whole program does"),
            (self.program_aware, "module_description", "what the module is there for"),
            (True, "module", "what the module takes and gives"),
            (self.fewshot_aware, "demonstrations", "calls of the module in successful runs"),
            (True, "current_instruction", "what the module is told at present"),
            (self.tip_aware, "tip", "how to write the new instruction"),
        ]
        return Signature(
            tuple(Field(name, desc=desc) for included, name, desc in inputs if included),
            (Field("instruction", desc="the new instruction and nothing else"),),
            "Write a better instruction for one module of a program that calls a language model. The instruction is "
            "shown with every input of the module; it must help a language model to give the right outputs.",
        )


@final
class InstructionWriter(Module):
    """Makes one call of the kind that ``step`` names: instructions are sampled, all other texts are greedy."""

    def __init__(self, context: ProposalContext, proposer: Proposer) -> None:
        kinds: Mapping[str, Any] = {
            "observe": Observe,
            "summarize": Summarize,
            "describe_program": DescribeProgram,
            "describe_module": DescribeModule,
            "write": context.signature(),
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


def written_text(trace: Trace) -> str:
    """Returns the text that a call wrote, without quotes or marks around it; empty if it could not be parsed."""
    text = str(next(iter(trace.prediction.values()))).strip() if trace.prediction else ""
    for quote in _QUOTES:
        if text.startswith(quote) and text.endswith(quote) and text.count(quote) == 2:
            text = text[len(quote) : -len(quote)].strip()
    return text
