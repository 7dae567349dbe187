"""The three inner loops of PLAID's search: colbert-ai's C++, compiled once for a machine, or the same in torch.

colbert-ai compiles at every start, in a folder of torch's where the lock of a build that was killed stops every later
one for ever. Here its sources are compiled into the cache folder under a lock that ends with its process, and loaded
from there. Knows nothing of indexes or queries.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import shutil
import sys
import sysconfig
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, final

import torch
from filelock import FileLock
from torch import Tensor
from torch.utils.cpp_extension import load

from lmpipe.engines.bundled_files import cache_folder
from lmpipe.errors import ConfigError
from lmpipe.storage.hashing import digest

logger = logging.getLogger(__name__)

_SOURCES = {
    "filter_pids": "search/filter_pids.cpp",
    "decompress_residuals": "search/decompress_residuals.cpp",
    "segmented_maxsim": "modeling/segmented_maxsim.cpp",
}
# each source is a module of its own and takes half a minute, nearly all for torch's headers: here they are one module
_MODULE = """#include <pthread.h>
#include <torch/extension.h>

#include <algorithm>
#include <chrono>
#include <numeric>
#include <utility>

#pragma push_macro("PYBIND11_MODULE")
#undef PYBIND11_MODULE
#define PYBIND11_MODULE(name, m) void bind(pybind11::module_& m)
{sources}
#pragma pop_macro("PYBIND11_MODULE")

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {{
{calls}
}}
"""
_NAME = "lmpipe_plaid"
_FAR = -9999.0  # colbert-ai's product with what a passage does not have


class Kernels(ABC):
    """The inner loops. All tensors are contiguous and on the CPU; numbers of passages are int32."""

    @abstractmethod
    def filter(
        self, numbers: Tensor, products: Tensor, codes: Tensor, lengths: Tensor, starts: Tensor, near: Tensor, most: int
    ) -> Tensor:
        """The passages whose tokens' centroids fit a query best: `most` by near centroids, of them a quarter by all.

        Args:
            numbers: ``[passages]``, of those to choose from.
            products: float32 ``[centroids, query tokens]``.
            codes: int32 ``[tokens]``: centroids of all tokens.
            lengths: int64: tokens of each passage of the index.
            starts: int64: first token of each passage of the index.
            near: bool ``[centroids]``: those that count at first.
            most: How many passages pass at first.

        Returns:
            Numbers, best first; among equals, the higher number first.
        """

    @abstractmethod
    def decompress(self, numbers: Tensor, lengths: Tensor, starts: Tensor, codec: Any, stored: Any) -> Tensor:
        """The token vectors of some passages, float32 ``[tokens, dim]``, not yet of length 1.

        Args:
            numbers: Of the passages.
            lengths: As for `filter`.
            starts: As for `filter`.
            codec: colbert-ai's ``ResidualCodec``.
            stored: Its ``ResidualEmbeddings``.
        """

    @abstractmethod
    def maxsim(self, products: Tensor, lengths: Tensor) -> Tensor:
        """Sum over a query's tokens of the largest product with any token of a passage, or of 0 if none is positive.

        Args:
            products: float32 ``[tokens, query tokens]``, one passage after the other.
            lengths: int64 ``[passages]``.

        Returns:
            float32 ``[passages]``.
        """


@final
class CompiledKernels(Kernels):
    """colbert-ai's C++.

    Args:
        folder: Where to keep what was compiled; by default in the cache folder.

    Raises:
        ConfigError: If it has yet to be compiled and cannot be.
    """

    def __init__(self, folder: Path | None = None) -> None:
        module = _load(folder or cache_folder() / "plaid")
        self._filter = module.filter_pids_cpp
        self._decompress = module.decompress_residuals_cpp
        self._maxsim = module.segmented_maxsim_cpp

    def filter(
        self, numbers: Tensor, products: Tensor, codes: Tensor, lengths: Tensor, starts: Tensor, near: Tensor, most: int
    ) -> Tensor:
        found: Tensor = self._filter(numbers, products, codes, lengths, starts, near, most)
        return found

    def decompress(self, numbers: Tensor, lengths: Tensor, starts: Tensor, codec: Any, stored: Any) -> Tensor:
        weights, order, table = codec.bucket_weights, codec.reversed_bit_map, codec.decompression_lookup_table
        vectors: Tensor = self._decompress(
            *(numbers, lengths, starts, weights, order, table),
            *(stored.residuals, stored.codes, codec.centroids, codec.dim, codec.nbits),
        )
        return vectors

    def maxsim(self, products: Tensor, lengths: Tensor) -> Tensor:
        scores: Tensor = self._maxsim(products, lengths)
        return scores


@final
class TorchKernels(Kernels):
    """The same without a compiler, several times slower: the same passages in the same order."""

    def filter(
        self, numbers: Tensor, products: Tensor, codes: Tensor, lengths: Tensor, starts: Tensor, near: Tensor, most: int
    ) -> Tensor:
        for kept, counts in ((most, near), (most // 4, None)):
            places = _places(lengths[numbers.long()], starts[numbers.long()])
            found, counted = codes[places].long(), lengths[numbers.long()]
            if counts is not None:
                owners = torch.arange(len(numbers)).repeat_interleave(counted)
                counted = torch.bincount(owners[counts[found]], minlength=len(numbers))
                found = found[counts[found]]
            best = torch.segment_reduce(products[found], "max", lengths=counted, initial=_FAR)
            scores = torch.zeros(len(numbers))
            for column in best.T:  # one after the other, since the order decides how a sum is rounded
                scores += column
            numbers, order = numbers.sort(descending=True)
            numbers = numbers[scores[order].argsort(descending=True, stable=True)][:kept]
        return numbers

    def decompress(self, numbers: Tensor, lengths: Tensor, starts: Tensor, codec: Any, stored: Any) -> Tensor:
        places = _places(lengths[numbers.long()], starts[numbers.long()])
        table = codec.bucket_weights[codec.decompression_lookup_table[codec.reversed_bit_map.long()].long()]
        rest = table[stored.residuals[places].long()].view(len(places), -1)
        vectors: Tensor = rest + codec.centroids[stored.codes[places].long()]
        return vectors

    def maxsim(self, products: Tensor, lengths: Tensor) -> Tensor:
        best = torch.segment_reduce(products, "max", lengths=lengths, initial=0.0)
        return best.sum(1)


def _places(lengths: Tensor, starts: Tensor) -> Tensor:
    """Where the tokens of some passages are."""
    ends = lengths.cumsum(0)
    return torch.arange(int(ends[-1]) if len(ends) else 0) + (starts - ends + lengths).repeat_interleave(lengths)


@lru_cache
def load_kernels(folder: Path | None = None) -> Kernels:
    """The compiled inner loops, or, said once, the others where they cannot be compiled.

    Args:
        folder: As for `CompiledKernels`.
    """
    try:
        return CompiledKernels(folder)
    except ConfigError as error:
        logger.warning("PLAID searches in torch, several times slower: %s", error)
        return TorchKernels()


def _load(folder: Path) -> Any:
    paths = {name: _package() / path for name, path in _SOURCES.items()}
    try:
        texts = [path.read_text() for path in paths.values()]
        kind = digest([_MODULE, *texts, torch.__version__, sysconfig.get_config_var("EXT_SUFFIX")])
        library = folder / kind[:12] / f"{_NAME}.so"
        library.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(library.parent / "compiling.lock"):
            if not library.exists():
                _compile(paths, library)
        return _import(library)
    except (OSError, RuntimeError, ImportError) as error:
        first = (str(error).strip() or repr(error)).splitlines()[0]
        raise ConfigError(f"colbert-ai's C++ cannot be compiled and loaded here ({first})") from error


def _compile(paths: Mapping[str, Path], library: Path) -> None:
    """Compiles the inner loops, in about half a minute."""
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler) is None:
        raise OSError(f"there is no compiler {compiler}")
    logger.info("compiling colbert-ai's C++, once")
    # in a folder of its own: torch waits for ever where a build that was killed has left its lock
    with TemporaryDirectory(dir=library.parent) as unfinished, _ninja():
        source = Path(unfinished) / f"{_NAME}.cpp"
        sources = "\n".join(f'namespace {name} {{\n#include "{path}"\n}}' for name, path in paths.items())
        source.write_text(_MODULE.format(sources=sources, calls="\n".join(f"{name}::bind(m);" for name in paths)))
        load(_NAME, [str(source)], extra_cflags=["-O3"], build_directory=unfinished, verbose=False)
        made = next(Path(unfinished).glob("*.so"))
        made.replace(library)


@contextmanager
def _ninja() -> Iterator[None]:
    """Lets torch find the ninja that is installed beside this Python, whose environment may not be activated."""
    path = os.environ.get("PATH", "")
    os.environ["PATH"] = os.pathsep.join([path, str(Path(sys.executable).parent)])
    try:
        yield
    finally:
        os.environ["PATH"] = path


def _import(library: Path) -> Any:
    found = importlib.util.spec_from_file_location(library.stem, library)
    if found is None or found.loader is None:
        raise ImportError(f"{library} is no extension module")
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


def _package() -> Path:
    found = importlib.util.find_spec("colbert")
    if found is None or found.origin is None:
        raise ConfigError("colbert-ai is not installed; run: pip install 'lmpipe[plaid]'")
    return Path(found.origin).parent
