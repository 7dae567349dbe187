"""Choices in text: finds which of several values a text names.

The whole text is compared with each choice first: exactly, then without surrounding quotes and punctuation, then
ignoring case and the characters between words. Otherwise a choice is searched as a phrase of the text; it does not
count after a negation in the same sentence. A text that names no choice, or several, is refused. Knows nothing about
fields or completions.
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

_EDGES = " \t\r\n\"'`*_.,;!()[]{}“”‘’«»"  # characters that LMs put around a value
_TO_ASCII = str.maketrans("‐‑‒–−’ʼ", "-----''")
_BETWEEN = re.compile(r"(?<=\S)[\s_-]+(?=\S)")  # characters between the words of a name
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
_LINK = re.compile(rf"\s+(?:{_AUXILIARY}){{1,3}}")  # between a choice and a negation that applies to it
_PREFIX = re.compile(r"([^\W_]+)[-_]+\Z")
_NEGATIVE_PREFIX = re.compile(
    "non|not?|anti|contra|counter|un|dis|mis|in|semi|half|quasi|pseudo|near|ex|pre|post|sub|over|under|de"
)
_NEGATIVE_WORDS = frozenset(["no", "not", "non", "none", "nothing", "never", "neither", "nor"])
_CONTINUED = re.compile(  # a next word that belongs to the same phrase: not a verb, a conjunction or a comparison
    r"\s+[\"'`*]*(?!(?:or|and|nor|vs|versus|but|is|was|are|because|since|as|seems|looks|fits|over)\b)\w"
)
_LABEL = re.compile(r"\b(?:option|choice|answer|letter|label|class|category|group|grade|type)[\s\"'`*(:]*\Z")
_CONTEXT = 40  # characters around a phrase that are examined


@final
@dataclass(frozen=True, slots=True)
class Choice:
    """One of the values that a text can name.

    Attributes:
        value: The value itself.
        text: Text of the value in prompts and completions.
        aliases: Other texts that are read as this value.
    """

    value: Any
    text: str
    aliases: tuple[str, ...] = ()


@lru_cache(maxsize=1024)
def choices_of(type_: Any) -> Choices | None:
    """Returns the choices of a ``Literal``, an enum, or a union of these and None; returns None for other types.

    A choice is written as its value. It is read from its value or, for an enum, its name; None is also read from
    ``null``.

    Raises:
        SignatureError: If the type has no choice, or two choices with the same text.
    """
    values = _options(type_)
    if values is None or values == [None]:
        return None
    choices = tuple({(type(value), str(value)): to_choice(value) for value in values}.values())
    texts = [choice.text.strip() for choice in choices]
    repeated = sorted({text for text in texts if texts.count(text) > 1})
    if repeated or not choices:
        problem = f"two choices with the text {repeated[0]!r}" if repeated else "no choices"
        raise SignatureError(f"a type has {problem}: {shorten(str(type_), 300)}; give each choice a text of its own")
    return Choices(choices)


def ends_negated(before: str) -> bool:
    """Whether the text after this one is negated: true after ``it is not``, but not after ``Not so. It is``."""
    negated = False
    for match in _NEGATIONS.finditer(_folded(before)):
        negated = match.lastgroup == "negation"
    return negated


@final
@dataclass(frozen=True)
class Choices:
    """Values of which a text can name one.

    Args:
        choices: All choices; their texts are distinct.
    """

    choices: tuple[Choice, ...]

    def read(self, text: str) -> Any:
        """Returns the value that a text, or its first line, names.

        Raises:
            ValueError: If the text names no choice, or several; the message says which.
        """
        line = text.strip().partition("\n")[0]
        indices, denied = self._match_whole(text, _EXACT) or self._match_whole(line, _FORMS), False
        if not indices:
            indices, denied = self._match_phrases(_folded(line))
        if len(indices) == 1:
            return self.choices[indices.pop()].value
        if indices:
            listed = ", ".join(self.choices[index].text for index in sorted(indices))
            raise ValueError(f"names several of the choices: {listed}")
        listed = ", ".join(choice.text for choice in self.choices)
        raise ValueError(f"names none of the choices {listed}" + (" without a negation" if denied else ""))

    def render(self, value: Any) -> str:
        """Returns the text of a value: of a choice, or of the plain JSON of a choice, as in demonstrations."""
        choice = next((choice for choice in self.choices if _is_value_of(choice.value, value)), None)
        return to_choice(value).text if choice is None else choice.text

    def _match_whole(self, text: str, forms: tuple[_Form, ...]) -> set[int]:
        """Indices of the choices that equal the text, in the strictest form in which any does."""
        for form in forms:
            if indices := self._index[form].get(form.of_text(text)):
                return set(indices)
        return set()

    def _match_phrases(self, line: str) -> tuple[set[int], bool]:
        """Indices of the choices that phrases of a line name, and whether other choices are named but negated."""
        named: list[tuple[frozenset[int], bool]] = []  # choices that a phrase names, and whether it is negated
        sentence = 0  # number of phrases before this sentence
        negation, last = False, -_CONTEXT
        for hit in self._pattern.finditer(line):
            match hit.lastgroup:
                case "choice":
                    indices = self._named(line, hit)
                    if indices:
                        named.append((indices, negation))
                        last = hit.end()
                    else:
                        negation = negation or hit[0] in _NEGATIVE_WORDS
                case "negation":
                    negation = True
                    if hit.start() - last < _CONTEXT and _applies_to_choice(line[last : hit.start()], hit[0]):
                        named[-1] = (named[-1][0], True)
                case "turn":
                    negation = False
                case _:
                    if "?" in hit[0]:  # a question names nothing
                        del named[sentence:]
                    negation, sentence, last = False, len(named), -_CONTEXT
        affirmed = {index for indices, negative in named if not negative for index in indices}
        return affirmed, any(negative for _, negative in named)

    def _named(self, line: str, hit: re.Match[str]) -> frozenset[int]:
        """Indices of the choices that a phrase names; none if it is part of another word or has another meaning."""
        name = _BETWEEN.sub(" ", hit[0])
        indices = self._index[_KEY].get(name, frozenset())
        before = line[max(0, hit.start() - _CONTEXT) : hit.start()]
        after = line[hit.end() : hit.end() + _CONTEXT]
        capital = any(self.choices[index].text != self.choices[index].text.lower() for index in indices)
        ambiguous = name in _NEGATIVE_WORDS or name in {"a", "i"}
        if _is_part(before, name, capital) or (ambiguous and _CONTINUED.match(after) and not _LABEL.search(before)):
            return frozenset()
        return indices

    @cached_property
    def _index(self) -> dict[_Form, dict[str, frozenset[int]]]:
        """For each form: name → indices of the choices with this name."""
        taken = {_bare_key(choice.text) for choice in self.choices}
        by_form: dict[_Form, dict[str, frozenset[int]]] = {form: {} for form in _FORMS}
        for index, choice in enumerate(self.choices):
            aliases = [name for name in choice.aliases if _bare_key(name) not in taken]
            for form, names in by_form.items():
                for name in {form.of_name(text) for text in (choice.text, *aliases)}:
                    if name or form in _EXACT:
                        names[name] = names.get(name, frozenset()) | {index}
        return by_form

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        names = sorted(self._index[_KEY], key=len, reverse=True)  # a longer name is matched before its own beginning
        words = "|".join(r"[\s_-]+".join(map(re.escape, name.split(" "))) for name in names) or "(?!)"
        return re.compile(rf"(?P<choice>{_NOT_BEFORE}(?:{words}){_NOT_AFTER})|{_SENTENCE}")


def _options(type_: Any) -> list[Any] | None:
    """The values of a type with choices; None for other types."""
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
    """Returns the choice of a value: its text and its aliases."""
    if value is None:
        return Choice(None, "None", ("null",))
    if not isinstance(value, enum.Enum):
        return Choice(value, str(value))
    names = tuple(name for name, member in type(value).__members__.items() if member is value)
    if isinstance(value.value, (str, int, float)):
        return Choice(value, str(value.value), names)
    return Choice(value, value.name, names)


def _is_value_of(choice: Any, value: Any) -> bool:
    """Whether a value is that of a choice, or its plain JSON, as in demonstrations."""
    if isinstance(choice, enum.Enum) and not isinstance(value, enum.Enum):
        choice = to_jsonable_python(choice, fallback=str)
    return type(choice) is type(value) and bool(choice == value)


def _applies_to_choice(between: str, negation: str) -> bool:
    """Whether a negation after a choice applies to it, as in ``spam isn't …``, but not in ``ham, not spam``."""
    return bool(_LINK.fullmatch(between)) or (between.isspace() and negation.endswith(("nt", "n't", "cannot")))


def _is_part(before: str, name: str, capital: bool) -> bool:
    """Whether a hyphen before a phrase makes it part of another word.

    ``Iris-versicolor`` names the class ``versicolor``; but ``non-positive`` does not name ``positive``, ``New-York``
    does not name ``York``, and ``-3`` does not name ``3``.
    """
    if not before.endswith(("-", "_")):
        return False
    prefix = _PREFIX.search(before)
    if prefix is None:
        return name[0].isdigit()
    return capital or prefix[1].isdigit() or bool(_NEGATIVE_PREFIX.fullmatch(prefix[1]))


def _folded(text: str) -> str:
    return unicodedata.normalize("NFKC", text).translate(_TO_ASCII).casefold()


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
    """A way to compare a text with a name: both are converted to the same form."""

    of_text: Callable[[str], str]
    of_name: Callable[[str], str]


_KEY = _Form(_key, _key)
_EXACT = (_Form(_as_it_is, _as_it_is), _Form(str.strip, str.strip))
_FORMS = (*_EXACT, _Form(_without_edges, str.strip), _KEY, _Form(_bare_key, _bare_key))
