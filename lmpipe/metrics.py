"""Metrics: functions of an example and a prediction that return a score in [0, 1], optionally with feedback.

Answers are normalised as in SQuAD (Rajpurkar et al. 2016) and HotPotQA (Yang et al. 2018): lower case, no punctuation,
no articles, single spaces.
"""

from __future__ import annotations

import enum
import inspect
import math
import re
import statistics
import string
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from fractions import Fraction
from typing import Any, SupportsFloat

from lmpipe.data import Example, Prediction
from lmpipe.errors import MetricError
from lmpipe.prompting.numbers import Number, find_numbers
from lmpipe.text.cleaning import clean_text
from lmpipe.text.display import shorten, shown
from lmpipe.validation.arguments import check_callable

Metric = Callable[[Example, Prediction], float | tuple[float, str]]
"""A function that scores a prediction on an example, in [0, 1].

It may return ``(score, feedback)``; the feedback says what is wrong with the prediction, for reflective optimizers. A
resumed run identifies a metric by its code (`lmpipe.program.identity`).
"""

Z_95 = statistics.NormalDist().inv_cdf(0.975)
"""Half-width of a 95 % interval by the normal approximation, in standard errors."""

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_ROUNDING = 1e-6
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_SPECIAL_ANSWERS = frozenset(["yes", "no", "noanswer"])
_ANSWER_MARK = re.compile(r"#### *(?=[-−$€£¥.\d])")
_SLASH = re.compile(r"\s?/\s?")


def check_metric(metric: object) -> None:
    """Checks that a metric is a function of an example and a prediction, before anything is scored with it.

    Raises:
        ConfigError: If it is not a function, or takes other arguments.
    """
    check_callable("metric", metric, ("example", "prediction"), "def metric(example, prediction): return 1.0")


def score_prediction(metric: Metric, example: Example, prediction: Prediction) -> tuple[float, str]:
    """Returns the score of a prediction and the metric's feedback, which may be empty.

    Raises:
        MetricError: If the metric did not return a number in [0, 1], or such a number and feedback. The message is a
            clause that follows the name of the metric.
        Exception: Any exception that the metric raises.
    """
    result = metric(example, prediction)
    score, feedback = result if isinstance(result, tuple) and len(result) == 2 else (result, "")
    return _in_range(score), clean_text(str(feedback))


def _in_range(score: object) -> float:
    """Returns a score as a float; a value that is outside of [0, 1] by a rounding error of 1e-6 is moved inside."""
    if inspect.iscoroutine(score):
        score.close()
        raise MetricError("it is async, so it returned a coroutine; write `def` instead of `async def`")
    if getattr(score, "shape", ()):  # an array of numpy or torch
        raise MetricError(f"it returned {shown(score, 100)}, an array; write `return float(scores.mean())` or the like")
    value = float(score) if isinstance(score, (float, int, SupportsFloat)) else math.nan
    if not -_ROUNDING <= value <= 1 + _ROUNDING:  # also true for NaN
        missing = "; does it lack a `return`?" if score is None else ""
        percent = f"; for a percentage, write `return {shown(score, 50)} / 100`" if 1 < value <= 100 else ""
        raise MetricError(
            f"it returned {shown(score, 100)}; it must return a number in [0, 1], or (number, text){missing}{percent}"
        )
    return min(max(value, 0.0), 1.0)


def normalize_answer(text: object) -> str:
    """Lowercases a text and removes punctuation, articles and extra white space."""
    return " ".join(_ARTICLES.sub(" ", str(text).lower().translate(_PUNCTUATION)).split())


def exact_match(example: Example, prediction: Prediction) -> float:
    """Returns 1 if the prediction's ``answer`` equals the label ``answer`` after normalisation, else 0.

    If the label is a list, each of its items is a correct answer; the best score counts, as in SQuAD.

    Raises:
        MetricError: If the prediction or the labels have no ``answer``.
    """
    answer, golds = _answers("exact_match", example, prediction)
    return float(any(normalize_answer(answer) == normalize_answer(gold) for gold in golds))


def answer_f1(example: Example, prediction: Prediction) -> float:
    """Returns the F1 score of the words of ``answer`` after normalisation.

    As in HotPotQA's official script, ``yes``, ``no`` and ``noanswer`` match only themselves. Two answers that are both
    empty after normalisation (``"A"`` and ``"the"``) are equal, as they are for `exact_match`.

    If the label is a list, each of its items is a correct answer; the best score counts, as in SQuAD.

    Raises:
        MetricError: If the prediction or the labels have no ``answer``.
    """
    answer, golds = _answers("answer_f1", example, prediction)
    return max(_f1(normalize_answer(answer), normalize_answer(gold)) for gold in golds)


def last_number(text: object) -> Fraction | None:
    """Returns the exact value of the last number of a text, such as ``$1,000``, ``5.00``, ``3/4``, ``1 1/2`` or ``-7``.

    See `lmpipe.prompting.numbers.find_numbers` for the notations. A number is returned as it is.

    Returns:
        The number; None if there is none, or the last one is ambiguous (``1.000.000``) or has more than 4,300 digits.
    """
    if isinstance(text, (int, Fraction)) and not isinstance(text, bool):
        return Fraction(text)
    text = str(text)
    numbers = find_numbers(text)
    return _fraction(text, numbers) if numbers else None


def _fraction(text: str, numbers: Sequence[Number]) -> Fraction | None:
    """The value of the last number or, if the numbers before it are parts of the same fraction, of that fraction."""
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
    """Returns the number that is the answer of a solution: the first number after ``####``, or else the last number.

    GSM8K (Cobbe et al. 2021) uses this mark. Unlike there, numbers are compared by value, not as strings.
    """
    if isinstance(text, str) and (mark := _ANSWER_MARK.search(text)):
        numbers = find_numbers(text[mark.end() :])
        return numbers[0].value if numbers else None
    return last_number(text)


def number_match(example: Example, prediction: Prediction) -> float:
    """Returns 1 if the numbers of ``answer`` and of the label ``answer`` are equal, else 0 (see `answer_number`).

    If the label is a list, each of its items is a correct answer.

    Raises:
        MetricError: If the prediction or the labels have no ``answer``, or a label has no number.
    """
    answer, golds = _answers("number_match", example, prediction)
    gold_numbers = [answer_number(gold) for gold in golds]
    if None in gold_numbers:
        raise MetricError(
            f"number_match needs a number in the label 'answer'; {shown(golds[gold_numbers.index(None)])} has none"
        )
    number = answer_number(answer)
    return float(number is not None and number in gold_numbers)


def _answers(metric: str, example: Example, prediction: Prediction) -> tuple[Any, list[Any]]:
    """Returns the answer of a prediction and the list of correct answers."""
    for name, fields in (("prediction", prediction), ("labels", example.labels)):
        if "answer" not in fields:
            listed = shorten(", ".join(map(repr, fields)), 300) or "none"
            raise MetricError(
                f"{metric} needs the field 'answer' in the {name}; fields there: {listed}; name it 'answer', or write "
                "a metric for your fields: def metric(example, prediction): …"
            )
    label = example.labels["answer"]
    golds = list(label) if isinstance(label, (list, tuple)) else [label]
    if not golds or None in golds:
        raise MetricError(f"{metric} needs an answer in the label 'answer'; it is {shown(label)}")
    answer, *golds = (
        value.value if isinstance(value, enum.Enum) else value for value in (prediction["answer"], *golds)
    )
    return "" if answer is None else answer, golds


def _f1(answer: str, gold: str) -> float:
    if answer == gold:
        return 1.0
    if {answer, gold} & _SPECIAL_ANSWERS:
        return 0.0
    answer_words, gold_words = Counter(answer.split()), Counter(gold.split())
    shared = (answer_words & gold_words).total()
    return 2 * shared / (answer_words.total() + gold_words.total()) if shared else 0.0


def best_index(scores: Iterable[float | None]) -> int | None:
    """Returns the index of the highest score; of equal scores, the first.

    Scores that are None, NaN or infinite are left out.

    Returns:
        The index, or None if no score is left.
    """
    ranked = [(score, -index) for index, score in enumerate(scores) if score is not None and math.isfinite(score)]
    return -max(ranked)[1] if ranked else None


def finite_values(values: Iterable[float | None]) -> list[float]:
    """Returns the values that are neither None, NaN nor infinite, in their order; JSON has no NaN or infinity."""
    return [value for value in values if value is not None and math.isfinite(value)]


def wilson_interval(mean: float, n: int) -> tuple[float, float]:
    """Returns the 95 % interval of a mean score (Wilson 1927); NaN if there is no score.

    It is exact in its coverage for scores of 0 and 1 alone, and too wide for others, whose variance is smaller.

    Args:
        mean: The mean, from 0 to 1.
        n: Number of scores.
    """
    if not n or not math.isfinite(mean):
        return math.nan, math.nan
    spread = Z_95 * Z_95 / n
    centre = (mean + spread / 2) / (1 + spread)
    half = math.sqrt(max(mean * (1 - mean), 0) * spread + spread * spread / 4) / (1 + spread)
    return max(0.0, centre - half), min(1.0, centre + half)


def paired_interval(scores: Mapping[str, float], baseline: Mapping[str, float]) -> tuple[float, float, float]:
    """Returns the mean paired difference on the common examples, and its 95 % interval by the normal approximation.

    Differences that are not finite are left out. With fewer than two differences the bounds are infinite.
    """
    differences = finite_values(scores[name] - baseline[name] for name in scores if name in baseline)
    if len(differences) < 2:
        return statistics.fmean(differences or [math.nan]), -math.inf, math.inf
    mean = statistics.fmean(differences)
    half = Z_95 * statistics.stdev(differences) / math.sqrt(len(differences))
    return mean, mean - half, mean + half
