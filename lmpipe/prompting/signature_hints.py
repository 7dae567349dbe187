"""What was probably meant by a signature in string form that cannot be read: clauses for the ends of messages.

Knows nothing about how signatures are parsed.
"""

from __future__ import annotations

import keyword
import re
from collections.abc import Collection, Mapping

from lmpipe.text.display import did_you_mean, shown

_ALTERNATIVES: Mapping[str, str] = {
    "Optional": "; write 'str | None' for Optional[str]",
    "Union": "; write 'int | str' for Union[int, str]",
}
"""Type that is not known → what to write instead."""


def syntax_hint(side: str) -> str:
    """Says what to write in place of one side of a signature that is not valid Python; empty if it is hard to say."""
    if quotes := re.findall("[‘’“”„`´]", side):
        return f"; write straight quotes, ' or \", in place of {quotes[0]}"
    names = [name.strip() for name in re.findall(r"(?:^|,)([^:,\[\]]+)(?=[:,]|$)", side)]
    for name in names:
        if keyword.iskeyword(name):
            return f"; {name!r} is a word of Python, so write {name + '_'!r} or another name"
        if not name.isidentifier():
            valid = re.sub(r"\W+", "_", name.strip("'\"")).strip("_")
            return f"; {name!r} cannot name a field, so write {valid!r}"
    return ""


def arrow_hint(text: str) -> str:
    """Says how to write a signature that has no arrow, several, or another one than ``->``."""
    replaced = re.sub(r"\s*(?:→|⇒|=>|—>|–>|>)\s*", " -> ", text)
    if "->" not in text and replaced.count("->") == 1:
        return f"write {shown(replaced)}"
    return "write 'question, context -> answer' with your own fields"


def type_hint(written: str, known: Collection[str]) -> str:
    """Says what to write for a type that is not known.

    Args:
        written: The type as it was written.
        known: Names of the types that are known.
    """
    name = re.sub(r"\W.*", "", written)
    return f"{_ALTERNATIVES.get(name) or did_you_mean(name, known)}; pass others in types={{{name!r}: …}}"
