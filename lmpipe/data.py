"""Examples, which are the inputs of a program and their labels, and predictions, which are its outputs.

The strings of an example are cleaned (`lmpipe.text.cleaning`), so that all later steps can handle them. Knows nothing
about signatures, LMs or metrics.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, final

from typing_extensions import Never

from lmpipe.errors import ConfigError
from lmpipe.storage.hashing import digest
from lmpipe.text.cleaning import clean_value
from lmpipe.text.display import did_you_mean, shown
from lmpipe.text.reprs import short_repr

_NOTHING: Mapping[str, Any] = MappingProxyType({})


@final
@dataclass(frozen=True)
class Example:
    """One labelled record. Numbers and arrays of numpy become numbers and lists of Python.

    Args:
        inputs: Keyword arguments of the program.
        labels: Correct outputs by field name; metrics see them, programs never do.
        id: Stable name of the record; by default a digest of its content.

    Attributes:
        replaced: Number of characters that were not valid text and were replaced by U+FFFD.

    Raises:
        ConfigError: If inputs or labels are not a mapping of names to values, the id is not a string, a value contains
            itself, or fields are passed as arguments.
    """

    inputs: Mapping[str, Any]
    labels: Mapping[str, Any] = field(default_factory=dict)
    id: str = ""
    replaced: int = field(init=False, default=0, repr=False, compare=False)

    def __init__(
        self,
        inputs: Mapping[str, Any] = _NOTHING,
        labels: Mapping[str, Any] = _NOTHING,
        id: str = "",  # noqa: A002
        **fields: Never,
    ) -> None:
        if fields or inputs is _NOTHING:
            raise ConfigError(
                f"an example has a dict of inputs and one of labels; write Example(inputs={dict(fields)!r}, "
                "labels={…}), with the correct outputs in labels"
            )
        for name, value in (("inputs", inputs), ("labels", labels)):
            _check_fields(name, value)
        if not isinstance(id, str):
            raise ConfigError(f"the id of an example is {shown(id, 100)}; pass a string, such as id={str(id)!r}")
        replaced: list[int] = []
        try:
            values = clean_value(without_numpy([dict(inputs), dict(labels), id]), replaced.append)
        except RecursionError:
            raise ConfigError("an example has a value that contains itself or is nested too deeply") from None
        for name, value in zip(("inputs", "labels", "id"), values, strict=True):
            object.__setattr__(self, name, value)
        object.__setattr__(self, "replaced", sum(replaced))
        if not self.id:
            object.__setattr__(self, "id", digest([self.inputs, self.labels])[:12])

    def __repr__(self) -> str:
        return short_repr(self, id=self.id, inputs=dict(self.inputs), labels=dict(self.labels))

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            fields = [part for part in ("labels", "inputs") if name in self.__dict__.get(part, ())]
            hint = f"; write example.{fields[0]}[{name!r}]" if fields else ""
            raise AttributeError(f"an Example has no attribute {name!r}{hint}")

    @cached_property
    def digest(self) -> str:
        """Digest of inputs, labels and id."""
        return digest([self.id, self.inputs, self.labels])


def _check_fields(part: str, fields: object) -> None:
    """Raises a ConfigError if the inputs or the labels of an example are not a dict with names as keys."""
    if not isinstance(fields, Mapping):
        name = "question" if part == "inputs" else "answer"
        raise ConfigError(
            f"the {part} of an example are {shown(fields, 100)}; pass a dict of field names to values, such as "
            f"{part}={{{name!r}: {shown(fields, 50)}}}"
        )
    unnamed = [key for key in fields if not isinstance(key, str)]
    if unnamed:
        raise ConfigError(
            f"the {part} of an example have the field {shown(unnamed[0], 50)}; names of fields are strings, so write "
            f"{str(unnamed[0])!r}"
        )


def without_numpy(value: Any) -> Any:
    """Returns a value with numbers and arrays of numpy as those of Python, also in nested lists, dicts and tuples.

    A value without any is returned itself.
    """
    if type(value) in _PLAIN or (numpy := sys.modules.get("numpy")) is None:
        return value
    if isinstance(value, (numpy.generic, numpy.ndarray)):
        return value.tolist()
    if isinstance(value, dict):
        pairs = [(without_numpy(key), without_numpy(item)) for key, item in value.items()]
        same = all(key is old and item is value[old] for (key, item), old in zip(pairs, value, strict=True))
        return value if same else dict(pairs)
    if type(value) in (list, tuple):
        items = type(value)(map(without_numpy, value))
        return value if all(map(operator.is_, items, value)) else items
    return value


_PLAIN = frozenset([str, int, float, bool, type(None)])


def snapshot(value: Any) -> Any:
    """Copies a value: nested lists, dicts, sets and tuples, so that later changes to them do not affect the copy."""
    if isinstance(value, dict):
        return {key: item if type(item) in _PLAIN else snapshot(item) for key, item in value.items()}
    if type(value) is list:
        return [item if type(item) in _PLAIN else snapshot(item) for item in value]
    if type(value) in _NESTED:
        return type(value)(map(snapshot, value))
    return value


_NESTED = (set, tuple, frozenset)


@final
class Prediction(Mapping[str, Any]):
    """The outputs of a program or module: a read-only mapping whose items are also attributes."""

    __slots__ = ("_values",)
    _values: dict[str, Any]

    def __init__(self, *unnamed: Never, **values: Any) -> None:
        if unnamed:
            raise ConfigError(f"an output has a name; write Prediction(answer={shown(unnamed[0], 100)})")
        object.__setattr__(self, "_values", values)

    def __getitem__(self, name: str) -> Any:
        try:
            return self._values[name]
        except KeyError:
            raise KeyError(self._no_field(name)) from None

    def __getattr__(self, name: str) -> Any:
        try:
            return self._values[name]
        except KeyError:
            raise AttributeError(self._no_field(name)) from None

    def _no_field(self, name: str) -> str:
        known = ", ".join(self._values) or "none"
        return f"this prediction has no field {name!r}; it has {known}{did_you_mean(name, self._values)}"

    def __setattr__(self, name: str, value: object) -> None:
        code = f"Prediction(**{{**prediction, {name!r}: {shown(value, 50)}}})"
        raise AttributeError(f"a Prediction cannot be changed; create a new one: {code}")

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
