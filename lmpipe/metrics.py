"""Metrics: functions of an example and a prediction that give a score in [0, 1], and may say why.

The normalisation of answers is the one of SQuAD (Rajpurkar et al. 2016) and HotPotQA (Yang et al. 2018): lower case, no
punctuation, no articles, single spaces.
"""

from __future__ import annotations

import inspect
import math
import re
import string
from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from typing import SupportsFloat

from lmpipe.data import Example, Prediction
from lmpipe.errors import MetricError
from lmpipe.text import clean

Metric = Callable[[Example, Prediction], float | tuple[float, str]]
"""Scores a prediction on an example, in [0, 1]; a resumed run knows it by its code (`lmpipe.identity`).

It may give ``(score, feedback)``: what is wrong with the prediction, in words, which reflective optimizers read.
"""

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NUMBER = re.compile(
    r"""(?<![\w.])(?P<sign>[-−]?)(?:[$€£]\s?)?               # a hyphen between words, or before a space, is no sign
        (?:(?P<whole>\d+)\s+(?=\d+/\d))?                    # 1 1/2
        (?P<number>\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d*\.\d+|\d+)
        (?:\s?/\s?(?P<under>[1-9]\d{0,2}(?:,\d{3})+|\d*[1-9]\d*)(?![\d.,]*\d*/))?""",
    re.VERBOSE,
)
_ROUNDING = 1e-6
_SHOWN = 100  # characters of a verdict in a message
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def judge(metric: Metric, example: Example, prediction: Prediction) -> tuple[float, str]:
    """Score and feedback; the latter is empty where the metric gives none.

    Raises:
        MetricError: If the metric gave something else than a number in [0, 1], or such a number and feedback. The
            message goes on from the name of the metric.
        Exception: What the metric raised.
    """
    verdict = metric(example, prediction)
    score, feedback = verdict if isinstance(verdict, tuple) and len(verdict) == 2 else (verdict, "")
    return _in_range(score), clean(str(feedback))


def _in_range(score: object) -> float:
    """The score as a number; what rounding puts beyond 0 or 1 by less than a millionth is put back."""
    if inspect.iscoroutine(score):
        score.close()
        raise MetricError("is async, so it gave a coroutine; write `def` in place of `async def`")
    value = float(score) if isinstance(score, SupportsFloat) else math.nan
    if not -_ROUNDING <= value <= 1 + _ROUNDING:  # a NaN is not either
        shown = repr(score) if len(repr(score)) <= _SHOWN else f"{repr(score)[:_SHOWN]}…"
        raise MetricError(f"gave {shown}; it must give a number in [0, 1], or (number, text)")
    return min(max(value, 0.0), 1.0)


def normalize_answer(text: object) -> str:
    """Lower case without punctuation, articles and extra white space."""
    return " ".join(_ARTICLES.sub(" ", str(text).lower().translate(_PUNCTUATION)).split())


def exact_match(example: Example, prediction: Prediction) -> float:
    """1 if the prediction's ``answer`` equals the label ``answer`` after normalisation, else 0."""
    return float(normalize_answer(prediction["answer"]) == normalize_answer(example.labels["answer"]))


def answer_f1(example: Example, prediction: Prediction) -> float:
    """Harmonic mean of the precision and recall of the words of ``answer`` after normalisation."""
    found = Counter(normalize_answer(prediction["answer"]).split())
    gold = Counter(normalize_answer(example.labels["answer"]).split())
    shared = (found & gold).total()
    return 2 * shared / (found.total() + gold.total()) if shared else 0.0


def last_number(text: object) -> Fraction | None:
    """The last number of a text, exactly: ``$1,000``, ``5.00``, ``3/4``, ``1 1/2`` and ``-7`` are numbers.

    Returns:
        None if there is none.
    """
    numbers = list(_NUMBER.finditer(str(text)))
    if not numbers:
        return None
    found = numbers[-1]
    whole, number, under = ((found[part] or "").replace(",", "") for part in ("whole", "number", "under"))
    value = int(whole or 0) + Fraction(number) / int(under or 1)
    return -value if found["sign"] else value


def number_match(example: Example, prediction: Prediction) -> float:
    """1 if the last numbers of ``answer`` and of the label ``answer`` are equal, else 0 (Cobbe et al. 2021)."""
    number = last_number(prediction["answer"])
    return float(number is not None and number == last_number(example.labels["answer"]))
