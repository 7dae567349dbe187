"""Examples, which are the inputs of a program and their labels, and predictions, which are its outputs.

The strings of an example are cleaned (`lmpipe.text.cleaning`), so that all later steps can handle them. Knows nothing
about signatures, LMs or metrics.
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
from lmpipe.text.reprs import short_repr


@final
@dataclass(frozen=True)
class Example:
    """One labelled record.

    Args:
        inputs: Keyword arguments of the program.
        labels: Correct outputs by field name; metrics see them, programs never do.
        id: Stable name of the record; by default a digest of its content.

    Attributes:
        replaced: Number of characters that were not valid text and were replaced by U+FFFD.

    Raises:
        ConfigError: If inputs or labels are not a mapping, the id is not a string, or a value contains itself.
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
            raise ConfigError(f"the id of an example is {shown(self.id, 100)}; pass a string")
        replaced: list[int] = []
        try:
            values = clean_value([dict(self.inputs), dict(self.labels), self.id], replaced.append)
        except RecursionError:
            raise ConfigError("an example has a value that contains itself or is nested too deeply") from None
        for name, value in zip(("inputs", "labels", "id"), values, strict=True):
            object.__setattr__(self, name, value)
        object.__setattr__(self, "replaced", sum(replaced))
        if not self.id:
            object.__setattr__(self, "id", digest([self.inputs, self.labels])[:12])

    def __repr__(self) -> str:
        return short_repr(self, id=self.id, inputs=dict(self.inputs), labels=dict(self.labels))

    @cached_property
    def digest(self) -> str:
        """Digest of inputs, labels and id."""
        return digest([self.id, self.inputs, self.labels])


def snapshot(value: Any) -> Any:
    """Copies a value: nested lists, dicts, sets and tuples, so that later changes to them do not affect the copy."""
    if isinstance(value, dict):
        return {key: snapshot(item) if isinstance(item, _NESTED) else item for key, item in value.items()}
    if type(value) in _NESTED:
        return type(value)(snapshot(item) if isinstance(item, _NESTED) else item for item in value)
    return value


_NESTED = (dict, list, set, tuple, frozenset)


@final
class Prediction(Mapping[str, Any]):
    """The outputs of a program or module: a read-only mapping whose items are also attributes."""

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
        raise AttributeError("a Prediction cannot be changed; create a new one")

    def __reduce__(self) -> tuple[Any, ...]:
        return _restore_prediction, (self._values,)

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __repr__(self) -> str:
        return short_repr(self, **self._values)


def _restore_prediction(values: dict[str, Any]) -> Prediction:
    """Restores a prediction that was copied or pickled."""
    return Prediction(**values)
