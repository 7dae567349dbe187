"""Every error that lmpipe raises on purpose.

    LmpipeError
    ├── ConfigError          a value that the caller passed cannot be used
    │   ├── MetricError      a metric failed, or gave no number in [0, 1]
    │   ├── SignatureError   a signature, or the inputs given to it, do not fit
    │   └── StrategyError    a strategy string cannot be read
    ├── SessionError         a program was called where no session is active
    ├── ModuleError          a module was changed after its first run, or cannot be found
    ├── ParseError           a completion does not hold the fields that its signature asks for
    ├── EngineError          an LM request or a retrieval could not be answered
    │   └── TrainingDiverged a training came to NaN or infinite values
    ├── BudgetSpent          a call was not made, or was ended, because a budget is spent
    ├── ClusterError         the machines of a cluster cannot do the work
    └── StoreError           a run directory cannot be used
        ├── ConfigChanged    it belongs to a run with other settings
        └── CorruptBlob      stored bytes no longer match their checksum

`ParseError`, `EngineError`, `BudgetSpent` and `MetricError` of one example become data (a trace with a failure, a score
of 0); the others end the call that raised them. Knows nothing of the rest of the package but how text is shortened.
"""

from __future__ import annotations

from lmpipe.text.display import shorten


class LmpipeError(Exception):
    """Base of every error that lmpipe raises on purpose."""


class ConfigError(LmpipeError, ValueError):
    """A value that the caller passed cannot be used."""


class MetricError(ConfigError):
    """A metric raised an exception, or gave something else than a number in [0, 1]."""


class SignatureError(ConfigError):
    """A signature, or the inputs given to it, do not fit."""


class StrategyError(ConfigError):
    """A strategy string cannot be read."""


class SessionError(LmpipeError, RuntimeError):
    """A program was called where no session is active, or the session lacks what it needs."""


class ModuleError(LmpipeError, RuntimeError):
    """A module was changed after its first run, or cannot be found in its program."""


class ParseError(LmpipeError):
    """A completion does not hold a field that its signature asks for.

    Attributes:
        field: Name of the output field that could not be read.
        problem: What is wrong with it, in at most 500 characters.
        text: The completion; of one with more than 2,000 characters, its head and tail, with its length between them.
    """

    def __init__(self, field: str, problem: str, text: str) -> None:
        self.field = field
        self.problem = shorten(problem, 500)
        self.text = shorten(text)
        super().__init__(f"field {field!r}: {self.problem}; the completion was {shorten(repr(self.text))}")

    def __reduce__(self) -> tuple[type[ParseError], tuple[str, str, str]]:
        """An exception is copied and pickled by the arguments of its class, which are not the message here."""
        return type(self), (self.field, self.problem, self.text)


class EngineError(LmpipeError):
    """An LM request or a retrieval could not be answered."""


class TrainingDiverged(EngineError):
    """A loss, a gradient or a weight of a training became NaN or infinite; nothing of that training is used.

    Attributes:
        step: The optimizer step that it was found at, 0 before the first.
        losses: Mean losses of the steps before.
    """

    def __init__(self, problem: str, step: int = 0, losses: tuple[float, ...] = ()) -> None:
        super().__init__(problem)
        self.step = step
        self.losses = losses


class BudgetSpent(LmpipeError):
    """An LM call or a retrieval was not made, or was ended, because a budget is spent."""


class ClusterError(LmpipeError):
    """The machines of a cluster cannot do the work: they are not there, differ, or were lost too often."""


class StoreError(LmpipeError):
    """A run directory cannot be used."""


class ConfigChanged(StoreError):
    """The run directory belongs to a run with other settings."""


class CorruptBlob(StoreError):
    """Stored bytes no longer match their checksum."""
