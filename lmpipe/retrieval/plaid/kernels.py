"""The three inner loops of PLAID's search: colbert-ai's C++, compiled once for a machine, or the same in torch.

colbert-ai compiles at every start, in a folder of torch's where the lock of a build that was killed stops every later
one for ever. Here its sources are compiled into the cache folder under a lock that ends with its process, and loaded
from there. Knows nothing of indexes or queries.
"""

from __future__ import annotations

import importlib.util
import logging
import sysconfig
from abc import ABC, abstractmethod
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, final

import torch
from filelock import FileLock
from torch import Tensor
from torch.utils.cpp_extension import load

from lmpipe.engines.packaged import cache_folder
from lmpipe.errors import ConfigError
from lmpipe.hashing import digest

logger = logging.getLogger(__name__)

_SOURCES = {
    "filter_pids_cpp": "search/filter_pids.cpp",
    "decompress_residuals_cpp": "search/decompress_residuals.cpp",
    "segmented_maxsim_cpp": "modeling/segmented_maxsim.cpp",
}
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
        modules = {name: _load(name, path, folder) for name, path in _SOURCES.items()}
        self._filter = modules["filter_pids_cpp"].filter_pids_cpp
        self._decompress = modules["decompress_residuals_cpp"].decompress_residuals_cpp
        self._maxsim = modules["segmented_maxsim_cpp"].segmented_maxsim_cpp

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
            owners = torch.arange(len(numbers)).repeat_interleave(lengths[numbers.long()])
            found = codes[places].long()
            if counts is not None:
                found, owners = found[counts[found]], owners[counts[found]]
            best = torch.full((len(numbers), products.shape[1]), _FAR)
            best = best.index_reduce_(0, owners, products[found], "amax")
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
def load_kernels() -> Kernels:
    """The compiled inner loops, or, said once, the others where they cannot be compiled."""
    try:
        return CompiledKernels()
    except ConfigError as error:
        logger.warning("PLAID searches in torch, several times slower: %s", error)
        return TorchKernels()


def _load(name: str, path: str, folder: Path | None) -> Any:
    source = _package() / path
    kind = digest([source.read_text(), torch.__version__, sysconfig.get_config_var("EXT_SUFFIX")])
    library = (folder or cache_folder() / "plaid") / f"{name}-{kind[:12]}" / f"{name}.so"
    try:
        library.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(library.parent / "compiling.lock"):
            if not library.exists():
                _compile(source, library)
        return _import(library)
    except (OSError, RuntimeError, ImportError) as error:
        first = (str(error).strip() or repr(error)).splitlines()[0]
        raise ConfigError(f"colbert-ai's {source.name} cannot be compiled and loaded here ({first})") from error


def _compile(source: Path, library: Path) -> None:
    """Compiles one file, about half a minute."""
    logger.info("compiling colbert-ai's %s, once", source.name)
    with TemporaryDirectory(dir=library.parent) as unfinished:  # of its own: torch waits for locks left in any other
        load(library.stem, [str(source)], extra_cflags=["-O3"], build_directory=unfinished, is_python_module=False)
        made = next(Path(unfinished).glob("*.so"))  # torch numbers the name if it has built one like it before
        made.replace(library)


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
