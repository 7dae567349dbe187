"""Late-interaction retrieval: ColBERT checkpoints, indexes over token vectors, and the retrievers made of them.

A passage is a row of token vectors; a query is another; the score of a passage is the sum, over the query's vectors, of
the largest product with any vector of the passage (MaxSim; Khattab and Zaharia 2020, arXiv 2004.12832). Nothing here is
imported before it is made: see `load_retriever`.
"""
