"""What a function, class or module of the user consists of, and what their code reads.

Everything is found as Python would find it when the code runs. Nothing of it is run, except that the modules that a
function imports are imported.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import sys
from collections.abc import Iterator, Mapping, Sequence
from enum import Enum
from functools import singledispatch
from types import CellType, FunctionType, ModuleType
from typing import Any, NamedTuple

from pydantic import BaseModel

from lmpipe.errors import LmpipeError
from lmpipe.program.identity.bytecode import Chain, Import, summarize_code
from lmpipe.program.identity.packages import package_of

_SINGLEDISPATCH: Any = singledispatch(repr)  # its code is that of every function that is made so
_HEAP_TYPE = 1 << 9  # flag of classes that were made by Python code
_OF_MODULES = frozenset(vars(ModuleType("m"))) | {
    "__annotations__",
    "__builtins__",
    "__cached__",
    "__file__",
    "__path__",
}
_OF_CLASSES = {  # names that Python keeps in a class: positions, caches, and what follows from the rest
    "__abstractmethods__",
    "__annotations_cache__",
    "__class_vars__",
    "__dataclass_params__",
    "__dict__",
    "__firstlineno__",
    "__module__",
    "__qualname__",
    "__signature__",
    "__slotnames__",
    "__static_attributes__",
    "__weakref__",
    "_abc_impl",
}


class IdentityError(LmpipeError):
    """Something cannot be identified.

    Args:
        what: What it is.
        thing: The id of the object.
        way: Names that lead to it, if they are known already.
    """

    def __init__(self, what: str, thing: int, way: Sequence[str] = ()) -> None:
        super().__init__(f"nothing identifies {' → '.join(way)} ({what})")
        self.what, self.thing, self.way = what, thing, way


class Components(NamedTuple):
    """What a value is, in words, and what decides the rest, by name."""

    label: str
    named: list[tuple[str, object]]


def package_label(value: FunctionType | type | ModuleType) -> str | None:
    """What stands for a function, class or module of a package: its name and the package's version.

    Returns:
        None for the user's own, and for what code of a package made while it ran, such as the wrapper of a decorator.
    """
    if isinstance(value, ModuleType):
        package = package_of(value.__name__)
        return package and f"{package} {value.__name__}"
    if isinstance(value, FunctionType):
        owner, code = value.__globals__.get("__name__"), summarize_code(value.__code__).digest
    else:
        owner, code = value.__module__, ""
    package = package_of(owner) if isinstance(owner, str) else None
    if package is None:
        return None
    is_static = isinstance(value, type) and not value.__flags__ & _HEAP_TYPE
    if is_static or _found(str(owner), value.__qualname__) is value:
        return f"{package} {owner}.{value.__qualname__} {code}"
    return None


def _found(module: str, qualname: str) -> object:
    """What a module has under a name with dots, or none."""
    found: object = sys.modules.get(module)
    for name in qualname.split("."):
        found = found.__dict__.get(name) if isinstance(found, (ModuleType, type)) else None
    return found


def module_components(module: ModuleType) -> Components:
    """All that a module of the user holds."""
    held = {name: value for name, value in vars(module).items() if name not in _OF_MODULES}
    return Components("module", sorted(held.items()))


def class_components(kind: type) -> Components:
    """Bases and attributes of a class, methods among them."""
    own = {name: value for name, value in vars(kind).items() if name not in _OF_CLASSES}
    if dataclasses.is_dataclass(kind) and str(kind.__doc__).startswith(f"{kind.__name__}("):
        own.pop("__doc__", None)  # made by dataclasses, and shows the addresses of default values
    if issubclass(kind, Enum):
        own = {name: value for name, value in own.items() if name not in kind.__members__ and not _is_sunder(name)}
        own["members"] = {name: member._value_ for name, member in kind.__members__.items()}
    elif issubclass(kind, BaseModel) and kind is not BaseModel:
        own = {name: value for name, value in own.items() if not name.startswith("__pydantic_")}
        own |= {"fields": dict(kind.model_fields), "validators": _validators(kind)}
    named = [("metaclass", type(kind)), *((base.__name__, base) for base in kind.__bases__), *sorted(own.items())]
    return Components(f"class {kind.__qualname__}", named)


def _is_sunder(name: str) -> bool:
    return name.startswith("_") and name.endswith("_") and not name.startswith("__")


def _validators(kind: type[BaseModel]) -> dict[str, object]:
    """What validators and serializers of a pydantic model are for; their functions are among its attributes."""
    kinds = kind.__pydantic_decorators__
    return {
        f"{sort.name} {name}": decorator.info
        for sort in dataclasses.fields(kinds)
        for name, decorator in getattr(kinds, sort.name).items()
    }


def function_components(function: FunctionType) -> Components:
    """Code, defaults, captured values and attributes of a function, and what its code reads."""
    code = summarize_code(function.__code__)
    named: list[tuple[str, object]] = [("defaults", function.__defaults__), ("keywords", function.__kwdefaults__)]
    if function.__code__ is _SINGLEDISPATCH.__code__:  # the rest are caches
        named += [("function", vars(function)["__wrapped__"]), ("registry", vars(function)["registry"])]
    else:
        named += [*_captured(function), *vars(function).items()]
        if package_of(str(function.__globals__.get("__name__"))) is None:
            named += _globals(function.__globals__, code.reads)
            named += [part for statement in code.imports for part in _imported(function.__globals__, statement)]
    return Components(f"function {function.__qualname__} {code.digest}", named)


def _captured(function: FunctionType) -> Iterator[tuple[str, object]]:
    cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
    return ((name, value) for name, cell in cells for value in _content(cell))


def _content(cell: CellType) -> tuple[object, ...]:
    try:
        return (cell.cell_contents,)
    except ValueError:  # not set yet
        return ()


def _globals(namespace: Mapping[str, Any], reads: tuple[Chain, ...]) -> list[tuple[str, object]]:
    """The values of global names; of a module of the user only what is read of it, unless it is used as a whole.

    Names that are not there are builtins, or errors when the code runs.
    """
    found: dict[str, object] = {}
    for name, *attributes in reads:
        if name in namespace and name not in _OF_MODULES:
            way, value = [name], namespace[name]
            while attributes and isinstance(value, ModuleType) and package_of(value.__name__) is None:
                way.append(attributes.pop(0))
                value = vars(value).get(way[-1])
            found[".".join(way)] = value
    return list(found.items())


def _imported(namespace: Mapping[str, Any], statement: Import) -> Iterator[tuple[str, object]]:
    """What an import statement within a function gives.

    Raises:
        Unidentified: If a module of the user cannot be imported.
    """
    name = statement.module
    if statement.level:
        name = importlib.util.resolve_name("." * statement.level + name, str(namespace.get("__package__")))
    if (package := package_of(name)) is not None:
        yield f"import {name}", package
        return
    module = _module(name)
    if module is None or not statement.names:
        yield f"import {name}", module
        return
    for wanted in statement.names:
        held = vars(module)
        yield f"{name}.{wanted}", held[wanted] if wanted in held else _module(f"{name}.{wanted}")


def _module(name: str) -> ModuleType | None:
    """Imports a module; none if there is no such module."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        return None
    except Exception as error:  # whatever a module's own code raises
        raise IdentityError(f"its import fails with {type(error).__name__}: {error}", id(name)) from error
