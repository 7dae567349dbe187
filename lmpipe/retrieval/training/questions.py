"""Questions with the titles of their gold passages, for training and evaluating an encoder.

Does not depend on models.
"""

from __future__ import annotations

import html
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from lmpipe.errors import ConfigError
from lmpipe.retrieval.passages import PassageText
from lmpipe.storage.lines import numbered_lines, parse_json_object
from lmpipe.text.cleaning import clean_text, count_unclean

logger = logging.getLogger(__name__)


@final
@dataclass(frozen=True)
class Question:
    """A question with the titles of its gold passages.

    Attributes:
        text: Text of the question.
        titles: Distinct titles of the gold passages, at least one.
    """

    text: str
    titles: tuple[str, ...]


def read_questions(path: str | Path) -> list[Question]:
    """Reads the questions of a file, in order. Characters are replaced as in `read_passages`, with one warning.

    Args:
        path: JSON Lines with ``question`` and ``titles``, or in the format of HotPotQA on the hub: ``question`` and
            ``supporting_facts`` with the titles in ``title``. May be gzipped (``.gz``).

    Raises:
        ConfigError: If the file does not exist or has no questions, or if a line is not a question with titles. The
            message names file and line.
    """
    questions = [_parse_question(line, f"{path}, line {number}") for number, line in numbered_lines(Path(path))]
    if not questions:
        raise ConfigError(f"{path} contains no questions")
    if replaced := sum(count_unclean(question.text) for question in questions):
        logger.warning("%s: %d control characters or halves of surrogate pairs were replaced by U+FFFD", path, replaced)
    return [Question(clean_text(question.text), question.titles) for question in questions]


def _parse_question(line: bytes, where: str) -> Question:
    try:
        record: Any = parse_json_object(line)
        text, titles = record["question"], record.get("titles") or record["supporting_facts"]["title"]
        if not isinstance(text, str) or not text.strip() or not isinstance(titles, list) or not titles:
            raise ValueError("a question must be text, and its titles a list of texts")
        return Question(text, tuple(dict.fromkeys(map(_normalise, titles))))
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise ConfigError(f"{where}: not a question with titles of gold passages ({error!r})") from None


def find_gold_passages(
    questions: Sequence[Question], passages: Sequence[PassageText]
) -> list[tuple[tuple[int, ...], ...]]:
    """Returns, for each question and each of its titles, the numbers of the passages with that title.

    Titles are compared after HTML escapes are decoded. Titles that no passage has are skipped, with one warning.

    Raises:
        ConfigError: If no passage has the title of a gold passage.
    """
    by_title: dict[str, list[int]] = {}
    for number, passage in enumerate(passages):
        by_title.setdefault(_normalise(passage.title), []).append(number)
    gold = [tuple(tuple(by_title[title]) for title in question.titles if title in by_title) for question in questions]
    total, present = sum(len(question.titles) for question in questions), sum(map(len, gold))
    if not present:
        raise ConfigError("no passage has the title of a gold passage; pass the passages that the questions are about")
    if present < total:
        logger.warning("%d of %d gold passages are not among the passages; they are skipped", total - present, total)
    return gold


def _normalise(title: str) -> str:
    return clean_text(html.unescape(title)).strip()
