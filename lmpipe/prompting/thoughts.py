"""Separates the thoughts in a completion from its answer.

Reasoning models write their thoughts between ``<think>`` and ``</think>``. Knows nothing about fields: the caller
passes a pattern that matches the beginning of a field.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import final

_TAG = r"<[ \t]*(?:/[ \t]*)?think(?:ing)?(?:[ \t][^<>\n]*)?/?>"
_UNQUOTED = re.compile(rf"(?<!\\)({_TAG})", re.IGNORECASE | re.ASCII)
_ANY = re.compile(rf"(?<!\\)(\\*)({_TAG})", re.IGNORECASE | re.ASCII)
_BEFORE = " \t>*"  # characters that may precede a tag at the beginning of a line


@final
@dataclass(frozen=True, slots=True)
class SplitCompletion:
    """A completion, split into its answer and its thoughts.

    Attributes:
        answer: Text without thoughts.
        thoughts: Text of all thoughts.
        unfinished: Whether the completion ends within a thought.
    """

    answer: str
    thoughts: str = ""
    unfinished: bool = False


def split_thoughts(text: str, header: re.Pattern[str]) -> SplitCompletion:
    r"""Separates thoughts from the rest of a completion.

    A thought goes from an opening tag to the next closing tag. The opening tag is before the first field, or at the
    beginning of a line or of a field. A closing tag without an opening tag ends a thought that the chat template
    opened, if it is before the first field, at the beginning or end of its line, or directly before a field. All other
    tags are plain text, such as a mention in a sentence; so are tags after a backslash (see `quote_tags`). Tags are
    ``<think>`` and ``<thinking>`` in upper or lower case, also with attributes.

    Args:
        text: Text of the completion.
        header: Pattern of the beginning of a line that opens a field.
    """
    if "<" not in text:
        return SplitCompletion(text)
    first, *rest = _UNQUOTED.split(text)
    reader = _Reader(header, first)
    for tag, after in zip(rest[::2], rest[1::2], strict=True):
        reader.read(tag, after)
    return reader.result()


def quote_tags(text: str) -> str:
    """Puts a backslash before each tag, so that it is not read as the beginning or end of a thought."""
    return _ANY.sub(r"\\\g<0>", text) if "<" in text else text


def unquote_tags(text: str) -> str:
    """Removes the backslashes that `quote_tags` inserted."""
    return _ANY.sub(lambda tag: tag[1][1:] + tag[2], text) if "\\" in text and "<" in text else text


@final
class _Reader:
    """Reads a completion from tag to tag."""

    def __init__(self, header: re.Pattern[str], first: str) -> None:
        self._header = header
        self._answer: list[str] = []  # text before the last thought
        self._part: list[str] = []  # text after the last thought, up to the last tag
        self._thoughts: list[str] = []
        self._gap = first  # text between the last tag and the next one
        self._inside = False  # whether the gap is within a thought
        self._begun_before, self._begun = False, False  # whether a field began before the last thought, and so far

    def read(self, tag: str, after: str) -> None:
        """Reads a tag and the text after it, up to the next tag."""
        closing = tag[1:].lstrip().startswith("/")
        if self._inside:
            self._thoughts.append(self._gap)
            self._inside = not closing
        else:
            self._begun = self._begun or bool(self._header.search(self._gap))
            if not closing and (not self._begun or self._at_line_start()):
                self._answer.append("".join([*self._part, self._gap]))
                self._part, self._begun_before, self._inside = [], self._begun, not tag.endswith("/>")
            elif closing and self._closes(after):
                self._thoughts += [*self._part, self._gap]
                self._part, self._begun = [], self._begun_before
            else:
                self._part += [self._gap, tag]
        self._gap = after

    def result(self) -> SplitCompletion:
        """Returns the completion that was read."""
        if self._inside:
            self._thoughts.append(self._gap)
        else:
            self._answer.append("".join([*self._part, self._gap]))
        return SplitCompletion("\n".join(self._answer), "\n".join(self._thoughts).strip(), self._inside)

    def _closes(self, after: str) -> bool:
        """Whether a closing tag after the gap ends a thought that the chat template opened."""
        if not self._begun or self._at_line_start():
            return True
        if self._part and "\n" not in self._gap:  # an earlier tag in this line is mentioned, not a thought's
            return False
        return not after.partition("\n")[0].strip() or bool(self._header.match(after.lstrip()))

    def _at_line_start(self) -> bool:
        """Whether a tag after the gap is at the beginning of its line or field."""
        _, line_end, line = self._gap.rpartition("\n")
        if self._part and not line_end:
            return False
        return not line.strip(_BEFORE) or bool(self._header.fullmatch(line))
