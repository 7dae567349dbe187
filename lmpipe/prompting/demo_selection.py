"""Which demonstrations a prompt shows for an input, where it shows those nearest to it.

The selection by nearest neighbours of Liu et al. 2022 (arXiv 2101.06804), who found it to be better than drawn ones.
Knows nothing of how embeddings are computed, nor of who asks: inference and fine-tuning rows have the same answer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

from lmpipe.embedder import Vector, cosine
from lmpipe.prompting.signature import Signature
from lmpipe.prompting.template import Template
from lmpipe.state import PromptState
from lmpipe.text.cleaning import clean_text

Embed = Callable[[str, Sequence[str]], Sequence[Vector]]
"""Vectors of some texts, by the embedder of that name."""


def select_demos(signature: Signature, prompt: PromptState, inputs: Mapping[str, Any], embed: Embed) -> PromptState:
    """The prompt with the demos that it shows for some inputs.

    Of a prompt with a selection these are the k demos whose rendered inputs are nearest to the rendered inputs by the
    cosine of their embeddings, the nearest last; of equally near ones the earlier in the pool is the nearer. A demo of
    the very same inputs is never shown: so a training example does not see its own label.

    Args:
        signature: Decides the input fields.
        prompt: With a selection or without; without one it comes back as it is.
        inputs: A value for each input field.
        embed: Asked for vectors of length 1.
    """
    if prompt.nearest is None:
        return prompt
    asked = clean_text(Template().user_message(signature, inputs))
    others = [(demo, text) for demo, text in zip(prompt.demos, _texts(signature, prompt), strict=True) if text != asked]
    vectors = embed(prompt.nearest.embedder, [asked, *(text for _, text in others)])
    distances = [-cosine(vectors[0], vector) for vector in vectors[1:]]
    nearest = sorted(range(len(others)), key=distances.__getitem__)[: prompt.nearest.k]
    return PromptState(instructions=prompt.instructions, demos=tuple(others[number][0] for number in reversed(nearest)))


@lru_cache(maxsize=256)
def _texts(signature: Signature, prompt: PromptState) -> tuple[str, ...]:
    return tuple(clean_text(Template().user_message(signature, demo.inputs)) for demo in prompt.demos)
