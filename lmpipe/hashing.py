"""Identity by content: canonical JSON, digests, and the seeds derived from them.

Two values are the same thing exactly when their canonical JSON is the same. Knows nothing of what the
values mean.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence, Set
from types import BuiltinFunctionType, FunctionType
from typing import Any

from pydantic import BaseModel
from pydantic_core import to_jsonable_python

from lmpipe.errors import ConfigError


def canonical_json(value: object) -> str:
    """The one JSON text of a value: sorted keys, no spaces, UTF-8 kept as it is."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, default=to_jsonable_python)


def digest_bytes(data: bytes) -> str:
    """Hex BLAKE2b digest (128 bits, 32 characters) of some bytes."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def digest(value: object) -> str:
    """Hex BLAKE2b digest (128 bits, 32 characters) of a value's canonical JSON."""
    return digest_bytes(canonical_json(value).encode())


def derive_seed(*parts: str | int) -> int:
    """A seed in [0, 2**63) that depends on every part and on their order, and on nothing else."""
    text = json.dumps(parts).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1


def describe(value: object) -> Any:
    """Plain JSON that names what a component is and how it is set, so that it can be hashed and compared.

    Dataclasses and ordinary objects become their class name and public fields, functions their qualified name;
    whatever a dataclass marks with ``field(repr=False)`` is left out.

    Raises:
        ConfigError: For a lambda: it has no name that identifies it in a later run.
    """
    if value is None or isinstance(value, (str, int, float, bool)):
        return value
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if isinstance(value, Mapping):
        return {str(key): describe(item) for key, item in value.items()}
    if isinstance(value, Set):
        return sorted(describe(item) for item in value)
    if isinstance(value, Sequence):
        return [describe(item) for item in value]
    if isinstance(value, (FunctionType, BuiltinFunctionType, type)):
        return _function_name(value)
    if dataclasses.is_dataclass(value):
        shown = {f.name: getattr(value, f.name) for f in dataclasses.fields(value) if f.repr}
    else:
        shown = {name: item for name, item in vars(value).items() if not name.startswith("_")}
    return {"type": type(value).__qualname__, **{name: describe(item) for name, item in shown.items()}}


def _function_name(function: FunctionType | BuiltinFunctionType | type) -> str:
    name = f"{function.__module__}.{function.__qualname__}"
    if "<lambda>" in name:
        raise ConfigError(f"{name} has no name of its own; use a named function, so that a run can be resumed with it")
    return name
