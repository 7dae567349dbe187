"""The walk over all objects that a value refers to, which computes their common digest.

Functions, classes and modules of the user are entries of a list, and other texts refer to them by number, so they may
refer to one another in any way and depth. All other values are written in place, so equal values have equal texts,
whether they are the same object or not.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from operator import itemgetter
from types import FunctionType, MappingProxyType, ModuleType
from typing import Any, final

from lmpipe.program.identity.bytecode import constant_text
from lmpipe.program.identity.code import IdentityError, package_label
from lmpipe.program.identity.components import components_of
from lmpipe.storage.hashing import digest_bytes

_ATOMS = frozenset({type(None), bool, int, float, complex, str, bytes, type(Ellipsis), type(NotImplemented)})
_CODE = (FunctionType, type, ModuleType)
_SHORT = 200  # characters; longer texts are replaced by their digest
_NAMES = 5  # names in the path of a message about values that are nested too deeply
_DEPTH = 3  # depth of the sketches by which elements of a set are sorted


@final
class Walk:
    """One walk; the values must not change meanwhile.

    Args:
        outer: The walk that reached the value as an element of a set, if any.
    """

    def __init__(self, outer: Walk | None = None) -> None:
        self._outer = outer
        self._path: list[str] = list(outer._path) if outer else []
        self._sketches: dict[int, str] = outer._sketches if outer else {}  # id → sketch of an element of a set
        self._element_digests: dict[int, str] = {}  # id → digest of an element of a set with an ambiguous sketch
        self._entries: list[tuple[object, list[str]]] = []  # functions, classes and modules, each with its path
        self._texts: dict[int, str] = {}  # id → text
        self._alive: list[object] = outer._alive if outer else []  # references that keep the ids above from reuse
        self._open: dict[int, int] = {}  # id → depth of each value that is being written
        self._outermost: float = math.inf  # depth of the outermost open value that was referred to

    def digest(self, value: object) -> str:
        """Returns the digest of a value (32 hex characters).

        Raises:
            IdentityError: If an object that the value refers to cannot be identified; the message names its path.
        """
        try:
            texts = [self._text(value)]
            for entry, path in self._entries:  # the list grows during the loop
                self._path = list(path)
                texts.append(self._labelled(*components_of.dispatch(type(entry))(entry)))
        except IdentityError as error:
            raise error if error.path else IdentityError(error.description, error.object_id, self._path) from error
        except RecursionError:
            raise IdentityError("values nested too deeply", id(value), self._path[:_NAMES]) from None
        return digest_bytes("\n".join(texts).encode("utf-8", "surrogatepass"))

    @property
    def code(self) -> list[tuple[object, list[str]]]:
        """Functions, classes and modules of the user that were reached, each with the names that lead to it."""
        return self._entries

    def _text(self, value: object) -> str:
        if type(value) in _ATOMS:
            return _short(_atom(value))
        if (text := self._texts.get(id(value))) is not None:
            if text[0] == "#":  # it refers to an enclosing value, and so do all values that are open now
                self._outermost = -1
            return text
        if (depth := self._open.get(id(value))) is not None:
            self._outermost = min(self._outermost, depth)
            return f"^{len(self._open) - depth}"
        if issubclass(type(value), _CODE):  # not `isinstance`, which a proxy can deceive
            return self._remember(value, self._code(value))
        flat = _flat(value)
        return self._nested(value) if flat is None else _short(flat)

    def _remember(self, value: object, text: str) -> str:
        self._texts[id(value)] = text
        self._alive.append(value)
        return text

    def _code(self, value: Any) -> str:
        """The text of a function, class or module: its label, or the number of a new entry if it is the user's."""
        if (label := package_label(value)) is not None:
            return f"<{label!r}>"
        name = value.__name__ if isinstance(value, ModuleType) else value.__qualname__
        self._entries.append((value, [*self._path, *([] if self._path[-1:] == [name] else [name])]))
        return f"@{len(self._entries)}"

    def _nested(self, value: object) -> str:
        """The text of a value that has parts."""
        depth, outer = len(self._open), self._outermost
        self._open[id(value)], self._outermost = depth, math.inf
        text = _short(self._write_parts(value))
        del self._open[id(value)]
        closed = self._outermost >= depth  # it does not refer to an enclosing value
        self._outermost = outer if closed else min(outer, self._outermost)
        self._remember(value, text if closed else f"#{len(self._texts)}")
        return text

    def _write_parts(self, value: Any) -> str:
        kind = type(value)
        if kind is list or kind is tuple:
            return f"{kind.__name__}[{','.join(map(self._text, value))}]"
        if kind is dict or kind is MappingProxyType:
            if all(type(name) is str for name in value):
                return self._labelled("dict", sorted(value.items(), key=itemgetter(0)))
            return self._labelled("dict of keys", [(self._text(key), value[key]) for key in self._in_order(value)])
        if kind is set or kind is frozenset:
            return f"{kind.__name__}{{{','.join(map(self._text, self._in_order(value)))}}}"
        return self._labelled(*components_of.dispatch(kind)(value))

    def _labelled(self, label: str, parts: Iterable[tuple[str, object]]) -> str:
        texts = []
        for name, value in parts:
            self._path.append(name)
            texts.append(f"{name!r}:{self._text(value)}")
            self._path.pop()
        return f"{label!r}({','.join(texts)})"

    def _in_order(self, elements: Iterable[object]) -> list[object]:
        """The elements of a set in an order that is the same in every process: sorted by sketch, then by digest."""
        keyed = [(self._sketch_of(element), element) for element in elements]
        if self._outer is None:  # within an element of a set, only by sketch: digests would take unbounded time
            counts = Counter(key for key, _ in keyed)
            keyed = [(key if counts[key] == 1 else key + self._digest_of(element), element) for key, element in keyed]
        return [element for _, element in sorted(keyed, key=itemgetter(0))]

    def _sketch_of(self, element: object) -> str:
        if id(element) not in self._sketches:
            self._alive.append(element)
            self._sketches[id(element)] = _sketch(element, _DEPTH)
        return self._sketches[id(element)]

    def _digest_of(self, element: object) -> str:
        if id(element) not in self._element_digests:
            self._element_digests[id(element)] = Walk(self).digest(element)
        return self._element_digests[id(element)]


def _sketch(value: Any, depth: int) -> str:
    """Describes a value down to a depth, independently of the walk; different values may have the same sketch."""
    kind = type(value)
    if kind in _ATOMS:
        return _atom(value)
    if issubclass(kind, _CODE):
        return package_label(value) or components_of.dispatch(kind)(value).label
    if not depth:
        return str(kind.__qualname__)
    if kind is list or kind is tuple:
        return f"{kind.__name__}{[_sketch(item, depth - 1) for item in value]}"
    if kind is set or kind is frozenset:
        return f"{kind.__name__}{sorted(_sketch(item, depth - 1) for item in value)}"
    if kind is dict or kind is MappingProxyType:
        return f"dict{sorted((_sketch(key, depth - 1), _sketch(item, depth - 1)) for key, item in value.items())}"
    label, parts = components_of.dispatch(kind)(value)
    return f"{label}{[(name, _sketch(item, depth - 1)) for name, item in parts]}"


def _atom(value: object) -> str:
    if type(value) is bytes and len(value) > _SHORT:
        return f"bytes {digest_bytes(value)}"
    return constant_text(value) if type(value) is int else repr(value)


def _short(text: str) -> str:
    return text if len(text) <= _SHORT else f"%{digest_bytes(text.encode('utf-8', 'surrogatepass'))}"


def _flat(value: Any) -> str | None:
    """The text of a list, tuple, dict or set of plain values, in one pass; None for other values."""
    kind = type(value)
    if kind is list or kind is tuple:
        return _plain(value) if _ATOMS.issuperset(map(type, value)) else None
    if (kind is set or kind is frozenset) and _ATOMS.issuperset(map(type, value)):
        return f"{kind.__name__}{sorted(map(_atom, value))}"
    if kind is dict and _ATOMS.issuperset(map(type, value.values())) and all(type(name) is str for name in value):
        return f"dict{_plain(sorted(value.items()))}"
    return None


def _plain(value: Any) -> str:
    """The `repr` of a value, even if it contains integers that are too large for `repr`."""
    try:
        return repr(value)
    except ValueError:
        return constant_text(tuple(value))
