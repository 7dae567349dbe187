"""What an LM thought before it answered, told apart from what it said.

Reasoning models write their thoughts between ``<think>`` and ``</think>``. Knows nothing of fields: the caller says how
they begin.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import final

_TAG = r"<[ \t]*(?:/[ \t]*)?think(?:ing)?(?:[ \t][^<>\n]*)?/?>"
_UNQUOTED = re.compile(rf"(?<!\\)({_TAG})", re.IGNORECASE | re.ASCII)
_ANY = re.compile(rf"(?<!\\)(\\*)({_TAG})", re.IGNORECASE | re.ASCII)
_BEFORE = " \t>*"  # what may stand before a tag at the beginning of a line


@final
@dataclass(frozen=True, slots=True)
class SplitCompletion:
    """The two parts of a completion.

    Attributes:
        said: The text without thoughts.
        thought: The thoughts, one after another.
        unfinished: Whether the completion ends within a thought.
    """

    said: str
    thought: str = ""
    unfinished: bool = False


def split_thoughts(text: str, header: re.Pattern[str]) -> SplitCompletion:
    r"""Separates thoughts from the rest of a completion.

    A thought goes from an opening tag to the next closing one. The opening tag stands before the first field, or at the
    beginning of a line or of a field; a closing tag without an opening one ends a thought that the chat template
    opened, if it stands before the first field, at an edge of its line, or directly before a field. Other tags are
    mentioned in a sentence, and are text; so are those with a backslash before them (see `quote_tags`). Tags are
    ``<think>`` and ``<thinking>`` in any case, also with attributes.

    Args:
        text: The completion.
        header: Matches the beginning of a line that opens a field.
    """
    if "<" not in text:
        return SplitCompletion(text)
    first, *rest = _UNQUOTED.split(text)
    reader = _Reader(header, first)
    for tag, after in zip(rest[::2], rest[1::2], strict=True):
        reader.read(tag, after)
    return reader.reply()


def quote_tags(text: str) -> str:
    """The text with a backslash before each tag, so that none is read as the edge of a thought."""
    return _ANY.sub(r"\\\g<0>", text) if "<" in text else text


def unquote_tags(text: str) -> str:
    """The text without the backslashes that `quote_tags` put there."""
    return _ANY.sub(lambda tag: tag[1][1:] + tag[2], text) if "\\" in text and "<" in text else text


@final
class _Reader:
    """Reads a completion from tag to tag."""

    def __init__(self, header: re.Pattern[str], first: str) -> None:
        self._header = header
        self._said: list[str] = []  # what stands before the last thought
        self._part: list[str] = []  # what was said since, up to the last tag
        self._thought: list[str] = []
        self._gap = first  # the text between the last tag and this one
        self._inside = False
        self._begun_before, self._begun = False, False  # whether fields began before the last thought, and until here

    def read(self, tag: str, after: str) -> None:
        """Goes on to the text after a tag."""
        closing = tag[1:].lstrip().startswith("/")
        if self._inside:
            self._thought.append(self._gap)
            self._inside = not closing
        else:
            self._begun = self._begun or bool(self._header.search(self._gap))
            if not closing and self._opens():
                self._open(alone=tag.endswith("/>"))
            elif closing and self._closes(after):
                self._thought += [*self._part, self._gap]
                self._part, self._begun = [], self._begun_before
            else:
                self._part += [self._gap, tag]
        self._gap = after

    def reply(self) -> SplitCompletion:
        """What was read."""
        if self._inside:
            self._thought.append(self._gap)
        else:
            self._said.append("".join([*self._part, self._gap]))
        return SplitCompletion("\n".join(self._said), "\n".join(self._thought).strip(), self._inside)

    def _open(self, alone: bool) -> None:
        self._said.append("".join([*self._part, self._gap]))
        self._part, self._begun_before, self._inside = [], self._begun, not alone

    def _opens(self) -> bool:
        return not self._begun or self._at_line_start()

    def _closes(self, after: str) -> bool:
        if not self._begun or self._at_line_start():
            return True
        if self._part and "\n" not in self._gap:  # its line mentions a tag before
            return False
        return not after.partition("\n")[0].strip() or bool(self._header.match(after.lstrip()))

    def _at_line_start(self) -> bool:
        """Whether a tag after the gap is the first word of its line or field."""
        _, line_end, line = self._gap.rpartition("\n")
        if self._part and not line_end:
            return False
        return not line.strip(_BEFORE) or bool(self._header.fullmatch(line))
