"""Compiles the kernels for this processor, and loads them.

Knows nothing about what the kernels compute.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch

from lmpipe.engines.bundled_files import cache_folder

logger = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("kernels.c")
DISABLE = "LMPIPE_KERNELS"  # environment variable: 0 turns the kernels off
_FLAGS = (
    "-std=gnu11",
    "-O3",
    "-funroll-loops",
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-fPIC",
    "-Wno-psabi",
)
_TIMEOUT = 120  # seconds that a compilation may take

_pointer, _long, _int, _float = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float
_SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "attention": (_int, [*[_pointer] * 7, _long, *[_pointer] * 3, *[_long] * 3, _float, _int, _int]),
    "append": (None, [_pointer, _long, _long, _pointer, *[_long] * 4, _pointer, *[_long] * 4]),
    "argmax": (None, [_pointer, _long, _pointer, _pointer, _long, _long]),
    "draw": (None, [_pointer, _long, *[_pointer] * 4, _long, _long]),
    "attention_backward": (
        _int,
        [*[_pointer] * 7, _long, *[_pointer] * 2, _long, *[_pointer] * 3, *[_long] * 3, _float, _int],
    ),
    "rms_norm_backward": (None, [_pointer, _pointer, _float, _pointer, _int, _pointer, _pointer, _long, _long]),
    "silu_mul_backward": (None, [_pointer, _pointer, _pointer, _int, _long, _long]),
    "add_rms_norm": (None, [_pointer, _pointer, _long, _int, _pointer, _float, _pointer, _int, _long, _long]),
    "rotate": (None, [_pointer, _long, _int, _pointer, _pointer, _long, _long, _long]),
    "silu_mul": (None, [_pointer, _long, _pointer, _long, _pointer, _int, _long, _long]),
}


@cache
def kernels() -> Any:
    """Returns the compiled kernels, or None where they are turned off or cannot be compiled."""
    if os.environ.get(DISABLE) == "0":
        return None
    compiler = _compiler()
    if not compiler:
        logger.info("no C compiler was found, so the local engine uses PyTorch's own functions, which are slower")
        return None
    return next(filter(None, (_loaded(compiler, flags) for flags in _flag_sets())), None)


def _loaded(compiler: list[str], flags: tuple[str, ...]) -> Any:
    """Returns the kernels, or None if they cannot be compiled with these flags, or not be loaded."""
    try:
        return _load(_compiled(compiler, flags))
    except (OSError, AttributeError, RuntimeError, subprocess.SubprocessError) as error:  # Path.home raises the third
        problem = getattr(error, "stderr", "") or str(error)
        command = shlex.join([*compiler, *flags])
        logger.info("%s cannot compile the kernels of the local engine: %s", command, problem)
        return None


def _compiler() -> list[str]:
    """Returns the command of a C compiler: ``$CC``, the one that Python was built with, or a common one; or nothing."""
    commands = (os.environ.get("CC"), sysconfig.get_config_var("CC"), "cc", "gcc", "clang")
    return next((words for command in commands if (words := (command or "").split()) and shutil.which(words[0])), [])


def _flag_sets() -> list[tuple[str, ...]]:
    """Returns flags from the fastest to the most compatible: for this very processor, with PyTorch's threads or one."""
    native = "-mcpu=native" if sys.platform == "darwin" else "-march=native"
    return [(native, "-fopenmp"), (native,), ()]


def _compiled(compiler: list[str], flags: tuple[str, ...]) -> Path:
    """Returns the path of the compiled kernels, which are compiled unless the cache holds them undamaged."""
    # the macros say which compiler this is, and what instructions it uses for this processor: homes may be shared
    macros = _run([*compiler, *flags, "-E", "-dM", "-x", "c", os.devnull])
    parts = (SOURCE.read_text(encoding="utf-8"), *_FLAGS, *flags, macros, torch.__version__)
    name, cached = _digest(repr(parts).encode()), cache_folder() / "kernels"
    for path in cached.glob(f"{name}-*.so"):
        if path.stem == f"{name}-{_digest(path.read_bytes())}":
            return path
    cached.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cached) as folder:
        compiled, linked = Path(folder) / "kernels.o", Path(folder) / "kernels.so"
        # linked without OpenMP: the calls of its library then lead to the one that PyTorch has loaded, and its threads
        undefined = ("-undefined", "dynamic_lookup") if sys.platform == "darwin" else ()
        _run([*compiler, *_FLAGS, *flags, "-c", str(SOURCE), "-o", str(compiled)])
        _run([*compiler, "-shared", *undefined, str(compiled), "-o", str(linked), "-lm"])
        return linked.replace(cached / f"{name}-{_digest(linked.read_bytes())}.so")


def _run(command: list[str]) -> str:
    run = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", check=True, timeout=_TIMEOUT)
    return run.stdout


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:32]


def _load(path: Path) -> Any:
    library = ctypes.CDLL(str(path))
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library
