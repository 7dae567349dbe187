"""The errors of lmpipe, in one tree. Every exception that lmpipe raises on purpose is a `LmpipeError`.

    LmpipeError
    ├── ConfigError (ValueError)       an argument or a setting is invalid
    │   ├── MetricError                a metric failed, or did not return a number in [0, 1]
    │   ├── SignatureError             a signature is invalid, or inputs do not match it
    │   └── StrategyError              a strategy string cannot be parsed
    ├── SessionError (RuntimeError)    a program was called without an active session
    ├── ModuleError (RuntimeError)     a module was changed after its first run, or does not exist
    ├── ParseError                     a completion lacks a field that its signature asks for
    ├── EngineError                    an LM request or a retrieval failed
    │   └── TrainingDiverged           a training run reached NaN or infinite values
    ├── BudgetSpent                    a call was not made, or was stopped, because a budget is spent
    ├── ClusterError                   the machines of a cluster cannot do the work
    └── StoreError                     a run directory cannot be used
        ├── ConfigChanged              the run directory has other settings
        └── CorruptBlob                stored bytes do not match their checksum

A `ParseError`, `EngineError`, `BudgetSpent` or `MetricError` on one example becomes data: a trace with a failure and a
score of 0. All other errors end the call that raised them. Depends on nothing else in the package but
`lmpipe.text.display`.
"""

from __future__ import annotations

from lmpipe.text.display import shorten


class LmpipeError(Exception):
    """Base class of all errors that lmpipe raises on purpose."""


class ConfigError(LmpipeError, ValueError):
    """An argument or a setting is invalid."""


class MetricError(ConfigError):
    """A metric raised an exception, or did not return a number in [0, 1]."""


class SignatureError(ConfigError):
    """A signature is invalid, or inputs do not match it."""


class StrategyError(ConfigError):
    """A strategy string cannot be parsed."""


class SessionError(LmpipeError, RuntimeError):
    """A program was called without an active session, or the session lacks something that the program needs."""


class ModuleError(LmpipeError, RuntimeError):
    """A module was changed after its first run, or does not exist in its program."""


class ParseError(LmpipeError):
    """A completion lacks a field that its signature asks for, or the field cannot be parsed.

    Attributes:
        field: Name of the output field.
        problem: Description of the problem, at most 500 characters.
        text: Text of the completion, shortened to 2,000 characters.
    """

    def __init__(self, field: str, problem: str, text: str) -> None:
        self.field = field
        self.problem = shorten(problem, 500)
        self.text = shorten(text)
        super().__init__(f"field {field!r}: {self.problem}; the completion was {shorten(repr(self.text))}")

    def __reduce__(self) -> tuple[type[ParseError], tuple[str, str, str]]:
        """Copies and pickles the error by its three arguments; the default would pass the message alone."""
        return type(self), (self.field, self.problem, self.text)


class EngineError(LmpipeError):
    """An LM request or a retrieval failed."""


class TrainingDiverged(EngineError):
    """A loss, a gradient or a weight became NaN or infinite in a training run; none of its results are used.

    Attributes:
        step: Optimizer step at which it was noticed; 0 before the first.
        losses: Mean losses of the earlier steps.
    """

    def __init__(self, problem: str, step: int = 0, losses: tuple[float, ...] = ()) -> None:
        super().__init__(problem)
        self.step = step
        self.losses = losses


class BudgetSpent(LmpipeError):
    """An LM call or a retrieval was not made, or was stopped, because a budget is spent."""


class ClusterError(LmpipeError):
    """The machines of a cluster cannot do the work: they are missing, differ from one another, or fail too often."""


class StoreError(LmpipeError):
    """A run directory cannot be used."""


class ConfigChanged(StoreError):
    """The run directory has other settings."""


class CorruptBlob(StoreError):
    """Stored bytes do not match their checksum."""
