"""The model card of a saved session: what was saved, how well it does, and snippets that load it.

Knows nothing about how the files beside it are written.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

from lmpipe.state import ProgramState
from lmpipe.text.cleaning import clean_text
from lmpipe.text.markdown import as_block, as_code, as_line

_CARD = "model_card.md.jinja"


@final
@dataclass(frozen=True)
class CardFacts:
    """What a model card says besides what the saved files say themselves.

    Attributes:
        program: Name of the program or of the task.
        found_by: The strategy or the optimizer that found the state, as Markdown.
        seed: Seed of the run.
        scores: Sentences about scores, as Markdown.
        prompts: Module path → messages of its prompt, each as ``(role, content)``.
        settings: Further settings of the run, as JSON; empty if there are none.
    """

    program: str
    found_by: str
    seed: int
    scores: Sequence[str]
    prompts: Mapping[str, Sequence[tuple[str, str]]]
    settings: Mapping[str, Any] = field(default_factory=dict)


@final
@dataclass(frozen=True)
class SavedAdapter:
    """Tuned weights in a saved folder.

    Attributes:
        folder: Name of their folder.
        digest: Digest of their files.
        keys: Keys of the weights in the state that use them, such as ``lm`` or ``lm/answer``.
        config: PEFT's configuration; None if the folder holds a whole model.
    """

    folder: str
    digest: str
    keys: Sequence[str]
    config: Mapping[str, Any] | None

    @property
    def role(self) -> str:
        """Role of their LM."""
        return self.keys[0].partition("/")[0]

    @property
    def rank(self) -> int | None:
        """Rank of a LoRA adapter, which vLLM must be told; None for other weights."""
        return None if self.config is None else self.config.get("r")


def render_card(
    facts: CardFacts, state: ProgramState, session: Mapping[str, Any], adapters: Sequence[SavedAdapter]
) -> str:
    """Returns a model card as Markdown.

    Args:
        facts: What the card says about the state.
        state: The saved state.
        session: The saved session, as JSON.
        adapters: The saved adapters.
    """
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=jinja2.select_autoescape(),
    )
    environment.filters |= {"line": as_line, "code": as_code, "fenced": as_block, "shell": _shell_word}
    lms: Mapping[str, Any] = session["lm"]
    return environment.get_template(_CARD).render(
        facts=facts,
        names=[lm["name"] for lm in lms.values()],
        bases={role: _Base.create(lm["name"], lm["spec"]) for role, lm in lms.items()},
        missing=_missing(state, session),
        adapters=adapters,
    )


@final
@dataclass(frozen=True)
class _Base:
    """A base LM, as code that names it.

    Attributes:
        name: Hub id, local folder or name.
        bundled: Whether it is the bundled LM, which is not on the hub.
    """

    name: str
    bundled: bool

    @classmethod
    def create(cls, name: str, spec: str | None) -> _Base:
        kind, _, rest = (spec or "").partition(":")
        # the suffix of a name is the dtype or the quantization of the weights
        return cls(clean_text(rest if kind in ("hf", "vllm") else name.partition("@")[0]), spec == "bundled")


def _missing(state: ProgramState, session: Mapping[str, Any]) -> dict[str, str]:
    """Returns the arguments that `lmpipe.load` needs, as code → the name of what they stand for."""
    by_hand = {role: lm["name"] for role, lm in session["lm"].items() if lm["spec"] is None}
    alone = len(session["lm"]) == 1
    missing = {"lm=..." if alone else f"lm={{{role!r}: ...}}": name for role, name in by_hand.items()}
    if session["retriever"]:
        missing["retriever=..."] = session["retriever"]
    for prompt in state.prompts.values():
        if prompt.nearest is not None:
            missing["embedder=..."] = prompt.nearest.embedder
    return missing


def _shell_word(text: object) -> str:
    """Quotes a text as one word of a command line."""
    return shlex.quote(" ".join(clean_text(str(text)).split()))
