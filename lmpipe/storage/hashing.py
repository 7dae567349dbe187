"""Identity by content: canonical JSON, digests, and seeds that derive from them.

Two values are identical if and only if their canonical JSON is the same. Knows nothing about the meaning of the values.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence, Set
from enum import Enum
from functools import partial
from json.encoder import encode_basestring_ascii
from pathlib import Path
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any, TypeGuard

from pydantic import BaseModel, RootModel
from pydantic_core import to_jsonable_python

from lmpipe.errors import ConfigError

_CHUNK = 1 << 20  # bytes of a file in memory at once
_DEPTH = 20  # most names in the path to an invalid value


def canonical_json(value: object) -> str:
    """Returns the canonical JSON of a value: sorted keys, no spaces, unescaped UTF-8; the same in every process.

    Sets become sorted lists, also those inside dataclasses and pydantic models; numpy arrays and numbers become lists
    and numbers; bytes become their text if they are UTF-8, and base64 otherwise.

    Raises:
        ConfigError: If a value has no JSON that is the same in every process, such as an iterator or an object of a
            class that pydantic cannot serialize; the message names the field.
    """
    try:
        return _CANONICAL.encode(value)
    except TypeError:  # keys that are not strings, or cannot be compared
        return _encoded_with_text_keys(value)
    except (ConfigError, ValueError, RecursionError) as error:
        raise _no_json(value, error) from None


def jsonable(value: object) -> Any:
    """Returns a value as plain JSON values, as in its canonical JSON.

    Raises:
        ConfigError: If the value has no JSON form, as `canonical_json` describes.
    """
    return json.loads(canonical_json(value))


def json_default(value: object) -> Any:
    """Converts a value that JSON does not support; for the argument ``default`` of `json.dumps`.

    The returned list or dict may contain such values again.

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
        raise ConfigError(f"an iterator ({type(value).__qualname__}) can be read only once; pass a list")
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


def _sorted_sets(converted: Any, value: object) -> Any:
    """Sorts the lists that pydantic made from sets, wherever they are in the JSON of a value.

    Args:
        converted: JSON that pydantic made from the value.
        value: The value itself, which shows which lists were sets.
    """
    if isinstance(value, RootModel):
        return _sorted_sets(converted, value.root)
    if isinstance(converted, dict) and isinstance(value, BaseModel):
        fields = type(value).model_fields.items()
        names = {field.serialization_alias or field.alias or name: name for name, field in fields}
        parts = {key: getattr(value, str(names.get(key, key)), None) for key in converted}
        return {key: _sorted_sets(item, parts[key]) for key, item in converted.items()}
    if isinstance(converted, dict) and dataclasses.is_dataclass(value):
        return {name: _sorted_sets(item, getattr(value, name, None)) for name, item in converted.items()}
    if isinstance(converted, dict) and isinstance(value, Mapping) and len(converted) == len(value):
        pairs = zip(converted.items(), value.values(), strict=True)
        return {name: _sorted_sets(item, part) for (name, item), part in pairs}
    if isinstance(converted, list) and isinstance(value, Collection) and len(converted) == len(value):
        items = [_sorted_sets(item, part) for item, part in zip(converted, value, strict=True)]
        return sorted(items, key=canonical_json) if isinstance(value, Set) else items
    return converted


_CANONICAL = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=False, default=json_default)


def _encoded_with_text_keys(value: object) -> str:
    try:
        return _CANONICAL.encode(_with_text_keys(value))
    except (ConfigError, TypeError, ValueError, RecursionError) as error:
        raise _no_json(value, error) from None


def _with_text_keys(value: object) -> Any:
    """Replaces the keys of all mappings in a value that are not strings by their JSON."""
    if isinstance(value, Mapping):
        pairs = [(_key_text(key), _with_text_keys(item)) for key, item in value.items()]
        if len(converted := dict(pairs)) < len(pairs):
            raise ConfigError(f"several keys of a mapping have the same text, among {', '.join(sorted(converted))}")
        return converted
    if isinstance(value, (list, tuple)):
        return [_with_text_keys(item) for item in value]
    return value if value is None or isinstance(value, (str, int, float)) else _with_text_keys(json_default(value))


def _key_text(key: object) -> str:
    if isinstance(key, Enum):
        key = key.value
    return key if isinstance(key, str) else canonical_json(key)


def _no_json(value: object, error: Exception) -> ConfigError:
    """Returns the error for a value that has no JSON; it names the path to the invalid part."""
    reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
    names: list[str] = []
    for _ in range(_DEPTH):
        parts = list(value.items() if isinstance(value, Mapping) else enumerate(value) if _is_list(value) else ())
        invalid = next((pair for pair in parts if not _has_json(pair[1])), None)
        if invalid is None:
            break
        value = invalid[1]
        names += [str(invalid[0])] if names or not isinstance(invalid[0], int) else []
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
    """Returns the BLAKE2b digest of bytes, in hex (128 bits, 32 characters)."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def digest_file(path: Path) -> str:
    """Returns the BLAKE2b digest of a file, in hex (128 bits, 32 characters); the file is read in chunks."""
    hasher = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            hasher.update(chunk)
    return hasher.hexdigest()


def file_digests(folder: Path) -> dict[str, str]:
    """Returns a dict: path relative to the folder → digest, for each file in the folder and its subfolders."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): digest_file(path) for path in files}


def digest_path(path: Path) -> str:
    """Returns the digest of a file, or of all files of a folder with their names."""
    return digest(file_digests(path)) if path.is_dir() else digest_file(path)


def digest(value: object) -> str:
    """Returns the BLAKE2b digest of a value's canonical JSON, in hex (128 bits, 32 characters)."""
    return digest_bytes(canonical_json(value).encode("utf-8", "surrogatepass"))


def derive_seed(*parts: str | int) -> int:
    """Derives a seed in [0, 2**63) that depends on the parts and their order, and on nothing else."""
    items = [
        encode_basestring_ascii(part) if type(part) is str else repr(part) if type(part) is int else json.dumps(part)
        for part in parts
    ]  # the JSON of the parts; one json.dumps takes three times as long
    text = f"[{', '.join(items)}]".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1


def describe_settings(value: object) -> Any:
    """Describes a component and its settings as plain JSON for people to read and compare.

    Dataclasses and ordinary objects become their class name and fields, functions and classes their names; fields that
    a dataclass declares with ``field(repr=False)`` are left out. Two functions with the same name are not told apart
    here; recorded work is looked up by `lmpipe.program.identity`, which does.
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
