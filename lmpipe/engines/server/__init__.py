"""The engine for OpenAI-compatible servers."""

from lmpipe.engines.server.client import ServerLM

__all__ = ["ServerLM"]
