"""Summaries of compiled Python code: a digest of what it does, and the global names and imports that it reads.

Bytecode is available without source, so this also works in notebooks. Comments, blank lines, positions and docstrings
of functions do not change the digest. It differs between minor versions of Python, whose compilers differ.
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
_POSITIONS = {"__firstlineno__", "__static_attributes__"}  # names that Python 3.13 sets in the body of a class
_CONSTANTS = set(dis.hasconst)
_FLAGS = 0xFFFF  # excludes the flag of Python 3.13 for a docstring
_LONG = 4000  # bits; `repr` always writes integers up to this length

Chain = tuple[str, ...]
"""A global name and the attributes that are read from it: three names for ``helpers.text.clean``."""


@final
@dataclass(frozen=True, slots=True)
class Import:
    """An import statement within a function.

    Attributes:
        module: Name of the module, relative to the package of the function if `level` is not 0.
        level: Number of dots before the name.
        names: Names that are imported from the module; empty if the module itself is imported.
    """

    module: str
    level: int
    names: tuple[str, ...]


@final
@dataclass(frozen=True, slots=True)
class CodeSummary:
    """A summary of a code object, including the code objects nested in it.

    Attributes:
        digest: Digest of instructions, constants and names.
        reads: Global names that are read, each with the attributes read from it, sorted.
        imports: Import statements.
    """

    digest: str
    reads: tuple[Chain, ...]
    imports: tuple[Import, ...]


_summaries: WeakKeyDictionary[CodeType, CodeSummary] = WeakKeyDictionary()  # a cache, since code objects never change


def summarize_code(code: CodeType) -> CodeSummary:
    """Returns the summary of a code object, from a cache if it was summarized before."""
    summary = _summaries.get(code)
    if summary is None:
        summary = _summaries[code] = _summarize(code)
    return summary


def constant_text(value: object) -> str:
    """Returns a text for a value that can be a constant in compiled code.

    Two texts are equal only if the values are equal and of the same type. Sets are sorted, since their order differs
    between processes.
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


def _summarize(code: CodeType) -> CodeSummary:
    steps = [step for step in dis.get_instructions(code) if step.opname not in ("EXTENDED_ARG", "CACHE")]
    nested = [summarize_code(value) for value in code.co_consts if isinstance(value, CodeType)]
    texts = [
        constant_text((code.co_name, code.co_names, code.co_varnames, code.co_cellvars, code.co_freevars)),
        constant_text((code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_flags & _FLAGS)),
        constant_text(getattr(code, "co_exceptiontable", b"")),  # from Python 3.11 on
        *_instructions(steps),
    ]
    reads = {chain for summary in nested for chain in summary.reads} | set(_global_reads(steps))
    imports = [*_imports(steps), *(statement for summary in nested for statement in summary.imports)]
    text = "\n".join(texts).encode("utf-8", "surrogatepass")
    return CodeSummary(digest_bytes(text), tuple(sorted(reads)), tuple(dict.fromkeys(imports)))


def _instructions(steps: Sequence[dis.Instruction]) -> Iterator[str]:
    """Yields each instruction with its argument, except those that only set the position of a class."""
    for step, after in zip(steps, [*steps[1:], None], strict=True):
        if after is not None and after.opname == "STORE_NAME" and after.argval in _POSITIONS:
            continue
        yield f"{step.opname} {constant_text(step.argval) if step.opcode in _CONSTANTS else step.arg}"


def _global_reads(steps: Sequence[dis.Instruction]) -> Iterator[Chain]:
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
