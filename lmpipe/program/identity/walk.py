"""The walk over everything that a value reaches, which ends in one digest.

Functions, classes and modules of the user are entries of a list, and others refer to them by number; so they may refer
to one another in any way and depth. All other values are written where they stand. Of these, equal values are alike,
whether they are one object or two.
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
from lmpipe.program.identity.parts import components_of
from lmpipe.storage.hashing import digest_bytes

_ATOMS = frozenset({type(None), bool, int, float, complex, str, bytes, type(Ellipsis), type(NotImplemented)})
_CODE = (FunctionType, type, ModuleType)
_SHORT = 200  # characters of a text that stands for itself
_NAMES = 5  # that lead to values nested too deeply
_DEPTH = 3  # of what elements of a set are put in order by


@final
class Walk:
    """One walk; the values must not change meanwhile.

    Args:
        outer: The walk that met the value as an element of a set.
    """

    def __init__(self, outer: Walk | None = None) -> None:
        self._outer = outer
        self._way: list[str] = list(outer._way) if outer else []
        self._sketches: dict[int, str] = outer._sketches if outer else {}  # id → sketch of an element of a set
        self._wholes: dict[int, str] = {}  # id → digest of an element of a set that looks like another
        self._entries: list[tuple[object, list[str]]] = []  # code of the user, with the way to it
        self._known: dict[int, str] = {}  # id → text
        self._held: list[object] = outer._held if outer else []  # what has these ids, so that nothing else gets them
        self._open: dict[int, int] = {}  # id → depth of each value that is being written
        self._outermost: float = math.inf  # depth of the outermost open value that was referred to

    def digest(self, value: object) -> str:
        """The digest of a value (32 hex characters).

        Raises:
            Unidentified: If something that it reaches cannot be identified; the text says what and where.
        """
        try:
            texts = [self._text(value)]
            for entry, way in self._entries:  # more are found meanwhile
                self._way = list(way)
                texts.append(self._named(*components_of.dispatch(type(entry))(entry)))
        except IdentityError as error:
            raise error if error.way else IdentityError(error.what, error.thing, self._way) from error
        except RecursionError:
            raise IdentityError("values nested too deeply", id(value), self._way[:_NAMES]) from None
        return digest_bytes("\n".join(texts).encode("utf-8", "surrogatepass"))

    def _text(self, value: object) -> str:
        if type(value) in _ATOMS:
            return _short(_atom(value))
        if (known := self._known.get(id(value))) is not None:
            if known[0] == "#":  # it refers to what is around it, and so does all that is open now
                self._outermost = -1
            return known
        if (depth := self._open.get(id(value))) is not None:
            self._outermost = min(self._outermost, depth)
            return f"^{len(self._open) - depth}"
        if issubclass(type(value), _CODE):  # `isinstance` would believe what a proxy says of itself
            return self._remember(value, self._code(value))
        flat = _flat(value)
        return self._nested(value) if flat is None else _short(flat)

    def _remember(self, value: object, text: str) -> str:
        self._known[id(value)] = text
        self._held.append(value)
        return text

    def _code(self, value: Any) -> str:
        """What stands for a function, class or module: the user's own gets a number, and a place on the list."""
        if (label := package_label(value)) is not None:
            return f"<{label!r}>"
        name = value.__name__ if isinstance(value, ModuleType) else value.__qualname__
        self._entries.append((value, [*self._way, *([] if self._way[-1:] == [name] else [name])]))
        return f"@{len(self._entries)}"

    def _nested(self, value: object) -> str:
        """The text of a value that has parts."""
        depth, outer = len(self._open), self._outermost
        self._open[id(value)], self._outermost = depth, math.inf
        text = _short(self._written(value))
        del self._open[id(value)]
        closed = self._outermost >= depth  # it refers to nothing around it
        self._outermost = outer if closed else min(outer, self._outermost)
        self._remember(value, text if closed else f"#{len(self._known)}")
        return text

    def _written(self, value: Any) -> str:
        kind = type(value)
        if kind is list or kind is tuple:
            return f"{kind.__name__}[{','.join(map(self._text, value))}]"
        if kind is dict or kind is MappingProxyType:
            if all(type(name) is str for name in value):
                return self._named("dict", sorted(value.items(), key=itemgetter(0)))
            return self._named("dict of keys", [(self._text(key), value[key]) for key in self._in_order(value)])
        if kind is set or kind is frozenset:
            return f"{kind.__name__}{{{','.join(map(self._text, self._in_order(value)))}}}"
        return self._named(*components_of.dispatch(kind)(value))

    def _named(self, label: str, named: Iterable[tuple[str, object]]) -> str:
        texts = []
        for name, value in named:
            self._way.append(name)
            texts.append(f"{name!r}:{self._text(value)}")
            self._way.pop()
        return f"{label!r}({','.join(texts)})"

    def _in_order(self, elements: Iterable[object]) -> list[object]:
        """The elements of a set in an order that is the same in every process."""
        seen = [(self._looks(element), element) for element in elements]
        if self._outer is None:  # within an element of a set, looks must do: the work would have no bound
            counts = Counter(text for text, _ in seen)
            seen = [(text if counts[text] == 1 else text + self._whole(element), element) for text, element in seen]
        return [element for _, element in sorted(seen, key=itemgetter(0))]

    def _looks(self, element: object) -> str:
        if id(element) not in self._sketches:
            self._held.append(element)
            self._sketches[id(element)] = _sketch(element, _DEPTH)
        return self._sketches[id(element)]

    def _whole(self, element: object) -> str:
        if id(element) not in self._wholes:
            self._wholes[id(element)] = Walk(self).digest(element)
        return self._wholes[id(element)]


def _sketch(value: Any, depth: int) -> str:
    """What a value looks like down to a depth, whatever was walked before; values that differ may look alike."""
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
    label, named = components_of.dispatch(kind)(value)
    return f"{label}{[(name, _sketch(item, depth - 1)) for name, item in named]}"


def _atom(value: object) -> str:
    if type(value) is bytes and len(value) > _SHORT:
        return f"bytes {digest_bytes(value)}"
    return constant_text(value) if type(value) is int else repr(value)


def _short(text: str) -> str:
    return text if len(text) <= _SHORT else f"%{digest_bytes(text.encode('utf-8', 'surrogatepass'))}"


def _flat(value: Any) -> str | None:
    """The text of a list, tuple, dict or set of plain values at once; none if it is something else."""
    kind = type(value)
    if kind is list or kind is tuple:
        return _plain(value) if _ATOMS.issuperset(map(type, value)) else None
    if (kind is set or kind is frozenset) and _ATOMS.issuperset(map(type, value)):
        return f"{kind.__name__}{sorted(map(_atom, value))}"
    if kind is dict and _ATOMS.issuperset(map(type, value.values())) and all(type(name) is str for name in value):
        return f"dict{_plain(sorted(value.items()))}"
    return None


def _plain(value: Any) -> str:
    """As `repr`, which refuses very large integers."""
    try:
        return repr(value)
    except ValueError:
        return constant_text(tuple(value))
