"""Puts the rules that pydantic's messages state into plain words: ``"Input should be a valid integer"`` and its kind.

Knows nothing about what is validated.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

from lmpipe.text.display import did_you_mean

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

_WORDS = (
    (r"^Field required$", "is missing"),
    (r"^Extra inputs are not permitted$", "does not exist"),
    (r"^Value error, ", ""),
    (r"^Input should be ", "must be "),
    (r"^(\w+) should have ", r"\1 must have "),
    (r"a valid (dictionary|dict|mapping)\b", "a dict"),
    (r"a dict or (an )?instance of (\w+)", r"of the type \2"),
    (r"an instance of (\w+)", r"of the type \1"),
    (r"a valid string", "text"),
    (r"a valid integer(, .*)?", "a whole number"),
    (r"a valid number", "a number"),
    (r"a valid boolean", "True or False"),
    (r"a valid (list|tuple|set)", r"a \1"),
    (r"callable$", "a function"),
    (r"greater than or equal to", "at least"),
    (r"less than or equal to", "at most"),
)


def state_rule(detail: ErrorDetails, known: Iterable[str] = ()) -> str:
    """Returns the rule that a value breaks, as a clause such as ``"must be a whole number"``.

    Args:
        detail: One of the errors of a `pydantic.ValidationError`.
        known: Names that would have been valid, if the rule is about a name.
    """
    text = detail["msg"]
    for pattern, words in _WORDS:
        text = re.sub(pattern, words, text)
    if detail["type"] == "literal_error" and isinstance(detail["input"], str):
        text += did_you_mean(detail["input"], re.findall(r"'([^']*)'", detail["ctx"]["expected"]))
    if detail["type"] == "model_type":
        text += f"; write {detail['ctx']['class_name']}(…)"
    if detail["type"] == "extra_forbidden":
        text += did_you_mean(detail["loc"][-1], known) or f"; there are {', '.join(known)}"
    return text
