"""Who writes instructions: an LM, the weights it runs on, and how it is sampled.

Knows nothing of what it is asked.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, final

from lmpipe import LM, ProgramState, Sampling, Session
from lmpipe.extend import ConfigError


@final
@dataclass(frozen=True)
class Proposer:
    """The LM that writes instructions; by default the one that the program runs on.

    Args:
        lm: Another LM.
        role: Which of the session's LMs writes, if not another one.
        weights: Whether the session's LM writes on its base weights or on those of the state. Fine-tuning on a task
            can cost an LM the ability to write anything but answers.
        temperature: Of the instructions, so that they differ (in MIPROv2, ``init_temperature``). Small LMs need less.
        max_tokens: Most new tokens of what it writes.

    Raises:
        ConfigError: If another LM is to run on the weights of the state, or the sampling is out of its range.
    """

    lm: LM | None = None
    role: str = "lm"
    weights: Literal["base", "state"] = "base"
    temperature: float = 1.0
    max_tokens: int = 512

    def __post_init__(self) -> None:
        if self.lm is not None and self.weights == "state":
            raise ConfigError(
                "the weights of a state belong to the session's LM, not to the proposer's; drop lm= or weights='state'"
            )
        Sampling(temperature=self.temperature, max_tokens=self.max_tokens)

    @property
    def sampling(self) -> Sampling:
        """How it is sampled."""
        return Sampling(temperature=self.temperature, max_tokens=self.max_tokens)

    def place(self, state: ProgramState, session: Session) -> tuple[ProgramState, Session]:
        """State and session in which a program of the proposer's own runs, when it is asked about a state."""
        asked = replace(session, lm={self.role: self.lm or session.lm_of(self.role)})
        weights = asked.untuned_weights() if self.weights == "base" else {self.role: state.weights_of(self.role, "")}
        return ProgramState(prompts={}, weights=weights), asked
