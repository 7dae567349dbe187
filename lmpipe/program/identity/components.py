"""The components of objects: a label, and the parts that decide what the object is and does.

Each kind of object has a function here. Knows nothing about how parts are written as text, or about cycles.
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
from lmpipe.program.identity.bytecode import constant_text
from lmpipe.program.identity.code import (
    Components,
    IdentityError,
    class_components,
    function_components,
    module_components,
)
from lmpipe.program.identity.packages import package_of
from lmpipe.program.module import Module
from lmpipe.retriever import Retriever
from lmpipe.storage.store import RunStore

_NEW: Callable[..., object] = copyreg.__newobj__  # type: ignore[attr-defined]  # creates an object without __init__


@singledispatch
def components_of(value: object) -> Components:
    """Returns the components of a value that is neither a plain value nor a list, tuple, dict or set.

    If no function is registered for its type, the components are its class and the state that pickle would save.

    Raises:
        IdentityError: If nothing identifies the value.
    """
    kind = type(value)
    if kind.__module__ == typing.__name__ and typing.get_origin(value) is not None:
        return _generic(value)
    if (torch := sys.modules.get("torch")) is not None and issubclass(kind, torch.Tensor):
        return _tensor(value, torch)
    constructor, arguments, state, items, pairs = _reduce(value)
    parts: list[tuple[str, object]] = [("class", kind)]
    if constructor is not _NEW:
        parts += [("made by", constructor), ("made of", arguments)]
    elif arguments[1:]:
        parts += [("made of", arguments[1:])]
    parts += _attributes(kind, state)
    return Components("object", [*parts, ("items", items), ("pairs", pairs)])


def _tensor(value: Any, torch: Any) -> Components:
    """A tensor is identified by its data; pickle would save the address of its storage."""
    try:
        data = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    except Exception as error:  # a tensor without dense data
        raise _unidentified(value) from error
    dtype, shape = str(value.dtype), tuple(value.shape)
    parts: list[tuple[str, object]] = [("class", type(value)), ("dtype", dtype), ("shape", shape), ("data", data)]
    return Components("tensor", [*parts, ("state", vars(value))])


def _reduce(value: object) -> tuple[Any, Any, Any, Any, Any]:
    """Returns what pickle saves: the function that creates the object, its arguments, state, items and pairs."""
    try:
        reducer = copyreg.dispatch_table.get(type(value))
        reduced = reducer(value) if reducer else value.__reduce_ex__(4)
        if isinstance(reduced, str):  # the name of a global
            return _NEW, (None, reduced), None, None, None
        constructor, arguments, state, items, pairs = (*reduced, None, None, None)[:5]
        return constructor, tuple(arguments), state, items and list(items), pairs and dict(pairs)
    except RecursionError:
        raise
    except Exception as error:  # the object's own code may raise any exception
        raise _unidentified(value) from error


def _unidentified(value: object) -> IdentityError:
    kind = type(value)
    name = kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
    return IdentityError(name, id(value))


def _attributes(kind: type, state: object) -> list[tuple[str, object]]:
    """The state of an object by attribute, without excluded and derived attributes."""
    if isinstance(state, list) and dataclasses.is_dataclass(kind):  # frozen dataclasses with slots
        state = dict(zip((field.name for field in dataclasses.fields(kind)), state, strict=False))
    halves = state if isinstance(state, tuple) and len(state) == 2 else (state,)  # attributes in `__dict__`, in slots
    parts: list[tuple[str, object]] = []
    for half in halves:
        if type(half) is dict and all(isinstance(name, str) for name in half):
            parts += sorted(_included(kind, half), key=itemgetter(0))
        elif half is not None:
            parts.append(("state", half))
    return parts


def _included(kind: type, state: dict[str, object]) -> Iterable[tuple[str, object]]:
    """The attributes other than fields with ``repr=False``, cached properties and the mark of a module that has run."""
    fields = getattr(kind, "__dataclass_fields__", {})
    excluded = {name for name in state.keys() & fields if not fields[name].repr}
    for base in kind.__mro__:
        excluded |= {name for name in state.keys() & vars(base).keys() if isinstance(vars(base)[name], cached_property)}
    for name, value in state.items():
        is_mark = issubclass(kind, Module) and type(value).__module__ == Module.__module__
        if name not in excluded and not is_mark:
            yield name, value


components_of.register(types.FunctionType, function_components)
components_of.register(type, class_components)
components_of.register(types.ModuleType, module_components)


@components_of.register(LM)
@components_of.register(Retriever)
@components_of.register(Embedder)
def _named(value: LM | Retriever | Embedder) -> Components:
    """An LM, retriever or embedder is identified by its name alone."""
    try:
        return Components("named", [("name", value.name)])
    except Exception as error:  # the object's own code
        raise _unidentified(value) from error


@components_of.register(RunStore)
@components_of.register(logging.Logger)
@components_of.register(logging.LoggerAdapter)
def _without_influence(value: object) -> Components:
    """Run stores and loggers do not influence results."""
    return Components("no part of a result", [])


@components_of.register
def _method(value: types.MethodType) -> Components:
    return Components("method", [("function", value.__func__), ("self", value.__self__)])


@components_of.register
def _builtin(value: types.BuiltinFunctionType) -> Components:
    owner = value.__self__
    if not isinstance(owner, types.ModuleType):
        return Components(f"method {value.__qualname__}", [("self", owner)])
    package = package_of(owner.__name__)
    if package is None:  # compiled code of the user
        raise _unidentified(value)
    return Components(f"{package} {owner.__name__}.{value.__qualname__}", [])


@components_of.register(types.GetSetDescriptorType)
@components_of.register(types.MemberDescriptorType)
def _descriptor(value: types.GetSetDescriptorType | types.MemberDescriptorType) -> Components:
    return Components(f"descriptor {value.__name__}", [])


@components_of.register
def _code(value: types.CodeType) -> Components:
    return Components(constant_text(value), [])


@components_of.register(staticmethod)
@components_of.register(classmethod)
def _wrapped(value: staticmethod[..., Any] | classmethod[Any, ..., Any]) -> Components:
    return Components(type(value).__name__, [("function", value.__func__)])


@components_of.register
def _property(value: property) -> Components:
    return Components("property", [("get", value.fget), ("set", value.fset), ("delete", value.fdel)])


@components_of.register
def _cached_property(value: cached_property) -> Components:  # type: ignore[type-arg]
    return Components("cached property", [("function", value.func)])


@components_of.register(type(lru_cache(repr)))
def _cached_function(value: Any) -> Components:
    return Components("cached function", [("function", value.__wrapped__), ("settings", value.cache_parameters())])


@components_of.register
def _member(value: Enum) -> Components:
    return Components("member", [("class", type(value)), ("name", value.name), ("value", value.value)])


@components_of.register
def _model(value: BaseModel) -> Components:
    if type(value).__getstate__ is not BaseModel.__getstate__:  # the class decides what is excluded
        return components_of.dispatch(object)(value)
    fields = type(value).model_fields
    included = {name: item for name, item in vars(value).items() if name in fields and fields[name].repr}
    extra, private = value.__pydantic_extra__, value.__pydantic_private__
    return Components("model", [("class", type(value)), *included.items(), ("extra", extra), ("private", private)])


@components_of.register
def _field(value: dataclasses.Field) -> Components:  # type: ignore[type-arg]
    names = ("name", "default", "default_factory", "metadata", "init", "repr")
    return Components("field", [(name, getattr(value, name)) for name in names])


@components_of.register
def _model_field(value: FieldInfo) -> Components:
    names = [name for name in FieldInfo.__slots__ if not name.startswith("_")]
    return Components("field", [(name, getattr(value, name, None)) for name in names])


@components_of.register(types.GenericAlias)
@components_of.register(types.UnionType)
def _generic(value: Any) -> Components:
    return Components("type", [("origin", typing.get_origin(value)), ("arguments", typing.get_args(value))])


@components_of.register
def _alias(value: TypeAliasType) -> Components:
    return Components(f"type {value.__name__}", [("value", value.__value__)])


@components_of.register
def _new_type(value: NewType) -> Components:
    return Components(f"type {value.__name__}", [("type", value.__supertype__)])


@components_of.register
def _forward(value: ForwardRef) -> Components:
    return Components(f"type {value.__forward_arg__}", [])


@components_of.register(set)
@components_of.register(frozenset)
def _set(value: set[Any] | frozenset[Any]) -> Components:
    """A set of the user's own class; pickle would save its elements in the order of this process."""
    return Components(
        "set", [("class", type(value)), ("items", frozenset(value)), *_attributes(type(value), vars(value))]
    )
