"""Which of several values a text names."""

from __future__ import annotations

import enum
import re
import unicodedata
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmpipe import Demo, ParseError, PromptState, signature
from lmpipe.errors import SignatureError
from lmpipe.prompting.choices import choices_of
from lmpipe.prompting.regex import completion_regex
from lmpipe.prompting.signature import Field, Signature
from lmpipe.prompting.template import Template
from lmpipe.prompting.values import parse_value, render_output


class Colour(enum.Enum):
    RED = "dark red"
    GREEN = "green"


class Level(enum.IntEnum):
    LOW = 1
    HIGH = 2


class Kind(str, enum.Enum):
    GOOD = "good"
    BAD = "bad"


class Place(enum.Enum):
    HOME = (0, 1)
    AWAY = (1, 0)


TYPES: dict[Any, list[Any]] = {
    Literal["yes", "no"]: ["yes", "no"],
    Literal["A", "a", "A*", "C", "C++", ""]: ["A", "a", "A*", "C", "C++", ""],
    Literal[1, 2, -1, True, None]: [1, 2, -1, True, None],
    Literal["<think>", "a\nb", "q: x", "```"]: ["<think>", "a\nb", "q: x", "```"],
    Literal["x"] | None: ["x", None],
    Literal["x"] | Literal[3]: ["x", 3],
    Colour: list(Colour),
    Colour | None: [*Colour, None],
    Level: list(Level),
    Kind: list(Kind),
    Place: list(Place),
}


def read(kind: Any, text: str) -> Any:
    return parse_value(Field("answer", kind), text)


@pytest.mark.parametrize(("kind", "value"), [(kind, value) for kind, values in TYPES.items() for value in values])
def test_every_choice_reads_back_in_a_completion_after_json_and_from_its_pattern(kind: Any, value: Any) -> None:
    spec = Signature((), (Field("reasoning"), Field("answer", kind)))
    outputs = {"reasoning": "so", "answer": value}
    demo = Demo(inputs={}, outputs=outputs)
    for given_outputs in (outputs, Demo.model_validate_json(demo.model_dump_json()).outputs):
        text = Template().completion(spec, given_outputs)
        parsed = Template().parse(spec, text)
        assert parsed == outputs
        assert type(parsed["answer"]) is type(value)
        assert re.fullmatch(completion_regex(spec), text)
    assert Template().messages(spec, PromptState(instructions="", demos=(demo,)), {})


@pytest.mark.parametrize(
    ("choices", "text", "meant"),
    [
        (("entailed", "not_entailed"), "not entailed", "not_entailed"),
        (("entailed", "not_entailed"), "It is Not-Entailed.", "not_entailed"),
        (("New York", "York"), "New-York", "New York"),
        (("New York", "York"), "new   york", "New York"),
        (("New York", "York"), "It is New\N{NON-BREAKING HYPHEN}York", "New York"),
        (("spam", "ham"), "ＳＰＡＭ", "spam"),
        (("spam", "ham"), "ham, not spam", "ham"),
        (("spam", "ham"), "not spam but ham", "ham"),
        (("spam", "ham"), "No, ham", "ham"),
        (("spam", "ham"), "It's not clear. Spam!", "spam"),
        (("spam", "ham"), "nothing but spam", "spam"),
        (("yes", "no"), "yes, there is no doubt", "yes"),
        (("yes", "no"), "No, it is not.", "no"),
        (("C", "C++"), "It's c++.", "C++"),
        (("A", "B"), "Option A is right", "A"),
        (("A", "B"), "(b)", "B"),
        (("A", "a"), '"a"', "a"),
        (("low", "very low"), "very-low", "very low"),
        (("related", "unrelated"), "unrelated", "unrelated"),
        ((1, 2, 3), "Rating: 3", 3),
        ((1, 2, 3), "Option-2", 2),
        ((-1, 0, 1), "−1", -1),
    ],
)
def test_a_choice_is_the_whole_text_or_a_phrase_of_it(choices: tuple[Any, ...], text: str, meant: Any) -> None:
    assert read(Literal[choices], text) == meant


@pytest.mark.parametrize(
    ("choices", "text", "message"),
    [
        (("positive", "negative"), "not positive", "without a negation"),
        (("positive", "negative"), "non-positive", "names none"),
        (("positive", "negative"), "not positive or negative", "without a negation"),
        (("positive", "negative"), "positive and negative", "several of the choices: positive, negative"),
        (("spam", "ham"), "It isn't spam", "without a negation"),
        (("spam", "ham"), "It isn’t spam", "without a negation"),
        (("spam", "ham"), "never spam", "without a negation"),
        (("spam", "ham"), "no longer spam", "without a negation"),
        (("spam", "ham"), "neither spam nor ham", "without a negation"),
        (("spam", "ham"), "cannot be spam", "without a negation"),
        (("spam", "ham"), "anything but spam", "without a negation"),
        (("spam", "ham"), "spam is not right", "without a negation"),
        (("spam", "ham"), "not only spam but ham", "several"),
        (("spam", "ham"), "spam? no", "names none"),
        (("spam", "ham"), "anti-spam", "names none"),
        (("spam", "ham"), "spam-free", "names none"),
        (("spam", "ham"), "unspam", "names none"),
        (("York", "Rome"), "New-York", "names none"),
        (("yes", "no"), "not no", "without a negation"),
        (("yes", "no"), "there is no doubt", "names none"),
        (("A", "B"), "That's a hard question", "names none"),
        (("A", "B"), "A or B", "several"),
        (("A", "B"), "The answer is A and B", "several"),
        (("I", "II"), "I or II", "several"),
        (("A", "a"), "the answer is a.", "several"),
        (("C", "C++"), "C#", "names none"),
        ((1, 2, 3), "3.5", "names none"),
        ((1, 2, 3), "-3", "names none"),
        (("spam", None), "None of them is spam", "without a negation"),
    ],
)
def test_a_text_that_names_none_or_several_is_refused(choices: tuple[Any, ...], text: str, message: str) -> None:
    with pytest.raises(ParseError, match=re.escape(message)):
        read(Literal[choices], text)


@pytest.mark.parametrize("text", ["dark red", "Dark-Red", "red", "RED", "it is red", '"dark_red".'])
def test_an_enum_is_read_by_value_and_by_name(text: str) -> None:
    assert read(Colour, text) is Colour.RED


def test_an_enum_is_written_by_value_and_offered_in_the_prompt() -> None:
    spec = signature("x -> answer: Colour | None", types={"Colour": Colour})
    system = Template().messages(spec, PromptState(instructions="Look."), {})[0].content
    assert system.endswith("answer: one of: dark red, green, None")
    assert render_output(Field("answer", Level), Level.HIGH) == "2"
    assert read(Colour | None, "null") is None


@pytest.mark.parametrize("kind", [Literal["a", " a"], Literal[1, "1"], enum.Enum("Empty", {})])
def test_choices_that_cannot_be_told_apart_are_refused(kind: Any) -> None:
    with pytest.raises(SignatureError, match="give each choice a text of its own"):
        choices_of(kind)


WORDS = [
    "spam",
    "ham",
    "not",
    "isn't",
    "no",
    "is",
    "it",
    "but",
    ",",
    ".",
    "?",
    "York",
    "New",
    "New-York",
    "A",
    "-",
    "_",
]


@given(st.lists(st.sampled_from(WORDS), max_size=8).map(" ".join) | st.text())
def test_any_text_names_a_choice_or_is_refused(text: str) -> None:
    try:
        value = read(Literal["spam", "ham", "York", "New York", "A", "no"], text)
    except ParseError:
        return
    assert value.casefold().split()[-1] in unicodedata.normalize("NFKC", text).casefold()
