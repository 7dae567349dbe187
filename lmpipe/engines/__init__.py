"""Engines: what answers LM requests and trains weights. Each is imported when it is first made."""

from __future__ import annotations

from lmpipe.errors import ConfigError
from lmpipe.lm import LM


def load_lm(spec: str) -> LM:
    """Makes the LM that a short text names.

    Args:
        spec: ``"embedded"`` for the LM that comes with lmpipe[embedded], or ``"hf:ID_OR_PATH"`` for a model of the hub
            or of a local folder.

    Raises:
        ConfigError: If the text names no LM, or it cannot be loaded.
    """
    kind, _, rest = spec.partition(":")
    if spec == "embedded":
        from lmpipe.engines.embedded import load_embedded

        return load_embedded()
    if kind == "hf" and rest:
        from lmpipe.engines.local import LocalLM

        return LocalLM.from_pretrained(rest)
    raise ConfigError(f"unknown LM {spec!r}; write 'embedded' or 'hf:ID_OR_PATH'")
