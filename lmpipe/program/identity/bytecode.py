"""What a piece of compiled Python code does, as a digest, and which names outside of it it reads.

Bytecode needs no source, so a cell of a notebook is known as well as a file. Comments, blank lines, positions and the
docstrings of functions do not count. The digest differs between minor versions of Python, which compile differently.
"""

from __future__ import annotations

import dis
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import CodeType
from typing import final
from weakref import WeakKeyDictionary

from lmpipe.storage.hashing import digest_bytes

_GLOBAL = {"LOAD_GLOBAL", "LOAD_NAME", "LOAD_FROM_DICT_OR_GLOBALS"}
_ATTRIBUTE = {"LOAD_ATTR", "LOAD_METHOD"}
_POSITIONS = {"__firstlineno__", "__static_attributes__"}  # what Python 3.13 notes in the body of a class
_CONSTANTS = set(dis.hasconst)
_FLAGS = 0xFFFF  # without the flag of Python 3.13 that there is a docstring
_LONG = 4000  # bits of an integer that `repr` writes in any case

Chain = tuple[str, ...]
"""A global name and the attributes that are read of it at once: ``helpers.text.clean`` gives three names."""


@final
@dataclass(frozen=True, slots=True)
class Import:
    """An import statement within a function.

    Attributes:
        module: Name of the module, relative to the package of the function if `level` is not 0.
        level: How many dots stand before the name.
        names: What is taken from the module; empty for the module itself.
    """

    module: str
    level: int
    names: tuple[str, ...]


@final
@dataclass(frozen=True, slots=True)
class CodeSummary:
    """What there is to know of a code object and of those nested in it.

    Attributes:
        digest: Of instructions, constants and names.
        reads: The global names that are read, with the attributes read of each at once, sorted.
        imports: The import statements.
    """

    digest: str
    reads: tuple[Chain, ...]
    imports: tuple[Import, ...]


_known: WeakKeyDictionary[CodeType, CodeSummary] = WeakKeyDictionary()  # a code object never changes


def summarize_code(code: CodeType) -> CodeSummary:
    """Reads a code object, or remembers what was read of it before."""
    found = _known.get(code)
    if found is None:
        found = _known[code] = _read(code)
    return found


def constant_text(value: object) -> str:
    """A text for a value that the compiler makes a constant of; equal texts mean equal values of one type.

    Sets are sorted, since their order differs between processes.
    """
    if isinstance(value, CodeType):
        return f"code {summarize_code(value).digest}"
    if isinstance(value, tuple):
        return f"({','.join(map(constant_text, value))})"
    if isinstance(value, frozenset):
        return f"{{{','.join(sorted(map(constant_text, value)))}}}"
    if isinstance(value, slice):
        return f"slice{constant_text((value.start, value.stop, value.step))}"
    if isinstance(value, int) and value.bit_length() > _LONG:
        return hex(value)
    return repr(value)


def _read(code: CodeType) -> CodeSummary:
    steps = [step for step in dis.get_instructions(code) if step.opname not in ("EXTENDED_ARG", "CACHE")]
    inner = [summarize_code(value) for value in code.co_consts if isinstance(value, CodeType)]
    own = [
        constant_text((code.co_name, code.co_names, code.co_varnames, code.co_cellvars, code.co_freevars)),
        constant_text((code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_flags & _FLAGS)),
        constant_text(getattr(code, "co_exceptiontable", b"")),  # from Python 3.11 on
        *_instructions(steps),
    ]
    reads = {chain for one in inner for chain in one.reads} | set(_reads(steps))
    imports = [*_imports(steps), *(statement for one in inner for statement in one.imports)]
    text = "\n".join(own).encode("utf-8", "surrogatepass")
    return CodeSummary(digest_bytes(text), tuple(sorted(reads)), tuple(dict.fromkeys(imports)))


def _instructions(steps: Sequence[dis.Instruction]) -> Iterator[str]:
    """Each instruction with its argument; constants by value, less those that only say where a class stands."""
    for step, after in zip(steps, [*steps[1:], None], strict=True):
        if after is not None and after.opname == "STORE_NAME" and after.argval in _POSITIONS:
            continue
        yield f"{step.opname} {constant_text(step.argval) if step.opcode in _CONSTANTS else step.arg}"


def _reads(steps: Sequence[dis.Instruction]) -> Iterator[Chain]:
    for number, step in enumerate(steps):
        if step.opname in _GLOBAL:
            chain = [step.argval]
            for after in steps[number + 1 :]:
                if after.opname not in _ATTRIBUTE:
                    break
                chain.append(after.argval)
            yield tuple(chain)


def _imports(steps: Sequence[dis.Instruction]) -> Iterator[Import]:
    for number, step in enumerate(steps):
        if step.opname == "IMPORT_NAME":
            level, names = steps[number - 2].argval, steps[number - 1].argval
            yield Import(step.argval, level or 0, tuple(names or ()))
