"""Selection of the demonstrations that a prompt shows for an input: those nearest to it.

Liu et al. 2022 (arXiv 2101.06804) found that nearest neighbours are better demonstrations than random ones. Knows
nothing about how embeddings are computed. Inference and fine-tuning rows use the same selection.
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
"""A function of an embedder's name and a list of texts that returns a vector of length 1 for each text."""


def select_demos(signature: Signature, prompt: PromptState, inputs: Mapping[str, Any], embed: Embed) -> PromptState:
    """Returns a prompt with only the demonstrations that it shows for some inputs.

    These are the k demonstrations whose rendered inputs are nearest to the rendered inputs, by the cosine similarity of
    their embeddings, the nearest last. Of equally near demonstrations, the earlier one in the pool counts as nearer. A
    demonstration with identical inputs is left out, so that a training example does not see its own label.

    Args:
        signature: Signature of the module.
        prompt: Prompt of the module; without a selection it is returned as it is.
        inputs: Value of each input field.
        embed: Function that embeds texts.
    """
    if prompt.nearest is None:
        return prompt
    query = clean_text(Template().user_message(signature, inputs))
    pool = zip(prompt.demos, _demo_texts(signature, prompt), strict=True)
    candidates = [(demo, text) for demo, text in pool if text != query]
    vectors = embed(prompt.nearest.embedder, [query, *(text for _, text in candidates)])
    distances = [-cosine(vectors[0], vector) for vector in vectors[1:]]
    nearest = sorted(range(len(candidates)), key=distances.__getitem__)[: prompt.nearest.k]
    demos = tuple(candidates[index][0] for index in reversed(nearest))
    return PromptState(instructions=prompt.instructions, demos=demos)


@lru_cache(maxsize=256)
def _demo_texts(signature: Signature, prompt: PromptState) -> tuple[str, ...]:
    """The rendered inputs of the demonstrations of a prompt."""
    return tuple(clean_text(Template().user_message(signature, demo.inputs)) for demo in prompt.demos)
