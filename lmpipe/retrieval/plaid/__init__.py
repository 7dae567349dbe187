"""PLAID: each token vector is stored as its nearest centroid and a residual of 1, 2, 4 or 8 bits per component.

ColBERTv2's residual compression (Santhanam et al. 2022, arXiv 2112.01488) and PLAID's search (Santhanam et al. 2022,
arXiv 2205.09707), built on the package ``colbert-ai``: indexes are in its format, its codec compresses vectors, and its
C++ filters and decompresses. Only this folder of lmpipe depends on that package.
"""

from lmpipe.retrieval.plaid.build import build_plaid
from lmpipe.retrieval.plaid.index import PlaidIndex, SearchSettings

__all__ = ["PlaidIndex", "SearchSettings", "build_plaid"]
