"""PLAID: token vectors as the nearest of many centroids and what remains, in 1, 2, 4 or 8 bits a component.

ColBERTv2's residual compression (Santhanam et al. 2022, arXiv 2112.01488) and PLAID's search (Santhanam et al. 2022,
arXiv 2205.09707), by way of the package ``colbert-ai``: indexes are in its format, its codec compresses and its C++
filters and decompresses. This package isolates it; nothing else of lmpipe knows of it.
"""

from lmpipe.retrieval.plaid.build import build_plaid
from lmpipe.retrieval.plaid.index import PlaidIndex, SearchSettings

__all__ = ["PlaidIndex", "SearchSettings", "build_plaid"]
