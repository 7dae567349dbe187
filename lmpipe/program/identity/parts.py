"""What decides what a value is and does: a label, and the parts that are looked at in turn.

Knows kinds of values; nothing of how parts are written, or of cycles.
"""

from __future__ import annotations

import copyreg
import dataclasses
import logging
import sys
import types
import typing
from collections.abc import Callable, Iterable
from enum import Enum
from functools import cached_property, lru_cache, singledispatch
from operator import itemgetter
from typing import Any, ForwardRef, NewType

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from typing_extensions import TypeAliasType

from lmpipe.embedder import Embedder
from lmpipe.lm import LM
from lmpipe.program.identity.bytecode import constant
from lmpipe.program.identity.code import Parts, Unidentified, class_parts, function_parts, module_parts
from lmpipe.program.identity.packages import package_of
from lmpipe.program.module import Module
from lmpipe.retriever import Retriever
from lmpipe.storage.store import RunStore

_NEW: Callable[..., object] = copyreg.__newobj__  # type: ignore[attr-defined]  # makes an object without __init__
_BOOKKEEPING = {"_frozen", "_paths"}  # attributes of a module that has run


@singledispatch
def parts_of(value: object) -> Parts:
    """The parts of a value that is neither a plain value nor a list, tuple, dict or set.

    Unless it is of a kind that is known, it consists of its class and of what pickle would keep of it.

    Raises:
        Unidentified: If nothing identifies it.
    """
    kind = type(value)
    if kind.__module__ == typing.__name__ and typing.get_origin(value) is not None:
        return _generic(value)
    if (torch := sys.modules.get("torch")) is not None and issubclass(kind, torch.Tensor):
        return _tensor(value, torch)
    made, given, state, items, pairs = _reduced(value)
    named: list[tuple[str, object]] = [("class", kind)]
    if made is not _NEW:
        named += [("made by", made), ("made of", given)]
    elif given[1:]:
        named += [("made of", given[1:])]
    named += _attributes(kind, state)
    return Parts("object", [*named, ("items", items), ("pairs", pairs)])


def _tensor(value: Any, torch: Any) -> Parts:
    """Pickle would keep the address of a tensor's storage."""
    try:
        data = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    except Exception as error:  # one without dense data
        raise _unidentified(value) from error
    dtype, shape = str(value.dtype), tuple(value.shape)
    named: list[tuple[str, object]] = [("class", type(value)), ("dtype", dtype), ("shape", shape), ("data", data)]
    return Parts("tensor", [*named, ("state", vars(value))])


def _reduced(value: object) -> tuple[Any, Any, Any, Any, Any]:
    """What pickle keeps: a function and its arguments that make the object, its state, and its items."""
    try:
        known = copyreg.dispatch_table.get(type(value))
        reduced = known(value) if known else value.__reduce_ex__(4)
        if isinstance(reduced, str):  # the name of a global
            return _NEW, (None, reduced), None, None, None
        made, given, state, items, pairs = (*reduced, None, None, None)[:5]
        return made, tuple(given), state, items and list(items), pairs and dict(pairs)
    except RecursionError:
        raise
    except Exception as error:  # the object's own code says what it consists of
        raise _unidentified(value) from error


def _unidentified(value: object) -> Unidentified:
    kind = type(value)
    name = kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
    return Unidentified(name, id(value))


def _attributes(kind: type, state: object) -> list[tuple[str, object]]:
    """The state of an object by attribute, less what its class leaves out and what follows from the rest."""
    if isinstance(state, list) and dataclasses.is_dataclass(kind):  # those with slots are pickled so
        state = dict(zip((field.name for field in dataclasses.fields(kind)), state, strict=False))
    halves = state if isinstance(state, tuple) and len(state) == 2 else (state,)  # without and with slots
    named: list[tuple[str, object]] = []
    for half in halves:
        if type(half) is dict and all(isinstance(name, str) for name in half):
            named += sorted(_kept(kind, half), key=itemgetter(0))
        elif half is not None:
            named.append(("state", half))
    return named


def _kept(kind: type, state: dict[str, object]) -> Iterable[tuple[str, object]]:
    fields = getattr(kind, "__dataclass_fields__", {})
    left_out = {name for name in state.keys() & fields if not fields[name].repr}
    for base in kind.__mro__:
        left_out |= {name for name in state.keys() & vars(base).keys() if isinstance(vars(base)[name], cached_property)}
    is_module = issubclass(kind, Module)
    for name, value in state.items():
        kept_by_us = is_module and (name in _BOOKKEEPING or type(value).__module__ == Module.__module__)
        if name not in left_out and not kept_by_us:
            yield name, value


parts_of.register(types.FunctionType, function_parts)
parts_of.register(type, class_parts)
parts_of.register(types.ModuleType, module_parts)


@parts_of.register(LM)
@parts_of.register(Retriever)
@parts_of.register(Embedder)
def _named(value: LM | Retriever | Embedder) -> Parts:
    """It is known by its name, whatever else it holds."""
    try:
        return Parts("named", [("name", value.name)])
    except Exception as error:  # the object's own code
        raise _unidentified(value) from error


@parts_of.register(RunStore)
@parts_of.register(logging.Logger)
@parts_of.register(logging.LoggerAdapter)
def _without_influence(value: object) -> Parts:
    return Parts("no part of a result", [])


@parts_of.register
def _method(value: types.MethodType) -> Parts:
    return Parts("method", [("function", value.__func__), ("self", value.__self__)])


@parts_of.register
def _builtin(value: types.BuiltinFunctionType) -> Parts:
    owner = value.__self__
    if not isinstance(owner, types.ModuleType):
        return Parts(f"method {value.__qualname__}", [("self", owner)])
    package = package_of(owner.__name__)
    if package is None:  # compiled code of the user's own
        raise _unidentified(value)
    return Parts(f"{package} {owner.__name__}.{value.__qualname__}", [])


@parts_of.register(types.GetSetDescriptorType)
@parts_of.register(types.MemberDescriptorType)
def _descriptor(value: types.GetSetDescriptorType | types.MemberDescriptorType) -> Parts:
    return Parts(f"descriptor {value.__name__}", [])


@parts_of.register
def _code(value: types.CodeType) -> Parts:
    return Parts(constant(value), [])


@parts_of.register(staticmethod)
@parts_of.register(classmethod)
def _wrapped(value: staticmethod[..., Any] | classmethod[Any, ..., Any]) -> Parts:
    return Parts(type(value).__name__, [("function", value.__func__)])


@parts_of.register
def _property(value: property) -> Parts:
    return Parts("property", [("get", value.fget), ("set", value.fset), ("delete", value.fdel)])


@parts_of.register
def _cached_property(value: cached_property) -> Parts:  # type: ignore[type-arg]
    return Parts("cached property", [("function", value.func)])


@parts_of.register(type(lru_cache(repr)))
def _cached_function(value: Any) -> Parts:
    return Parts("cached function", [("function", value.__wrapped__), ("settings", value.cache_parameters())])


@parts_of.register
def _member(value: Enum) -> Parts:
    return Parts("member", [("class", type(value)), ("name", value.name), ("value", value.value)])


@parts_of.register
def _model(value: BaseModel) -> Parts:
    if type(value).__getstate__ is not BaseModel.__getstate__:  # it says what is left out
        return parts_of.dispatch(object)(value)
    fields = type(value).model_fields
    kept = {name: item for name, item in vars(value).items() if name in fields and fields[name].repr}
    extra, private = value.__pydantic_extra__, value.__pydantic_private__
    return Parts("model", [("class", type(value)), *kept.items(), ("extra", extra), ("private", private)])


@parts_of.register
def _field(value: dataclasses.Field) -> Parts:  # type: ignore[type-arg]
    names = ("name", "default", "default_factory", "metadata", "init", "repr")
    return Parts("field", [(name, getattr(value, name)) for name in names])


@parts_of.register
def _model_field(value: FieldInfo) -> Parts:
    names = [name for name in FieldInfo.__slots__ if not name.startswith("_")]
    return Parts("field", [(name, getattr(value, name, None)) for name in names])


@parts_of.register(types.GenericAlias)
@parts_of.register(types.UnionType)
def _generic(value: Any) -> Parts:
    return Parts("type", [("origin", typing.get_origin(value)), ("arguments", typing.get_args(value))])


@parts_of.register
def _alias(value: TypeAliasType) -> Parts:
    return Parts(f"type {value.__name__}", [("value", value.__value__)])


@parts_of.register
def _new_type(value: NewType) -> Parts:
    return Parts(f"type {value.__name__}", [("type", value.__supertype__)])


@parts_of.register
def _forward(value: ForwardRef) -> Parts:
    return Parts(f"type {value.__forward_arg__}", [])


@parts_of.register(set)
@parts_of.register(frozenset)
def _set(value: set[Any] | frozenset[Any]) -> Parts:
    """Of a class of the user; pickle would keep the elements in the order that this process has."""
    return Parts("set", [("class", type(value)), ("items", frozenset(value)), *_attributes(type(value), vars(value))])
