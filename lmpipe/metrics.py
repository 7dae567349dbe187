"""Metrics: functions of an example and a prediction that give a score in [0, 1], and may say why.

The normalisation of answers is the one of SQuAD (Rajpurkar et al. 2016) and HotPotQA (Yang et al. 2018): lower case, no
punctuation, no articles, single spaces.
"""

from __future__ import annotations

import enum
import inspect
import math
import re
import string
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction
from typing import Any, SupportsFloat

from lmpipe.data import Example, Prediction
from lmpipe.errors import MetricError
from lmpipe.prompting.numbers import Number, find_numbers
from lmpipe.text.cleaning import clean
from lmpipe.text.display import shorten, shown

Metric = Callable[[Example, Prediction], float | tuple[float, str]]
"""Scores a prediction on an example, in [0, 1]; a resumed run knows it by its code (`lmpipe.program.identity`).

It may give ``(score, feedback)``: what is wrong with the prediction, in words, which reflective optimizers read.
"""

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_ROUNDING = 1e-6
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ALONE = frozenset(["yes", "no", "noanswer"])
_FINAL = re.compile(r"#### *(?=[-−$€£¥.\d])")
_SLASH = re.compile(r"\s?/\s?")


def score_prediction(metric: Metric, example: Example, prediction: Prediction) -> tuple[float, str]:
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
        raise MetricError("it is async, so it gave a coroutine; write `def` in place of `async def`")
    value = float(score) if isinstance(score, (float, int, SupportsFloat)) else math.nan
    if not -_ROUNDING <= value <= 1 + _ROUNDING:  # a NaN is not either
        raise MetricError(f"it gave {shown(score, 100)}; it must give a number in [0, 1], or (number, text)")
    return min(max(value, 0.0), 1.0)


def normalize_answer(text: object) -> str:
    """Lower case without punctuation, articles and extra white space."""
    return " ".join(_ARTICLES.sub(" ", str(text).lower().translate(_PUNCTUATION)).split())


def exact_match(example: Example, prediction: Prediction) -> float:
    """1 if the prediction's ``answer`` equals the label ``answer`` after normalisation, else 0.

    A label that is a list holds answers that are all right; the best score counts, as in SQuAD.

    Raises:
        MetricError: If the prediction or the labels have no ``answer``.
    """
    answer, golds = _answers("exact_match", example, prediction)
    return float(any(normalize_answer(answer) == normalize_answer(gold) for gold in golds))


def answer_f1(example: Example, prediction: Prediction) -> float:
    """Harmonic mean of the precision and recall of the words of ``answer`` after normalisation.

    As in HotPotQA's official script, ``yes``, ``no`` and ``noanswer`` match only themselves. Two answers of which
    normalisation leaves nothing (``"A"`` and ``"the"``) are equal, as they are for `exact_match`.

    A label that is a list holds answers that are all right; the best score counts, as in SQuAD.

    Raises:
        MetricError: If the prediction or the labels have no ``answer``.
    """
    answer, golds = _answers("answer_f1", example, prediction)
    return max(_f1(normalize_answer(answer), normalize_answer(gold)) for gold in golds)


def last_number(text: object) -> Fraction | None:
    """The last number of a text, exactly: ``$1,000``, ``5.00``, ``3/4``, ``1 1/2`` and ``-7`` are numbers.

    See `lmpipe.prompting.numbers.find_numbers` for how they are written. Of a number, it is the number itself.

    Returns:
        None if there is none, or if the last one has no certain reading (``1.000.000``, more than 4,300 digits).
    """
    if isinstance(text, (int, Fraction)) and not isinstance(text, bool):
        return Fraction(text)
    text = str(text)
    numbers = find_numbers(text)
    return _fraction(text, numbers) if numbers else None


def _fraction(text: str, numbers: Sequence[Number]) -> Fraction | None:
    """The value of the last number; with the numbers before it, if these are the other parts of a fraction."""
    *before, last = numbers
    above = before[-1].value if before else None
    if last.value is None or above is None or last.value <= 0 or last.value.denominator != 1:
        return last.value
    if before[-1].unit or not _SLASH.fullmatch(text[before[-1].end : last.start]):
        return last.value
    whole = before[-2] if len(before) > 1 else None
    between = text[whole.end : before[-1].start] if whole else "no number"
    if _SLASH.fullmatch(between):  # 1/2/3
        return last.value
    if (
        whole is None
        or whole.value is None
        or whole.unit
        or between.strip()
        or text[: whole.start].rstrip().endswith("/")
    ):
        return above / last.value
    return whole.value + (above if whole.value >= 0 else -above) / last.value


def answer_number(text: object) -> Fraction | None:
    """The number that a solution gives as its answer: right after the first ``####`` before a number, or the last one.

    The mark is the one of GSM8K (Cobbe et al. 2021). Numbers are compared by value, not by spelling as there.
    """
    if isinstance(text, str) and (mark := _FINAL.search(text)):
        found = find_numbers(text[mark.end() :])
        return found[0].value if found else None
    return last_number(text)


def number_match(example: Example, prediction: Prediction) -> float:
    """1 if the numbers of ``answer`` and of the label ``answer`` are equal, else 0 (see `answer_number`).

    A label that is a list holds answers that are all right.

    Raises:
        MetricError: If the prediction or the labels have no ``answer``, or a label holds no number.
    """
    answer, golds = _answers("number_match", example, prediction)
    wanted = [answer_number(gold) for gold in golds]
    if None in wanted:
        raise MetricError(
            f"number_match needs a number in the label 'answer'; {shown(golds[wanted.index(None)])} has none"
        )
    number = answer_number(answer)
    return float(number is not None and number in wanted)


def _answers(metric: str, example: Example, prediction: Prediction) -> tuple[Any, list[Any]]:
    """The answer of a prediction, and those of the labels."""
    for name, fields in (("prediction", prediction), ("labels", example.labels)):
        if "answer" not in fields:
            raise MetricError(f"{metric} needs the field 'answer' in the {name}; there is {_listed(fields)}")
    label = example.labels["answer"]
    golds = list(label) if isinstance(label, (list, tuple)) else [label]
    if not golds or None in golds:
        raise MetricError(f"{metric} needs an answer in the label 'answer'; it is {shown(label)}")
    answer, *golds = (one.value if isinstance(one, enum.Enum) else one for one in (prediction["answer"], *golds))
    return "" if answer is None else answer, golds


def _f1(answer: str, gold: str) -> float:
    if answer == gold:
        return 1.0
    if {answer, gold} & _ALONE:
        return 0.0
    found, wanted = Counter(answer.split()), Counter(gold.split())
    shared = (found & wanted).total()
    return 2 * shared / (found.total() + wanted.total()) if shared else 0.0


def _listed(fields: Any) -> str:
    return shorten(", ".join(map(repr, fields)), 300) or "none"


def best(scores: Iterable[float | None]) -> int | None:
    """Number of the highest score, the earliest of equals.

    What has no score (none, NaN or an infinity) never wins, since no number can be compared with it.

    Returns:
        None if nothing has a score.
    """
    known = [(score, -number) for number, score in enumerate(scores) if score is not None and math.isfinite(score)]
    return -max(known)[1] if known else None


def finite(values: Iterable[float | None]) -> list[float]:
    """The values that are numbers, in their order; JSON has none in the place of one that is not."""
    return [value for value in values if value is not None and math.isfinite(value)]
