"""Identity by content: canonical JSON, digests, and the seeds derived from them.

Two values are the same thing exactly when their canonical JSON is the same. Knows nothing of what the
values mean.
"""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import json
from collections.abc import Mapping, Sequence, Set
from functools import lru_cache, partial
from pathlib import Path
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any

from pydantic import BaseModel
from pydantic_core import to_jsonable_python

from lmpipe.errors import ConfigError

_PIECE = 1 << 20  # bytes of a file in memory at once


def canonical_json(value: object) -> str:
    """The one JSON text of a value: sorted keys, no spaces, UTF-8 kept as it is."""
    return _CANONICAL.encode(value)


def plain(value: object) -> Any:
    """A value that JSON does not know as one that it does; sets become sorted lists."""
    if isinstance(value, Set):
        return sorted(value, key=canonical_json)
    return to_jsonable_python(value)


_CANONICAL = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=False, default=plain)


def digest_bytes(data: bytes) -> str:
    """Hex BLAKE2b digest (128 bits, 32 characters) of some bytes."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def digest_file(path: Path) -> str:
    """Hex BLAKE2b digest (128 bits, 32 characters) of a file's bytes, read piece by piece."""
    hasher = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while piece := file.read(_PIECE):
            hasher.update(piece)
    return hasher.hexdigest()


def file_digests(folder: Path) -> dict[str, str]:
    """Path within the folder → digest of its bytes, for each file below it."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): digest_file(path) for path in files}


def content_digest(path: Path) -> str:
    """Digest of a file's bytes, or of all files of a folder with their names."""
    return digest(file_digests(path)) if path.is_dir() else digest_file(path)


def digest(value: object) -> str:
    """Hex BLAKE2b digest (128 bits, 32 characters) of a value's canonical JSON."""
    return digest_bytes(canonical_json(value).encode())


def derive_seed(*parts: str | int) -> int:
    """A seed in [0, 2**63) that depends on every part and on their order, and on nothing else."""
    text = json.dumps(parts).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1


def describe(value: object) -> Any:
    """Plain JSON that names what a component is and how it is set, so that it can be hashed and compared.

    Dataclasses and ordinary objects become their class name and fields, functions their name and a digest of their
    source; whatever a dataclass marks with ``field(repr=False)`` is left out.

    Raises:
        ConfigError: For a lambda, a function that captures variables, or an object without fields that JSON can hold:
            nothing identifies it in a later run.
    """
    if value is None or isinstance(value, (str, int, float, bool)):
        return value
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if isinstance(value, Mapping):
        return {str(key): describe(item) for key, item in value.items()}
    if isinstance(value, Set):
        return sorted((describe(item) for item in value), key=canonical_json)
    if isinstance(value, Sequence):
        return [describe(item) for item in value]
    if isinstance(value, FunctionType):
        return _function(value)
    if isinstance(value, (BuiltinFunctionType, type)):
        return f"{value.__module__}.{value.__qualname__}"
    if isinstance(value, MethodType):
        return {"method": value.__func__.__qualname__, "of": describe(value.__self__)}
    if isinstance(value, partial):
        return {"partial": describe(value.func), "args": describe(value.args), "keywords": describe(value.keywords)}
    return _object(value)


@lru_cache(maxsize=1024)
def source_digest(code: FunctionType | type) -> str:
    """Digest of the source of a function or class; empty where there is none, as at an interactive prompt."""
    try:
        return digest(inspect.getsource(code))
    except (OSError, TypeError):
        return ""


def _function(function: FunctionType) -> str:
    name = f"{function.__module__}.{function.__qualname__}"
    if "<lambda>" in name or function.__closure__:
        raise ConfigError(
            f"nothing identifies {name} in a later run; use a named function that captures no variables, or a frozen "
            "dataclass with __call__"
        )
    return f"{name} {source_digest(function)}"


def _object(value: object) -> dict[str, Any]:
    if dataclasses.is_dataclass(value):
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value) if f.repr}
    else:
        try:
            fields = vars(value)
        except TypeError:
            raise ConfigError(f"nothing identifies {value!r} in a later run; make it a frozen dataclass") from None
    return {"type": type(value).__qualname__, **{name: describe(item) for name, item in fields.items()}}
