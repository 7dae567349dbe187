"""Signatures: the typed inputs and outputs of one LM call, as a frozen value.

A signature is written as a string, ``"question, context: list[str] -> answer: Literal['yes', 'no']"``, or as a
class whose annotated attributes are set to `Input` and `Output`. Knows nothing about prompts: see
`lmpipe.prompting.template`.
"""

from __future__ import annotations

import ast
import enum
import inspect
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from types import NoneType
from typing import Any, Literal, final, get_args, get_origin, get_type_hints

from pydantic import TypeAdapter
from pydantic.errors import PydanticUserError

from lmpipe.errors import SignatureError
from lmpipe.prompting.choices import choices_of
from lmpipe.prompting.signature_hints import arrow_hint, syntax_hint, type_hint
from lmpipe.storage.hashing import digest
from lmpipe.text.display import did_you_mean, shorten, shown
from lmpipe.text.reprs import Name, short_repr
from lmpipe.validation.arguments import check_type

_TYPE_NAMES: Mapping[str, Any] = {"str": str, "int": int, "float": float, "bool": bool, "Any": Any}
_CONTAINERS: Mapping[str, Any] = {"list": list, "dict": dict, "tuple": tuple}


@final
@dataclass(frozen=True)
class Field:
    """One input or output of a signature.

    Args:
        name: Name of the field in prompts and completions; a Python identifier.
        type: Type of the value; outputs are parsed into it.
        desc: Description of the field for the LM, in addition to its type.
        optional: For outputs: whether a completion may lack the field; its value is then ``""``.
    """

    name: str
    type: Any = str
    desc: str = ""
    optional: bool = False

    @property
    def type_name(self) -> str:
        """Name of the type, as in a string signature."""
        return self.type.__name__ if inspect.isclass(self.type) else str(self.type).replace("typing.", "")

    @property
    def type_identity(self) -> Any:
        """Identity of the type by content: its name and, if that does not say everything, its JSON schema."""
        if self.type in (str, int, float, bool, Any):
            return self.type_name
        names = [list(self.type.__members__)] if isinstance(self.type, enum.EnumMeta) else []
        return [self.type_name, schema_of(self.type), *names]


@final
@dataclass(frozen=True)
class Signature:
    """The typed inputs and outputs of one LM call, and its instructions.

    Args:
        inputs: Input fields, in the order of the prompt.
        outputs: Output fields, in the order of the completion.
        instructions: Instructions for the LM. Optimizers search over this text and over demonstrations.

    Raises:
        SignatureError: If there is no output, two fields share a name, a name is not an identifier, or values of a type
            cannot be rendered and parsed.
    """

    inputs: tuple[Field, ...]
    outputs: tuple[Field, ...]
    instructions: str = ""

    def __post_init__(self) -> None:
        for field in self.inputs + self.outputs:
            _check_field(field)
        names = [field.name.lower() for field in self.inputs + self.outputs]
        if not self.outputs:
            example = ", ".join(field.name for field in self.inputs) or "question"
            raise SignatureError(
                f"signature with inputs {names} has no output field; write the outputs after the arrow, such as "
                f"'{example} -> answer'"
            )
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise SignatureError(f"field {repeated[0]!r} appears twice in a signature; give each field its own name")
        if not self.instructions:
            inputs = ", ".join(field.name for field in self.inputs)
            outputs = ", ".join(field.name for field in self.outputs)
            object.__setattr__(
                self, "instructions", f"Given {inputs}, produce {outputs}." if inputs else f"Produce {outputs}."
            )

    def __repr__(self) -> str:
        return short_repr(self, Name(self.text))

    @cached_property
    def digest(self) -> str:
        """Digest of the content of the signature."""
        sides = [[[f.name, f.type_identity, f.desc, f.optional] for f in side] for side in (self.inputs, self.outputs)]
        return digest([self.instructions, *sides])

    def __hash__(self) -> int:
        return hash(self.digest)

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Signature) and other.digest == self.digest)

    @property
    def text(self) -> str:
        """The signature in string form, without instructions and descriptions: ``"question -> answer"``."""
        sides = (
            [f.name if f.type is str else f"{f.name}: {f.type_name}" for f in side]
            for side in (self.inputs, self.outputs)
        )
        return " -> ".join(", ".join(side) for side in sides).strip()

    def prepend(self, field: Field) -> Signature:
        """Returns a signature with an additional output field before the other outputs."""
        return replace(self, outputs=(field, *self.outputs))

    def check_inputs(self, inputs: Mapping[str, Any]) -> None:
        """Checks that inputs have exactly the input fields of the signature.

        Raises:
            SignatureError: If a field is missing or unknown.
        """
        if inputs.keys() == self._input_names:
            return
        missing = [field.name for field in self.inputs if field.name not in inputs]
        unknown = sorted(inputs.keys() - self._input_names)
        problems = [
            f"{part} {', '.join(names)}" for part, names in (("missing", missing), ("unknown", unknown)) if names
        ]
        hint = did_you_mean(unknown[0], missing) if unknown else ""
        expected = ", ".join(field.name for field in self.inputs) or "none"
        raise SignatureError(
            f"inputs do not fit the signature: {' and '.join(problems)}; its inputs are {expected}{hint}"
        )

    @cached_property
    def _input_names(self) -> frozenset[str]:
        return frozenset(field.name for field in self.inputs)


@final
@dataclass(frozen=True)
class _Marker:
    """The value of a class attribute that declares a field."""

    side: Literal["input", "output"]
    desc: str
    optional: bool = False


def Input(desc: str = "") -> Any:
    """Declares an attribute of a signature class as an input field."""
    return _Marker("input", desc)


def Output(desc: str = "", *, optional: bool = False) -> Any:
    """Declares an attribute of a signature class as an output field."""
    return _Marker("output", desc, optional)


@lru_cache(maxsize=1024)
def schema_of(type_: Any) -> dict[str, Any]:
    """Returns the JSON schema of a field's type; the dict is cached and must not be changed."""
    return TypeAdapter(type_).json_schema()


def _check_field(field: Field) -> None:
    """Raises a SignatureError for a field with an invalid name or type."""
    if not isinstance(field.name, str) or not field.name.isidentifier() or field.name == "self":
        raise SignatureError(f"{shown(field.name)} cannot name a field; use a Python identifier other than 'self'")
    try:
        if field.type in (str, int, float, bool, Any):
            return
        choices_of(field.type)
        schema_of(field.type)
    except SignatureError as error:
        raise SignatureError(f"field {field.name!r}: {error}") from None
    except (
        PydanticUserError,
        TypeError,
        ValueError,
        NameError,
        AttributeError,
        RecursionError,
        AssertionError,
    ) as error:
        raise SignatureError(
            f"field {field.name!r} has a type whose values cannot be rendered and parsed: "
            f"{shorten(str(error).partition(chr(10))[0], 300)}"
        ) from None
    invalid = [constant for constant in _constants_of(field.type) if not _is_plain(constant)]
    if invalid:
        raise SignatureError(
            f"field {field.name!r} has the choice {shown(invalid[0])}; a Literal may contain only strings, finite "
            "numbers, booleans, enum members and None"
        )


def _constants_of(type_: Any) -> list[Any]:
    """The constants of the ``Literal`` types in a type."""
    if get_origin(type_) is Literal:
        return list(get_args(type_))
    return [constant for part in get_args(type_) if not isinstance(part, list) for constant in _constants_of(part)]


def _is_plain(constant: Any) -> bool:
    if isinstance(constant, float):
        return math.isfinite(constant)
    return constant is None or isinstance(constant, (str, int, enum.Enum))


SignatureLike = Signature | str | type


def signature(source: SignatureLike, instructions: str = "", types: Mapping[str, Any] | None = None) -> Signature:
    """Creates a signature from a string or a class.

    Args:
        source: ``"a, b: int -> c: list[str]"``; or a class whose docstring contains the instructions and whose
            annotated attributes are set to `Input` and `Output`; or a signature, which is returned as it is.
        instructions: Instructions for a string; by default they are made from the field names.
        types: Additional type names for a string, such as those of pydantic models.

    Raises:
        SignatureError: If the string or the class is invalid; the message names the invalid part.
    """
    check_type("instructions", instructions, str)
    check_type("types", types, (dict, Mapping, NoneType))
    if isinstance(source, Signature):
        return source
    if isinstance(source, str):
        try:
            return _from_string(source, instructions, types or {})
        except (RecursionError, MemoryError):
            raise SignatureError(f"signature {shown(source)} is nested too deeply") from None
    if not isinstance(source, type):
        if any(isinstance(value, _Marker) for value in vars(type(source)).values()):
            raise SignatureError(f"{shown(source)} is an object; pass the class itself: {type(source).__name__}")
        raise SignatureError(
            f"{shown(source)} is not a signature; write 'question -> answer' with your own fields, or a class with "
            "Input and Output"
        )
    return _from_class(source)


def _from_class(source: type) -> Signature:
    if issubclass(source, Signature):
        raise SignatureError(f"a class of fields has no base class; write class {source.__name__}: …")
    for name, value in vars(source).items():
        if isinstance(value, _Marker) and name not in vars(source).get("__annotations__", {}):
            raise SignatureError(
                f"{source.__name__}.{name} has no type; write {name}: str = {value.side.capitalize()}()"
            )
    try:
        hints = get_type_hints(source)
    except (
        NameError,
        TypeError,
        ValueError,
        AttributeError,
        LookupError,
        SyntaxError,
        ArithmeticError,
        RecursionError,
    ) as e:
        raise SignatureError(
            f"an annotation of {source.__name__} cannot be resolved: {shorten(str(e), 300)}; use types that are defined"
        ) from e
    sides: dict[str, list[Field]] = {"input": [], "output": []}
    for name, hint in hints.items():
        marker = source.__dict__.get(name)
        if not isinstance(marker, _Marker):
            raise SignatureError(
                f"{source.__name__}.{name} must be set to Input() or Output(); write {name}: "
                f"{getattr(hint, '__name__', hint)} = Input()"
            )
        sides[marker.side].append(Field(name, hint, marker.desc, marker.optional))
    return Signature(tuple(sides["input"]), tuple(sides["output"]), inspect.cleandoc(source.__doc__ or ""))


def _from_string(text: str, instructions: str, types: Mapping[str, Any]) -> Signature:
    left, arrow, right = text.partition("->")
    if not arrow or "->" in right:
        raise SignatureError(
            f"signature {shown(text)} needs exactly one '->' between inputs and outputs; {arrow_hint(text)}"
        )
    return Signature(_fields(left, text, types), _fields(right, text, types), instructions)


def _fields(side: str, text: str, types: Mapping[str, Any]) -> tuple[Field, ...]:
    """Parses one side of a string signature as the parameters of a Python function, whose syntax it has."""
    where = f"{shown(side.strip())} in signature {shown(text)}"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about invalid escapes in strings, which are read as Python reads them
            tree, *rest = ast.parse(f"def _({side.strip()}\n): pass").body
    except SyntaxError as error:
        raise SignatureError(f"cannot read {where}: {error.msg}{syntax_hint(side)}") from None
    except ValueError as error:  # NUL, and invalid Unicode
        raise SignatureError(f"cannot read {where}: {error}") from None
    if rest or not isinstance(tree, ast.FunctionDef) or not isinstance(tree.body[0], ast.Pass):
        raise SignatureError(f"cannot read {where}")
    arguments = tree.args
    if arguments.defaults or arguments.kwonlyargs or arguments.posonlyargs or arguments.vararg or arguments.kwarg:
        raise SignatureError(f"{where} may contain only 'name' and 'name: type'; leave out *, / and defaults")
    try:
        return tuple(Field(arg.arg, _type(arg.annotation, text, types)) for arg in arguments.args)
    except TypeError as error:  # None | None, dict[int]
        raise SignatureError(f"cannot read a type of {where}: {error}") from None


def _type(node: ast.expr | None, text: str, types: Mapping[str, Any]) -> Any:
    match node:
        case None:
            return str
        case ast.Constant(value=None):
            return None
        case ast.Name(id=name) if name in types or name in _TYPE_NAMES or name in _CONTAINERS:
            return {**_TYPE_NAMES, **_CONTAINERS, **types}[name]
        case ast.BinOp(left=left, op=ast.BitOr(), right=right):
            return _type(left, text, types) | _type(right, text, types)
        case ast.Subscript(value=ast.Name(id="Literal"), slice=options):
            return Literal[tuple(_constants(options, text))]
        case ast.Subscript(value=ast.Name(id=name), slice=ast.Tuple(elts=items)) if name in _CONTAINERS:
            return _CONTAINERS[name][tuple(_item(item, text, types) for item in items)]
        case ast.Subscript(value=ast.Name(id=name), slice=item) if name in _CONTAINERS:
            return _CONTAINERS[name][_type(item, text, types)]
    written, known = ast.unparse(node), [*_TYPE_NAMES, *_CONTAINERS, "Literal", *types]
    raise SignatureError(
        f"unknown type {shown(written)} in signature {shown(text)}; known types are {shorten(', '.join(known), 300)}"
        f"{type_hint(written, known)}"
    )


def _item(node: ast.expr, text: str, types: Mapping[str, Any]) -> Any:
    """A type within a container, or the dots of ``tuple[str, ...]``."""
    return ... if isinstance(node, ast.Constant) and node.value is ... else _type(node, text, types)


def _constants(node: ast.expr, text: str) -> list[Any]:
    items = node.elts if isinstance(node, ast.Tuple) else [node]
    try:
        constants = [ast.literal_eval(item) for item in items]
    except (ValueError, TypeError, SyntaxError):
        constants = []
    if not constants or not all(map(_is_plain, constants)):
        quoted = ", ".join(repr(item.id) if isinstance(item, ast.Name) else ast.unparse(item) for item in items)
        raise SignatureError(
            f"Literal in signature {shown(text)} may contain only strings, finite numbers, True, False and None; write "
            f"Literal[{quoted}]"
        )
    return constants
