"""Examples that go into a program and predictions that come out of it.

Both clean the text that they are given (`lmpipe.text.cleaning`), so that everything downstream can handle it. Knows
nothing of signatures, LMs or metrics.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, final

from lmpipe.errors import ConfigError
from lmpipe.storage.hashing import digest
from lmpipe.text.cleaning import clean_value
from lmpipe.text.display import shown


@final
@dataclass(frozen=True)
class Example:
    """One labelled record.

    Args:
        inputs: The keyword arguments of the program.
        labels: What is known of the right outputs, by field name. Programs never see it; metrics do.
        id: Stable name of the record; by default a digest of its content.

    Attributes:
        replaced: How many characters of it were no text and were replaced by U+FFFD.

    Raises:
        ConfigError: If inputs or labels are no mapping, the id is no text, or something in it contains itself.
    """

    inputs: Mapping[str, Any]
    labels: Mapping[str, Any] = field(default_factory=dict)
    id: str = ""
    replaced: int = field(init=False, default=0, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name, value in (("inputs", self.inputs), ("labels", self.labels)):
            if not isinstance(value, Mapping):
                raise ConfigError(
                    f"the {name} of an example are {shown(value, 100)}; pass a dict of field names to values"
                )
        if not isinstance(self.id, str):
            raise ConfigError(f"the id of an example is {shown(self.id, 100)}; pass a text")
        replaced: list[int] = []
        try:
            values = clean_value([dict(self.inputs), dict(self.labels), self.id], replaced.append)
        except RecursionError:
            raise ConfigError("an example holds something that contains itself, or is nested too deeply") from None
        for name, value in zip(("inputs", "labels", "id"), values, strict=True):
            object.__setattr__(self, name, value)
        object.__setattr__(self, "replaced", sum(replaced))
        if not self.id:
            object.__setattr__(self, "id", digest([self.inputs, self.labels])[:12])

    @cached_property
    def digest(self) -> str:
        """Identity by content, id included."""
        return digest([self.id, self.inputs, self.labels])


def snapshot(value: Any) -> Any:
    """The value as it is now: nested lists, dicts, sets and tuples are copied, so later changes do not reach them."""
    if isinstance(value, dict):
        return {key: snapshot(item) if isinstance(item, _NESTED) else item for key, item in value.items()}
    if type(value) in _NESTED:
        return type(value)(snapshot(item) if isinstance(item, _NESTED) else item for item in value)
    return value


_NESTED = (dict, list, set, tuple, frozenset)


@final
class Prediction(Mapping[str, Any]):
    """The outputs of a program or module: a read-only mapping whose items are attributes too."""

    __slots__ = ("_values",)
    _values: dict[str, Any]

    def __init__(self, **values: Any) -> None:
        object.__setattr__(self, "_values", values)

    def __getitem__(self, name: str) -> Any:
        return self._values[name]

    def __getattr__(self, name: str) -> Any:
        try:
            return self._values[name]
        except KeyError:
            raise AttributeError(f"this prediction has no field {name!r}; it has {', '.join(self._values)}") from None

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError("a Prediction cannot be changed; make a new one")

    def __reduce__(self) -> tuple[Any, ...]:
        return _prediction, (self._values,)

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __repr__(self) -> str:
        return f"Prediction({', '.join(f'{name}={value!r}' for name, value in self._values.items())})"


def _prediction(values: dict[str, Any]) -> Prediction:
    """A prediction that was copied or pickled."""
    return Prediction(**values)
