"""Choices in text: which of several values a text names.

A choice is found as the whole text first: exactly, then without quotes and full stops around it, then whatever the case
and the signs between words. Otherwise it is found as a phrase of the text, unless a negation comes before it in its
sentence. A text that names none or several has no reading. Knows nothing of fields or completions.
"""

from __future__ import annotations

import enum
import re
import types
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, Literal, Union, final, get_args, get_origin

from pydantic_core import to_jsonable_python

from lmpipe.errors import SignatureError
from lmpipe.text.display import shorten

_EDGES = " \t\r\n\"'`*_.,;!()[]{}“”‘’«»"  # what LMs put around a value
_SPELLED = str.maketrans("‐‑‒–−’ʼ", "-----''")
_BETWEEN = re.compile(r"(?<=\S)[\s_-]+(?=\S)")  # the words of one name
_NOT_BEFORE = r"(?<![^\W_])(?<![+#@&$€£%^~\\])(?<!\w')(?<!\d[.,:/])"
_NOT_AFTER = r"(?![^\W_])(?![-_][^\W_])(?![+#@&$€£%^~\\])(?![.'][^\W_])(?![,:/]\d)"
_NEGATION = (
    r"\b(?:no|not(?!\s(?:only|just|merely)\b)|never|neither|nor|none|nothing|nobody|nowhere|non|anti|cannot|without"
    r"|hardly|barely|scarcely|unlikely|doubts?|doubtful|den(?:y|ies|ied)|wrong|incorrect|untrue|except|excluding"
    r"|exclude[sd]?|fails? to|far from|anything but|rather than|instead of|other than|rules? out|ruled out|\w+n't"
    r"|(?:is|are|was|were|do|does|did|has|have|had|ca|could|should|would|wo|must)nt)\b"
)
_SENTENCE = rf"(?P<turn>\bbut\b|\A\s*no(?=\s*,))|(?P<negation>{_NEGATION})|(?P<end>[.!?;]+(?=[\"')\]*]*(?:\s|\Z)))"
_NEGATIONS = re.compile(_SENTENCE)
_AUXILIARY = r"(?:is|are|was|were|be|been|do|does|did|has|have|can|could|should|would|will|must|seems?)\s+"
_LINK = re.compile(rf"\s+(?:{_AUXILIARY}){{1,3}}")  # between a choice and the negation that is said of it
_PREFIX = re.compile(r"([^\W_]+)[-_]+\Z")
_NEGATIVE_PREFIX = re.compile(
    "non|not?|anti|contra|counter|un|dis|mis|in|semi|half|quasi|pseudo|near|ex|pre|post|sub|over|under|de"
)
_NEGATIVE_WORDS = frozenset(["no", "not", "non", "none", "nothing", "never", "neither", "nor"])
_FURTHER = re.compile(  # a word that goes on after another, and does not say something of it or set a second beside it
    r"\s+[\"'`*]*(?!(?:or|and|nor|vs|versus|but|is|was|are|because|since|as|seems|looks|fits|over)\b)\w"
)
_LABEL = re.compile(r"\b(?:option|choice|answer|letter|label|class|category|group|grade|type)[\s\"'`*(:]*\Z")
_NEAR = 40  # how many characters around a phrase are looked at


@final
@dataclass(frozen=True, slots=True)
class Choice:
    """One of the values that a text can name.

    Attributes:
        value: The value.
        text: How it is written.
        others: Other names by which it is read.
    """

    value: Any
    text: str
    others: tuple[str, ...] = ()


@lru_cache(maxsize=1024)
def choices_of(type_: Any) -> Choices | None:
    """The choices of a ``Literal``, an enum, or a union of them and None; none for other types.

    A choice is written as its value, and read by its value or, in an enum, its name; None is also read as ``null``.

    Raises:
        SignatureError: If there is no choice, or two are written alike.
    """
    values = _options(type_)
    if values is None or values == [None]:
        return None
    made = tuple({(type(value), str(value)): to_choice(value) for value in values}.values())
    texts = [choice.text.strip() for choice in made]
    alike = sorted({text for text in texts if texts.count(text) > 1})
    if alike or not made:
        problem = f"two that are written {alike[0]!r}" if alike else "none"
        raise SignatureError(
            f"a type of choices has {problem}: {shorten(str(type_), 300)}; each needs a text of its own"
        )
    return Choices(made)


def ends_negated(before: str) -> bool:
    """Whether a negation comes before what follows this text: after ``it is not``, but not after ``Not so. It is``."""
    state = False
    for found in _NEGATIONS.finditer(_folded(before)):
        state = found.lastgroup == "negation"
    return state


@final
@dataclass(frozen=True)
class Choices:
    """Values of which a text can name one.

    Args:
        choices: The values; their texts are distinct.
    """

    choices: tuple[Choice, ...]

    def read(self, text: str) -> Any:
        """The value that a text, or the first line of it, names.

        Raises:
            ValueError: If it names none, or several; the message says which.
        """
        line = text.strip().partition("\n")[0]
        found, denied = self._whole(text, _EXACT) or self._whole(line, _FORMS), False
        if not found:
            found, denied = self._phrases(_folded(line))
        if len(found) == 1:
            return self.choices[found.pop()].value
        if found:
            raise ValueError(f"names several of the choices: {', '.join(self.choices[n].text for n in sorted(found))}")
        listed = ", ".join(choice.text for choice in self.choices)
        raise ValueError(f"names none of the choices {listed}" + (" without a negation" if denied else ""))

    def render(self, value: Any) -> str:
        """The text of a value: a choice, or its plain JSON, which demonstrations hold."""
        own = next((choice for choice in self.choices if _same(choice.value, value)), None)
        return to_choice(value).text if own is None else own.text

    def _whole(self, text: str, forms: tuple[_Form, ...]) -> set[int]:
        """Numbers of the choices that the text is, by the strictest comparison that finds any."""
        for form in forms:
            if found := self._index[form].get(form.of_text(text)):
                return set(found)
        return set()

    def _phrases(self, line: str) -> tuple[set[int], bool]:
        """Numbers of the choices that phrases of a line name; and whether there are others, which are negated."""
        named: list[tuple[frozenset[int], bool]] = []  # choices that a phrase names, and whether it is negated
        sentence = 0  # how many of them stood before this sentence
        negation, last = False, -_NEAR
        for found in self._pattern.finditer(line):
            match found.lastgroup:
                case "choice":
                    numbers = self._named(line, found)
                    if numbers:
                        named.append((numbers, negation))
                        last = found.end()
                    else:
                        negation = negation or found[0] in _NEGATIVE_WORDS
                case "negation":
                    negation = True
                    if found.start() - last < _NEAR and _is_said_of(line[last : found.start()], found[0]):
                        named[-1] = (named[-1][0], True)
                case "turn":
                    negation = False
                case _:
                    if "?" in found[0]:  # a question names nothing
                        del named[sentence:]
                    negation, sentence, last = False, len(named), -_NEAR
        meant = {number for numbers, negative in named if not negative for number in numbers}
        return meant, any(negative for _, negative in named)

    def _named(self, line: str, found: re.Match[str]) -> frozenset[int]:
        """The choices that a phrase names; none if it is a part of another word, or a word with another meaning."""
        name = _BETWEEN.sub(" ", found[0])
        numbers = self._index[_KEY].get(name, frozenset())
        before, after = line[max(0, found.start() - _NEAR) : found.start()], line[found.end() : found.end() + _NEAR]
        capital = any(self.choices[number].text != self.choices[number].text.lower() for number in numbers)
        word = name in _NEGATIVE_WORDS or name in {"a", "i"}
        if _is_part(before, name, capital) or (word and _FURTHER.match(after) and not _LABEL.search(before)):
            return frozenset()
        return numbers

    @cached_property
    def _index(self) -> dict[_Form, dict[str, frozenset[int]]]:
        """For each way of comparing: name → numbers of the choices that have it."""
        taken = {_bare_key(choice.text) for choice in self.choices}
        index: dict[_Form, dict[str, frozenset[int]]] = {form: {} for form in _FORMS}
        for number, choice in enumerate(self.choices):
            others = [name for name in choice.others if _bare_key(name) not in taken]
            for form, names in index.items():
                for name in {form.of_name(own) for own in (choice.text, *others)}:
                    if name or form in _EXACT:
                        names[name] = names.get(name, frozenset()) | {number}
        return index

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        names = sorted(self._index[_KEY], key=len, reverse=True)  # of two that begin alike, the longer one is meant
        words = "|".join(r"[\s_-]+".join(map(re.escape, name.split(" "))) for name in names) or "(?!)"
        return re.compile(rf"(?P<choice>{_NOT_BEFORE}(?:{words}){_NOT_AFTER})|{_SENTENCE}")


def _options(type_: Any) -> list[Any] | None:
    """The values of a type of choices."""
    if type_ is None or type_ is type(None):
        return [None]
    if isinstance(type_, enum.EnumMeta):
        return list(type_)
    if get_origin(type_) is Literal:
        return list(get_args(type_))
    if get_origin(type_) not in (Union, types.UnionType):
        return None
    parts = [_options(part) for part in get_args(type_)]
    return None if None in parts else [value for part in parts for value in part or ()]


def to_choice(value: Any) -> Choice:
    """How a value is written and read as a choice."""
    if value is None:
        return Choice(None, "None", ("null",))
    if not isinstance(value, enum.Enum):
        return Choice(value, str(value))
    names = tuple(name for name, member in type(value).__members__.items() if member is value)
    if isinstance(value.value, (str, int, float)):
        return Choice(value, str(value.value), names)
    return Choice(value, value.name, names)


def _same(choice: Any, value: Any) -> bool:
    """Whether a value is that choice, or its plain JSON, as demonstrations hold it."""
    if isinstance(choice, enum.Enum) and not isinstance(value, enum.Enum):
        choice = to_jsonable_python(choice, fallback=str)
    return type(choice) is type(value) and bool(choice == value)


def _is_said_of(between: str, negation: str) -> bool:
    """Whether a negation after a choice is about it: ``spam isn't …``, ``spam is not …``; but not ``ham, not spam``."""
    return bool(_LINK.fullmatch(between)) or (between.isspace() and negation.endswith(("nt", "n't", "cannot")))


def _is_part(before: str, name: str, capital: bool) -> bool:
    """Whether a hyphen before a phrase makes it a part of another word.

    ``Iris-versicolor`` is the class ``versicolor``; ``non-positive`` is not ``positive``, a name such as ``York`` is
    another one in ``New-York``, and ``-3`` is not ``3``.
    """
    if not before.endswith(("-", "_")):
        return False
    prefix = _PREFIX.search(before)
    if prefix is None:
        return name[0].isdigit()
    return capital or prefix[1].isdigit() or bool(_NEGATIVE_PREFIX.fullmatch(prefix[1]))


def _folded(text: str) -> str:
    return unicodedata.normalize("NFKC", text).translate(_SPELLED).casefold()


def _key(name: str) -> str:
    return _BETWEEN.sub(" ", _folded(name).strip())


def _bare_key(name: str) -> str:
    return _key(_folded(name).strip(_EDGES))


def _as_it_is(text: str) -> str:
    return text


def _without_edges(text: str) -> str:
    return text.strip(_EDGES)


@final
@dataclass(frozen=True, slots=True)
class _Form:
    """A way to compare a text with a name: both are brought into a form."""

    of_text: Callable[[str], str]
    of_name: Callable[[str], str]


_KEY = _Form(_key, _key)
_EXACT = (_Form(_as_it_is, _as_it_is), _Form(str.strip, str.strip))
_FORMS = (*_EXACT, _Form(_without_edges, str.strip), _KEY, _Form(_bare_key, _bare_key))
