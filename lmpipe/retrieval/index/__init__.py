"""Indexes of token vectors, each in a folder: building, opening, searching and changing them."""

from lmpipe.retrieval.index.build import BuildSettings, build_index
from lmpipe.retrieval.index.edit import add_passages, delete_passages
from lmpipe.retrieval.index.retriever import open_colbert_index, open_index

__all__ = ["BuildSettings", "add_passages", "build_index", "delete_passages", "open_colbert_index", "open_index"]
