"""The local engine: a transformers causal LM in this process."""

from lmpipe.engines.local.engine import LocalLM

__all__ = ["LocalLM"]
