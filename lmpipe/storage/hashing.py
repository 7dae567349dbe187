"""Identity by content: canonical JSON, digests, and the seeds derived from them.

Two values are the same thing exactly when their canonical JSON is the same. Knows nothing of what the
values mean.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence, Set
from enum import Enum
from functools import partial
from pathlib import Path
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any, TypeGuard

from pydantic import BaseModel, RootModel
from pydantic_core import to_jsonable_python

from lmpipe.errors import ConfigError

_PIECE = 1 << 20  # bytes of a file in memory at once
_DEPTH = 20  # names that lead to a faulty value, at most


def canonical_json(value: object) -> str:
    """The one JSON text of a value: sorted keys, no spaces, UTF-8 kept as it is; equal in every process.

    Sets become sorted lists, also those within dataclasses and pydantic models; numpy's arrays and numbers become lists
    and numbers; bytes become the text that they hold, or base64.

    Raises:
        ConfigError: If a value has no JSON that is the same in every process, such as an iterator or an object of a
            class that pydantic does not know; the message names the field.
    """
    try:
        return _CANONICAL.encode(value)
    except TypeError:  # keys that are not text, or cannot be compared
        return _encoded_with_text_keys(value)
    except (ConfigError, ValueError, RecursionError) as error:
        raise _without_json(value, error) from None


def jsonable(value: object) -> Any:
    """A value as plain JSON values: what its canonical JSON says.

    Raises:
        ConfigError: See `canonical_json`.
    """
    return json.loads(canonical_json(value))


def json_default(value: object) -> Any:
    """A value that JSON does not know as one that it does, of which parts may again be such values.

    Raises:
        ConfigError: If the value has no JSON that is the same in every process.
    """
    if isinstance(value, Set):
        return sorted((jsonable(item) for item in value), key=canonical_json)
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, range):
        return list(value)
    if isinstance(value, Iterator):
        raise ConfigError(f"an iterator ({type(value).__qualname__}) can be read only once; give a list")
    numpy = sys.modules.get("numpy")
    if numpy is not None and isinstance(value, (numpy.ndarray, numpy.generic)):
        return value.tolist()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    try:
        return _sorted_sets(to_jsonable_python(value), value)
    except UnicodeDecodeError:
        return to_jsonable_python(value, bytes_mode="base64")
    except (TypeError, ValueError) as error:
        raise ConfigError(f"a value of type {type(value).__qualname__} cannot be written as JSON ({error})") from None


def _sorted_sets(made: Any, value: object) -> Any:
    """The JSON that pydantic made of a value, with the lists that it made of sets in one order."""
    if isinstance(value, RootModel):
        return _sorted_sets(made, value.root)
    if isinstance(made, dict) and isinstance(value, BaseModel):
        fields = type(value).model_fields.items()
        names = {field.serialization_alias or field.alias or name: name for name, field in fields}
        return {key: _sorted_sets(part, getattr(value, str(names.get(key, key)), None)) for key, part in made.items()}
    if isinstance(made, dict) and dataclasses.is_dataclass(value):
        return {name: _sorted_sets(part, getattr(value, name, None)) for name, part in made.items()}
    if isinstance(made, dict) and isinstance(value, Mapping) and len(made) == len(value):
        return {name: _sorted_sets(part, own) for (name, part), own in zip(made.items(), value.values(), strict=True)}
    if isinstance(made, list) and isinstance(value, Collection) and len(made) == len(value):
        parts = [_sorted_sets(part, own) for part, own in zip(made, value, strict=True)]
        return sorted(parts, key=canonical_json) if isinstance(value, Set) else parts
    return made


_CANONICAL = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=False, default=json_default)


def _encoded_with_text_keys(value: object) -> str:
    try:
        return _CANONICAL.encode(_with_text_keys(value))
    except (ConfigError, TypeError, ValueError, RecursionError) as error:
        raise _without_json(value, error) from None


def _with_text_keys(value: object) -> Any:
    """The value with the keys of every mapping in it as text: a key that is none is written as JSON."""
    if isinstance(value, Mapping):
        named = [(_as_text(key), _with_text_keys(item)) for key, item in value.items()]
        if len(keys := dict(named)) < len(named):
            raise ConfigError(f"several keys of a mapping are written alike, among {', '.join(sorted(keys))}")
        return keys
    if isinstance(value, (list, tuple)):
        return [_with_text_keys(item) for item in value]
    return value if value is None or isinstance(value, (str, int, float)) else _with_text_keys(json_default(value))


def _as_text(key: object) -> str:
    if isinstance(key, Enum):
        key = key.value
    return key if isinstance(key, str) else canonical_json(key)


def _without_json(value: object, error: Exception) -> ConfigError:
    """What was wrong with a value that has no JSON, with the names that lead to it."""
    reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
    names: list[str] = []
    for _ in range(_DEPTH):
        parts = list(value.items() if isinstance(value, Mapping) else enumerate(value) if _is_list(value) else ())
        faulty = next((pair for pair in parts if not _has_json(pair[1])), None)
        if faulty is None:
            break
        value = faulty[1]
        names += [str(faulty[0])] if names or not isinstance(faulty[0], int) else []
    return ConfigError(f"{'.'.join(names)!r}: {reason}" if names else reason)


def _is_list(value: object) -> TypeGuard[Sequence[object]]:
    return isinstance(value, (list, tuple))


def _has_json(value: object) -> bool:
    try:
        _CANONICAL.encode(value)
    except (ConfigError, TypeError, ValueError, RecursionError):
        return False
    return True


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


def digest_path(path: Path) -> str:
    """Digest of a file's bytes, or of all files of a folder with their names."""
    return digest(file_digests(path)) if path.is_dir() else digest_file(path)


def digest(value: object) -> str:
    """Hex BLAKE2b digest (128 bits, 32 characters) of a value's canonical JSON."""
    return digest_bytes(canonical_json(value).encode("utf-8", "surrogatepass"))


def derive_seed(*parts: str | int) -> int:
    """A seed in [0, 2**63) that depends on every part and on their order, and on nothing else."""
    text = json.dumps(parts).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1


def describe_settings(value: object) -> Any:
    """Settings as plain JSON for people to read and compare: what a component is, and how it is set.

    Dataclasses and ordinary objects become their class name and fields, functions and classes their names; whatever a
    dataclass marks with ``field(repr=False)`` is left out. Two functions of one name are alike here: recorded work is
    looked up by `lmpipe.program.identity`.
    """
    if value is None or isinstance(value, (str, int, float, bool)):
        return value
    if isinstance(value, BaseModel):
        return jsonable(value)
    if isinstance(value, Mapping):
        return {str(key): describe_settings(item) for key, item in value.items()}
    if isinstance(value, Set):
        return sorted((describe_settings(item) for item in value), key=canonical_json)
    if isinstance(value, Sequence):
        return [describe_settings(item) for item in value]
    if isinstance(value, (FunctionType, BuiltinFunctionType, type)):
        return f"{value.__module__}.{value.__qualname__}"
    if isinstance(value, MethodType):
        return {"method": value.__func__.__qualname__, "of": describe_settings(value.__self__)}
    if isinstance(value, partial):
        return {
            "partial": describe_settings(value.func),
            "args": describe_settings(value.args),
            "keywords": describe_settings(value.keywords),
        }
    if dataclasses.is_dataclass(value):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value) if field.repr}
    else:
        fields = getattr(value, "__dict__", {})
    return {"type": type(value).__qualname__, **{name: describe_settings(item) for name, item in fields.items()}}
