"""The LM that writes instructions, the weights it runs on, and its sampling.

Knows nothing about its prompts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, final

from lmpipe import LM, ProgramState, Sampling, Session
from lmpipe.extend import ConfigError


@final
@dataclass(frozen=True)
class Proposer:
    """The LM that writes instructions; by default the LM of the program.

    Args:
        lm: LM to use in place of the session's.
        role: Role of the session's LM that writes, if `lm` is not given.
        weights: Whether the session's LM writes with its base weights or with those of the state. An LM that was
            fine-tuned on a task may no longer write anything but answers.
        temperature: Sampling temperature, which makes proposals differ (in MIPROv2, ``init_temperature``). Small LMs
            need a lower one.
        max_tokens: Maximum number of new tokens of a completion.

    Raises:
        ConfigError: If `lm` is to run with the weights of the state, or the sampling is out of its range.
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
        """Sampling of its completions."""
        return Sampling(temperature=self.temperature, max_tokens=self.max_tokens)

    def bind(self, state: ProgramState, session: Session) -> tuple[ProgramState, Session]:
        """Returns the state and session for the proposer's program, made from those of the optimized program."""
        session = replace(session, lm={self.role: self.lm or session.lm_of(self.role)})
        weights = session.untuned_weights() if self.weights == "base" else {self.role: state.weights_of(self.role, "")}
        return ProgramState(prompts={}, weights=weights), session
