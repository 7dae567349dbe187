"""The three inner loops of PLAID's search: colbert-ai's C++, compiled once per machine, or the same in torch.

colbert-ai compiles its C++ at every start, in torch's extension folder, where the lock of a killed build blocks all
later builds forever. Here its sources are compiled into the cache folder, under a lock that is released when its
process ends, and loaded from there. Does not depend on indexes or queries.
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
# each source is a separate module and takes half a minute, mostly for torch's headers; here they form one module
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
_NO_TOKEN_SCORE = -9999.0  # colbert-ai's maximum over a passage without tokens


class Kernels(ABC):
    """The inner loops. All tensors are contiguous and on the CPU; passage numbers are int32."""

    @abstractmethod
    def filter(
        self,
        numbers: Tensor,
        products: Tensor,
        codes: Tensor,
        lengths: Tensor,
        starts: Tensor,
        near: Tensor,
        count: int,
    ) -> Tensor:
        """Filters passages by the MaxSim of their tokens' centroids: first by near centroids only, then by all.

        Args:
            numbers: ``[passages]``: numbers of the passages to filter.
            products: float32 ``[centroids, query tokens]``: dot products.
            codes: int32 ``[tokens]``: centroid of each token of the index.
            lengths: int64: number of tokens of each passage of the index.
            starts: int64: first token of each passage of the index.
            near: bool ``[centroids]``: centroids that count in the first filter.
            count: Number of passages that pass the first filter; a quarter of them pass the second.

        Returns:
            Numbers of the remaining passages, best first; among equal scores, the higher number comes first.
        """

    @abstractmethod
    def decompress(self, numbers: Tensor, lengths: Tensor, starts: Tensor, codec: Any, stored: Any) -> Tensor:
        """Returns the token vectors of some passages, float32 ``[tokens, dim]``, not normalised.

        Args:
            numbers: Numbers of the passages.
            lengths: Number of tokens of each passage of the index; see `filter`.
            starts: First token of each passage of the index; see `filter`.
            codec: colbert-ai's ``ResidualCodec``.
            stored: colbert-ai's ``ResidualEmbeddings``.
        """

    @abstractmethod
    def maxsim(self, products: Tensor, lengths: Tensor) -> Tensor:
        """Returns, for each passage, the sum over query tokens of the largest dot product with a token, at least 0.

        Args:
            products: float32 ``[tokens, query tokens]``, passage after passage.
            lengths: int64 ``[passages]``: number of tokens of each passage.

        Returns:
            float32 ``[passages]``.
        """


@final
class CompiledKernels(Kernels):
    """The inner loops in colbert-ai's C++.

    Args:
        folder: Folder of the compiled library; by default within the cache folder.

    Raises:
        ConfigError: If the library is not compiled yet and cannot be compiled.
    """

    def __init__(self, folder: Path | None = None) -> None:
        module = _load(folder or cache_folder() / "plaid")
        self._filter = module.filter_pids_cpp
        self._decompress = module.decompress_residuals_cpp
        self._maxsim = module.segmented_maxsim_cpp

    def filter(
        self,
        numbers: Tensor,
        products: Tensor,
        codes: Tensor,
        lengths: Tensor,
        starts: Tensor,
        near: Tensor,
        count: int,
    ) -> Tensor:
        remaining: Tensor = self._filter(numbers, products, codes, lengths, starts, near, count)
        return remaining

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
    """The inner loops in torch, without a compiler: the same passages in the same order, but several times slower."""

    def filter(
        self,
        numbers: Tensor,
        products: Tensor,
        codes: Tensor,
        lengths: Tensor,
        starts: Tensor,
        near: Tensor,
        count: int,
    ) -> Tensor:
        for kept, mask in ((count, near), (count // 4, None)):
            token_indices = _token_indices(lengths[numbers.long()], starts[numbers.long()])
            centroids, token_counts = codes[token_indices].long(), lengths[numbers.long()]
            if mask is not None:
                owners = torch.arange(len(numbers)).repeat_interleave(token_counts)
                token_counts = torch.bincount(owners[mask[centroids]], minlength=len(numbers))
                centroids = centroids[mask[centroids]]
            maxima = torch.segment_reduce(products[centroids], "max", lengths=token_counts, initial=_NO_TOKEN_SCORE)
            scores = torch.zeros(len(numbers))
            for column in maxima.T:  # one after the other, since the order decides how a sum is rounded
                scores += column
            numbers, order = numbers.sort(descending=True)
            numbers = numbers[scores[order].argsort(descending=True, stable=True)][:kept]
        return numbers

    def decompress(self, numbers: Tensor, lengths: Tensor, starts: Tensor, codec: Any, stored: Any) -> Tensor:
        indices = _token_indices(lengths[numbers.long()], starts[numbers.long()])
        table = codec.bucket_weights[codec.decompression_lookup_table[codec.reversed_bit_map.long()].long()]
        residuals = table[stored.residuals[indices].long()].view(len(indices), -1)
        vectors: Tensor = residuals + codec.centroids[stored.codes[indices].long()]
        return vectors

    def maxsim(self, products: Tensor, lengths: Tensor) -> Tensor:
        maxima = torch.segment_reduce(products, "max", lengths=lengths, initial=0.0)
        return maxima.sum(1)


def _token_indices(lengths: Tensor, starts: Tensor) -> Tensor:
    """Returns the indices of all tokens of some passages."""
    ends = lengths.cumsum(0)
    return torch.arange(int(ends[-1]) if len(ends) else 0) + (starts - ends + lengths).repeat_interleave(lengths)


@lru_cache
def load_kernels(folder: Path | None = None) -> Kernels:
    """Returns the compiled inner loops; if they cannot be compiled, warns once and returns those in torch.

    Args:
        folder: Folder of the compiled library; see `CompiledKernels`.
    """
    try:
        return CompiledKernels(folder)
    except ConfigError as error:
        logger.warning("PLAID searches are computed in torch, which is several times slower: %s", error)
        return TorchKernels()


def _load(folder: Path) -> Any:
    paths = {name: _package() / path for name, path in _SOURCES.items()}
    try:
        texts = [path.read_text() for path in paths.values()]
        version = digest([_MODULE, *texts, torch.__version__, sysconfig.get_config_var("EXT_SUFFIX")])
        library = folder / version[:12] / f"{_NAME}.so"
        library.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(library.parent / "compiling.lock"):
            if not library.exists():
                _compile(paths, library)
        return _import(library)
    except (OSError, RuntimeError, ImportError) as error:
        first_line = (str(error).strip() or repr(error)).splitlines()[0]
        raise ConfigError(f"colbert-ai's C++ cannot be compiled and loaded here ({first_line})") from error


def _compile(paths: Mapping[str, Path], library: Path) -> None:
    """Compiles the inner loops, which takes about half a minute."""
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler) is None:
        raise OSError(f"there is no compiler {compiler}")
    logger.info("compiling colbert-ai's C++; this happens once")
    # in a new folder, since torch waits forever for the lock that a killed build has left
    with TemporaryDirectory(dir=library.parent) as unfinished, _ninja_on_path():
        source = Path(unfinished) / f"{_NAME}.cpp"
        sources = "\n".join(f'namespace {name} {{\n#include "{path}"\n}}' for name, path in paths.items())
        source.write_text(_MODULE.format(sources=sources, calls="\n".join(f"{name}::bind(m);" for name in paths)))
        load(_NAME, [str(source)], extra_cflags=["-O3"], build_directory=unfinished, verbose=False)
        next(Path(unfinished).glob("*.so")).replace(library)


@contextmanager
def _ninja_on_path() -> Iterator[None]:
    """Lets torch find the ninja of this Python's environment, even if that environment is not activated."""
    path = os.environ.get("PATH", "")
    os.environ["PATH"] = os.pathsep.join([path, str(Path(sys.executable).parent)])
    try:
        yield
    finally:
        os.environ["PATH"] = path


def _import(library: Path) -> Any:
    spec = importlib.util.spec_from_file_location(library.stem, library)
    if spec is None or spec.loader is None:
        raise ImportError(f"{library} is not an extension module")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _package() -> Path:
    spec = importlib.util.find_spec("colbert")
    if spec is None or spec.origin is None:
        raise ConfigError("colbert-ai is not installed; run: pip install 'lmpipe[plaid]'")
    return Path(spec.origin).parent
