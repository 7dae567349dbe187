"""Questions with the titles of the passages that answer them: what an encoder is trained and measured on.

Knows nothing of models.
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
class GoldQuestion:
    """A question and its gold passages.

    Attributes:
        text: The question.
        titles: Of the passages, at least one, each once.
    """

    text: str
    titles: tuple[str, ...]


def read_questions(path: str | Path) -> list[GoldQuestion]:
    """The questions of a file, in its order. Characters are replaced as in `read_passages`, with one warning.

    Args:
        path: JSON Lines with ``question`` and ``titles``, or as the hub has HotPotQA: ``question`` and
            ``supporting_facts`` with the titles in ``title``. May be gzipped (``.gz``).

    Raises:
        ConfigError: If there is no such file, or a line is no such question; it names file and line.
    """
    read = [_question(line, f"{path}, line {number}") for number, line in numbered_lines(Path(path))]
    if not read:
        raise ConfigError(f"{path} holds no questions")
    if changed := sum(count_unclean(one.text) for one in read):
        logger.warning("%s: %d control characters or halves of surrogate pairs are read as U+FFFD", path, changed)
    return [GoldQuestion(clean_text(one.text), one.titles) for one in read]


def _question(line: bytes, where: str) -> GoldQuestion:
    try:
        record: Any = parse_json_object(line)
        text, titles = record["question"], record.get("titles") or record["supporting_facts"]["title"]
        if not isinstance(text, str) or not text.strip() or not isinstance(titles, list) or not titles:
            raise ValueError("a question is a text, and its titles are a list of texts")
        return GoldQuestion(text, tuple(dict.fromkeys(map(_plain, titles))))
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise ConfigError(f"{where}: no question with titles of gold passages ({error!r})") from None


def gold_passages(
    questions: Sequence[GoldQuestion], passages: Sequence[PassageText]
) -> list[tuple[tuple[int, ...], ...]]:
    """For each question and each of its titles, the numbers of the passages of that title.

    Titles are compared without the escapes of HTML. Titles that no passage has are left out, with one warning.

    Raises:
        ConfigError: If there is no gold passage at all.
    """
    named: dict[str, list[int]] = {}
    for number, passage in enumerate(passages):
        named.setdefault(_plain(passage.title), []).append(number)
    found = [tuple(tuple(named[title]) for title in one.titles if title in named) for one in questions]
    wanted, there = sum(len(one.titles) for one in questions), sum(map(len, found))
    if not there:
        raise ConfigError("no passage has the title of a gold passage; give the passages that the questions are about")
    if there < wanted:
        logger.warning("%d of %d gold passages are not among the passages; they are left out", wanted - there, wanted)
    return found


def _plain(title: str) -> str:
    return clean_text(html.unescape(title)).strip()
