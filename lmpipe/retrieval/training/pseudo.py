"""Pseudo-questions, made of the passages themselves: an encoder learns a collection from them before real questions.

One is some words of a sentence of a passage; or of two passages, the first of which names the second, whose title is
left out, as in a question that takes two searches. After the inverse cloze task (Lee et al. 2019, arXiv 1906.00300).
Knows nothing of training.
"""

from __future__ import annotations

import html
import random
import re
from collections.abc import Mapping, Sequence
from typing import TypeAlias

from lmpipe.hashing import derive_seed
from lmpipe.retrieval.passages import PassageText
from lmpipe.retrieval.training.questions import QuestionSet

_KEPT = 0.7  # share of a span's words that a pseudo-question has
_PAIRED = 0.7  # share of the passages that name others which are asked about together with one of these
_ALONE, _TOGETHER = 20, 14  # words of a span
_SHORTEST, _LONGEST = 6, 4  # characters of a title, and words, that is looked for in other passages

_SENTENCE = re.compile(r"(?<=[.!?])\s+(?=[A-Z\"'(])")
_PARENTHESES = re.compile(r"\s*\([^()]*\)$")  # as in `Mercury (planet)`

Names: TypeAlias = Mapping[str, int]
"""Title in lower case → number of the passage."""


def pseudo_questions(passages: Sequence[PassageText], count: int, seed: int) -> QuestionSet:
    """Makes pseudo-questions with their gold passages.

    Args:
        passages: What is searched.
        count: How many, each of another passage; at most as many as there are passages.
        seed: Of all draws.
    """
    rng = random.Random(derive_seed(seed, "pseudo-questions"))
    titles = [_PARENTHESES.sub("", html.unescape(passage.title).strip()) for passage in passages]
    names = {title.lower(): number for number, title in enumerate(titles) if len(title) >= _SHORTEST}
    texts, gold = [], []
    for number in rng.sample(range(len(passages)), min(count, len(passages))):
        others = [other for other in _named(passages[number].text, names) if titles[other] != titles[number]]
        pair = (number, rng.choice(others)) if others and rng.random() < _PAIRED else (number,)
        hidden = titles[pair[-1]] if len(pair) > 1 or rng.random() < 0.5 else ""
        spans = [_span(passages[one].text, hidden, _ALONE if len(pair) == 1 else _TOGETHER, rng) for one in pair]
        texts.append(" ".join(rng.sample(spans, len(spans))))
        gold.append(tuple((one,) for one in pair))
    return QuestionSet(texts, gold)


def _named(text: str, names: Names) -> list[int]:
    """Passages whose titles stand in a text, in its order."""
    words = html.unescape(text).lower().split()
    spans = (words[first : first + size] for first in range(len(words)) for size in range(1, _LONGEST + 1))
    found = (names.get(" ".join(span).strip(".,;:()\"'")) for span in spans)
    return list(dict.fromkeys(number for number in found if number is not None))


def _span(text: str, hidden: str, size: int, rng: random.Random) -> str:
    """Some words of a run of words of a sentence, without those that are hidden."""
    text = html.unescape(text)
    sentence = rng.choice([part for part in _SENTENCE.split(text) if len(part.split()) > 4] or [text])
    words = re.sub(re.escape(hidden), "", sentence, flags=re.IGNORECASE).split() or sentence.split()
    first = rng.randrange(max(1, len(words) - size + 1))
    run = words[first : first + size]
    return " ".join([word for word in run if rng.random() < _KEPT] or run).strip(".,;")
